"""Attention over parts of the keys, put together: what cascades, shared prefixes and split caches need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedkv_ext.ops import checks

__all__ = ["merge_state"]


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention of the same queries over each.

    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``, as
    FlashInfer's ``merge_state``; our log-sum-exp is natural. Sums are float32, float64 for float64. A state
    with lse = -inf has no keys: its out is not read. Differentiable in all four.

    Args:
        out_a, out_b: (B, S, H, Dv) float32, bfloat16, float16 or float64, or packed (total_q, H, Dv).
        lse_a, lse_b: (B, H, S) float32, or packed (H, total_q), from ``return_lse``.
        out: A tensor that is filled and returned instead of a new one, ``out_a`` if you like. Not where an
            input needs a gradient.

    Returns:
        out in the dtype of ``out_a``, and lse in float32, in the shapes of the arguments. Where both states
        are empty, zeros and -inf.

    Raises:
        ValueError: A shape or device is wrong.
        TypeError: A type or dtype is wrong.
    """
    states = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    _check(states)
    if out is not None:
        checks.check_out(out, out_a.shape, out_a)
        checks.check_no_grad("merge_state with out", states, "leave out away")
    top = torch.maximum(lse_a, lse_b).detach()
    empty = top == -math.inf
    top = top.masked_fill(empty, 0)
    weights = [(lse - top).exp() for lse in (lse_a, lse_b)]
    total = (weights[0] + weights[1]).masked_fill(empty, 1)
    sums = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    merged: Tensor | None = None
    for part, lse, weight in ((out_a, lse_a, weights[0]), (out_b, lse_b, weights[1])):
        # (B, H, S) -> (B, S, H, 1)
        share, absent = ((x.transpose(-1, -2).unsqueeze(-1)) for x in (weight / total, lse == -math.inf))
        part = part.to(sums).masked_fill(absent, 0) * share
        merged = part if merged is None else merged + part
    assert merged is not None
    result = merged.to(out_a.dtype) if out is None else out.copy_(merged)
    return result, (top + total.log()).masked_fill(empty, -math.inf)


def _check(states: dict[str, Tensor]) -> None:
    out_a, out_b = states["out_a"], states["out_b"]
    for name, x in states.items():
        checks.check_tensor(name, x)
    checks.check_same_device(states)
    if out_a.dtype not in (*checks.ATTENTION_DTYPES, torch.float64):
        raise TypeError(f"out_a must be float32, bfloat16, float16 or float64, got {out_a.dtype}")
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b must be {out_a.dtype} as out_a, got {out_b.dtype}")
    if out_a.dim() not in (3, 4):
        raise ValueError(f"out_a must be (B, S, H, Dv) or (total_q, H, Dv), got {tuple(out_a.shape)}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b must have shape {tuple(out_a.shape)} as out_a, got {tuple(out_b.shape)}")
    *batch, rows, heads, _ = out_a.shape
    for name in ("lse_a", "lse_b"):
        lse = states[name]
        if lse.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {lse.dtype}")
        if lse.shape != (*batch, heads, rows):
            expected = (*batch, heads, rows)
            raise ValueError(f"{name} must have shape {expected} as out_a says, got {tuple(lse.shape)}")
