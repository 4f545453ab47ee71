"""The derivative of fuse_kv: dx_j = w_j (.) dout and dw_j = sum over tokens of dout (.) x_j.

Saves the sources, which the model keeps alive anyway, and the weights; never a fused tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext import ops  # noqa: F401  (registers torch.ops.fusedkv)


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: Tensor) -> None:
    sources, weights = inputs
    ctx.save_for_backward(weights, *sources)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
    weights, *sources = ctx.saved_tensors
    needs_sources, needs_weights = any(x.requires_grad for x in sources), weights.requires_grad
    grad_sources, grad_weights = torch.ops.fusedkv.fuse_kv_backward(
        grad.contiguous(), sources, weights, needs_sources, needs_weights
    )
    return (
        list(grad_sources.unbind(0)) if needs_sources else [None] * len(sources),
        grad_weights if needs_weights else None,
    )


torch.library.register_autograd("fusedkv::fuse_kv", _backward, setup_context=_setup_context)
