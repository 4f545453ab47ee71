"""The demonstration: train vanilla and FusedKV models alike, measure them side by side, show the result."""
