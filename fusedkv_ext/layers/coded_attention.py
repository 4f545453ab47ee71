"""Attention of a layer over a cache of codes.

Static scales are part of the fusion weights (cache/codec/kernel_codes.py). With a scale s per token and head,

    x^ = c + f (.) R^T (s u)        R: the rotation or the identity, f: the balance of channels

and fusion weights a and b,

    q . sum_j a_j (.) k^_j = sum_j (R (f_j (.) a_j (.) q)) . (s_j u_j) + q . sum_j a_j (.) c_j
    P sum_j b_j (.) v^_j   = sum_j b_j (.) f_j (.) (R^T P (s_j u_j)) + sum_j b_j (.) c_j

Kernels take a query per key source and the scales of tokens. They sum over the sources of values before
anything is rotated. So rotated values of several sources with weights take one call each.

Attention over codes, over raw last tokens and over raw first tokens are states, which are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.cache.cache_codecs import Folded
from fusedkv_ext.cache.codec.tensor_codec import TensorCodec
from fusedkv_ext.cache.first_tokens import attend_to_first
from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.cache.last_tokens import LastTokens
from fusedkv_ext.layers.layer_io import WeightedSum
from fusedkv_ext.ops import cached
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.merging import merge_states

__all__ = ["attend_to_codes"]

Coded = tuple[TensorCodec, slice | None]  # and which of its heads are read


def attend_to_codes(
    call: AttentionCall, cache: KVCache, place: tuple[int, int], keys: WeightedSum, values: WeightedSum
) -> Tensor:
    """Attention over codes, raw last and raw first tokens, (B, S, H, D).

    Args:
        call: The call over the tensors of the cache as if they were raw.
        cache: The cache.
        place: The layer and the segment of heads that read.
        keys: What the call reads.
        values: The same of values.
    """
    codecs: Any = cache.codecs
    k, v = ([(x.layer, x.heads) for x in side.tensors] for side in (keys, values))
    folded: Folded = codecs.fold(place, k, v, call.key_weights, call.value_weights)
    over = call._replace(
        key_weights=folded.key_weights, value_weights=folded.value_weights, value_bias=folded.value_bias
    )
    first, last = cache.first, cache.last
    if first is None and last is None:
        if cache.scales is None:
            return cached.attend_layer(over)
        return _attend_with_token_scales(over, call.q, cache, keys, values)[0]
    call = call._replace(schedule=None, return_lse=True)  # over raw tokens
    states: list[tuple[Tensor, Any]] = []
    if last is None or not 0 <= call.left < last.count:
        out, lse = _attend_to_others(over, cache, 0 if last is None else last.count, keys, values)
        if folded.key_bias is not None:  # which scores over codes lack
            rows = call.q.to(folded.key_bias.dtype).unflatten(2, (len(folded.key_bias), -1))
            lse = lse + call.scale * torch.einsum("bsghd,gd->bghs", rows, folded.key_bias).flatten(1, 2)
        states.append((out, lse))
    if last is not None:
        states.append(_attend_to_last_tokens(call, last, keys, values))
    if first is not None:
        rows_of_first = call._replace(
            keys=[x.of(first.keys[x.layer]) for x in keys.tensors],
            values=[x.of(first.values[x.layer]) for x in values.tensors],
        )
        states.append(attend_to_first(rows_of_first, cache.seq_lens, cache.lens_up_to(first.count)))
    outs, lses = zip(*states, strict=True)
    return merge_states(outs, lses)[0]


def _attend_to_last_tokens(
    call: AttentionCall, last: LastTokens, keys: WeightedSum, values: WeightedSum
) -> tuple[Tensor, Any]:
    """out and lse over the raw rows of ``last``."""
    window, raw_keys, raw_values = last.count - 1, last.keys, last.values
    return cached.attend(
        call._replace(
            keys=[x.of(raw_keys[x.layer]) for x in keys.tensors],
            values=[x.of(raw_values[x.layer]) for x in values.tensors],
            block_table=last.block_table,
            left=min(call.left, window) if call.left >= 0 else window,
        )
    )


def _attend_to_others(
    over: AttentionCall, cache: KVCache, count: int, keys: WeightedSum, values: WeightedSum
) -> tuple[Tensor, Any]:
    """out and lse over the codes of all tokens but each row's last ``count``: positions are less by that."""
    over = over._replace(
        cache_seqlens=cache.lens_without(cache.sinks + count),
        host_seqlens=[max(length - count, 0) for length in cache.stored_lengths],
        left=over.left - count if over.left >= 0 else over.left,
        return_lse=True,
    )
    if cache.scales is None:
        return cached.attend(over)
    return _attend_with_token_scales(over, over.q, cache, keys, values)


def _attend_with_token_scales(
    call: AttentionCall, q: Tensor, cache: KVCache, keys: WeightedSum, values: WeightedSum
) -> tuple[Tensor, Any]:
    """out and lse where a side has scales of tokens. The other side is raw or has static scales."""
    codecs: Any = cache.codecs
    scales: Any = cache.scales
    of_keys, of_values = (
        [x.of(side[x.layer]) for x in reads.tensors if side[x.layer] is not None]
        for reads, side in ((keys, scales.keys), (values, scales.values))
    )
    call = call._replace(
        codebook=codecs.codebook(q.device),
        key_token_scales=of_keys or None,
        value_token_scales=of_values or None,
        return_lse=True,
    )
    if of_keys:
        queries = _queries(q, [(codecs.keys[x.layer], x.heads) for x in keys.tensors], call.key_weights)
        several = queries if len(queries) > 1 else None
        call = call._replace(q=queries[0], q_sources=several, key_weights=None)
    sources = [(codecs.values[x.layer], x.heads) for x in values.tensors]
    if of_values and sources[0][0].codec.rotate:
        return _rotated(call, sources)
    return cached.attend(call)


def _queries(q: Tensor, sources: Sequence[Coded], weights: Tensor | None) -> Tensor:
    """(m, B, S, H, D): the query of each source of keys, in q's dtype."""
    found = []
    for j, (codec, heads) in enumerate(sources):
        x = q
        if weights is not None:
            x = (q.unflatten(2, (weights.shape[1], -1)) * weights[j].unsqueeze(1)).flatten(2, 3)
        found.append(codec.fold_query(x, heads))
    return torch.stack(found).to(q.dtype)


def _rotated(call: AttentionCall, sources: Sequence[Coded]) -> tuple[Tensor, Any]:
    """out and lse over rotated values: out is rotated back."""
    weights, bias, heads = call.value_weights, call.value_bias, call.keys[0].shape[2]
    call = call._replace(value_weights=None, value_bias=None)
    scales: Any = call.value_token_scales
    alike = weights is None and not sources[0][0].codec.balance  # the sum of the sources can be rotated
    total: Any = 0
    lse: Any = None
    for j in range(1 if alike else len(sources)):
        part = slice(None) if alike else slice(j, j + 1)
        out, lse = cached.attend(call._replace(values=call.values[part], value_token_scales=scales[part]))
        codec, which = sources[j]
        x = codec.from_frame(_by_group(out, heads), center=False, heads=which)
        total = total + (x if weights is None else x * weights[j])
    if bias is not None:
        total = total + _by_group((lse > -torch.inf).mT, heads).unsqueeze(-1) * bias
    return total.transpose(2, 3).flatten(2, 3).to(call.q.dtype), lse


def _by_group(x: Tensor, heads: int) -> Tensor:
    """(B, S, H, ...) as (B, S, group, g, ...), so that tensors (g, D) fit."""
    return x.unflatten(2, (heads, -1)).transpose(2, 3)
