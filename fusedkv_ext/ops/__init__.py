"""The operations: functions on tensors, their checks, derivatives, dispatch rules and float64 reference."""

from fusedkv_ext.ops import autograd, fakes  # noqa: F401  (register what torch.ops.fusedkv needs)
from fusedkv_ext.ops.functional import (
    FlashOptions,
    append_kvcache,
    debug_checks,
    decode_schedule,
    fuse_kv,
    fuse_kv_backward,
    fused_kv_attn_func,
    fused_kv_attn_varlen_func,
    fused_kv_attn_with_kvcache,
    rope_append_kvcache,
)
from fusedkv_ext.ops.merging import merge_state

__all__ = [
    "FlashOptions",
    "append_kvcache",
    "debug_checks",
    "decode_schedule",
    "fuse_kv",
    "fuse_kv_backward",
    "fused_kv_attn_func",
    "fused_kv_attn_varlen_func",
    "fused_kv_attn_with_kvcache",
    "merge_state",
    "rope_append_kvcache",
]
