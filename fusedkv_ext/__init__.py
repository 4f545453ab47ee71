"""fusedkv_ext: cross-layer KV caches for PyTorch.

A table (:class:`CachePlan`) says where each layer's keys and values come from; one family of kernels executes
any such table.
"""

from fusedkv_ext import autograd as _autograd  # noqa: F401  (registers the derivative of fuse_kv)
from fusedkv_ext.attention import FusedKVAttention
from fusedkv_ext.cache import KV, KVCache
from fusedkv_ext.checkpoint import load_pretrained, save_pretrained
from fusedkv_ext.decoder import Decoder, DecoderConfig
from fusedkv_ext.explain import Explanation, explain
from fusedkv_ext.fusion import FusionWeights, param_groups
from fusedkv_ext.mla import LatentAttention
from fusedkv_ext.ops import (
    append_kvcache,
    debug_checks,
    decode_schedule,
    fuse_kv,
    fuse_kv_backward,
    fused_kv_attn_func,
    fused_kv_attn_with_kvcache,
)
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment
from fusedkv_ext.rope import RotaryEmbedding, apply_rotary

__version__ = "0.1.0"

__all__ = [
    "KV",
    "CachePlan",
    "Decoder",
    "DecoderConfig",
    "Explanation",
    "FusedKVAttention",
    "Fusion",
    "FusionWeights",
    "KVCache",
    "LatentAttention",
    "LayerPlan",
    "RotaryEmbedding",
    "Segment",
    "append_kvcache",
    "apply_rotary",
    "debug_checks",
    "decode_schedule",
    "explain",
    "fuse_kv",
    "fuse_kv_backward",
    "fused_kv_attn_func",
    "fused_kv_attn_with_kvcache",
    "load_pretrained",
    "param_groups",
    "save_pretrained",
]


def __getattr__(name: str) -> object:
    """``fusedkv_ext.hf``, which needs transformers, is imported when it is first asked for."""
    if name == "hf":
        import importlib

        return importlib.import_module("fusedkv_ext.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
