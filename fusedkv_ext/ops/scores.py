"""Attention whose scores are more than scaled products: soft cap, ALiBi and sinks, in torch's operations.

torch's SDPA has none of them. Keys and values are fused once. Scores are float32 (float64 for float64),
computed for some query rows at a time. Autograd keeps no scores: the backward computes them again.
"""

from __future__ import annotations

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

__all__ = ["score_attention"]

_MOST_SCORES = 2**24  # of a chunk of rows: 64 MiB in float32
_MOST_ROWS = 512


def score_attention(call: AttentionCall, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Attention over one source of keys and values, without weights and without a cache.

    Differentiable in q, keys, values, sinks and slopes, once in reverse mode. In forward mode and in graphs
    of torch.compile autograd sees the operations themselves.

    Args:
        call: The call.
        mask: Boolean (B or 1, H or 1, S, T), True where a row sees a token, beside the call's own bounds and
            instead of its documents. Not with ``return_lse``. Rows that see no token give zeros.

    Returns:
        (B, S, H, Dv) in q's dtype, and None or (B, H, S) float32 without a gradient.
    """
    options = _Options(call.scale, call.left, call.right, call.softcap)
    allowed, masked = call.document_ids, None
    if mask is not None:  # such a row sees all tokens first, to keep NaN out of its gradient
        masked = ~mask.any(-1, keepdim=True)
        allowed = mask | masked
    inputs = (call.q, call.keys[0], call.values[0], call.sinks, call.alibi_slopes, allowed, options)
    keeps = torch.compiler.is_compiling() or in_forward_mode()
    with _float32(call.q):
        out, lse = _attend(*inputs) if keeps else _ScoreAttention.apply(*inputs)
    if masked is not None:
        out = out.masked_fill(masked.transpose(1, 2), 0)
    return out, lse.detach().float() if call.return_lse else None


class _Options(NamedTuple):
    """The fields of a call that are no tensors."""

    scale: float
    left: int
    right: int
    softcap: float


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


def _by_row(x: Tensor, rows: int) -> Tensor:
    """The inverse of ``_by_group``."""
    return x.unflatten(2, (x.shape[2] // rows if rows else 1, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)


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
    allowed: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    """The scores of a chunk, (B, H, rows, tokens), -inf where masked; and tanh(s / softcap) with a cap.

    ``keys``: (B, G, T, D), k in the dtype of sums. ``allowed``: document ids (B, T), or a mask that
    broadcasts to (B, H, S, T).
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
    mask = visible(rows, tokens, position - chunk.begin, options.left, options.right, q.device)
    if allowed is not None and allowed.dim() == 4:
        mask = mask & allowed[:, :, chunk.first : chunk.end, chunk.begin : chunk.stop]
    elif allowed is not None:
        own = allowed[:, position : position + rows, None]
        mask = (mask & (own == allowed[:, None, chunk.begin : chunk.stop]))[:, None]
    return scores.masked_fill(~mask, float("-inf")), tanh


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    allowed: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """out (B, S, H, Dv) and lse (B, H, S) in the dtype of sums; rows that see no token are first."""
    keys, values = (x.to(_sum_dtype(q)).transpose(1, 2) for x in (k, v))
    G, (B, _, H, _) = keys.shape[1], q.shape
    outs, lses = [], []
    for chunk in _chunks(q, k, options):
        scores, _ = _scores(chunk, q, k, keys, slopes, allowed, options)
        lse = torch.logsumexp(scores, dim=-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[:, None].expand_as(lse))
        probabilities = torch.exp(scores - lse[..., None]).unflatten(1, (G, H // G)).flatten(2, 3)
        out = probabilities @ values[:, :, chunk.begin : chunk.stop]
        outs.append(_by_row(out, chunk.end - chunk.first).to(q.dtype))
        lses.append(lse)
    masked = fully_masked_rows(q.shape[1], k.shape[1], options.right)
    if masked:
        outs.insert(0, q.new_zeros(B, masked, H, v.shape[3]))
        none = keys.new_full((B, H, masked), float("-inf"))
        lses.insert(0, none if sinks is None else sinks.detach()[:, None].expand_as(none))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


class _ScoreAttention(torch.autograd.Function):
    """``_attend`` that saves its inputs and its results, and no scores."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.options = inputs[6]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, slopes, allowed, out, lse = ctx.saved_tensors
        dtype, options, G = _sum_dtype(q), ctx.options, k.shape[2]
        keys, values = (x.to(dtype).transpose(1, 2) for x in (k, v))
        grad_q = torch.zeros_like(q, dtype=dtype)
        grad_keys, grad_values = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (keys, values))
        grad_sinks: Any = None if sinks is None else torch.zeros_like(sinks)
        grad_slopes: Any = None if slopes is None else torch.zeros_like(slopes)
        for chunk in _chunks(q, k, options):
            rows, tokens = slice(chunk.first, chunk.end), slice(chunk.begin, chunk.stop)
            size, heads = chunk.end - chunk.first, (q.shape[2] // G, chunk.end - chunk.first)
            scores, tanh = _scores(chunk, q, k, keys, slopes, allowed, options)
            probabilities = torch.exp(scores - lse[:, :, rows, None])
            grad_rows, out_rows = (x[:, rows].to(dtype) for x in (grad_out, out))
            delta = (grad_rows * out_rows).sum(-1).transpose(1, 2)  # (B, H, rows)
            if sinks is not None:
                grad_sinks -= (torch.exp(sinks[:, None] - lse[:, :, rows]) * delta).sum((0, 2))
            by_group, grouped = (
                _by_group(grad_rows, G),
                probabilities.unflatten(1, (G, heads[0])).flatten(2, 3),
            )
            grad_values[:, :, tokens] += grouped.transpose(2, 3) @ by_group
            grad = (by_group @ values[:, :, tokens].transpose(2, 3)).unflatten(2, heads).flatten(1, 2)
            grad = probabilities * (grad - delta[..., None])
            if slopes is not None:
                grad_slope = -(grad * _distances(chunk, q, k)).sum((2, 3))
                grad_slopes += grad_slope if slopes.dim() == 2 else grad_slope.sum(0)
            if tanh is not None:
                grad = grad * (1 - tanh * tanh)
            grad = grad.unflatten(1, (G, heads[0])).flatten(2, 3) * options.scale
            grad_q[:, rows] = _by_row(grad @ keys[:, :, tokens], size)
            grad_keys[:, :, tokens] += grad.transpose(2, 3) @ _by_group(q[:, rows].to(dtype), G)
        grad_k, grad_v = (x.transpose(1, 2).to(k.dtype) for x in (grad_keys, grad_values))
        return grad_q.to(q.dtype), grad_k, grad_v, grad_sinks, grad_slopes, None, None
