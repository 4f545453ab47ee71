"""Python kernels of the operations: fakes, and the error for CUDA tensors without CUDA operations.

A fake returns tensors of the right shapes and dtypes for torch.compile and meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fusedkv_ext.ops import codes, native

# The length of a schedule follows from them: csrc/api/attn_decode_cuda.cpp.
_MAX_BLOCKS, _FALLBACK_ROWS = (native.build_info()[name] for name in ("max_blocks", "fallback_rows"))


def _fake_fuse_kv(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    return sources[0].new_empty(sources[0].shape)


def _fake_fuse_kv_pair(
    keys: Sequence[Tensor], key_weights: Tensor, values: Sequence[Tensor], value_weights: Tensor
) -> tuple[Tensor, Tensor]:
    return keys[0].new_empty(keys[0].shape), values[0].new_empty(values[0].shape)


def _fake_fuse_kv_backward(
    grad: Tensor, sources: Sequence[Tensor], weights: Tensor, needs_sources: bool, needs_weights: bool
) -> tuple[Tensor, Tensor]:
    grad_sources = grad.new_empty((len(sources), *grad.shape) if needs_sources else (0,))
    return grad_sources, weights.new_empty((len(sources) if needs_weights else 0, *weights.shape[1:]))


def _fake_fuse_kv_backward_accumulate(
    grad: Tensor,
    sources: Sequence[Tensor],
    weights: Tensor,
    grad_sources: Sequence[Tensor],
    needs_weights: bool,
) -> Tensor:
    return weights.new_empty((len(sources) if needs_weights else 0, *weights.shape[1:]))


def _fake_fuse_kvcache(
    caches: Sequence[Tensor], weights: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, tokens: int
) -> Tensor:
    return caches[0].new_empty((cache_seqlens.shape[0], tokens, *caches[0].shape[2:]))


def _fake_attn_with_kvcache(
    q: Tensor, key_caches: Sequence[Tensor], value_caches: Sequence[Tensor], *args: object
) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    out = q.new_empty((B, S, H, codes.channels(value_caches[0])))
    return out, q.new_empty((B, H, S), dtype=torch.float32)


def _fake_attn_with_kvcache_out(q: Tensor, *args: object) -> Tensor:
    B, S, H, _ = q.shape
    return q.new_empty((B, H, S), dtype=torch.float32)


def _fake_attn_schedule(cache_seqlens: Tensor, *args: int) -> Tensor:
    if cache_seqlens.device.type == "cpu":
        return cache_seqlens.new_empty(0)
    query_length, num_heads, num_kv_heads, _, _, batch_invariant = args
    units = num_kv_heads * -(-query_length * (num_heads // num_kv_heads) // _FALLBACK_ROWS)
    counters = _MAX_BLOCKS + (cache_seqlens.shape[0] * units if batch_invariant else 0)
    return cache_seqlens.new_empty(cache_seqlens.shape[0] + 1 + counters)


def _fake_append_kvcache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *args: Any
) -> Tensor:
    query = args[5]
    return key.new_empty(0) if query is None else query.new_empty(query.shape)


def _fake_merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "fuse_kv": _fake_fuse_kv,
    "fuse_kv_pair": _fake_fuse_kv_pair,
    "fuse_kv_backward": _fake_fuse_kv_backward,
    "fuse_kv_backward_accumulate": _fake_fuse_kv_backward_accumulate,
    "fuse_kvcache": _fake_fuse_kvcache,
    "attn_schedule": _fake_attn_schedule,
    "attn_with_kvcache": _fake_attn_with_kvcache,
    "attn_with_kvcache_out": _fake_attn_with_kvcache_out,
    "append_kvcache": _fake_append_kvcache,
    "merge_states": _fake_merge_states,
}


def register_fakes(namespace: str) -> None:
    """Registers the fakes for a namespace: "fusedkv", or another one with the same schemas."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)


register_fakes("fusedkv")


def _refuse_cuda(*args: object) -> NoReturn:
    raise NotImplementedError(native.cuda_error())


# The dispatcher's own error lists every backend of torch and does not know the reason. As a kernel the error
# reaches compiled code and direct calls of torch.ops too.
_refusals = torch.library.Library("fusedkv", "IMPL")
if native.cuda_error() is not None and torch.backends.cuda.is_built():
    for _name in _FAKES:
        _refusals.impl(_name, _refuse_cuda, "CUDA")
