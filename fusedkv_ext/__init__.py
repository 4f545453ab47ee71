"""fusedkv_ext: cross-layer KV caches for PyTorch.

A table (:class:`CachePlan`) says where each layer's keys and values come from; one family of kernels executes
any such table.
"""

from fusedkv_ext.cache.kv_cache import KV, KVCache
from fusedkv_ext.checkpoint.pretrained import load_pretrained, save_pretrained
from fusedkv_ext.errors import CacheFullError
from fusedkv_ext.generation.sampling import Sampling
from fusedkv_ext.layers.attention import FusedKVAttention
from fusedkv_ext.layers.decoder import Decoder, DecoderConfig
from fusedkv_ext.layers.fusion import FusionWeights, param_groups
from fusedkv_ext.layers.latent_attention import LatentAttention
from fusedkv_ext.ops.explanation import Explanation, explain
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
from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment

__version__ = "0.1.0"

__all__ = [
    "KV",
    "CacheFullError",
    "CachePlan",
    "Decoder",
    "DecoderConfig",
    "Explanation",
    "FlashOptions",
    "FusedKVAttention",
    "Fusion",
    "FusionWeights",
    "KVCache",
    "LatentAttention",
    "LayerPlan",
    "RotaryEmbedding",
    "Sampling",
    "Segment",
    "append_kvcache",
    "apply_rotary",
    "debug_checks",
    "decode_schedule",
    "explain",
    "fuse_kv",
    "fuse_kv_backward",
    "fused_kv_attn_func",
    "fused_kv_attn_varlen_func",
    "fused_kv_attn_with_kvcache",
    "load_pretrained",
    "merge_state",
    "param_groups",
    "rope_append_kvcache",
    "save_pretrained",
]


# Imported when they are first asked for: they need more than torch, or most programs do not need them.
_LAZY = ("conversion", "hf", "testing")


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
