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

import torch
from torch import Tensor

from fusedkv_ext.ops import checks, debug
from fusedkv_ext.ops.call import AppendCall, AttentionCall
from fusedkv_ext.ops.dispatch import device_type_of, folds_cached, in_graph, native_head_dim
from fusedkv_ext.ops.fuse import fuse_cached, fuse_side
from fusedkv_ext.ops.native import run_op
from fusedkv_ext.ops.sdpa import sdpa_attention, sdpa_attention_lse
from fusedkv_ext.ops.sizes import always

__all__ = ["append", "attend", "attend_layer", "make_schedule"]


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


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Attention of the last S tokens of each sequence: out, and lse if the call wants it."""
    q, keys, values = call.q, call.keys, call.values
    if debug.active:
        checks.check_contents(call.seqlens, call.block_table, keys[0])
        _check_schedule(call)
    if _folds(call):
        return call.fold()
    if call.cu_seqlens_q is not None:
        return _attend_packed(call, call.cu_seqlens_q)
    if native_head_dim(q.shape[3], values[0].shape[3]):
        return _prefill(call), None
    return _gather(call)


def _folds(call: AttentionCall) -> bool:
    """Whether the native kernel runs the call."""
    q, keys, values = call.q, call.keys, call.values
    if call.return_lse or call.batch_invariant:
        return native_head_dim(q.shape[3], values[0].shape[3])
    return folds_cached(q, keys, values, device_type_of(q), call.query_length)


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
    q, bounds = call.q[0], cu_seqlens_q.tolist()
    counts = [end - begin for begin, end in itertools.pairwise(bounds)]
    if bounds[:1] != [0] or bounds[-1] != len(q) or not all(0 <= n <= call.max_seqlen_q for n in counts):
        raise ValueError(
            f"cu_seqlens_q must rise from 0 to {len(q)}, the tokens of q, in steps of at most max_seqlen_q = "
            f"{call.max_seqlen_q}, got {bounds}"
        )
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
        out[:, rows], own_lse = others.fold()
        if lse is not None:
            lse[:, :, rows] = own_lse
    return out, lse


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
    own = (torch.arange(tokens, device=q.device) >= tokens - lengths).int()
    padding = torch.arange(S, device=q.device) < S - lengths
    fused = call.fused(q, k, v, document_ids=own)
    out, lse = sdpa_attention_lse(fused)
    out = out.masked_fill(padding[:, :, None, None], 0)
    out = out.masked_fill(((lengths < 0) | (lengths > capacity))[:, :, None, None], math.nan)
    if lse is not None:
        nothing = lse.new_tensor(-math.inf) if call.sinks is None else call.sinks[:, None]
        lse = torch.where(padding[:, None], nothing, lse)
    return out, lse


def _prefill(call: AttentionCall) -> Tensor:
    """Fuses the tokens that some row sees, once, then attends.

    Cached prefix and new tokens share one workspace, so no partial results are merged. One call for equal
    lengths; else one per sequence, in a workspace of one sequence.
    """
    lengths = _lengths(call)
    call.check()
    if len(set(lengths)) == 1:
        return _prefill_length(call, lengths[0])
    outs = [_prefill_length(call.sequences(slice(b, b + 1)), n) for b, n in enumerate(lengths)]
    return torch.cat(outs) if outs else call.q.new_zeros(*call.q.shape[:3], call.values[0].shape[3])


def _prefill_length(call: AttentionCall, length: int) -> Tensor:
    """As ``_prefill``, of sequences of one length."""
    q, S = call.q, call.q.shape[1]
    if not 0 < length <= call.capacity:  # only CUDA lengths come here unchecked
        return q.new_full((*q.shape[:3], call.values[0].shape[3]), 0.0 if length == 0 else math.nan)
    new = min(S, length)
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
