"""The public operations.

Shapes: B batch, S query length, T key/value length, H query heads, G key/value heads (H a multiple of G), D
head dim, m sources (1 to 32), P pages. The layout is that of flash-attn: q (B, S, H, D), k and v (B, T, G,
D). The last dim is contiguous, other strides are free.

Kernels take head dims that are multiples of 8 up to 256 (``dispatch.native_head_dim``). All operations take
other head dims too, on every device, but slower: attention then fuses first and calls torch's SDPA.

FusedKV, arXiv 2512.03870: K_i = sum_j a_ij (.) K_j and V_i = sum_j b_ij (.) V_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fusedkv_ext.ops import cached, checks, debug, fuse
from fusedkv_ext.ops.call import (
    AttentionCall,
    append_call,
    attention_call,
    cached_attention_call,
    packed_call,
    take_code_inputs,
)
from fusedkv_ext.ops.checks import Tensors
from fusedkv_ext.ops.codes import EncodeOptions
from fusedkv_ext.ops.debug import debug_checks
from fusedkv_ext.ops.dispatch import folds_dense
from fusedkv_ext.ops.kvcache_args import FlashOptions, attend_with_options, cache_state
from fusedkv_ext.ops.masked import masked_attention
from fusedkv_ext.ops.packing import Documents
from fusedkv_ext.ops.sdpa import sdpa_attention_lse
from fusedkv_ext.ops.slots import slots_append_call
from fusedkv_ext.ops.varlen import Packing, document_attention, varlen_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing from Python 3.11 on

__all__ = [
    "FlashOptions",
    "append_kvcache",
    "debug_checks",
    "decode_schedule",
    "fuse_kv",
    "fuse_kv_backward",
    "fused_kv_attn_func",
    "fused_kv_attn_varlen_func",
    "fused_kv_attn_with_kvcache",
    "rope_append_kvcache",
]

_NO_WINDOW = (-1, -1)


def fuse_kv(sources: Tensors, weights: Tensor) -> Tensor:
    """``out[b, t, g, d] = sum_j weights[j, g, d] * sources[j][b, t, g, d]`` (FusedKV, arXiv 2512.03870).

    Differentiable in both arguments, in reverse and forward mode. The backward is deterministic and saves
    only these two.

    Args:
        sources: m tensors (B, T, G, D) of one shape and dtype: float32, bfloat16, float16 or float64.
        weights: Broadcastable to (m, G, D), any floating dtype.

    Returns:
        (B, T, G, D) in the sources' dtype, summed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: A shape, device or stride is wrong.
        TypeError: A type or dtype is wrong.
    """
    return fuse.fuse(*checks.check_fusion(sources, weights))


def fuse_kv_backward(
    grad: Tensor,
    sources: Tensors,
    weights: Tensor,
    *,
    grad_sources: Sequence[Tensor] | None = None,
    needs_weights: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of :func:`fuse_kv`, for callers that accumulate them over layers themselves.

    ``dsources[j] = weights[j] * grad``, and ``dweights[j]`` is the sum of ``grad * sources[j]`` over b and t
    (FusedKV, arXiv 2512.03870). A source that L layers fuse has L gradients. With ``grad_sources`` each is
    added to the buffers in place, in one pass and without a temporary. Two runs give the same bits. Autograd
    records nothing.

    Args:
        grad: (B, T, G, D), the gradient of fuse_kv's result, in the sources' dtype.
        sources: As in :func:`fuse_kv`.
        weights: As in :func:`fuse_kv`.
        grad_sources: m contiguous buffers (B, T, G, D), float32 or the sources' dtype, to which the sources'
            gradients are added. They share no memory with each other or with other arguments. If None, new
            tensors are returned.
        needs_weights: If False, the weights' gradient is None and the sources are not read.

    Returns:
        The m gradients of the sources (``grad_sources`` if given, else in the sources' dtype), and that of
        the weights in their own shape and dtype.

    Raises:
        ValueError: A shape, device or stride is wrong, or an argument has a forward-mode tangent.
        TypeError: A type or dtype is wrong.
    """
    grad = checks.check_tensor("grad", grad)
    sources, canonical = checks.check_fusion(sources, weights)
    needs_weights = checks.check_flag("needs_weights", needs_weights)
    inputs: dict[str, Any] = {"grad": grad, "sources": sources, "weights": canonical}
    checks.check_same_device(inputs)
    checks.check_no_tangent("fuse_kv_backward", inputs, "use fuse_kv with torch.func.vjp")
    detached = (grad.detach().contiguous(), [x.detach() for x in sources], canonical.detach())
    results: Any = None
    if grad_sources is not None:
        results = checks.as_tensors("grad_sources", grad_sources)
        checks.check_same_device({"grad": grad, "grad_sources": results})
        checks.check_no_grad("fuse_kv_backward", {"grad_sources": results}, "pass buffers that need none")
    grad_weights: Any
    results, grad_weights = fuse.fuse_backward(*detached, results, needs_weights)
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
    document_ids: Tensor | Documents | None = None,
    recompute_fusion: bool = False,
    softcap: float = 0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over K = sum_j a_j (.) K_j and V = sum_j b_j (.) V_j, for training and prefill.

    Differentiable in q, keys, values, both weights, sinks and slopes. Under autocast q, keys and values are
    cast to its dtype.

    The score of a row and a key is softmax_scale * (q . k). A soft cap and ALiBi change it, in this order.
    Then come mask and softmax. torch's SDPA has neither soft caps nor sinks. Calls with a soft cap, sinks or
    slopes that fuse first compute scores in float32, some rows at a time, and again in the backward. They
    cannot be differentiated twice.

    Args:
        q: (B, S, H, D) float32, bfloat16, float16 or float64.
        keys: m_k tensors (B, T, G, D), or one.
        values: m_v tensors (B, T, G, Dv), or one; m_v need not be m_k.
        key_weights: Broadcastable to (m_k, G, D); None: all ones.
        value_weights: Broadcastable to (m_v, G, Dv); None: all ones.
        softmax_scale: Default 1 / sqrt(D).
        causal: Whether a query row sees no later key. Row i has position i + T - S (bottom-right alignment).
        window_size: (left, right); the row at p sees keys p - left to p + right, -1 is unbounded.
        return_lse: Whether to return the log-sum-exp of the scores too.
        document_ids: (B, T) int32 or int64, the document of every key; the last S are those of the rows, so
            S <= T. A row sees keys of its own document only. Documents that are runs of tokens are computed
            one by one if the host may read the ids: on the CPU outside of graphs, or of ``Documents``
            (``ops.packing.read_documents``). Other ids make a mask.
        recompute_fusion: Whether the backward fuses K and V again instead of saving them. All gradients have
            the same bits. No effect under torch.compile and within other saved-tensor hooks, such as
            activation checkpointing, which choose what to save.
        softcap: If not 0.0, a score s becomes softcap * tanh(s / softcap) (Gemma 2, flash-attn).
        sinks: (H,), any floating dtype, or None. One more score per query head, with a value of zero: it adds
            to the denominator of the softmax and to the log-sum-exp alone (GPT-OSS).
        alibi_slopes: (H,) or (B, H), any floating dtype, or None. slope * |p - j| is subtracted from the
            score of the row at position p and key j (ALiBi, arXiv 2108.12409).
        attn_mask: A tensor that broadcasts to (B, H, S, T), as in torch's SDPA: boolean, False where a row
            does not see a key, or floating, added to the scores after soft cap and slopes, and then
            differentiable. SDPA adds it in q's dtype. Combined with ``causal``, ``window_size`` and
            ``document_ids``. Such calls fuse first.

    Returns:
        (B, S, H, Dv) in q's dtype; with ``return_lse`` also (B, H, S) float32, natural log, differentiable:
        its backward computes the scores again. Fully masked rows give zeros, and -inf or their sink.

    Raises:
        ValueError: A shape, device or stride is wrong.
        TypeError: A type or dtype is wrong.
    """
    recompute_fusion = checks.check_flag("recompute_fusion", recompute_fusion)
    call = attention_call(
        *(q, keys, values, key_weights, value_weights, softmax_scale, causal, window_size, return_lse),
        *(document_ids, softcap, sinks, alibi_slopes, attn_mask),
    )
    differentiates = _differentiates(call)
    q, keys, values = call.q, call.keys, call.values
    folds = document_ids is None and attn_mask is None and not differentiates
    if folds and folds_dense(q, keys, values, call.right, q.device.type):
        lengths = q.new_full(q.shape[:1], keys[0].shape[1], dtype=torch.int32)
        out, lse = call.fold(lengths)
        return (out, lse) if call.return_lse else out
    packs = call.packs_documents and not (call.return_lse and differentiates)  # varlen's lse has no gradient
    attend = document_attention if packs else sdpa_attention_lse
    if call.attn_mask is not None:
        attend = masked_attention
    return _fuse_once(call, attend, recompute_fusion and differentiates)


def _differentiates(call: AttentionCall) -> bool:
    """Whether an input may need a derivative. The log-sum-exp has no tangent: one is refused with it."""
    q, keys, values = call.q, call.keys, call.values
    if call.return_lse:
        scores = {"sinks": call.sinks, "alibi_slopes": call.alibi_slopes, "attn_mask": call.attn_mask}
        weights = {"key_weights": call.key_weights, "value_weights": call.value_weights}
        checks.check_no_tangent(
            "return_lse", {"q": q, "keys": keys, **weights, **scores}, "leave return_lse out"
        )
    optional = (call.key_weights, call.value_weights, call.sinks, call.alibi_slopes, call.attn_mask)
    return checks.may_differentiate(q, *keys, *values, *optional)


def _fuse_once(
    call: AttentionCall, attend: Callable[[AttentionCall], tuple[Tensor, Tensor | None]], recompute: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Fuses keys and values, then attends to them; ``recompute``: whether the backward fuses again."""
    k, v = fuse.fuse_both(*call.sides)
    recompute = recompute and not torch.compiler.is_compiling()
    with fuse.fused_recomputed(*call.sides, k, v) if recompute else nullcontext():
        fused = call.fused(call.q, k, v, call.document_ids)
        out, lse = attend(fused._replace(document_lengths=call.document_lengths, attn_mask=call.attn_mask))
    return (out, cast(Tensor, lse)) if call.return_lse else out


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
    recompute_fusion: bool = False,
    softcap: float = 0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fused_kv_attn_func` for B sequences of different lengths, one after another in one tensor.

    The layout and the names are those of flash-attn's ``flash_attn_varlen_func``. With one source and no
    weights both compute the same. Differentiable in q, keys, values and both weights.

    Keys and values are fused once. On CUDA with 16-bit elements, head dims up to 256, a positive scale and
    scores of products alone, torch's ``varlen_attn`` then runs FlashAttention, and the host reads nothing.
    All other calls attend per sequence, which on CUDA waits for the lengths. A graph of torch.compile cannot
    read lengths: where ``varlen_attn`` does not run, it has a mask of total_q x total_k elements.

    Args:
        q: (total_q, H, D) float32, bfloat16, float16 or float64.
        keys: m_k tensors (total_k, G, D), or one.
        values: m_v tensors (total_k, G, Dv), or one; m_v need not be m_k.
        key_weights, value_weights: As in :func:`fused_kv_attn_func`.
        cu_seqlens_q: (B + 1,) int32, from 0 to total_q: sequence b has the rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] - 1. A sequence may be empty.
        cu_seqlens_k: (B + 1,) int32, from 0 to total_k, the same of the tokens.
        max_seqlen_q, max_seqlen_k: Rows and tokens of the longest sequence, or more.
        softmax_scale, window_size, recompute_fusion, softcap, sinks, alibi_slopes: As in
            :func:`fused_kv_attn_func`.
        causal: Whether a query row sees no later key. Row i of a sequence with S rows and T tokens has
            position i + T - S (bottom-right alignment).
        return_lse: Whether to return the log-sum-exp of the scores too.

    Returns:
        (total_q, H, Dv) in q's dtype; with ``return_lse`` also (H, total_q) float32, natural log, without a
        gradient. Fully masked rows give zeros, and -inf or their sink.

    Raises:
        ValueError: A shape, device, stride or length is wrong. The contents of CUDA lengths are checked where
            they are read and under ``debug_checks``; else wrong ones give undefined results.
        TypeError: A type or dtype is wrong.
    """
    recompute_fusion = checks.check_flag("recompute_fusion", recompute_fusion)
    cu_seqlens_q, cu_seqlens_k = checks.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    options = (softmax_scale, causal, window_size, return_lse)
    scores = (softcap, sinks, alibi_slopes)
    call = packed_call(q, keys, values, key_weights, value_weights, *options, len(cu_seqlens_q) - 1, *scores)
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    checks.check_same_device({"q": call.q, **lengths})
    longest = (
        checks.check_length("max_seqlen_q", max_seqlen_q),
        checks.check_length("max_seqlen_k", max_seqlen_k),
    )
    packing = Packing(cu_seqlens_q, cu_seqlens_k, *longest)
    if debug.active:
        packing.read(call.q.shape[1], call.keys[0].shape[1])
    differentiates = _differentiates(call)
    attend = partial(varlen_attention, packing=packing)
    return _fuse_once(call, attend, recompute_fusion and differentiates)


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
    window_size: tuple[int, int] = _NO_WINDOW,
    return_lse: bool = False,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    host_seqlens: Sequence[int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softcap: float = 0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **flash: Unpack[FlashOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last S tokens of each sequence over its cache, for decoding.

    Two equal calls give the same bits. With many rows (``decode_max_rows``) and head dims of no kernel
    torch's SDPA computes, and its last bits may depend on the number of CPU threads. With few rows, and
    always in a CUDA graph, a CUDA call waits for nothing. It can be replayed with other lengths.

    Args:
        q: (B, S, H, D) float32, bfloat16 or float16, the LAST S tokens of each sequence. Rows before the
            start of a shorter sequence (left padding) give zeros and lse = -inf, or their sink. Or m_k of
            them.
        key_caches: m_k tensors (B, capacity, G, D), or (P, page_size, G, D) with a block_table, in q's dtype,
            or of codes: int8, float8_e4m3fn, or uint8 of two each (``ops.codes``).
        value_caches: m_v tensors, as key_caches with Dv for D, in any of these dtypes.
        key_weights, value_weights: As in :func:`fused_kv_attn_func`.
        cache_seqlens: (B,) int32 or int64, valid tokens of each sequence, those S included; or one int for
            all. None: contiguous caches are full. With ``k`` the lengths BEFORE its tokens, as flash-attn.
        block_table: (B, max_pages) int32 or int64, the page of each page_size tokens; unused entries hold
            anything. int32 avoids a copy, for ``cache_seqlens`` too.
        softmax_scale, window_size, return_lse: As in :func:`fused_kv_attn_func`.
        causal: As in :func:`fused_kv_attn_func`, but True by default.
        schedule: The result of :func:`decode_schedule` for the same lengths, S, H, G, capacity, left window
            and ``batch_invariant``, shared by all layers of a step. One for other lengths silently gives
            wrong results; ``debug_checks`` detects it. If None, it is computed for this call.
        batch_invariant: Whether a sequence gets the same bits in any batch, also of other CPU threads. Its
            splits are then not fitted to the batch, which costs more work on the GPU. As with ``return_lse``,
            calls with many rows then fold too, which is slow for prompts.
        host_seqlens: The numbers in cache_seqlens, if the host has them. With many rows a CUDA call then does
            not wait for the device. CUDA calls trust them; ``debug_checks`` compares.
        cu_seqlens_q: (B + 1,) int32, for sequences with different numbers of new tokens. q is then packed,
            (total_q, H, D), and sequence b has its rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1. If one
            has many rows, the host reads them. CUDA calls ignore rows out of range. Without ``schedule``.
        max_seqlen_q: The most rows of a sequence, with ``cu_seqlens_q`` only.
        softcap, sinks, alibi_slopes: As in :func:`fused_kv_attn_func`.
        **flash: Those of flash-attn, :class:`FlashOptions`, and of codes, :class:`CodeOptions`.

    Returns:
        (B, S, H, Dv) in q's dtype; with ``return_lse`` also (B, H, S) float32. Of packed queries
        (total_q, H, Dv) and (H, total_q). A sequence of length 0 gives zeros and -inf, or its sinks.

    Raises:
        ValueError: A shape, device, stride, length or page is wrong, or an input requires grad in grad mode
            (the operation is not differentiable).
        TypeError: A type or dtype is wrong.
    """
    sides = (key_caches, value_caches, key_weights, value_weights)
    options = (softmax_scale, causal, window_size, return_lse, schedule, batch_invariant, cu_seqlens_q)
    if not flash and _is_plain(options, softcap, host_seqlens, max_seqlen_q, sinks, alibi_slopes):
        if (out := cached.plain_step(q, *sides, cache_seqlens, block_table, softmax_scale)) is not None:
            return out
    query, coded = take_code_inputs(q, flash)
    state = cache_state(cache_seqlens, block_table, host_seqlens, query, key_caches, cu_seqlens_q, flash)
    rows = (max_seqlen_q, flash.get("left_padding", True), softcap, sinks, alibi_slopes)
    call = cached_attention_call(*(query, *sides, state, *options, *rows), coded)
    result, lse = attend_with_options(call, cache_seqlens, flash) if flash else cached.attend(call)
    if call.cu_seqlens_q is not None:
        result, lse = result.squeeze(0), None if lse is None else lse.squeeze(0)
    return (result, cast(Tensor, lse)) if call.return_lse else result


def _is_plain(options: tuple[Any, ...], softcap: object, *others: object) -> bool:
    """Whether all options of ``fused_kv_attn_with_kvcache`` but the scale have their defaults."""
    _, causal, window_size, return_lse, schedule, batch_invariant, cu_seqlens_q = options
    return (
        schedule is None
        and cu_seqlens_q is None
        and causal is True
        and return_lse is False
        and batch_invariant is False
        and window_size is _NO_WINDOW
        and (type(softcap) is int and softcap == 0)
        and all(x is None for x in others)
    )


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
    """How :func:`fused_kv_attn_with_kvcache` splits a step's work: computed once, shared by all layers.

    Calls that share a schedule must run one after another. It must be recomputed when lengths change.

    Args:
        cache_seqlens: (B,) int32, as the layers get it. Read on the device, so the host does not wait.
        query_length: S of the calls.
        num_heads: H of the calls.
        num_kv_heads: G of the calls.
        capacity: Tokens that a sequence can have: the caches' second dim, or page_size * max_pages.
        window_size, batch_invariant: As in the calls.

    Returns:
        An int32 tensor on the same device, to be passed on as it is. It is empty on the CPU, which needs
        none.

    Raises:
        ValueError: A size or shape is wrong.
        TypeError: A dtype is wrong.
    """
    checks.check_tensor("cache_seqlens", cache_seqlens)
    left, _ = checks.check_window(True, window_size)
    batch_invariant = checks.check_flag("batch_invariant", batch_invariant)
    sizes = (query_length, num_heads, num_kv_heads, capacity)
    return cached.make_schedule(cache_seqlens, *sizes, left, batch_invariant)


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
    **encode: Unpack[EncodeOptions],
) -> None:
    """Writes S new tokens into a cache, in place, at positions cache_seqlens - S to cache_seqlens - 1.

    With tables of angles the keys are rotated before they are stored (RoPE, arXiv 2104.09864). Use
    :func:`rope_append_kvcache` to rotate the queries of the same tokens in the same launch. Not
    differentiable.

    A CUDA token is not written if its length, its page or its row of the tables is out of range.

    Args:
        key, value: (B, S, G, D) and (B, S, Gv, Dv). Tokens at negative positions (left padding) are skipped.
        key_cache, value_cache: (B, capacity, G, D), or (P, page_size, G, D) with a block_table; key's dtype,
            or codes (``ops.codes``). They share no element with each other or with what is read; views of one
            tensor are fine.
        cache_seqlens: (B,) int32, lengths after the append; None only with a slot_mapping.
        block_table: (B, max_pages) int32, the page of each page_size tokens.
        rotary_cos, rotary_sin: (max_len, rotary_dim / 2); row p rotates the token at position p. rotary_dim
            is at most D, and further channels are copied. If None, keys are stored as they are.
        rotary_interleaved: Rotate pairs (2j, 2j + 1) instead of (j, j + rotary_dim / 2).
        slot_mapping: (total,) int64, where each token goes: page * page_size + offset, or row * capacity +
            position of a contiguous cache; -1 skips the token. key and value are then packed, (total, G, D)
            and (total, Gv, Dv), as in vLLM. There are no lengths, pages and tables. Slots differ.
        **encode: Arguments that encode tokens for a cache of codes, by :class:`EncodeOptions`.

    Raises:
        ValueError: A shape, device, stride, length or page is wrong, or an input requires grad in grad mode.
        TypeError: A type or dtype is wrong.
    """
    if slot_mapping is not None:
        others = {"cache_seqlens": cache_seqlens, "block_table": block_table}
        others |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        cached.append(slots_append_call(key, value, key_cache, value_cache, slot_mapping, others, encode))
        return
    tables = (cache_seqlens, block_table, rotary_cos, rotary_sin)
    call = append_call(key, value, key_cache, value_cache, *tables, rotary_interleaved, None, encode)
    cached.append(call)


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
    **encode: Unpack[EncodeOptions],
) -> Tensor:
    """:func:`append_kvcache` that rotates the queries of the same tokens too, in one launch.

    Args:
        query: (B, S, H, D) of key's dtype, any H.
        key, value, key_cache, value_cache: As in :func:`append_kvcache`.
        cache_seqlens, block_table, **encode: As in :func:`append_kvcache`.
        rotary_cos, rotary_sin, rotary_interleaved: As in :func:`append_kvcache`.

    Returns:
        The rotated queries, a new (B, S, H, D). Rows at negative positions are copied.

    Raises:
        ValueError: A shape, device, stride, length or page is wrong, or an input requires grad in grad mode.
        TypeError: A type or dtype is wrong.
    """
    checks.check_tensor("query", query)
    tables = (cache_seqlens, block_table, rotary_cos, rotary_sin)
    call = append_call(key, value, key_cache, value_cache, *tables, rotary_interleaved, query, encode)
    return cached.append(call)
