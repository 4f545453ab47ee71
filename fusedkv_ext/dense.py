"""Attention of many query rows: one fused K and V, then the best dense attention there is, torch's SDPA.

What SDPA does not say by itself is said here: bottom-right alignment, windows, blind rows, the lse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# With a window of W tokens a chunk of C query rows sees C + W keys: the others are not multiplied.
_WINDOW_CHUNK = 512


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> Tensor:
    """q (B, S, H, D), k (B, T, G, D), v (B, T, G, Dv) -> (B, S, H, Dv). Differentiable.

    Query row i stands at position p = i + T - S and sees keys p - left .. p + right; -1 is unbounded. Rows
    that see nothing give zeros.
    """
    S, T = q.shape[1], k.shape[1]
    # Only a prefix of the rows can be blind: p + right < 0.
    blind = min(max(S - T - right, 0), S) if right >= 0 else (S if T == 0 else 0)
    chunk = S - blind if left < 0 else max(_WINDOW_CHUNK, left)
    chunks = [
        _sdpa(q[:, i : min(i + chunk, S)], k, v, scale, i + T - S, left, right)
        for i in range(blind, S, max(chunk, 1))
    ]
    if blind:
        chunks.insert(0, q.new_zeros(q.shape[0], blind, q.shape[2], v.shape[3]))
    if not chunks:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, position: int, left: int, right: int) -> Tensor:
    """SDPA of rows that all see something; row 0 stands at ``position``."""
    S, T = q.shape[1], k.shape[1]
    begin = max(position - left, 0) if left >= 0 else 0
    end = min(position + S + right, T) if right >= 0 else T
    k, v = k[:, begin:end], v[:, begin:end]
    mask = None
    causal = right == 0 and left < 0 and position == 0 and S == T
    if not causal and (left >= 0 or right >= 0):
        mask = visible(S, end - begin, position - begin, left, right, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def visible(rows: int, tokens: int, position: int, left: int, right: int, device: torch.device) -> Tensor:
    """Boolean (rows, tokens): the keys that each row sees, row 0 standing at ``position``."""
    offset = (
        torch.arange(tokens, device=device)[None, :]
        - torch.arange(position, position + rows, device=device)[:, None]
    )
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    if left >= 0:
        mask = mask & (offset >= -left)
    if right >= 0:
        mask = mask & (offset <= right)
    return mask


def dense_lse(q: Tensor, k: Tensor, scale: float, left: int, right: int) -> Tensor:
    """The natural-log sum of exponentials of ``dense_attention``'s rows, (B, H, S) float32; no gradient."""
    (_, S, H, _), (T, G) = q.shape, k.shape[1:3]
    lse = []
    with torch.no_grad():
        keys = k.repeat_interleave(H // G, dim=2)
        sum_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        for i in range(0, S, _WINDOW_CHUNK):
            rows = q[:, i : i + _WINDOW_CHUNK]
            scores = torch.einsum("bshd,bthd->bhst", rows.to(sum_dtype) * scale, keys.to(sum_dtype))
            mask = visible(rows.shape[1], T, i + T - S, left, right, q.device)
            lse.append(torch.logsumexp(scores.masked_fill(~mask, float("-inf")), dim=-1).float())
        return torch.cat(lse, dim=2) if lse else q.new_zeros(q.shape[0], H, 0, dtype=torch.float32)
