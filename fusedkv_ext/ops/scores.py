"""What torch's SDPA does not compute: soft cap, ALiBi and sinks, and the log-sum-exp with its gradient.

Keys and values are fused once. Scores are float32 (float64 for float64), computed for some query rows at a
time by torch's operations. Autograd keeps no scores: the backward computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.checks import in_forward_mode
from fusedkv_ext.ops.sizes import chunks
from fusedkv_ext.ops.visibility import fully_masked_rows, seen_tokens, visible

__all__ = ["log_sum_exp", "score_attention"]

_MOST_SCORES = 2**24  # of a chunk of rows: 64 MiB in float32
_MOST_ROWS = 512


def score_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Attention over one source of keys and values, without weights and without a cache.

    Differentiable in q, keys, values, sinks, slopes and a floating mask, once in reverse mode. In forward
    mode and in graphs of torch.compile autograd sees the operations themselves.

    Returns:
        (B, S, H, Dv) in q's dtype, and None or (B, H, S) float32. Rows that see no token give zeros, and -inf
        or their sink.
    """
    scores = (call.sinks, call.alibi_slopes, call.document_ids, _mask(call), _options(call))
    inputs = (call.q, call.keys[0], call.values[0], *scores)
    with _float32(call.q):
        out, lse = _attend(*inputs) if _traces() else _ScoreAttention.apply(*inputs)
    return out, lse.float() if call.return_lse else None


def log_sum_exp(call: AttentionCall, known: Tensor | None = None) -> Tensor:
    """The natural log-sum-exp of the scores of a call without soft cap, sinks and slopes.

    Differentiable in q, keys and a floating mask, as ``score_attention``.

    Args:
        call: One source of keys, without weights and without a cache.
        known: (B, H, S) float32, if a kernel has computed it. Then the backward alone computes scores.

    Returns:
        (B, H, S) float32; -inf for rows that see no token.
    """
    inputs = (call.q, call.keys[0], call.document_ids, _mask(call), _options(call))
    with _float32(call.q):
        lse = _log_sum_exp(*inputs) if _traces() else _LogSumExp.apply(*inputs, known)
    return lse.float()


def _traces() -> bool:
    """Whether autograd sees the operations themselves."""
    return torch.compiler.is_compiling() or in_forward_mode()


def _mask(call: AttentionCall) -> Tensor | None:
    """The mask of a call with four dims."""
    mask = call.attn_mask
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


class _Options(NamedTuple):
    """The fields of a call that are no tensors."""

    scale: float
    left: int
    right: int
    softcap: float


def _options(call: AttentionCall) -> _Options:
    return _Options(call.scale, call.left, call.right, call.softcap)


class _Chunk(NamedTuple):
    """Query rows first..end - 1 and the tokens begin..stop - 1 that they see."""

    first: int
    end: int
    begin: int
    stop: int


def _float32(q: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which would multiply float32 in its own dtype."""
    device_type = q.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _sum_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _chunks(q: Tensor, k: Tensor, options: _Options) -> Iterator[_Chunk]:
    """The rows that see a token, in chunks; if there are none, one chunk without rows."""
    (B, S, H, _), T = q.shape, k.shape[1]
    masked, size = fully_masked_rows(S, T, options.right), _MOST_ROWS
    if not torch.compiler.is_compiling():
        size = max(min(size, _MOST_SCORES // max(B * H * T, 1)), 16)
    for first, end in chunks(masked, S, size) or [(S, S)]:
        yield _Chunk(first, end, *seen_tokens(first + T - S, end - first, T, options.left, options.right))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, rows, H, D) as (B, G, H / G * rows, D): the rows of one KV head together."""
    return x.unflatten(2, (groups, x.shape[2] // groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _by_row(x: Tensor, heads: int, rows: int) -> Tensor:
    """The inverse of ``_by_group``, with H = ``heads``."""
    return x.unflatten(2, (heads // x.shape[1], rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _distances(chunk: _Chunk, q: Tensor, k: Tensor) -> Tensor:
    """|position of the row - token|, (rows, tokens)."""
    position = torch.arange(chunk.first, chunk.end, device=q.device)[:, None] + (k.shape[1] - q.shape[1])
    distance = (position - torch.arange(chunk.begin, chunk.stop, device=q.device)).abs()
    return distance.to(_sum_dtype(q))


def _scores(
    chunk: _Chunk,
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    slopes: Tensor | None,
    documents: Tensor | None,
    mask: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    """The scores of a chunk, (B, H, rows, tokens), -inf where masked; and tanh(s / softcap) with a cap.

    ``keys``: (B, G, T, D), k in the dtype of sums. ``mask`` broadcasts to (B, H, S, T).
    """
    rows, H = chunk.end - chunk.first, q.shape[2]
    queries = _by_group(q[:, chunk.first : chunk.end].to(keys.dtype) * options.scale, keys.shape[1])
    scores = queries @ keys[:, :, chunk.begin : chunk.stop].transpose(2, 3)
    scores = scores.unflatten(2, (H // keys.shape[1], rows)).flatten(1, 2)
    tanh = None
    if options.softcap:
        tanh = torch.tanh(scores / options.softcap)
        scores = options.softcap * tanh
    if slopes is not None:
        scores = scores - slopes[..., None, None] * _distances(chunk, q, k)
    position = chunk.first + k.shape[1] - q.shape[1]
    tokens = chunk.stop - chunk.begin
    seen = visible(rows, tokens, position - chunk.begin, options.left, options.right, q.device)
    if documents is not None:
        own = documents[:, position : position + rows, None]
        seen = (seen & (own == documents[:, None, chunk.begin : chunk.stop]))[:, None]
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & _of_chunk(mask, chunk)
    elif mask is not None:
        scores = scores + _of_chunk(mask, chunk).to(scores.dtype)
    return scores.masked_fill(~seen, -math.inf), tanh


def _of_chunk(mask: Tensor, chunk: _Chunk) -> Tensor:
    """The part of a mask that broadcasts to (B, H, S, T) which broadcasts to (B, H, rows, tokens)."""
    mask = mask if mask.shape[2] == 1 else mask[:, :, chunk.first : chunk.end]
    return mask if mask.shape[3] == 1 else mask[..., chunk.begin : chunk.stop]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    documents: Tensor | None,
    mask: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """out (B, S, H, Dv) and lse (B, H, S) in the dtype of sums."""
    keys, values = (x.to(_sum_dtype(q)).transpose(1, 2) for x in (k, v))
    G, (B, _, H, _) = keys.shape[1], q.shape
    outs, lses = [], []
    for chunk in _chunks(q, k, options):
        scores, _ = _scores(chunk, q, k, keys, slopes, documents, mask, options)
        lse = _lse(scores, mask)
        if sinks is not None:
            lse = _with_sinks(lse, sinks)
        probabilities = _probabilities(scores, lse).unflatten(1, (G, H // G)).flatten(2, 3)
        out = probabilities @ values[:, :, chunk.begin : chunk.stop]
        outs.append(_by_row(out, H, chunk.end - chunk.first).to(q.dtype))
        lses.append(lse)
    masked = fully_masked_rows(q.shape[1], k.shape[1], options.right)
    if masked:
        outs.insert(0, q.new_zeros(B, masked, H, v.shape[3]))
        none = keys.new_full((B, H, masked), -math.inf)
        lses.insert(0, none if sinks is None else sinks[:, None].expand_as(none).to(none.dtype))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _log_sum_exp(
    q: Tensor, k: Tensor, documents: Tensor | None, mask: Tensor | None, options: _Options
) -> Tensor:
    """(B, H, S) in the dtype of sums."""
    keys = k.to(_sum_dtype(q)).transpose(1, 2)
    masked = fully_masked_rows(q.shape[1], k.shape[1], options.right)
    lses = [keys.new_full((q.shape[0], q.shape[2], masked), -math.inf)] if masked else []
    for chunk in _chunks(q, k, options):
        lses.append(_lse(_scores(chunk, q, k, keys, None, documents, mask, options)[0], mask))
    return torch.cat(lses, dim=2)


def _lse(scores: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, rows). A mask can leave a row without tokens."""
    if mask is None:
        return torch.logsumexp(scores, dim=-1)
    # Such a row has finite scores first, to keep NaN out of its gradient.
    empty = (scores == -math.inf).all(-1)
    return torch.logsumexp(scores.masked_fill(empty[..., None], 0), dim=-1).masked_fill(empty, -math.inf)


def _with_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """log(exp(lse) + exp(sink)), (B, H, rows). Where both are -inf the gradient is zero."""
    sinks = sinks[:, None].expand_as(lse)
    nothing = (lse == -math.inf) & (sinks == -math.inf)
    return torch.logaddexp(lse.masked_fill(nothing, 0), sinks.masked_fill(nothing, 0)).masked_fill(
        nothing, -math.inf
    )


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Zeros for a row whose scores and lse are -inf."""
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])


class _ScoreAttention(torch.autograd.Function):
    """``_attend`` that saves its inputs and its results, and no scores."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:-1], *output)
        ctx.options = inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        with _float32(grad_out):
            return _score_gradients(ctx, grad_out, grad_lse)


class _LogSumExp(torch.autograd.Function):
    """``_log_sum_exp`` that saves its inputs and its result, and no scores."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        known = inputs[-1]
        return _log_sum_exp(*inputs[:-1]) if known is None else known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4], output)
        ctx.options = inputs[4]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        with _float32(grad_lse):
            return _lse_gradients(ctx, grad_lse)


def _score_gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, slopes, documents, mask, out, lse = ctx.saved_tensors
    dtype, options, G = _sum_dtype(q), ctx.options, k.shape[2]
    keys, values = (x.to(dtype).transpose(1, 2) for x in (k, v))
    grad_q = torch.zeros_like(q, dtype=dtype)
    grad_keys, grad_values = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (keys, values))
    grad_sinks: Any = None if sinks is None else torch.zeros_like(sinks)
    grad_slopes: Any = None if slopes is None else torch.zeros_like(slopes)
    if sinks is not None:  # the log-sum-exp of rows without tokens
        masked = fully_masked_rows(q.shape[1], k.shape[1], options.right)
        grad_sinks += grad_lse[:, :, :masked].sum((0, 2))
    grad_mask: Any = torch.zeros_like(mask, dtype=dtype) if ctx.needs_input_grad[6] else None
    for chunk in _chunks(q, k, options):
        rows, tokens = slice(chunk.first, chunk.end), slice(chunk.begin, chunk.stop)
        heads = (q.shape[2] // G, chunk.end - chunk.first)
        scores, tanh = _scores(chunk, q, k, keys, slopes, documents, mask, options)
        probabilities = _probabilities(scores, lse[:, :, rows])
        grad_rows, out_rows = (x[:, rows].to(dtype) for x in (grad_out, out))
        delta = (grad_rows * out_rows).sum(-1).transpose(1, 2) - grad_lse[:, :, rows]  # (B, H, rows)
        if sinks is not None:
            of_sink = _probabilities(sinks[None, :, None, None], lse[:, :, rows])[..., 0]
            grad_sinks -= (of_sink * delta).sum((0, 2))
        by_group = _by_group(grad_rows, G)
        grouped = probabilities.unflatten(1, (G, heads[0])).flatten(2, 3)
        grad_values[:, :, tokens] += grouped.transpose(2, 3) @ by_group
        grad = (by_group @ values[:, :, tokens].transpose(2, 3)).unflatten(2, heads).flatten(1, 2)
        grad = probabilities * (grad - delta[..., None])
        if slopes is not None:
            grad_slope = -(grad * _distances(chunk, q, k)).sum((2, 3))
            grad_slopes += grad_slope if slopes.dim() == 2 else grad_slope.sum(0)
        if grad_mask is not None:
            part = _of_chunk(grad_mask, chunk)
            part += grad.sum_to_size(part.shape)
        if tanh is not None:
            grad = grad * (1 - tanh * tanh)
        _add_products(chunk, grad * options.scale, q, keys, grad_q, grad_keys)
    grad_k, grad_v = (x.transpose(1, 2).to(k.dtype) for x in (grad_keys, grad_values))
    grad_mask = None if grad_mask is None else grad_mask.to(mask.dtype)
    return grad_q.to(q.dtype), grad_k, grad_v, grad_sinks, grad_slopes, None, grad_mask, None


def _lse_gradients(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, documents, mask, lse = ctx.saved_tensors
    dtype, options = _sum_dtype(q), ctx.options
    keys = k.to(dtype).transpose(1, 2)
    grad_q = torch.zeros_like(q, dtype=dtype)
    grad_keys = torch.zeros(keys.shape, dtype=dtype, device=keys.device)
    grad_mask: Any = torch.zeros_like(mask, dtype=dtype) if ctx.needs_input_grad[3] else None
    for chunk in _chunks(q, k, options):
        rows = slice(chunk.first, chunk.end)
        scores, _ = _scores(chunk, q, k, keys, None, documents, mask, options)
        grad = _probabilities(scores, lse[:, :, rows]) * grad_lse[:, :, rows, None].to(dtype)
        if grad_mask is not None:
            part = _of_chunk(grad_mask, chunk)
            part += grad.sum_to_size(part.shape)
        _add_products(chunk, grad * options.scale, q, keys, grad_q, grad_keys)
    grad_mask = None if grad_mask is None else grad_mask.to(mask.dtype)
    return grad_q.to(q.dtype), grad_keys.transpose(1, 2).to(k.dtype), None, grad_mask, None, None


def _add_products(
    chunk: _Chunk, grad: Tensor, q: Tensor, keys: Tensor, grad_q: Tensor, grad_keys: Tensor
) -> None:
    """Adds what the gradient of the products q . k of a chunk, (B, H, rows, tokens), means for q and keys."""
    rows, tokens, G = slice(chunk.first, chunk.end), slice(chunk.begin, chunk.stop), keys.shape[1]
    grad = grad.unflatten(1, (G, q.shape[2] // G)).flatten(2, 3)
    grad_q[:, rows] = _by_row(grad @ keys[:, :, tokens], q.shape[2], chunk.end - chunk.first)
    grad_keys[:, :, tokens] += grad.transpose(2, 3) @ _by_group(q[:, rows].to(keys.dtype), G)
