"""fusedkv_ext: cross-layer KV caches for PyTorch.

A table (:class:`CachePlan`) says where each layer's keys and values come from; one family of kernels executes any such table.
"""

from fusedkv_ext import autograd as _autograd  # noqa: F401  (registers the derivative of fuse_kv)
from fusedkv_ext.ops import (
    append_kvcache,
    debug_checks,
    fuse_kv,
    fused_kv_attn_func,
    fused_kv_attn_with_kvcache,
)

__version__ = "0.1.0"

__all__ = [
    "append_kvcache",
    "debug_checks",
    "fuse_kv",
    "fused_kv_attn_func",
    "fused_kv_attn_with_kvcache",
]
