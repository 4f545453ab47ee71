"""Oracle of the operations: the formulas in plain torch, written to be read, not to be fast.

Every function has the name and the signature of its operation, plus ``dtype``: the dtype in which everything
is computed and returned (default: the dtype of the inputs). ``dtype=torch.float64`` gives the exact values.
The default gives the error of the same math in the working dtype.

Shapes: B batch, S query length, T key/value length, H query heads, G key/value heads, D head dim, m number of
sources. This module imports torch only and calls no kernel of this package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "append_kvcache",
    "fuse_kv",
    "fused_kv_attn_func",
    "fused_kv_attn_varlen_func",
    "fused_kv_attn_with_kvcache",
    "rope_append_kvcache",
]

Tensors = Tensor | Sequence[Tensor]


def fuse_kv(sources: Tensors, weights: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``out[b, t, g, d] = sum_j weights[j, g, d] * sources[j][b, t, g, d]`` (FusedKV, arXiv 2512.03870).

    Differentiable.

    Args:
        sources: m tensors (B, T, G, D), or one.
        weights: Broadcastable to (m, G, D).
        dtype: Of the computation and the result.

    Returns:
        (B, T, G, D).
    """
    sources = _as_list(sources)
    dtype = dtype or sources[0].dtype
    heads, dim = sources[0].shape[-2:]
    weights = weights.to(dtype).broadcast_to(len(sources), heads, dim)
    out = torch.zeros(sources[0].shape, dtype=dtype, device=sources[0].device)
    for source, weight in zip(sources, weights, strict=True):
        out = out + weight * source.to(dtype)
    return out


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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over fused keys K = sum_j a_j (.) K_j and fused values V = sum_j b_j (.) V_j.

    out = softmax(scale q K^T + mask) V and lse = log sum exp(scale q K^T + mask). Query head h reads
    key/value head h // (H / G). Query row i has position p = i + T - S. It sees key j if p - left <= j <= p +
    right (-1: no bound; causal: right = 0) and, with document_ids, document_ids[p] = document_ids[j]. A fully
    masked row gives zeros and lse = -inf. Differentiable in all tensors but document_ids.

    A score s = scale q . k becomes softcap tanh(s / softcap) if softcap is not 0. Then slope |p - j| is
    subtracted and attn_mask added. A sink is one more score of every row of its head, with a value of zero:
    lse has it too.

    Args:
        q: (B, S, H, D).
        keys: m_k tensors (B, T, G, D).
        values: m_v tensors (B, T, G, Dv).
        key_weights: Broadcastable to (m_k, G, D); None: all ones.
        value_weights: Broadcastable to (m_v, G, Dv); None: all ones.
        softmax_scale, causal, window_size, return_lse: As in the operation.
        document_ids: (B, T), with S <= T.
        softcap: The soft cap; 0.0 is none.
        sinks: (H,), natural log.
        alibi_slopes: (H,) or (B, H).
        attn_mask: Broadcastable to (B, H, S, T): boolean, False hides a key, or added to the scaled scores.
        dtype: Of the computation and the results.

    Returns:
        (B, S, H, Dv) and, with ``return_lse``, (B, H, S).
    """
    keys, values = _as_list(keys), _as_list(values)
    if attn_mask is not None:
        attn_mask = attn_mask.broadcast_to(q.shape[0], q.shape[2], q.shape[1], keys[0].shape[1])
    outs, lses = [], []
    for b in range(q.shape[0]):
        out, lse = _attend(
            q[b],
            _fused([key[b] for key in keys], key_weights, dtype or q.dtype),
            _fused([value[b] for value in values], value_weights, dtype or q.dtype),
            softmax_scale,
            causal,
            window_size,
            None if document_ids is None else document_ids[b],
            softcap,
            sinks,
            _slopes(alibi_slopes, b),
            None if attn_mask is None else attn_mask[b],
        )
        outs.append(out)
        lses.append(lse)
    return _stacked(q, values, outs, lses, return_lse, dtype or q.dtype)


def fused_kv_attn_varlen_func(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``fused_kv_attn_func`` of each sequence b alone: rows or tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.

    Differentiable in q, keys, values, both weights, sinks and slopes.

    Args:
        q: (total_q, H, D).
        keys: m_k tensors (total_k, G, D).
        values: m_v tensors (total_k, G, Dv).
        key_weights, value_weights: As in ``fused_kv_attn_func``.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), from 0 to total_q and total_k.
        max_seqlen_q, max_seqlen_k: Not used.
        softmax_scale, causal, window_size, return_lse: As in the operation.
        softcap, sinks, alibi_slopes: As in ``fused_kv_attn_func``.
        dtype: Of the computation and the results.

    Returns:
        (total_q, H, Dv) and, with ``return_lse``, (H, total_q).
    """
    keys, values = _as_list(keys), _as_list(values)
    outs = [q.new_zeros((0, q.shape[1], values[0].shape[-1]), dtype=dtype or q.dtype)]
    lses = [q.new_zeros((q.shape[1], 0), dtype=dtype or q.dtype)]
    for b in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        tokens = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
        out, lse = _attend(
            q[rows],
            _fused([key[tokens] for key in keys], key_weights, dtype or q.dtype),
            _fused([value[tokens] for value in values], value_weights, dtype or q.dtype),
            softmax_scale,
            causal,
            window_size,
            None,
            softcap,
            sinks,
            _slopes(alibi_slopes, b),
        )
        outs.append(out)
        lses.append(lse)
    return (torch.cat(outs), torch.cat(lses, dim=1)) if return_lse else torch.cat(outs)


def fused_kv_attn_with_kvcache(
    q: Tensors,
    key_caches: Tensors,
    value_caches: Tensors,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    left_padding: bool = True,
    dtype: torch.dtype | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last S tokens of each sequence over its cache: ``fused_kv_attn_func`` row by row.

    Sequence b has n = cache_seqlens[b] valid tokens. Query row i has position p = i + n - S. Rows with p < 0
    are padding of a shorter sequence: zeros and lse = -inf, or the sink, as for a sequence of length 0.
    Without left_padding only bounds hide keys from them. k and v are first written to n, n + 1, ...: n grows.
    Codes are decoded first. With a query per source q . K becomes sum_j q_j . (a_j (.) K_j).

    Args:
        q: (B, S, H, D), or one for each key source.
        key_caches, value_caches: m tensors (B, T, G, D), or pages (P, page_size, G, D). Only n are read.
        key_weights, value_weights: As in ``fused_kv_attn_func``.
        cache_seqlens: (B,), a number for all, or None: T.
        block_table: (B, max_pages): token t of sequence b is in page block_table[b, t // page_size], slot
            t % page_size. Entries beyond n are never read.
        softmax_scale, causal, window_size, return_lse, max_seqlen_q: As in the operation.
        cu_seqlens_q: (B + 1,): q is (total_q, H, D), sequence b has the rows from cu_seqlens_q[b] on.
        softcap, sinks, alibi_slopes: As in ``fused_kv_attn_func``.
        k, v, cache_batch_idx, cache_leftpad, left_padding: As in ``FlashOptions``.
        dtype: Of the computation and the results.
        **others: Those of ``CodeOptions``, and rotary_* of ``FlashOptions`` for row i of q as token n + i.

    Returns:
        (B, S, H, Dv) and, with ``return_lse``, (B, H, S); of packed rows (total_q, H, Dv) and (H, total_q).
    """
    caches = _as_list(key_caches), _as_list(value_caches)
    queries, batch = _as_list(q), len(_as_list(q)[0]) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    dtype = dtype or queries[0].dtype
    lengths = _lengths(caches[0][0].shape[1] if cache_seqlens is None else cache_seqlens, batch)
    pages = block_table if cache_batch_idx is None else cache_batch_idx[:, None]  # rows are pages
    if k is not None and v is not None:
        in_order = causal or any(0 <= size < 2**31 for size in window_size)  # wider: unbounded
        where = (caches[0][0], caches[1][0], lengths, pages, others, in_order)
        queries = [_with_new_tokens(queries[0], k, v, *where, dtype)]
        lengths = [length + k.shape[1] for length in lengths]
    scale = 1 / math.sqrt(queries[0].shape[-1]) if softmax_scale is None else softmax_scale
    leftpad = [0] * batch if cache_leftpad is None else cache_leftpad.tolist()
    keys, values = _numbers(caches[0], "key", others, dtype), _numbers(caches[1], "value", others, dtype)
    rows = torch.cat(queries, dim=-1)
    sequences = rows if cu_seqlens_q is None else rows.split(cu_seqlens_q.diff().tolist())
    outs, lses = [], []
    for b, (first, length) in enumerate(zip(leftpad, lengths, strict=True)):
        own = None if pages is None else pages[b]
        key, value = ([_tokens(x, b, length, own)[first:] for x in side] for side in (keys, values))
        fused = _fused(key, key_weights, dtype) if len(queries) == 1 else _beside(key, key_weights, dtype)
        summed = _fused(value, value_weights, dtype, others.get("value_bias"))
        scores = (softcap, sinks, _slopes(alibi_slopes, b))
        out, lse = _attend(sequences[b], fused, summed, scale, causal, window_size, None, *scores)
        if left_padding:
            _clear_padding(out, lse, len(sequences[b]) - (length - first), sinks)
        outs.append(out)
        lses.append(lse)
    if cu_seqlens_q is None:
        return _stacked(queries[0], values, outs, lses, return_lse, dtype)
    return (torch.cat(outs), torch.cat(lses, dim=1)) if return_lse else torch.cat(outs)


def _decoded(x: Tensor, codebook: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers that the elements of a cache stand for.

    Codes n of int8 and float8_e4m3fn are n. A byte (.., D / 2) of uint8 has the code of channel d in its low
    half and of channel d + D / 2 in its high half; n is codebook[n], or n - 8.
    """
    if x.dtype != torch.uint8:
        return x.to(dtype)
    numbers = torch.arange(-8, 8, device=x.device) if codebook is None else codebook
    return numbers.to(dtype)[torch.cat((x & 15, x >> 4), dim=-1).long()]


def _numbers(caches: list[Tensor], side: str, others: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Caches of codes decoded, times the scales of their tokens."""
    scales, codebook = others.get(f"{side}_token_scales"), others.get("codebook")
    coded = (torch.int8, torch.float8_e4m3fn, torch.uint8)
    numbers = [_decoded(x, codebook, dtype) if x.dtype in coded else x for x in caches]
    if scales is None:
        return numbers
    factors = [x.to(dtype).unsqueeze(-1) for x in _as_list(scales)]
    return [x.to(dtype) * factor for x, factor in zip(numbers, factors, strict=True)]


def _beside(sources: list[Tensor], weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weighted sources side by side, (T, G, m D), for queries that are side by side."""
    if weights is None:
        weights = torch.ones(1, 1, 1, dtype=dtype, device=sources[0].device)
    weights = weights.broadcast_to(len(sources), *sources[0].shape[-2:])
    return torch.cat([fuse_kv([x], w[None], dtype=dtype) for x, w in zip(sources, weights, strict=True)], -1)


def _lengths(cache_seqlens: Tensor | int, batch: int) -> list[int]:
    return [cache_seqlens] * batch if isinstance(cache_seqlens, int) else cache_seqlens.tolist()


def _clear_padding(out: Tensor, lse: Tensor, rows: int, sinks: Tensor | None) -> None:
    """The first rows of out (S, H, Dv) and lse (H, S) become those without keys."""
    out[: max(rows, 0)] = 0
    lse[:, : max(rows, 0)] = -math.inf if sinks is None else sinks.to(lse.dtype)[:, None]


def append_kvcache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    slot_mapping: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **encode: Tensor | None,
) -> None:
    """Writes token i of (B, S, G, D) at position p = cache_seqlens[b] - S + i of sequence b, in place.

    Tokens with p < 0 are skipped. The caches are as in ``fused_kv_attn_with_kvcache``. With rotary_cos and
    rotary_sin (max_len, r/2), r <= D, row p of the tables rotates the first r channels of the key: (x, y) ->
    (x cos - y sin, x sin + y cos). Channel j pairs with j + r/2, or 2j with 2j + 1 if interleaved.

    With slot_mapping, token i of (total, G, D) goes to slot slot_mapping[i] of all rows or pages, if not -1.

    Into a cache of codes go those of (x - center) / scale (``_encoded``), or x if it has codes already.
    """
    dtype = dtype or key.dtype
    of_key, of_value = ((encode.get(f"{x}_scale"), encode.get(f"{x}_center")) for x in ("key", "value"))
    if slot_mapping is not None:
        for i, slot in enumerate(slot_mapping.tolist()):
            for cache, new, code in ((key_cache, key, of_key), (value_cache, value, of_value)):
                if slot >= 0:
                    cache[slot // cache.shape[1], slot % cache.shape[1]] = _encoded(
                        new[i], cache.dtype, *code
                    )
        return
    assert cache_seqlens is not None
    steps = key.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        for i in range(max(steps - length, 0), steps):
            position = length - steps + i
            new_key = key[b, i].to(dtype)
            if rotary_cos is not None and rotary_sin is not None:
                cos, sin = rotary_cos[position].to(dtype), rotary_sin[position].to(dtype)
                new_key = _rotated(new_key, cos, sin, rotary_interleaved)
            for cache, new, code in ((key_cache, new_key, of_key), (value_cache, value[b, i], of_value)):
                new = _encoded(new, cache.dtype, *code)
                if block_table is None:
                    cache[b, position] = new.to(cache.dtype)
                else:
                    page_size = cache.shape[1]
                    page = int(block_table[b, position // page_size])
                    cache[page, position % page_size] = new.to(cache.dtype)


def _encoded(x: Tensor, code: torch.dtype, scale: Tensor | None, center: Tensor | None) -> Tensor:
    """The codes of x (G, D) in the dtype of a cache; x itself without a scale.

    u = (x - center) / scale is rounded to nearest even. int8 holds -127 .. 127, float8_e4m3fn -448 .. 448. A
    byte of uint8 holds two numbers -8 .. 7 plus 8: channel d in the low half, d + D / 2 in the high one.
    """
    if scale is None:
        return x
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    u = (u if center is None else u - center.to(u.dtype)) / scale.to(u.dtype)
    if code == torch.float8_e4m3fn:
        return u.clamp(-448, 448).to(code)
    if code == torch.int8:
        return u.nan_to_num(0).round().clamp(-127, 127).to(code)
    low, high = (u.nan_to_num(0).round().clamp(-8, 7) + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def rope_append_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    block_table: Tensor | None = None,
    rotary_interleaved: bool = False,
    dtype: torch.dtype | None = None,
    **encode: Any,
) -> Tensor:
    """``append_kvcache``, and row i of ``query`` (B, S, H, D) rotated like key i, in a new tensor."""
    tables: dict[str, Any] = {
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
    }
    state: dict[str, Any] = {"cache_seqlens": cache_seqlens, "block_table": block_table}
    append_kvcache(key, value, key_cache, value_cache, **state, **tables, dtype=dtype, **encode)
    dtype = dtype or query.dtype
    rotated, steps = query.to(dtype, copy=True), query.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        for i in range(max(steps - length, 0), steps):
            cos, sin = (table[length - steps + i].to(dtype) for table in (rotary_cos, rotary_sin))
            rotated[b, i] = _rotated(rotated[b, i], cos, sin, rotary_interleaved)
    return rotated


def _with_new_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: list[int],
    pages: Tensor | None,
    rotary: dict[str, Any],
    in_order: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """Appends k and v to sequences of ``lengths`` tokens. Returns the queries, rotated if there are tables.

    Row i of sequence b is rotated as the token at lengths[b] + i, or at lengths[b] if not ``in_order``.
    """
    cos, sin = rotary.get("rotary_cos"), rotary.get("rotary_sin")
    interleaved = rotary.get("rotary_interleaved", False)
    state: dict[str, Any] = {
        "cache_seqlens": torch.tensor(lengths) + k.shape[1],
        "block_table": pages,
        "rotary_cos": cos,
        "rotary_sin": sin,
        "rotary_interleaved": interleaved,
    }
    append_kvcache(k, v, key_cache, value_cache, **state, dtype=dtype)
    if cos is None or sin is None:
        return q
    rotated = q.to(dtype or q.dtype, copy=True)
    for b, length in enumerate(lengths):
        for i in range(q.shape[1]):
            position = length + i if in_order else length
            angles = cos[position].to(rotated.dtype), sin[position].to(rotated.dtype)
            rotated[b, i] = _rotated(rotated[b, i], angles[0], angles[1], interleaved)
    return rotated


def _as_list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _fused(
    sources: list[Tensor], weights: Tensor | None, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """The explicit K or V of one sequence, (T, G, D)."""
    if weights is None:
        weights = torch.ones(1, 1, 1, dtype=dtype, device=sources[0].device)
    fused = fuse_kv(sources, weights, dtype=dtype)
    return fused if bias is None else fused + bias.to(dtype)


def _tokens(cache: Tensor, b: int, length: int, pages: Tensor | None) -> Tensor:
    """The valid tokens of sequence b in order, (length, G, D)."""
    if pages is None:
        return cache[b, :length]
    page_size = cache.shape[1]
    used = pages[: -(-length // page_size)].long()
    return cache[used].flatten(0, 1)[:length]


def _visible(
    rows: int, tokens: int, causal: bool, window_size: tuple[int, int], device: torch.device
) -> Tensor:
    """Boolean (S, T): which key each query row sees; both ends aligned at the bottom right."""
    # No sequence is longer than int32: a wider window is no bound, and positions plus windows stay within
    # int64.
    left, right = (min(size, 2**31) for size in window_size)
    if causal:
        right = 0
    position = torch.arange(rows, device=device)[:, None] + (tokens - rows)
    key = torch.arange(tokens, device=device)[None, :]
    visible = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible & (key >= position - left)
    if right >= 0:
        visible = visible & (key <= position + right)
    return visible


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    document_ids: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q (S, H, D), k (T, G, D), v (T, G, Dv), ids (T,) -> out (S, H, Dv), lse (H, S).

    attn_mask: (H, S, T).
    """
    rows, heads, dim = q.shape
    tokens, groups = k.shape[:2]
    scale = 1 / math.sqrt(dim) if softmax_scale is None else float(softmax_scale)
    q = q.to(k.dtype).transpose(0, 1)
    k = k.repeat_interleave(heads // groups, dim=1).transpose(0, 1)
    v = v.repeat_interleave(heads // groups, dim=1).transpose(0, 1)
    # The sink of each row, (H, S). Without sinks one of no weight.
    sink = q.new_full((heads, rows), -math.inf)
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None].expand(heads, rows)
    if tokens == 0:
        # Both results keep their place in the graph: an empty sum of everything is zero.
        nothing = (q * 0).sum(-1, keepdim=True) + v.sum(1, keepdim=True)
        return nothing.transpose(0, 1), sink.clone()
    visible = _visible(rows, tokens, causal, window_size, q.device)
    if document_ids is not None:
        visible = visible & (document_ids[tokens - rows :, None] == document_ids[None, :])
    scores = scale * (q @ k.transpose(1, 2))
    if softcap:
        scores = float(softcap) * torch.tanh(scores / float(softcap))
    if slopes is not None:
        position = torch.arange(rows, device=q.device)[:, None] + (tokens - rows)
        distance = (position - torch.arange(tokens, device=q.device)).abs()
        scores = scores - slopes.to(q.dtype)[:, None, None] * distance.to(q.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        visible = visible & (attn_mask != -math.inf)
        scores = scores + attn_mask.to(scores.dtype)
    masked = ~visible.any(-1)
    # A fully masked row gets finite scores first and zeros afterwards, to keep NaN out of its gradient.
    scores = scores.masked_fill(~visible, -math.inf).masked_fill(masked[..., None], 0.0)
    scores = torch.cat((scores, sink[..., None]), dim=-1)
    out = (torch.softmax(scores, dim=-1)[..., :-1] @ v).masked_fill(masked[..., None], 0.0)
    lse = torch.where(masked, sink, torch.logsumexp(scores, dim=-1))
    return out.transpose(0, 1), lse


def _slopes(slopes: Tensor | None, b: int) -> Tensor | None:
    """The slopes of sequence b, (H,), of slopes (H,) or (B, H)."""
    return slopes[b] if slopes is not None and slopes.dim() == 2 else slopes


def _stacked(
    q: Tensor,
    values: list[Tensor],
    outs: list[Tensor],
    lses: list[Tensor],
    return_lse: bool,
    dtype: torch.dtype,
) -> Tensor | tuple[Tensor, Tensor]:
    _, rows, heads, _ = q.shape
    out = torch.stack(outs) if outs else q.new_zeros((0, rows, heads, values[0].shape[-1]), dtype=dtype)
    lse = torch.stack(lses) if lses else q.new_zeros((0, heads, rows), dtype=dtype)
    return (out, lse) if return_lse else out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first r channels of one token's key (G, D) by the r/2 angles whose cos and sin are
    given."""
    r = 2 * cos.shape[-1]
    out = x.clone()
    first, second = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, first] * sin + x[:, second] * cos
    return out
