"""Attention over coded caches in one pass: what decoding token by token would compute, for every row.

The row at position p sees the sequence as it is stored with p + 1 tokens: the coded ones of
``CodecPlan.coded_tokens(p + 1)`` decoded, the others raw. With raw(p, t) whether token t is raw,

    s = where(raw, q . k, q . k^),   out = (p raw) V + (p (1 - raw)) V^

where k^ and V^ are decoded. Where codes are local to a token this is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkv_ext.cache.codec.codec_plan import CodecPlan
from fusedkv_ext.cache.codec.tensor_codec import TensorCodec

__all__ = ["coded_attention", "decoded"]

_ROWS = 256  # of a block


def decoded(codec: TensorCodec | None, x: Tensor, plan: CodecPlan) -> Tensor:
    """x (B, T, g, D) after coding; tokens that no row reads as codes may be unchanged."""
    if codec is None:
        return x
    coded = plan.coded_tokens(x.shape[1])
    y = x.clone()
    rows = slice(coded.start, coded.stop)
    y[:, rows] = codec.decode(codec.encode(x[:, rows]), x.dtype)
    return y


def coded_attention(
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    plan: CodecPlan,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of the last S tokens, (B, S, H, D), float32 or float64.

    Args:
        q: (B, S, H, D).
        keys: Raw and decoded, each (B, T, G, D).
        values: Raw and decoded, each (B, T, G, D).
        plan: Says which tokens are coded.
        scale: Softmax scale.
        window: Tokens that a row sees, itself included; None for all.
    """
    S, T, G = q.shape[1], keys[0].shape[1], keys[0].shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4) * scale  # (B, G, group, S, D)
    k, kc, v, vc = (x.to(wide).permute(0, 2, 1, 3).unsqueeze(2) for x in (*keys, *values))  # (B, G, 1, T, D)
    outs = []
    token = torch.arange(T, device=q.device)
    for first in range(0, S, _ROWS):
        x = rows[..., first : first + _ROWS, :]
        position = torch.arange(T - S + first, T - S + first + x.shape[-2], device=q.device)
        stop = int(position[-1]) + 1
        ends = torch.tensor([plan.coded_tokens(p + 1).stop for p in position.tolist()], device=q.device)
        begin, sinks = min(int(ends[0]), stop), min(plan.sinks, stop)
        s = x @ kc[..., :stop, :].mT
        s[..., :sinks] = x @ k[..., :sinks, :].mT
        raw = token[begin:stop] >= ends[:, None]
        s[..., begin:] = torch.where(raw, x @ k[..., begin:stop, :].mT, s[..., begin:])
        hidden = token[:stop] > position[:, None]
        if window is not None:
            hidden |= token[:stop] <= position[:, None] - window
        p = s.masked_fill_(hidden, -torch.inf).softmax(-1)
        out = p @ vc[..., :stop, :]
        out += p[..., begin:] * raw @ (v - vc)[..., begin:stop, :]
        inner = min(sinks, begin)
        out += p[..., :inner] @ (v - vc)[..., :inner, :]
        outs.append(out)
    return torch.cat(outs, dim=-2).permute(0, 3, 1, 2, 4).flatten(2, 3)
