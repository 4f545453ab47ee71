"""The KV cache of a plan: memory for the layers that store, and views for those that read."""
