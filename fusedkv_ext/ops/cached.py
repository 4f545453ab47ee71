"""Attention over a cache, on a checked call. There are three paths:

* fold: the native kernel reads the sources without fusing them. Few query rows, and all calls in a graph.
* prefill: many rows. The tokens that some row sees are fused once, then torch's SDPA attends, or
  ``score_attention`` with a soft cap, sinks or ALiBi.
* gather: head dims that no kernel takes. As prefill, for all sequences together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fusedkv_ext.ops import checks, debug
from fusedkv_ext.ops.call import AppendCall, AttentionCall
from fusedkv_ext.ops.dispatch import MAX_HEAD_DIM, device_type_of, folds_cached, in_graph, native_head_dim
from fusedkv_ext.ops.fuse import fuse_cached, fuse_side, tokens_as_pages
from fusedkv_ext.ops.masked import masked_attention
from fusedkv_ext.ops.native import run_op
from fusedkv_ext.ops.sdpa import sdpa_attention, sdpa_attention_lse
from fusedkv_ext.ops.sizes import always, host_reads
from fusedkv_ext.ops.varlen import Packing, varlen_attention

__all__ = ["append", "attend", "attend_layer", "make_schedule", "plain_step"]


def attend_layer(call: AttentionCall) -> Tensor:
    """``fused_kv_attn_with_kvcache`` for the layers of this package, which call it for every token.

    The caches are the package's own. The native operation still checks what it reads.

    Raises:
        ValueError: The query or a weight requires grad.
    """
    if checks.may_differentiate(call.q, call.key_weights, call.value_weights):
        inputs = {"q": call.q, "key_weights": call.key_weights, "value_weights": call.value_weights}
        checks.check_no_grad("attention over a cache", inputs, "decode under torch.no_grad()")
    if not debug.active and folds_cached(call.q, call.keys, call.values, device_type_of(call.q)):
        return call.fold()[0]  # nearly every call of a step: without another look at its options
    return attend(call)[0]


def plain_step(
    q: Any,
    keys: Any,
    values: Any,
    key_weights: Any,
    value_weights: Any,
    lengths: Any,
    block_table: Any,
    softmax_scale: Any,
) -> Tensor | None:
    """``fused_kv_attn_with_kvcache`` of few rows on the CPU without further options.

    Over a short cache the checks of all options take longer than attention. These are the few that make sure
    that the native operation, which checks the rest, can be called with the arguments as they are.

    Returns:
        None for all other calls: wrong ones, those that convert an argument, other paths and devices.
    """
    if type(keys) is not list or type(values) is not list or not (0 < len(keys) and 0 < len(values)):
        return None
    given = [x for x in (key_weights, value_weights, block_table) if x is not None]
    if type(q) is not Tensor or not checks.plain_on_cpu([q, lengths, *keys, *values, *given]):
        return None
    key, value = keys[0], values[0]
    if not q.dim() == key.dim() == value.dim() == 4 or q.dtype is not key.dtype:
        return None
    if lengths.dtype is not torch.int32 or (block_table is not None and block_table.dtype is not torch.int32):
        return None
    if not folds_cached(q, keys, values, "cpu"):
        return None
    for sources, weights in ((keys, key_weights), (values, value_weights)):
        if weights is not None and not (
            weights.dtype is torch.float32
            and weights.shape == (len(sources), *sources[0].shape[2:])
            and weights.is_contiguous()
        ):
            return None
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    elif type(softmax_scale) is not float:
        return None
    if debug.active or torch.compiler.is_compiling():
        return None
    arguments = (q, keys, values, key_weights, value_weights, lengths, block_table, softmax_scale)
    return run_op("attn_with_kvcache", *arguments, -1, 0, None, False)[0]


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Attention of the last S tokens of each sequence: out, and lse if the call wants it.

    The result is ``call.out`` only if the native kernel has written it.
    """
    q, keys, values = call.q, call.keys, call.values
    if debug.active:
        checks.check_contents(call.seqlens, call.block_table, keys[0])
        _check_schedule(call)
    if _folds(call):
        return _fold_unordered(call) if call.all_rows_see_all else call.fold()
    call = call._replace(out=None, workspace=None)  # the other paths make tensors of their own
    if call.cu_seqlens_q is not None:
        return _attend_packed(call, call.cu_seqlens_q)
    if native_head_dim(q.shape[3], values[0].shape[3]):
        return _prefill(call), None
    return _gather(call)


def _folds(call: AttentionCall) -> bool:
    """Whether the native kernel runs the call."""
    q, keys, values = call.q, call.keys, call.values
    if call.native_only:
        if not native_head_dim(q.shape[3], call.value_dim):
            raise ValueError(
                f"q and values must have head dims that are multiples of 8 up to {MAX_HEAD_DIM} with codes, "
                f"token scales, a query per source or a value_bias, got {q.shape[3]} and {call.value_dim}"
            )
        return True
    if call.return_lse or call.batch_invariant:
        return native_head_dim(q.shape[3], values[0].shape[3])
    return folds_cached(q, keys, values, device_type_of(q), call.query_length)


def _fold_unordered(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs the kernel where every row sees all tokens. Rows become heads of one row, the last token's.

    The kernel has zeros for rows before the first token, but positions mean nothing here.
    """
    if call.query_length == 0:
        return call.fold()
    if call.cu_seqlens_q is not None:
        return _fold_unordered_packed(call, call.cu_seqlens_q)
    (B, S, H, _), G = call.q.shape, call.keys[0].shape[2]

    def as_heads(q: Tensor) -> Tensor:
        return q.unflatten(-2, (G, H // G)).transpose(-4, -3).flatten(-4, -2).unsqueeze(-3)

    q, q_sources = as_heads(call.q), None if call.q_sources is None else as_heads(call.q_sources)
    sinks = call.sinks
    if sinks is not None:
        sinks = sinks.unflatten(0, (G, 1, H // G)).expand(-1, S, -1).flatten().contiguous()
    out, lse = call._replace(q=q, q_sources=q_sources, sinks=sinks, out=None).fold()
    out = out.squeeze(1).unflatten(1, (G, S, H // G)).transpose(1, 2).flatten(2, 3)
    return out, lse.reshape(B, G, S, H // G).transpose(2, 3).flatten(1, 2)


def _fold_unordered_packed(call: AttentionCall, cu_seqlens_q: Tensor) -> tuple[Tensor, Tensor]:
    """The same for packed queries, padded to ``max_seqlen_q`` rows. The host reads nothing."""
    if cu_seqlens_q.is_cpu and host_reads(cu_seqlens_q):
        _packed_bounds(call, cu_seqlens_q)
    q, most = call.q[0], call.max_seqlen_q
    begin = cu_seqlens_q[:-1].long()
    step = torch.arange(most, device=q.device)
    rows = (begin[:, None] + step).clamp(0, max(len(q) - 1, 0))
    padded = q[rows] if len(q) else q.new_zeros(*rows.shape, *q.shape[1:])
    q_sources = call.q_sources
    if q_sources is not None:
        shape = (len(q_sources), *padded.shape)
        q_sources = q_sources[:, 0][:, rows] if len(q) else q.new_zeros(shape)
    alone = call._replace(q=padded, q_sources=q_sources, cu_seqlens_q=None, max_seqlen_q=0)
    out, lse = _fold_unordered(alone)
    row = torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True).clamp(max=max(len(begin) - 1, 0))
    place = (row - begin[sequence]).clamp(0, max(most - 1, 0))
    return out[sequence, place][None], lse[sequence, :, place].transpose(0, 1)[None]


def append(call: AppendCall) -> Tensor:
    """``append_kvcache`` for :class:`KVCache`, which calls it in every layer; empty without a query.

    Raises:
        ValueError: An input requires grad.
    """
    if checks.may_differentiate(call.key, call.value, call.query):
        inputs = {"key": call.key, "value": call.value, "query": call.query}
        checks.check_no_grad("append_kvcache", inputs, "decode under torch.no_grad()")
    if debug.active:
        checks.check_contents(call.cache_seqlens, call.block_table, call.key_cache)
    return run_op("append_kvcache", *call)


def make_schedule(
    cache_seqlens: Tensor,
    query_length: int,
    num_heads: int,
    num_kv_heads: int,
    capacity: int,
    left: int,
    batch_invariant: bool,
) -> Tensor:
    """``decode_schedule`` of checked arguments."""
    sizes = (query_length, num_heads, num_kv_heads, capacity)
    return run_op("attn_schedule", cache_seqlens, *sizes, left, batch_invariant)


def _check_schedule(call: AttentionCall) -> None:
    """That a CUDA schedule was made for these lengths, which the kernel cannot see."""
    if call.schedule is None or not call.schedule.is_cuda:
        return
    (B, S, H, _), G = call.q.shape, call.keys[0].shape[2]
    seqlens, left, invariant = call.seqlens, call.left, call.batch_invariant
    fresh = make_schedule(seqlens, S, H, G, call.capacity, left, invariant)
    if not torch.equal(call.schedule[: B + 1], fresh[: B + 1]):
        raise ValueError("schedule must be for these lengths and options; call decode_schedule again")


def _attend_packed(call: AttentionCall, cu_seqlens_q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Packed queries of which some sequence has many rows: each such sequence alone, the others together.

    The host reads ``cu_seqlens_q``, and so waits for the device.
    """
    q, bounds = call.q[0], _packed_bounds(call, cu_seqlens_q)
    counts = [end - begin for begin, end in itertools.pairwise(bounds)]
    out = q.new_empty((1, *q.shape[:2], call.values[0].shape[3]))
    lse = q.new_empty((1, q.shape[1], q.shape[0]), dtype=torch.float32) if call.return_lse else None
    rest = torch.ones(len(q), dtype=torch.bool)  # rows of the others
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = call.sequences(slice(b, b + 1), q[None, begin:end])
        if begin == end or _folds(alone):
            continue
        counts[b], rest[begin:end] = 0, False
        out[:, begin:end], own_lse = attend(alone)
        if lse is not None and own_lse is not None:
            lse[:, :, begin:end] = own_lse
    if rest.any():
        rows = rest.nonzero()[:, 0].to(q.device)
        cu_seqlens = cu_seqlens_q.new_tensor([0, *itertools.accumulate(counts)])
        others = call._replace(q=q[None, rows], cu_seqlens_q=cu_seqlens, max_seqlen_q=max(counts))
        out[:, rows], own_lse = _fold_unordered(others) if call.all_rows_see_all else others.fold()
        if lse is not None:
            lse[:, :, rows] = own_lse
    return out, lse


def _packed_bounds(call: AttentionCall, cu_seqlens_q: Tensor) -> list[int]:
    """The numbers in ``cu_seqlens_q``, checked. Waits for the device that has them."""
    total, bounds = call.q.shape[1], cu_seqlens_q.tolist()
    steps = (end - begin for begin, end in itertools.pairwise(bounds))
    if bounds[:1] != [0] or bounds[-1] != total or not all(0 <= n <= call.max_seqlen_q for n in steps):
        raise ValueError(
            f"cu_seqlens_q must rise from 0 to {total}, the tokens of q, in steps of at most max_seqlen_q = "
            f"{call.max_seqlen_q}, got {bounds}"
        )
    return bounds


def _gather(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Fuses what rows see of all sequences, then attends to all of them together.

    Sequences end together, so the shorter ones begin later: their slots before that are a document of their
    own. If the host has no lengths, as in a graph, all slots of the caches are fused.
    """
    call.check()
    q, lengths, left = call.q, call.seqlens, call.left
    B, S = q.shape[:2]
    if call.batch_invariant and B > 1:
        alone = [call.sequences(slice(b, b + 1))._replace(batch_invariant=False) for b in range(B)]
        outs, lses = zip(*map(_gather, alone), strict=True)
        return torch.cat(outs), torch.cat(lses) if call.return_lse else None
    longest = capacity = call.capacity
    if not in_graph(q, q.device.type):
        longest = min(max(0, *_lengths(call)), capacity) if B else 0
    tokens = longest if left < 0 or always(longest <= S + left) else S + left
    if not always(tokens >= S):
        tokens = tokens + S  # rows before the first token
    k, v = (fuse_cached(*side, lengths, call.block_table, tokens) for side in call.sides)
    lengths = lengths[:, None]
    own = torch.arange(tokens, device=q.device) >= tokens - lengths
    if call.all_rows_see_all:
        out, lse = masked_attention(call.fused(q, k, v)._replace(attn_mask=own[:, None, None]))
        return out.masked_fill(((lengths < 0) | (lengths > capacity))[:, :, None, None], math.nan), lse
    padding = torch.arange(S, device=q.device) < S - lengths
    out, lse = sdpa_attention_lse(call.fused(q, k, v, document_ids=own.int()))
    out = out.masked_fill(padding[:, :, None, None], 0)
    out = out.masked_fill(((lengths < 0) | (lengths > capacity))[:, :, None, None], math.nan)
    if lse is not None:
        nothing = lse.new_tensor(-math.inf) if call.sinks is None else call.sinks[:, None]
        lse = torch.where(padding[:, None], nothing, lse)
    return out, lse


def _prefill(call: AttentionCall) -> Tensor:
    """Fuses the tokens that some row sees, once, then attends.

    Cached prefix and new tokens share one workspace, so no partial results are merged. One call for equal
    lengths, and for others where they are packed; else one per sequence, in a workspace of one sequence.
    """
    lengths = _lengths(call)
    call.check()
    if len(set(lengths)) == 1:
        return _prefill_length(call, lengths[0])
    if _packs(call) and lengths:
        return _prefill_packed(call, lengths)
    outs = [_prefill_length(call.sequences(slice(b, b + 1)), n) for b, n in enumerate(lengths)]
    return torch.cat(outs) if outs else call.q.new_zeros(*call.q.shape[:3], call.values[0].shape[3])


def _packs(call: AttentionCall) -> bool:
    """Whether sequences of different lengths are fused into one pack.

    That is where launches cost. On the CPU torch attends to one after the other anyway, and a workspace of
    one sequence is smaller. Head-major caches cannot be read with one page per token.
    """
    return call.q.is_cuda and all(tokens_as_pages(x) is not None for x in (*call.keys, *call.values))


def _prefill_packed(call: AttentionCall, lengths: Sequence[int]) -> Tensor:
    """As ``_prefill`` for any lengths: one fusion for each side and one call of varlen attention."""
    q, S = call.q, call.q.shape[1]
    exist = [0 < n <= call.capacity for n in lengths]  # only CUDA lengths come here unchecked
    seen = [n if known else 0 for n, known in zip(lengths, exist, strict=True)]
    rows = [S if n and call.all_rows_see_all else min(S, n) for n in seen]
    tokens = [n if call.left < 0 else min(n, r + call.left) for n, r in zip(seen, rows, strict=True)]
    total = sum(tokens)
    out = q.new_zeros((*q.shape[:3], call.values[0].shape[3]))
    if total:
        slots = _packed_slots(call, seen, tokens)[None]
        count = torch.full((1,), total, dtype=torch.int32, device=q.device)
        k, v = (
            fuse_cached([cast(Tensor, tokens_as_pages(x)) for x in caches], weights, count, slots, total)
            for caches, weights in call.sides
        )
        last = torch.tensor([S - r for r in rows], device=q.device)
        mine = torch.arange(S, device=q.device) >= last[:, None]  # the rows that attend, (B, S)
        whole = all(r == S for r in rows)
        index = None if whole else mine.flatten().nonzero_static(size=sum(rows))[:, 0]
        packed = q.flatten(0, 1) if index is None else q.flatten(0, 1)[index]
        cu_seqlens_q, cu_seqlens_k = (
            torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32, device=q.device)
            for side in (rows, tokens)
        )
        sizes = list(zip(rows, tokens, strict=True))
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max(rows), max(tokens), sizes)
        attended = varlen_attention(call.fused(packed[None], k, v), packing)[0]
        out = attended.unflatten(0, (-1, S)) if index is None else _placed(out, index, attended)
    wrong = [b for b, n in enumerate(lengths) if n and not exist[b]]
    return out.index_fill(0, torch.tensor(wrong, device=q.device), math.nan) if wrong else out


def _placed(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """out (B, S, H, Dv) with ``rows`` at the places ``index`` of its B * S rows."""
    return out.flatten(0, 1).index_copy_(0, index, rows).view_as(out)


def _packed_slots(call: AttentionCall, lengths: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The slots of the last ``tokens`` of each sequence, one after another: int32, -1 for no page."""
    device, (pages, size), table = call.q.device, call.keys[0].shape[:2], call.block_table
    counts, ends = (torch.tensor(x, device=device) for x in (tokens, lengths))
    total = sum(tokens)
    sequence = torch.repeat_interleave(torch.arange(len(tokens), device=device), counts, output_size=total)
    # The last token of a sequence has position ends - 1 and is the last of its part of the pack.
    position = torch.arange(total, device=device) + (ends - counts.cumsum(0))[sequence]
    if table is None:
        return (sequence * size + position).int()
    page = table[sequence, position // size].long()
    return torch.where((page >= 0) & (page < pages), page * size + position % size, -1).int()


def _prefill_length(call: AttentionCall, length: int) -> Tensor:
    """As ``_prefill``, of sequences of one length."""
    q, S = call.q, call.q.shape[1]
    if not 0 < length <= call.capacity:  # only CUDA lengths come here unchecked
        return q.new_full((*q.shape[:3], call.values[0].shape[3]), 0.0 if length == 0 else math.nan)
    new = S if call.all_rows_see_all else min(S, length)
    tokens = length if call.left < 0 else min(length, new + call.left)

    def last_tokens(caches: Sequence[Tensor], weights: Tensor | None) -> Tensor:
        if call.block_table is None:
            return fuse_side([x[:, length - tokens : length] for x in caches], weights)
        return fuse_cached(caches, weights, call.seqlens, call.block_table, tokens)

    k, v = (last_tokens(*side) for side in call.sides)
    out = sdpa_attention(call.fused(q[:, S - new :], k, v))
    return out if new == S else torch.nn.functional.pad(out, (0, 0, 0, 0, S - new, 0))


def _lengths(call: AttentionCall) -> Sequence[int]:
    """The lengths on the host. Waits for the device only if the caller has not given ``host_seqlens``."""
    seqlens, host = call.seqlens, call.host_seqlens
    if host is None or seqlens.device.type == "cpu" or debug.active:
        lengths = seqlens.tolist()
        if host is not None and list(host) != lengths:
            raise ValueError(f"host_seqlens must be {lengths} as cache_seqlens, got {list(host)}")
        return lengths
    if len(host) != len(seqlens):
        raise ValueError(f"host_seqlens must have {len(seqlens)} entries, got {len(host)}")
    return host
