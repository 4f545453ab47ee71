"""The demo: trains vanilla and FusedKV models under equal conditions, and measures and compares them."""
