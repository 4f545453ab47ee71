"""Attention over parts of the keys, put together: what cascades, shared prefixes and split caches need."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext.ops import checks, native
from fusedkv_ext.ops.dispatch import native_head_dim

__all__ = ["merge_state", "merge_states"]


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention of the same queries over each.

    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``, as
    FlashInfer's ``merge_state``; our log-sum-exp is natural. Sums are float32, float64 for float64. A state
    with lse = -inf has no keys: its out is not read. Differentiable in all four. Without gradients it is one
    native operation.

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
    if out_a.dim() == 3:
        merged, lse = merge_states([out_a[None], out_b[None]], [lse_a[None], lse_b[None]])
        merged, lse = merged[0], lse[0]
    else:
        merged, lse = merge_states([out_a, out_b], [lse_a, lse_b])
    return merged if out is None else out.copy_(merged), lse


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``merge_state`` of any number of states whose arguments are checked: (B, S, H, Dv) and (B, H, S) each.

    One native operation, or torch's: for gradients, float64, other head dims and devices without kernels.
    """
    if _is_native(outs, lses):
        merged, lse = native.run_op("merge_states", outs, lses)
        return merged, lse
    top = functools.reduce(torch.maximum, lses).detach()
    empty = top == -math.inf
    top = top.masked_fill(empty, 0)
    weights = [(lse - top).exp() for lse in lses]
    total = sum(weights[1:], weights[0]).masked_fill(empty, 1)
    sums = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    parts = []
    for part, lse, weight in zip(outs, lses, weights, strict=True):
        # (B, H, S) -> (B, S, H, 1)
        share, absent = ((x.transpose(-1, -2).unsqueeze(-1)) for x in (weight / total, lse == -math.inf))
        parts.append(part.to(sums).masked_fill(absent, 0) * share)
    return sum(parts[1:], parts[0]).to(outs[0].dtype), (top + total.log()).masked_fill(empty, -math.inf)


def _is_native(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    out = outs[0]
    if not native_head_dim(out.shape[3]) or out.dtype == torch.float64:
        return False
    if not (out.is_cpu or (out.is_cuda and native.cuda_error() is None)):
        return False
    return not checks.may_differentiate(*outs, *lses) and all(x.stride(3) == 1 for x in outs)


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
