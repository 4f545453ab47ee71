"""The operations of fusedkv_ext.

Words and shapes: B batch, S query length, T key/value length, H query heads, G key/value heads (H a multiple
of G), D head dim, m sources (1 to 32), P pages. Layout as in flash-attn: q (B, S, H, D), k and v (B, T, G,
D); the last dim is contiguous, other strides are free.

Kernels take head dims that are multiples of 8 up to 256 (``dispatch.native_head_dim``). All operations take
the others too, on every device and slower: attention then always fuses first and attends densely.

The maths: FusedKV, arXiv 2512.03870, K_i = sum_j a_ij (.) K_j and V_i = sum_j b_ij (.) V_j.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.ops import (
    checks,
    fakes,  # noqa: F401  (registers the fakes of torch.ops.fusedkv)
)
from fusedkv_ext.ops.checks import Tensors
from fusedkv_ext.ops.dispatch import folds_cached, folds_dense, in_graph, native_head_dim
from fusedkv_ext.ops.head_dims import from_eights, fuse_backward_in_eights, in_eights
from fusedkv_ext.ops.recompute import recomputed
from fusedkv_ext.ops.sdpa import dense_attention, dense_lse
from fusedkv_ext.ops.sizes import always

__all__ = [
    "append_kvcache",
    "debug_checks",
    "decode_schedule",
    "fuse_kv",
    "fuse_kv_backward",
    "fused_kv_attn_func",
    "fused_kv_attn_with_kvcache",
]

_ops = torch.ops.fusedkv

_NATIVE_ERROR = re.compile(r"fusedkv (ValueError|TypeError): (.*)")
_debug_checks = False


def debug_checks(enabled: bool) -> None:
    """Checks what stands in CUDA tensors too, at the price of a synchronisation per call: lengths, block
    tables, and that ``schedule`` and ``host_seqlens`` belong to these lengths.

    On the CPU they are always checked. Without this, a CUDA sequence with a length or a page out of range
    gives NaN.
    """
    global _debug_checks
    _debug_checks = bool(enabled)


def fuse_kv(sources: Tensors, weights: Tensor) -> Tensor:
    """``out[b, t, g, d] = sum_j weights[j, g, d] * sources[j][b, t, g, d]`` (FusedKV, arXiv 2512.03870).

    Args:
        sources: m tensors (B, T, G, D) of one shape and dtype: float32, bfloat16, float16 or float64.
        weights: broadcastable to (m, G, D), any floating dtype.

    Returns:
        (B, T, G, D) in the sources' dtype: summed in float32 (float64 for float64) and rounded once.

    Differentiable in both, in reverse and forward mode. The backward is deterministic and saves only these.
    Raises ValueError (shapes, devices, strides) or TypeError (types, dtypes), naming the argument.
    """
    sources, weights = checks.check_fusion(sources, weights)
    heads, head_dim = sources[0].shape[2:]
    if native_head_dim(head_dim):
        return _call(_ops.fuse_kv.default, sources, weights)
    (weights,) = in_eights([weights])
    return from_eights(_call(_ops.fuse_kv.default, in_eights(sources), weights), heads, head_dim)


def fuse_kv_backward(
    grad: Tensor,
    sources: Tensors,
    weights: Tensor,
    *,
    grad_sources: Sequence[Tensor] | None = None,
    needs_weights: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of :func:`fuse_kv` for those who add them up over layers themselves.

    dsources[j] = weights[j] * grad and dweights[j] = sum over b, t of grad * sources[j]    (FusedKV, arXiv
    2512.03870). A source that L layers fuse has L gradients: with ``grad_sources`` each is added to the
    buffers in place, in one pass and without a temporary.

    Args:
        grad: (B, T, G, D), the gradient of fuse_kv's result, in the sources' dtype.
        sources, weights: as in :func:`fuse_kv`.
        grad_sources: m buffers (B, T, G, D), contiguous, apart from each other and what is read, float32 or
            the sources' dtype, to which the sources' gradients are added. None: new tensors.
        needs_weights: False returns None for the weights' gradient and does not read the sources.

    Returns:
        The m gradients of the sources (``grad_sources`` where given, else in the sources' dtype) and that of
        the weights in their own shape and dtype.

    Two runs give the same bits. Nothing is recorded for autograd; a forward-mode tangent raises ValueError.
    Raises ValueError (shapes, devices, strides) or TypeError (types, dtypes), naming the argument.
    """
    grad = checks.check_tensor("grad", grad)
    sources, canonical = checks.check_fusion(sources, weights)
    needs_weights = checks.check_flag("needs_weights", needs_weights)
    inputs = {"grad": grad, "sources": sources, "weights": canonical}
    checks.check_same_device(inputs)
    checks.check_no_tangent("fuse_kv_backward", inputs, "use fuse_kv with torch.func.vjp")
    arguments = [grad.detach().contiguous(), [x.detach() for x in sources], canonical.detach()]
    results = None
    if grad_sources is not None:
        results = checks.as_tensors("grad_sources", grad_sources)
        checks.check_same_device({"grad": grad, "grad_sources": results})
        checks.check_no_grad("fuse_kv_backward", {"grad_sources": results}, "pass buffers that need none")
    if native_head_dim(sources[0].shape[3]):
        results, grad_weights = _backward(*arguments, results, needs_weights)
    else:
        results, grad_weights = fuse_backward_in_eights(_backward, *arguments, results, needs_weights)
    if not needs_weights:
        return results, None
    return results, grad_weights.sum_to_size(weights.shape).to(weights.dtype)


def fused_kv_attn_func(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    document_ids: Tensor | None = None,
    recompute_fusion: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over K = sum_j a_j (.) K_j and V = sum_j b_j (.) V_j, for training and prefill.

    Args:
        q: (B, S, H, D) float32, bfloat16, float16 or float64.
        keys: m_k tensors (B, T, G, D), or one; values: m_v tensors (B, T, G, Dv), or one. Their counts may
            differ.
        key_weights, value_weights: broadcastable to (m_k, G, D) and (m_v, G, Dv); None: all ones.
        softmax_scale: default 1 / sqrt(D).
        causal: query row i (position i + T - S: aligned bottom-right) sees no later key.
        window_size: (left, right), the row at p sees keys p - left .. p + right; -1 is unbounded.
        return_lse: also return the log-sum-exp of the scores.
        document_ids: (B, T) int32 or int64, the document of every key; those of the rows are the last S, so
            S <= T. Of the keys that the other arguments show it a row sees those of its own document.
        recompute_fusion: the backward fuses K and V again instead of keeping them from the forward. Same bits
            of every gradient. No effect under torch.compile and within other saved-tensor hooks, as those of
            activation checkpointing: they decide by themselves what is kept.

    Returns:
        (B, S, H, Dv) in q's dtype; with ``return_lse`` also (B, H, S) float32, natural log, without a
        gradient. A row that sees no key gives zeros and -inf.

    Differentiable in q, keys, values and both weights. Under autocast q, keys and values are cast to its
    dtype.
    Raises ValueError (shapes, devices, strides) or TypeError (types, dtypes), naming the argument.
    """
    q = checks.check_tensor("q", q)
    keys, values = checks.as_tensors("keys", keys), checks.as_tensors("values", values)
    (q,), keys, values = checks.autocast([q]), checks.autocast(keys), checks.autocast(values)
    checks.check_attention(q, keys, values)
    left, right = checks.check_window(causal, window_size)
    scale = checks.check_scale(softmax_scale, q.shape[3])
    return_lse = checks.check_flag("return_lse", return_lse)
    document_ids = checks.check_document_ids(document_ids, q, keys[0])
    recompute_fusion = checks.check_flag("recompute_fusion", recompute_fusion)
    key_weights, value_weights = checks.attention_weights(keys, values, key_weights, value_weights)
    weights = {"key_weights": key_weights, "value_weights": value_weights}
    checks.check_same_device(
        {"q": q, "keys": keys, "values": values, **weights, "document_ids": document_ids}
    )

    sources = (keys, values, key_weights, value_weights)
    differentiates = checks.may_differentiate(q, *keys, *values, key_weights, value_weights)
    if return_lse:
        checks.check_no_tangent("return_lse", {"q": q, "keys": keys, **weights}, "leave return_lse out")
    folds = document_ids is None and not differentiates
    if folds and folds_dense(q, keys, values, right, q.device.type):
        seqlens = q.new_full(q.shape[:1], keys[0].shape[1], dtype=torch.int32)
        out, lse = _call(
            _ops.attn_with_kvcache.default,
            q,
            *sources,
            seqlens,
            None,
            scale,
            left,
            right,
            None,
            False,
        )
        return (out, lse) if return_lse else out
    k, v = _fuse_both(*sources)
    recompute = recompute_fusion and differentiates and not torch.compiler.is_compiling()
    with _recomputing(*sources, k, v) if recompute else nullcontext():
        out = dense_attention(q, k, v, scale, left, right, document_ids)
    return (out, dense_lse(q, k, scale, left, right, document_ids)) if return_lse else out


def fused_kv_attn_with_kvcache(
    q: Tensor,
    key_caches: Tensors,
    value_caches: Tensors,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    host_seqlens: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last S tokens of each sequence over its cache, for decoding.

    Args:
        q: (B, S, H, D) float32, bfloat16 or float16: the LAST S tokens of each sequence. Rows of a sequence
            shorter than S (left padding) give zeros and lse = -inf.
        key_caches: m_k tensors (B, capacity, G, D), or (P, page_size, G, D) with a block_table; value_caches:
            m_v with Dv.
        key_weights, value_weights: as in :func:`fused_kv_attn_func`.
        cache_seqlens: (B,) int32, valid tokens of each sequence, those S included.
        block_table: (B, max_pages) int32, the page of each page_size tokens; unused entries hold anything.
        softmax_scale, causal (default True), window_size, return_lse: as in :func:`fused_kv_attn_func`.
        schedule: what :func:`decode_schedule` made of these very lengths, S, H, G, capacity, left window and
            batch_invariant, once for all layers of a step. None: it is made anew. A right one does not change
            the result; one of other lengths gives wrong results, and no error without ``debug_checks``.
        batch_invariant: a sequence gets the same bits in any batch: its splits are fixed, not fitted to the
            batch (on the CPU they always are), which costs more work on the GPU. Like ``return_lse`` it makes
            calls with many rows fold too, which is slow for prompts.
        host_seqlens: the numbers in cache_seqlens, if the host has them: with many rows a CUDA call then does
            not wait for the device. CUDA trusts them (``debug_checks`` compares).

    Returns:
        (B, S, H, Dv) in q's dtype; with ``return_lse`` also (B, H, S) float32. A sequence of length 0 gives
        zeros and -inf.

    Two equal calls give the same bits; with few rows (``decode_max_rows``), ``return_lse`` or
    ``batch_invariant`` also for every number of CPU threads. With many rows torch's SDPA computes, whose last
    bits may depend on it. With few rows, and in a CUDA graph always, a CUDA call waits for nothing: it can be
    captured, and replayed with other lengths. Head dims that no kernel takes count as many rows.

    Not differentiable: an input that requires grad raises ValueError under grad mode. Raises ValueError
    (shapes, devices, strides, lengths, pages) or TypeError (types, dtypes), naming the argument.
    """
    key_caches = checks.as_list("key_caches", key_caches)
    value_caches = checks.as_list("value_caches", value_caches)
    optional = [x for x in (key_weights, value_weights, block_table) if x is not None]
    if not checks.plain_on_cpu([q, *key_caches, *value_caches, cache_seqlens, *optional]):
        checks.check_inputs(
            "fused_kv_attn_with_kvcache",
            {"q": q, "key_caches": key_caches, "value_caches": value_caches, "cache_seqlens": cache_seqlens},
            {"key_weights": key_weights, "value_weights": value_weights, "block_table": block_table},
            "use fused_kv_attn_func to train, torch.no_grad() and plain tensors to decode",
            ("key_caches", "value_caches"),
        )
    if q.dtype != key_caches[0].dtype:
        q = checks.autocast_like(q, key_caches[0])
    if not q.dim() == key_caches[0].dim() == value_caches[0].dim() == 4:
        checks.check_rank4({"q": q, "key_caches": key_caches[:1], "value_caches": value_caches[:1]})
    how = checks.check_scale(softmax_scale, q.shape[3]), *checks.check_window(causal, window_size)
    return_lse = checks.check_flag("return_lse", return_lse)
    batch_invariant = checks.check_flag("batch_invariant", batch_invariant)
    weights = checks.attention_weights(key_caches, value_caches, key_weights, value_weights)
    if schedule is not None:
        _check_schedule(schedule, q, key_caches[0], cache_seqlens, block_table, how[1], batch_invariant)
    arguments = (q, key_caches, value_caches, *weights, cache_seqlens, block_table)
    if not (return_lse or batch_invariant):
        return attend_cached(*arguments, *how, schedule, host_seqlens)
    if _debug_checks:
        checks.check_contents(cache_seqlens, block_table, key_caches[0])
    if native_head_dim(q.shape[3], value_caches[0].shape[3]):
        both = _call(_ops.attn_with_kvcache.default, *arguments, *how, schedule, batch_invariant)
    else:
        both = _attend_gathered(*arguments, *how, host_seqlens, return_lse, batch_invariant)
    return both if return_lse else both[0]


def attend_cached(
    q: Tensor,
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    left: int,
    right: int,
    schedule: Tensor | None,
    host_seqlens: Sequence[int] | None,
) -> Tensor:
    """:func:`fused_kv_attn_with_kvcache` for layers of this package, which call it for every token.

    Arguments are as its checks leave them, weights contiguous fp32 (m, G, D); the native op still checks what
    it reads.
    """
    arguments = (q, key_caches, value_caches, key_weights, value_weights, cache_seqlens, block_table)
    if checks.may_differentiate(q, key_weights, value_weights):
        inputs = {"q": q, "key_weights": key_weights, "value_weights": value_weights}
        checks.check_no_grad("attention over a cache", inputs, "pass .detach()ed tensors")
    if _debug_checks:
        checks.check_contents(cache_seqlens, block_table, key_caches[0])
        if schedule is not None:
            _check_schedule(schedule, q, key_caches[0], cache_seqlens, block_table, left, False)
    if folds_cached(q, key_caches, value_caches, _device_type(q)):
        return _call(_ops.attn_with_kvcache.default, *arguments, scale, left, right, schedule, False)[0]
    if not native_head_dim(q.shape[3], value_caches[0].shape[3]):
        return _attend_gathered(*arguments, scale, left, right, host_seqlens, False, False)[0]
    return _prefill_with_kvcache(*arguments, scale, left, right, _lengths(cache_seqlens, host_seqlens))


def decode_schedule(
    cache_seqlens: Tensor,
    *,
    query_length: int,
    num_heads: int,
    num_kv_heads: int,
    capacity: int,
    window_size: tuple[int, int] = (-1, -1),
    batch_invariant: bool = False,
) -> Tensor:
    """How :func:`fused_kv_attn_with_kvcache` cuts a step's work: made once, used by all of its layers.

    Args:
        cache_seqlens: (B,) int32, as the layers get it. Read on the device, so nobody waits for it.
        query_length, num_heads, num_kv_heads: S, H and G of the calls.
        capacity: tokens that a sequence may have: the caches' second dim, or page_size * max_pages.
        window_size, batch_invariant: as in the calls.

    Returns:
        int32 tensor on the same device, to be passed on as it is; empty on the CPU, which needs none. Calls
        that share it must run one after another, and it must be made again when lengths change.

    Raises ValueError (sizes, shapes) or TypeError (dtypes), naming the argument.
    """
    checks.check_tensor("cache_seqlens", cache_seqlens)
    left, _ = checks.check_window(True, window_size)
    batch_invariant = checks.check_flag("batch_invariant", batch_invariant)
    sizes = (query_length, num_heads, num_kv_heads, capacity)
    return _call(_ops.attn_schedule.default, cache_seqlens, *sizes, left, batch_invariant)


def append_kvcache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    query: Tensor | None = None,
) -> Tensor | None:
    """Writes S new tokens at positions cache_seqlens - S .. cache_seqlens - 1, in place, rotating keys on the
    way, and the queries of the same tokens with them.

    Args:
        key, value: (B, S, G, D) and (B, S, Gv, Dv). Tokens at negative positions (left padding) are skipped.
        key_cache, value_cache: (B, capacity, G, D), or (P, page_size, G, D) with a block_table; key's dtype.
            They share no element with each other or with what is read; views of one tensor are fine.
        cache_seqlens: (B,) int32, lengths after the append. block_table: (B, max_pages) int32.
        rotary_cos, rotary_sin: (max_len, rotary_dim / 2), row p rotates the token at position p (RoPE, arXiv
            2104.09864); rotary_dim <= D, further channels are copied. None: keys are written as they are.
        rotary_interleaved: rotate pairs (2j, 2j + 1) instead of (j, j + rotary_dim / 2).
        query: (B, S, H, D) of key's dtype, any H; needs rotary_cos and rotary_sin.

    Returns:
        None, or with ``query`` a new (B, S, H, D): its rows rotated like keys, those at negative positions as
        they are.

    A CUDA token whose length, page or row of the tables is out of range is not written.
    Not differentiable: an input that requires grad raises ValueError under grad mode. Raises ValueError
    (shapes, devices, strides, lengths, pages) or TypeError (types, dtypes), naming the argument.
    """
    tables = {"block_table": block_table, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "query": query}
    optional = [x for x in tables.values() if x is not None]
    if not checks.plain_on_cpu([key, value, key_cache, value_cache, cache_seqlens, *optional]):
        caches = {"key_cache": key_cache, "value_cache": value_cache, "cache_seqlens": cache_seqlens}
        arguments = {"key": key, "value": value, **caches}
        checks.check_inputs("append_kvcache", arguments, tables, "append .detach()ed tensors")
    if not torch.compiler.is_compiling() and (key_cache.is_neg() or value_cache.is_neg()):
        name = "key_cache" if key_cache.is_neg() else "value_cache"
        raise ValueError(f"{name} is a lazily negated view; expected memory to write to (.resolve_neg())")
    if rotary_cos is not None:
        rotary_cos = checks.rotary_table("rotary_cos", rotary_cos)
    if rotary_sin is not None:
        rotary_sin = checks.rotary_table("rotary_sin", rotary_sin)
    interleaved = checks.check_flag("rotary_interleaved", rotary_interleaved)
    cached = (key, value, key_cache, value_cache, cache_seqlens, block_table)
    rotated = append_cached(*cached, rotary_cos, rotary_sin, interleaved, query)
    return None if query is None else rotated


def append_cached(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    query: Tensor | None,
) -> Tensor:
    """:func:`append_kvcache` for ``KVCache``, which calls it in every layer; empty without a query.

    The caches are its own memory, the tables contiguous fp32; the native op still checks what it reads.
    """
    if checks.may_differentiate(key, value, query):
        inputs = {"key": key, "value": value, "query": query}
        checks.check_no_grad("append_kvcache", inputs, "append .detach()ed tensors")
    if _debug_checks:
        checks.check_contents(cache_seqlens, block_table, key_cache)
    cached = (key, value, key_cache, value_cache, cache_seqlens, block_table)
    return _call(_ops.append_kvcache.default, *cached, rotary_cos, rotary_sin, rotary_interleaved, query)


def _backward(
    grad: Tensor, sources: list[Tensor], weights: Tensor, buffers: list[Tensor] | None, needs_weights: bool
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the sources, new or added to ``buffers``, and that of the weights."""
    if buffers is None:
        grads, of_weights = _call(_ops.fuse_kv_backward.default, grad, sources, weights, True, needs_weights)
        return list(grads.unbind(0)), of_weights
    arguments = (grad, sources, weights, buffers, needs_weights)
    return buffers, _call(_ops.fuse_kv_backward_accumulate.default, *arguments)


# ---- helpers -------------------------------------------------------------------------------------------


def _call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls a native op; its checks arrive as RuntimeError and leave as the Python type that they name."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        match = _NATIVE_ERROR.search(str(error))
        if match is None:
            raise
        kind = ValueError if match[1] == "ValueError" else TypeError
        raise kind(match[2]) from None


def _device_type(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type  # the flag is the cheaper one


def _fuse(sources: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    if weights is None:
        if len(sources) == 1:
            return sources[0]
        return fuse_kv(sources, sources[0].new_ones(len(sources), 1, 1))
    return fuse_kv(sources, weights)


def _fuse_both(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """K and V; in one launch where both are sums."""
    single = any(
        weights is None and len(x) == 1 for x, weights in ((keys, key_weights), (values, value_weights))
    )
    if single or not native_head_dim(keys[0].shape[3], values[0].shape[3]):
        return _fuse(keys, key_weights), _fuse(values, value_weights)
    return _fuse_pair(keys, key_weights, values, value_weights)


def _fuse_pair(
    keys: Sequence[Tensor],
    key_weights: Tensor | None,
    values: Sequence[Tensor],
    value_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(fuse_kv(keys, key_weights), fuse_kv(values, value_weights)) in one launch; None: all ones."""
    arguments: list[Any] = []
    for name, side, weights in (("key_weights", keys, key_weights), ("value_weights", values, value_weights)):
        weights = side[0].new_ones(()) if weights is None else weights
        arguments += [side, checks.canonical_weights(name, weights, len(side), *side[0].shape[2:], side[0])]
    return _call(_ops.fuse_kv_pair.default, *arguments)


def _recomputing(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    k: Tensor,
    v: Tensor,
) -> AbstractContextManager[None]:
    """A context in which autograd does not keep what of k and v is fused."""
    keys, values = [x.detach() for x in keys], [x.detach() for x in values]
    weights = [None if x is None else x.detach() for x in (key_weights, value_weights)]
    inputs = [x for x in (*keys, *values, *weights) if x is not None]
    return recomputed(lambda: _fuse_both(keys, values, *weights), (k, v), inputs)


def _check_schedule(
    schedule: Any,
    q: Tensor,
    cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    left: int,
    batch_invariant: bool,
) -> None:
    """Its type and device; on request that it was made of these lengths, which the kernel cannot see."""
    checks.check_tensor("schedule", schedule)
    checks.check_same_device({"q": q, "schedule": schedule})
    if not _debug_checks or not schedule.is_cuda:
        return
    pages = 1 if block_table is None else block_table.shape[1]
    fresh = decode_schedule(
        cache_seqlens,
        query_length=q.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=cache.shape[2],
        capacity=cache.shape[1] * pages,
        window_size=(left, -1),
        batch_invariant=batch_invariant,
    )
    sums = q.shape[0] + 1
    if not torch.equal(schedule[:sums], fresh[:sums]):
        raise ValueError("schedule was made of other lengths or options; call decode_schedule again")


def _check_cached(*arguments: Any) -> None:
    """The native op's checks, on no query rows: same messages, no work. arguments: up to ``right``."""
    q, *rest = arguments
    _call(_ops.attn_with_kvcache.default, q[:, :0], *rest, None, False)


def _attend_gathered(
    q: Tensor,
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    left: int,
    right: int,
    host_seqlens: Sequence[int] | None,
    return_lse: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention over caches with head dims that no kernel takes: fuse what rows see, then attend densely.

    Sequences end together, so those that are shorter begin later: their slots before that are a document of
    their own. Where the host has no lengths, as in a graph, all slots of the caches are fused.
    """
    caches = (key_caches, value_caches)
    state = (key_weights, value_weights, cache_seqlens, block_table, scale, left, right)
    _check_cached(q, *caches, *state)
    if batch_invariant and q.shape[0] > 1:
        rows = [slice(b, b + 1) for b in range(q.shape[0])]
        outs = []
        for row in rows:
            own = caches if block_table is not None else [[x[row] for x in side] for side in caches]
            table = None if block_table is None else block_table[row]
            host = None if host_seqlens is None else list(host_seqlens)[row]
            state = (key_weights, value_weights, cache_seqlens[row], table, scale, left, right, host)
            outs.append(_attend_gathered(q[row], *own, *state, return_lse, False))
        out, lse = zip(*outs, strict=True)
        return torch.cat(out), torch.cat(lse) if return_lse else None
    S, capacity = q.shape[1], key_caches[0].shape[1]
    if block_table is not None:
        capacity *= block_table.shape[1]
    longest = capacity
    if not in_graph(q, q.device.type):
        longest = min(max(0, *_lengths(cache_seqlens, host_seqlens)), capacity) if q.shape[0] else 0
    tokens = longest if left < 0 or always(longest <= S + left) else S + left
    if not always(tokens >= S):
        tokens = tokens + S  # rows before the first token
    k = _fuse_cached(key_caches, key_weights, cache_seqlens, block_table, tokens)
    v = _fuse_cached(value_caches, value_weights, cache_seqlens, block_table, tokens)
    lengths = cache_seqlens[:, None]
    own = (torch.arange(tokens, device=q.device) >= tokens - lengths).int()
    padding = torch.arange(S, device=q.device) < S - lengths
    out = dense_attention(q, k, v, scale, left, right, own).masked_fill(padding[:, :, None, None], 0)
    out = out.masked_fill(((lengths < 0) | (lengths > capacity))[:, :, None, None], math.nan)
    if not return_lse:
        return out, None
    return out, dense_lse(q, k, scale, left, right, own).masked_fill(padding[:, None], -math.inf)


def _prefill_with_kvcache(
    q: Tensor,
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    left: int,
    right: int,
    lengths: Sequence[int],
) -> Tensor:
    """Many rows: fuse the tokens that some row sees, once, then dense attention.

    Cached prefix and new tokens go into one workspace, and so need no merge of partial results. One call for
    equal lengths, else one a sequence, in a workspace of one sequence.
    """
    sides = ((key_caches, key_weights), (value_caches, value_weights))
    caches = (key_caches, value_caches, key_weights, value_weights)
    _check_cached(q, *caches, cache_seqlens, block_table, scale, left, right)
    B, S = q.shape[:2]
    page_size = key_caches[0].shape[1]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]

    def attend(rows: slice, length: int) -> Tensor:
        if not 0 < length <= capacity:  # Only CUDA lengths come here unchecked.
            blind = 0.0 if length == 0 else math.nan
            return q.new_full((*q[rows].shape[:3], value_caches[0].shape[3]), blind)
        new = min(S, length)
        tokens = length if left < 0 else min(length, new + left)
        table = None if block_table is None else block_table[rows]
        k, v = (_gather(*side, rows, cache_seqlens[rows], table, length, tokens) for side in sides)
        out = dense_attention(q[rows, S - new :], k, v, scale, left, right)
        return out if new == S else torch.nn.functional.pad(out, (0, 0, 0, 0, S - new, 0))

    if len(set(lengths)) == 1:
        return attend(slice(0, B), lengths[0])
    outs = [attend(slice(b, b + 1), length) for b, length in enumerate(lengths)]
    return torch.cat(outs) if outs else q.new_zeros(*q.shape[:3], value_caches[0].shape[3])


def _lengths(cache_seqlens: Tensor, host_seqlens: Sequence[int] | None) -> Sequence[int]:
    """The lengths on the host; CUDA's are waited for if nobody has brought them."""
    if host_seqlens is None or cache_seqlens.device.type == "cpu" or _debug_checks:
        lengths = cache_seqlens.tolist()
        if host_seqlens is not None and list(host_seqlens) != lengths:
            raise ValueError(f"host_seqlens is {list(host_seqlens)}; cache_seqlens holds {lengths}")
        return lengths
    if len(host_seqlens) != len(cache_seqlens):
        raise ValueError(f"host_seqlens has {len(host_seqlens)} entries; expected {len(cache_seqlens)}")
    return host_seqlens


def _gather(
    caches: Sequence[Tensor],
    weights: Tensor | None,
    rows: slice,
    lengths: Tensor,
    block_table: Tensor | None,
    length: int,
    tokens: int,
) -> Tensor:
    """The last ``tokens`` tokens of some sequences of one length, fused."""
    if block_table is None:
        return _fuse([cache[rows, length - tokens : length] for cache in caches], weights)
    return _fuse_cached(caches, weights, lengths, block_table, tokens)


def _fuse_cached(
    caches: Sequence[Tensor],
    weights: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    tokens: int,
) -> Tensor:
    """The last ``tokens`` tokens of each sequence, fused: (B, tokens, G, D), zeros before its first."""
    shape = caches[0].shape[2:]
    if weights is None:
        weights = torch.ones(len(caches), *shape, device=caches[0].device)
    if native_head_dim(shape[1]):
        return _call(_ops.fuse_kvcache.default, caches, weights, lengths, block_table, tokens)
    (weights,) = in_eights([weights])
    fused = _call(_ops.fuse_kvcache.default, in_eights(caches), weights, lengths, block_table, tokens)
    return from_eights(fused, *shape)
