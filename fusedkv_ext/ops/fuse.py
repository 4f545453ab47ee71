"""The weighted sum of sources and its gradients, on checked arguments: how attention fuses keys and values.

Head dims that no kernel takes are regrouped into heads of 8 channels (head_dims.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.ops.call import Side
from fusedkv_ext.ops.checks import canonical_weights
from fusedkv_ext.ops.dispatch import native_head_dim
from fusedkv_ext.ops.head_dims import from_eights, fuse_backward_in_eights, in_eights
from fusedkv_ext.ops.native import run_op
from fusedkv_ext.ops.recompute import recomputed

__all__ = [
    "fuse",
    "fuse_backward",
    "fuse_both",
    "fuse_cached",
    "fuse_side",
    "fused_recomputed",
    "tokens_as_pages",
]


def fuse(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``fuse_kv`` of checked sources and weights (m, G, D)."""
    heads, head_dim = sources[0].shape[2:]
    if native_head_dim(head_dim):
        return run_op("fuse_kv", sources, weights)
    (weights,) = in_eights([weights])
    return from_eights(run_op("fuse_kv", in_eights(sources), weights), heads, head_dim)


def fuse_backward(
    grad: Tensor, sources: list[Tensor], weights: Tensor, buffers: list[Tensor] | None, needs_weights: bool
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the sources, new or added to ``buffers``, and that of the weights."""
    arguments = (grad, sources, weights, buffers, needs_weights)
    if native_head_dim(sources[0].shape[3]):
        return _fuse_backward(*arguments)
    return fuse_backward_in_eights(_fuse_backward, *arguments)


def _fuse_backward(
    grad: Tensor, sources: list[Tensor], weights: Tensor, buffers: list[Tensor] | None, needs_weights: bool
) -> tuple[list[Tensor], Tensor]:
    if buffers is None:
        grads, of_weights = run_op("fuse_kv_backward", grad, sources, weights, True, needs_weights)
        return list(grads.unbind(0)), of_weights
    return buffers, run_op("fuse_kv_backward_accumulate", grad, sources, weights, buffers, needs_weights)


def fuse_side(sources: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """Fused keys, or fused values. A lone source without weights is returned as it is."""
    if weights is None and len(sources) == 1:
        return sources[0]
    return fuse(sources, _weights_of(sources, weights))


def fuse_both(keys: Side, values: Side) -> tuple[Tensor, Tensor]:
    """Fused keys and values, in one launch if both are sums."""
    single = any(weights is None and len(sources) == 1 for sources, weights in (keys, values))
    if single or not native_head_dim(keys[0][0].shape[3], values[0][0].shape[3]):
        return fuse_side(*keys), fuse_side(*values)
    return fuse_pair(keys, values)


def fuse_pair(keys: Side, values: Side) -> tuple[Tensor, Tensor]:
    """Two sums in one launch: (fuse_kv(*keys), fuse_kv(*values)). Weights of None are all ones."""
    arguments: list[Any] = []
    for sources, weights in (keys, values):
        arguments += [sources, _weights_of(sources, weights)]
    return run_op("fuse_kv_pair", *arguments)


def fuse_cached(
    caches: Sequence[Tensor],
    weights: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    tokens: int,
) -> Tensor:
    """The last ``tokens`` tokens of each sequence, fused: (B, tokens, G, D), zeros before its first token."""
    shape = caches[0].shape[2:]
    if weights is None:
        weights = torch.ones(len(caches), *shape, device=caches[0].device)
    if native_head_dim(shape[1]):
        return run_op("fuse_kvcache", caches, weights, lengths, block_table, tokens)
    (weights,) = in_eights([weights])
    fused = run_op("fuse_kvcache", in_eights(caches), weights, lengths, block_table, tokens)
    return from_eights(fused, *shape)


def tokens_as_pages(cache: Tensor) -> Tensor | None:
    """A cache (N, size, G, D) as a view (N * size, 1, G, D); None if its tokens have several strides."""
    if cache.shape[1] == 1:
        return cache
    if cache.shape[0] != 1 and cache.stride(0) != cache.shape[1] * cache.stride(1):
        return None
    return cache.flatten(0, 1).unsqueeze(1)


def fused_recomputed(keys: Side, values: Side, k: Tensor, v: Tensor) -> AbstractContextManager[None]:
    """A context in which autograd does not save k and v, what ``fuse_both`` returned: it fuses again."""
    detached = [
        ([x.detach() for x in sources], None if weights is None else weights.detach())
        for sources, weights in (keys, values)
    ]
    inputs = [x for sources, weights in detached for x in (*sources, weights) if x is not None]
    return recomputed(lambda: fuse_both(*detached), (k, v), inputs)


def _weights_of(sources: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """Weights (m, G, D) in the dtype of sums; None: all ones."""
    if weights is None:
        weights = sources[0].new_ones(())
    return canonical_weights("weights", weights, sources)
