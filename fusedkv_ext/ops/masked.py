"""Attention under a mask or bias of the caller's, ``attn_mask`` of torch's SDPA.

The mask is combined with the bounds of the call and its documents, for some rows at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.scores import log_sum_exp, score_attention
from fusedkv_ext.ops.sdpa import sdpa_with_mask
from fusedkv_ext.ops.sizes import chunks
from fusedkv_ext.ops.visibility import visible

__all__ = ["masked_attention"]

_ROWS = 512  # whose mask is made at a time


def masked_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Attention over one source of keys and values, under the call's ``attn_mask``. Differentiable.

    Returns:
        (B, S, H, Dv) in q's dtype, and (B, H, S) float32 if the call returns it. Fully masked rows give zeros
        and -inf.
    """
    if call.adjusted:
        return score_attention(call)
    mask = call.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        call = call._replace(attn_mask=mask.to(call.q.dtype))  # as SDPA adds it
    parts = [_rows(call, first, end) for first, end in chunks(0, call.q.shape[1], _ROWS) or [(0, 0)]]
    return torch.cat(parts, dim=1), log_sum_exp(call) if call.return_lse else None


def _rows(call: AttentionCall, first: int, end: int) -> Tensor:
    """The rows first..end - 1."""
    T = call.keys[0].shape[1]
    rows = call._replace(q=call.q[:, first:end])
    if T == 0:  # an empty sum keeps its place in the graph
        v = call.values[0]
        return (rows.q[..., :0].sum(-1, keepdim=True) + v.sum()).expand(*rows.q.shape[:3], v.shape[3])
    bias = _bias(call, first, end)
    blind = (bias == -math.inf).all(dim=-1, keepdim=True)
    # A fully masked row sees all tokens first and gives zeros afterwards, to keep NaN out of its gradient.
    safe = bias.masked_fill(blind, 0)
    zeros = blind.expand(*blind.shape[:2], end - first, 1).transpose(1, 2)
    return sdpa_with_mask(rows, safe).masked_fill(zeros, 0)


def _bias(call: AttentionCall, first: int, end: int) -> Tensor:
    """What is added to the scores of some rows, -inf where a key is hidden: broadcasts to (B, H, rows, T)."""
    mask, documents = call.attn_mask, call.document_ids
    assert mask is not None
    S, T = call.q.shape[1], call.keys[0].shape[1]
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[:, :, first:end] if mask.shape[2] != 1 or S == 1 else mask
    position = first + T - S
    seen = visible(end - first, T, position, call.left, call.right, call.q.device)[None, None]
    if documents is not None:
        own = documents[:, position : position + end - first, None] == documents[:, None, :]
        seen = seen & own[:, None]
    if mask.dtype == torch.bool:
        seen = seen & mask
        return torch.zeros_like(seen, dtype=call.q.dtype).masked_fill(~seen, -math.inf)
    return mask.masked_fill(~seen, -math.inf)
