"""The dispatch rule: which calls the native kernels take, and which of those they fold.

Folding reads the sources in place, with the fusion weights in q and the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext.ops import native
from fusedkv_ext.ops.sizes import is_open

__all__ = [
    "MAX_HEAD_DIM",
    "decode_max_rows",
    "device_type_of",
    "folds_cached",
    "folds_dense",
    "in_graph",
    "native_head_dim",
]

MAX_HEAD_DIM: int = native.build_info()["max_head_dim"]
# Query rows per KV head that every kernel folds: those of one task of the CPU.
FEW_ROWS: int = native.build_info()["task_rows"]


def native_head_dim(head_dim: int, value_dim: int = 8) -> bool:
    """Whether the kernels of fuse_kv and cached attention take these head dims: multiples of 8 up to 256.

    Other head dims work too, but slower: fuse_kv regroups channels (head_dims.py), attention fuses and calls
    SDPA. append_kvcache copies rows of any length by itself.
    """
    if head_dim % 8 or value_dim % 8:
        return False
    return 0 < head_dim <= MAX_HEAD_DIM and 0 < value_dim <= MAX_HEAD_DIM


def device_type_of(x: Tensor) -> str:
    """``x.device.type``; asking for the CPU first is cheaper."""
    return "cpu" if x.is_cpu else x.device.type


def decode_max_rows(device_type: str, dtype: torch.dtype, sources: int, head_dim: int) -> int:
    """The crossover between folding and fusing, in query rows per KV head: R = S * H / G.

    Up to this many rows attention folds; with more it fuses once and calls SDPA. Take m = 2, 16-bit elements
    and T tokens. Per KV head, folding costs 4 R T D FLOP more, and fusing keys and values moves 12 T D bytes.
    With P FLOP/s and B byte/s they break even at R = 3 P / B: 570 rows at an H100's 640 TFLOP/s and 3.35
    TB/s.

    So it is 512 where tensor cores fold: CUDA, bfloat16 and float16, head dims up to 128, or up to 256 with
    one source of each. Elsewhere folding computes much slower than SDPA: 32 rows, those of one task of the
    CPU.

    Args:
        device_type: "cpu" or "cuda".
        dtype: Of q and the sources.
        sources: The larger of m_k and m_v.
        head_dim: The larger of D and Dv.
    """
    tensor_cores = head_dim <= 128 if sources == 2 else sources == 1
    half = dtype in (torch.bfloat16, torch.float16)
    return 512 if device_type == "cuda" and half and tensor_cores else FEW_ROWS


def folds_dense(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], right: int, device_type: str
) -> bool:
    """Whether ``fused_kv_attn_func`` without a gradient folds."""
    # An export has one path for all sizes, and SDPA takes them all.
    if torch.compiler.is_exporting() and (is_open(q.shape[1]) or (right != 0 and is_open(keys[0].shape[1]))):
        return False
    # The kernel's rows are the last S tokens: with S > T those before the first must be fully masked.
    aligned = q.shape[1] <= keys[0].shape[1] or right == 0
    return aligned and q.dtype != torch.float64 and _few_rows(q, keys, values, device_type)


def folds_cached(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    device_type: str,
    query_length: int | None = None,
) -> bool:
    """Whether ``fused_kv_attn_with_kvcache`` without lse folds. ``query_length``: the most of packed queries.

    Fusing needs the lengths on the host. There are none in a graph, of torch.compile or of CUDA, and none for
    DTensors, where this process has its own sequences only.
    """
    if _few_rows(q, keys, values, device_type, query_length):
        return True
    return in_graph(q, device_type) and native_head_dim(q.shape[3], values[0].shape[3])


def in_graph(q: Tensor, device_type: str) -> bool:
    """Whether the host has no lengths."""
    if device_type == "meta" or torch.compiler.is_compiling():
        return True
    return hasattr(q, "to_local") or (q.is_cuda and torch.cuda.is_current_stream_capturing())


def _few_rows(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    device_type: str,
    query_length: int | None = None,
) -> bool:
    """Whether a kernel takes the head dims, and folding is the faster path for so few rows."""
    _, steps, num_heads, head_dim = q.shape
    value_dim = values[0].shape[3]
    if not native_head_dim(head_dim, value_dim):
        return False
    if query_length is not None:
        steps = query_length
    rows = steps * (num_heads // (keys[0].shape[2] or 1))
    if rows <= FEW_ROWS:
        return True
    sources, head_dim = max(len(keys), len(values)), max(head_dim, value_dim)
    return rows <= decode_max_rows(device_type, q.dtype, sources, head_dim)
