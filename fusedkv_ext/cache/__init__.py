"""The KV cache of a plan: memory of the storage layers, contiguous or paged."""
