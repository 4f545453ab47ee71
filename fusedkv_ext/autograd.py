"""The derivative of fuse_kv, dx_j = w_j (.) dout and dw_j = sum over tokens of dout (.) x_j, and of that.

Saves the weights and, only where these need a gradient, the sources, which the model keeps alive anyway.
Never a fused tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext import ops  # noqa: F401  (registers torch.ops.fusedkv)

Gradients = tuple[list[Tensor | None], Tensor | None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    """inputs: sources and weights of one sum, or of two."""
    sides = [(inputs[i], inputs[i + 1]) for i in range(0, len(inputs), 2)]
    kept = [sources if weights.requires_grad else [] for sources, weights in sides]
    ctx.counts = [len(sources) for sources in kept]
    ctx.save_for_backward(*(weights for _, weights in sides), *(x for sources in kept for x in sources))
    ctx.set_materialize_grads(False)


def _gradients(
    op: Callable[..., tuple[Tensor, Tensor]],
    grad: Tensor | None,
    sources: Sequence[Tensor],
    weights: Tensor,
    needs_sources: Sequence[bool],
    needs_weights: bool,
) -> Gradients:
    m = len(needs_sources)
    of_sources: list[Tensor | None] = [None] * m
    of_weights: list[Tensor] = [weights] * m
    if grad is None or not (any(needs_sources) or needs_weights):
        return of_sources, None
    grad = grad.contiguous()
    # Sources with and without a gradient of their own apart: memory for gradients is for the former alone.
    for needed in (True, False):
        chosen = [j for j in range(m) if bool(needs_sources[j]) == needed]
        if not chosen or not (needed or needs_weights):
            continue
        # Only the weights' gradient is made of the sources: without it, any of their shape and dtype will do.
        own_sources = [sources[j] if needs_weights else grad for j in chosen]
        own_weights = weights if len(chosen) == m else torch.stack([weights[j] for j in chosen])
        grads, sums = op(grad, own_sources, own_weights, needed, needs_weights)
        if len(chosen) == m:
            return list(grads.unbind(0)) if needed else of_sources, sums if needs_weights else None
        for i, j in enumerate(chosen):
            of_sources[j] = grads[i] if needed else None
            of_weights[j] = sums[i] if needs_weights else weights
    return of_sources, torch.stack(of_weights) if needs_weights else None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    grad, sources, weights, *_ = inputs
    ctx.save_for_backward(grad, weights, *sources)
    ctx.set_materialize_grads(False)


def register(namespace: str) -> None:
    """Gives fuse_kv, fuse_kv_pair and fuse_kv_backward of a namespace, "fusedkv" or another with the same
    schemas, their derivatives."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op = getattr(torch.ops, namespace).fuse_kv_backward.default
        saved = list(ctx.saved_tensors)  # read once: activation checkpointing gives them out once
        weights, saved = saved[: len(grads)], saved[len(grads) :]
        results: list[Any] = []
        for i, grad in enumerate(grads):
            sources = [saved.pop(0) for _ in range(ctx.counts[i])]
            needs = ctx.needs_input_grad[2 * i : 2 * i + 2]
            results += _gradients(op, grad, sources, weights[i], *needs)
        return tuple(results)

    def double_backward(ctx: Any, c: Tensor | None, d: Tensor | None) -> tuple[Any, ...]:
        """c (m, B, T, G, D) and d (m, G, D) arrive for w_j (.) dout and for the sums of dout (.) x_j."""
        native = getattr(torch.ops, namespace)
        grad, weights, *sources = ctx.saved_tensors
        needs_grad, needs_sources, needs_weights, *_ = ctx.needs_input_grad
        of_grad, of_sources, of_weights = [], [None] * len(sources), None
        if c is not None:
            of_grad.append(native.fuse_kv.default(list(c.unbind(0)), weights))
            if needs_weights:
                of_weights = native.fuse_kv_backward.default(grad, list(c.unbind(0)), weights, False, True)[1]
        if d is not None:
            of_grad.append(native.fuse_kv.default(sources, d.contiguous()))
            if any(needs_sources):
                of_sources = [native.fuse_kv.default([grad], x) for x in d.contiguous().split(1)]
        return sum(of_grad) if needs_grad and of_grad else None, of_sources, of_weights, None, None

    torch.library.register_autograd(
        f"{namespace}::fuse_kv_backward", double_backward, setup_context=_save_backward
    )
    for name in ("fuse_kv", "fuse_kv_pair"):
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=_save)


register("fusedkv")
