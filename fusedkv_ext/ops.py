"""The four operations of fusedkv_ext, their fakes and the rule that picks a kernel.

Words and shapes: B batch, S query length, T key/value length, H query heads, G key/value heads (H a multiple
of G), D head dim (a multiple of 8 up to 256), m sources (1 to 32), P pages. Layout as in flash-attn: q (B, S,
H, D), k and v (B, T, G, D); the last dim is contiguous, other strides are free.

The maths: FusedKV, arXiv 2512.03870, K_i = sum_j a_ij (.) K_j and V_i = sum_j b_ij (.) V_j.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext import _checks, _native  # noqa: F401  (_native registers torch.ops.fusedkv)
from fusedkv_ext._checks import Arguments, Tensors
from fusedkv_ext.dense import dense_attention, dense_lse

__all__ = ["append_kvcache", "debug_checks", "fuse_kv", "fused_kv_attn_func", "fused_kv_attn_with_kvcache"]

_ops = torch.ops.fusedkv

# Up to this many query rows per KV head (S * H / G), attention reads the sources where they lie, weights
# folded into q and the output; with more rows, fusing once and then a dense attention is cheaper.
DECODE_MAX_ROWS = 32

_NATIVE_ERROR = re.compile(r"fusedkv (ValueError|TypeError): (.*)")
_debug_checks = False


def debug_checks(enabled: bool) -> None:
    """Checks lengths and block tables inside CUDA tensors too, at the price of a synchronisation per call.

    On the CPU they are always checked. Without this, a CUDA sequence with a length or a page out of range
    gives NaN.
    """
    global _debug_checks
    _debug_checks = bool(enabled)


def fuse_kv(sources: Tensors, weights: Tensor) -> Tensor:
    """out[b, t, g, d] = sum_j weights[j, g, d] * sources[j][b, t, g, d]    (FusedKV, arXiv 2512.03870).

    Args:
        sources: m tensors (B, T, G, D) of one shape and dtype: float32, bfloat16, float16 or float64.
        weights: broadcastable to (m, G, D), any floating dtype.

    Returns:
        (B, T, G, D) in the sources' dtype: summed in float32 (float64 for float64) and rounded once.

    Differentiable in both. The backward is deterministic and saves only the sources and the weights.
    Raises ValueError (shapes, devices, strides) or TypeError (types, dtypes), naming the argument.
    """
    sources = _checks.as_tensors("sources", sources)
    _checks.check_sources("sources", sources, "sources[0]", sources[0])
    _checks.check_head_dim("sources[0]", sources[0].shape[3])
    if sources[0].dtype not in (*_checks.ATTENTION_DTYPES, torch.float64):
        raise TypeError(f"sources[0] is {sources[0].dtype}; expected float32, bfloat16, float16 or float64")
    weights = _checks.canonical_weights("weights", weights, len(sources), *sources[0].shape[2:], sources[0])
    _checks.check_same_device({"sources": sources, "weights": weights})
    return _call(_ops.fuse_kv.default, sources, weights)


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

    Returns:
        (B, S, H, Dv) in q's dtype; with ``return_lse`` also (B, H, S) float32, natural log, without a
        gradient. A row that sees no key gives zeros and -inf.

    Differentiable in q, keys, values and both weights. Under autocast q, keys and values are cast to its
    dtype.
    Raises ValueError (shapes, devices, strides) or TypeError (types, dtypes), naming the argument.
    """
    q = _checks.check_tensor("q", q)
    keys, values = _checks.as_tensors("keys", keys), _checks.as_tensors("values", values)
    (q,), keys, values = _autocast([q]), _autocast(keys), _autocast(values)
    _checks.check_attention(q, keys, values)
    left, right = _checks.check_window(causal, window_size)
    scale = _checks.check_scale(softmax_scale, q.shape[3])
    return_lse = _checks.check_flag("return_lse", return_lse)
    key_weights, value_weights = _attention_weights(keys, values, key_weights, value_weights)
    _checks.check_same_device(
        {"q": q, "keys": keys, "values": values, "key_weights": key_weights, "value_weights": value_weights}
    )

    B, S, H, _ = q.shape
    T, G = keys[0].shape[1:3]
    differentiates = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, *keys, *values, key_weights, value_weights)
    )
    few_rows = S * (H // G) <= DECODE_MAX_ROWS and (S <= T or right == 0)
    if few_rows and not differentiates and q.dtype != torch.float64 and _reads_sources(q.device):
        seqlens = torch.full((B,), T, dtype=torch.int32, device=q.device)
        out, lse = _call(
            _ops.attn_with_kvcache.default,
            q,
            keys,
            values,
            key_weights,
            value_weights,
            seqlens,
            None,
            scale,
            left,
            right,
        )
        return (out, lse) if return_lse else out
    k, v = _fuse(keys, key_weights), _fuse(values, value_weights)
    out = dense_attention(q, k, v, scale, left, right)
    return (out, dense_lse(q, k, scale, left, right)) if return_lse else out


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last S tokens of each sequence over its cache, for decoding.

    Args:
        q: (B, S, H, D) float32, bfloat16 or float16: the LAST S tokens of each sequence. Rows of a sequence
            shorter than S (left padding) give zeros and lse = -inf.
        key_caches: m_k tensors (B, capacity, G, D), or (P, page_size, G, D) with a block_table; value_caches:
            m_v with Dv.
        key_weights, value_weights: as in :func:`fused_kv_attn_func`.
        cache_seqlens: (B,) int32, valid tokens of each sequence, those S included.
        block_table: (B, max_pages) int32, the page of each page_size tokens. Entries past the length are not
            looked at.
        softmax_scale, causal, window_size, return_lse: as in :func:`fused_kv_attn_func`.

    Returns:
        (B, S, H, Dv) in q's dtype; with ``return_lse`` also (B, H, S) float32. A sequence of length 0 gives
        zeros and -inf.

    Two runs give the same bits, whatever the number of threads and the rest of the batch.
    Not differentiable: an input that requires grad raises ValueError under grad mode. Raises ValueError
    (shapes, devices, strides, lengths, pages) or TypeError (types, dtypes), naming the argument.
    """
    q = _checks.check_tensor("q", q)
    key_caches = _checks.as_tensors("key_caches", key_caches)
    value_caches = _checks.as_tensors("value_caches", value_caches)
    (q,) = _autocast([q], like=key_caches[0])
    left, right = _checks.check_window(causal, window_size)
    _check_rank4("q", q)
    _check_rank4("key_caches[0]", key_caches[0])
    _check_rank4("value_caches[0]", value_caches[0])
    scale = _checks.check_scale(softmax_scale, q.shape[3])
    return_lse = _checks.check_flag("return_lse", return_lse)
    key_weights, value_weights = _attention_weights(key_caches, value_caches, key_weights, value_weights)
    tensors = {
        "q": q,
        "key_caches": key_caches,
        "value_caches": value_caches,
        "key_weights": key_weights,
        "value_weights": value_weights,
    }
    _check_table(tensors, cache_seqlens, block_table, key_caches[0])
    _checks.check_no_grad(
        "fused_kv_attn_with_kvcache", tensors, "use fused_kv_attn_func to train, torch.no_grad() to decode"
    )
    arguments = (*tensors.values(), cache_seqlens, block_table, scale, left, right)
    rows = q.shape[1] * (q.shape[2] // max(key_caches[0].shape[2], 1))
    if (
        rows > DECODE_MAX_ROWS
        and not return_lse
        and not torch.compiler.is_compiling()
        and q.device.type == "cpu"
    ):
        return _prefill_with_kvcache(*arguments)
    out, lse = _call(_ops.attn_with_kvcache.default, *arguments)
    return (out, lse) if return_lse else out


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
) -> None:
    """Writes S new tokens at positions cache_seqlens - S .. cache_seqlens - 1, in place, rotating keys on the
    way.

    Args:
        key, value: (B, S, G, D) and (B, S, Gv, Dv). Tokens at negative positions (left padding) are skipped.
        key_cache, value_cache: (B, capacity, G, D), or (P, page_size, G, D) with a block_table; key's dtype.
        cache_seqlens: (B,) int32, lengths after the append. block_table: (B, max_pages) int32.
        rotary_cos, rotary_sin: (max_len, rotary_dim / 2), row p rotates the token at position p (RoPE, arXiv
            2104.09864); rotary_dim <= D, further channels are copied. None: keys are written as they are.
        rotary_interleaved: rotate pairs (2j, 2j + 1) instead of (j, j + rotary_dim / 2).

    Not differentiable: an input that requires grad raises ValueError under grad mode. Raises ValueError
    (shapes, devices, strides, lengths, pages) or TypeError (types, dtypes), naming the argument.
    """
    tensors = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    for name, x in tensors.items():
        _checks.check_tensor(name, x)
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        if not torch.compiler.is_compiling() and x.is_neg():
            raise ValueError(f"{name} is a lazily negated view; expected memory to write to (.resolve_neg())")
    _check_rank4("key_cache", key_cache)
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if x is not None and not _checks.check_tensor(name, x).is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; expected a floating dtype")
    tensors.update(rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    _check_table(tensors, cache_seqlens, block_table, key_cache)
    _checks.check_no_grad("append_kvcache", tensors, "append under torch.no_grad()")
    if rotary_cos is not None and rotary_sin is not None:
        rotary_cos, rotary_sin = rotary_cos.float().contiguous(), rotary_sin.float().contiguous()
    interleaved = _checks.check_flag("rotary_interleaved", rotary_interleaved)
    new = (key, value, key_cache, value_cache)
    _call(_ops.append_kvcache.default, *new, cache_seqlens, block_table, rotary_cos, rotary_sin, interleaved)


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


def _autocast(tensors: Sequence[Tensor], like: Tensor | None = None) -> list[Tensor]:
    """Under autocast, float tensors in its dtype (or in that of ``like``, a cache, which is not copied)."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type) if like is None else like.dtype
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _attention_weights(
    keys: Sequence[Tensor], values: Sequence[Tensor], key_weights: Tensor | None, value_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if key_weights is not None:
        key_weights = _checks.canonical_weights(
            "key_weights", key_weights, len(keys), *keys[0].shape[2:], keys[0]
        )
    if value_weights is not None:
        value_weights = _checks.canonical_weights(
            "value_weights", value_weights, len(values), *values[0].shape[2:], values[0]
        )
    return key_weights, value_weights


def _fuse(sources: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    if weights is None:
        if len(sources) == 1:
            return sources[0]
        return fuse_kv(sources, torch.ones(len(sources), 1, 1, device=sources[0].device))
    return fuse_kv(sources, weights)


def _check_rank4(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 4 dims")


def _check_table(tensors: Arguments, cache_seqlens: Any, block_table: Any, cache: Tensor) -> None:
    """Types and devices of lengths and block table; values on request for CUDA (the CPU op always checks)."""
    _checks.check_tensor("cache_seqlens", cache_seqlens)
    if block_table is not None:
        _checks.check_tensor("block_table", block_table)
    _checks.check_same_device({**tensors, "cache_seqlens": cache_seqlens, "block_table": block_table})
    if not _debug_checks or not cache_seqlens.is_cuda:
        return
    capacity = cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"cache_seqlens[{b}] = {length}; expected 0 to {capacity}, what the cache holds")
        pages = [] if block_table is None else block_table[b, : -(-length // cache.shape[1])].tolist()
        for i, page in enumerate(pages):
            if not 0 <= page < cache.shape[0]:
                raise ValueError(
                    f"block_table[{b}, {i}] = {page}; expected a page from 0 to {cache.shape[0] - 1}"
                )


def _reads_sources(device: torch.device) -> bool:
    """Whether this device has the kernel that attends to sources without fusing them first."""
    return device.type in ("cpu", "meta")


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
) -> Tensor:
    """Many rows: fuse the valid tokens once, then dense attention; one call for equal lengths, else one a
    sequence."""
    # The native op's checks, on no query rows: same messages, no work.
    _call(
        _ops.attn_with_kvcache.default,
        *(
            q[:, :0],
            key_caches,
            value_caches,
            key_weights,
            value_weights,
            cache_seqlens,
            block_table,
            scale,
            left,
            right,
        ),
    )
    B, S = q.shape[:2]
    lengths = cache_seqlens.tolist()
    out = q.new_zeros(*q.shape[:3], value_caches[0].shape[3])

    def attend(rows: slice, length: int) -> None:
        def tokens(cache: Tensor) -> Tensor:
            if block_table is None:
                return cache[rows, :length]
            pages = block_table[rows, : -(-length // cache.shape[1])]
            return cache[pages.long()].flatten(1, 2)[:, :length]

        k = _fuse([tokens(cache) for cache in key_caches], key_weights)
        v = _fuse([tokens(cache) for cache in value_caches], value_weights)
        new = min(S, length)
        out[rows, S - new :] = dense_attention(q[rows, S - new :], k, v, scale, left, right)

    if B and len(set(lengths)) == 1:
        attend(slice(0, B), lengths[0])
    else:
        for b, length in enumerate(lengths):
            attend(slice(b, b + 1), length)
    return out


# ---- fakes ---------------------------------------------------------------------------------------------


@torch.library.register_fake("fusedkv::fuse_kv")
def _(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    return sources[0].new_empty(sources[0].shape)


@torch.library.register_fake("fusedkv::fuse_kv_backward")
def _(
    grad: Tensor, sources: Sequence[Tensor], weights: Tensor, needs_sources: bool, needs_weights: bool
) -> tuple[Tensor, Tensor]:
    grad_sources = grad.new_empty((len(sources), *grad.shape) if needs_sources else (0,))
    return grad_sources, weights.new_empty((len(sources) if needs_weights else 0, *weights.shape[1:]))


@torch.library.register_fake("fusedkv::attn_with_kvcache")
def _(
    q: Tensor, key_caches: Sequence[Tensor], value_caches: Sequence[Tensor], *args: object
) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty((B, S, H, value_caches[0].shape[3])), q.new_empty((B, H, S), dtype=torch.float32)


@torch.library.register_fake("fusedkv::append_kvcache")
def _(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *args: object) -> None:
    return None
