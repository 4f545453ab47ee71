"""fuse_kv with head dims that its kernels do not take.

The sum works channel by channel, so the channels of a token can be regrouped into heads of 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["from_eights", "fuse_backward_in_eights", "in_eights"]

_WIDTH = 8


def in_eights(tensors: Sequence[Tensor]) -> list[Tensor]:
    """(..., G, D) -> (..., ceil(G D / 8), 8), padded with zeros.

    A view if the heads of a token are contiguous and G D is a multiple of 8, else a copy.
    """
    return [_in_eights(x) for x in tensors]


def _in_eights(x: Tensor) -> Tensor:
    x = x.flatten(-2)
    missing = -x.shape[-1] % _WIDTH
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, _WIDTH))


def from_eights(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """The inverse of ``in_eights`` for a tensor that was (..., G, D): a view."""
    return x.flatten(-2)[..., : heads * head_dim].unflatten(-1, (heads, head_dim))


def fuse_backward_in_eights(
    backward: Callable[..., tuple[list[Tensor], Tensor]],
    grad: Tensor,
    sources: list[Tensor],
    weights: Tensor,
    buffers: list[Tensor] | None,
    needs_weights: bool,
) -> tuple[list[Tensor], Tensor]:
    """Runs ``backward``, which takes the other arguments, on regrouped channels.

    Returns:
        The gradients of the sources, new or added to ``buffers``, and that of the weights.
    """
    shape = sources[0].shape[2:]
    if grad.shape != sources[0].shape:
        raise ValueError(
            f"grad must have shape {tuple(sources[0].shape)} as sources[0], got {tuple(grad.shape)}"
        )
    for j, x in enumerate(buffers or ()):
        if x.shape != grad.shape or not x.is_contiguous():
            raise ValueError(
                f"grad_sources[{j}] must be a contiguous {tuple(grad.shape)}, got shape {tuple(x.shape)} and "
                f"strides {x.stride()}"
            )
    cut = None if buffers is None else in_eights(buffers)
    grad, weights = in_eights([grad, weights])
    results, of_weights = backward(grad, in_eights(sources), weights, cut, needs_weights)
    results, of_weights = [from_eights(x, *shape) for x in results], from_eights(of_weights, *shape)
    if buffers is None:
        return results, of_weights
    if math.prod(shape) % 8:  # the buffers were copied
        for buffer, result in zip(buffers, results, strict=True):
            buffer.copy_(result)
    return buffers, of_weights
