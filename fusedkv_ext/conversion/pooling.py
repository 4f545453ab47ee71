"""Pooling of the heads of a trained projection, for layers that store part of their KV heads.

SkipV1Former (arXiv:2510.16807) converts a trained model by pooling every two value heads of a layer into one.
Here G heads become s heads for any s. The G heads are divided into s consecutive groups of nearly equal size,
and each group becomes one head. Let W_h be the rows of the value projection of head h. Let O_h be the columns
of the output projection that its query heads use. The methods are

    mean-v         mean of the W_h of a group; the paper's choice
    mean-vo        the same, and the O_h of a group become their mean
    top-norm-v     the head of the group whose W_h has the largest Frobenius norm
    top-norm-vo    the head of the group whose O_h W_h has the largest norm, with its O_h
    svd            the D strongest directions of the stacked W_h of a group
    own            no pooling: the heads that the layer continues to store, unchanged

The paper finds mean-v and mean-vo far better than the others before training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["POOLING", "pool"]

POOLING = ("mean-v", "mean-vo", "top-norm-v", "top-norm-vo", "svd", "own")


def pool(
    weight: Tensor, output: Tensor, stored: Sequence[int], num_kv_heads: int, method: str
) -> tuple[Tensor, Tensor]:
    """Pools the heads of a layer.

    Args:
        weight: (G * D, hidden), the value projection of all heads.
        output: (hidden, H * D), the output projection, with H / G query heads per KV head.
        stored: indices of the heads that are stored.
        num_kv_heads: G.
        method: the name of a method.

    Returns:
        The rows of the stored heads, (s * D, hidden), and the output projection, (hidden, H * D), in the
        dtypes of the arguments.

    Raises:
        ValueError: ``method`` is unknown.
    """
    if method not in POOLING:
        raise ValueError(f"pooling must be one of {', '.join(POOLING)}, got {method!r}")
    # (G, D, hidden) and (hidden, G, H / G, D)
    rows = weight.detach().unflatten(0, (num_kv_heads, -1)).double()
    columns = output.detach().unflatten(1, (num_kv_heads, -1, rows.shape[1])).double()
    new = columns.clone()
    pooled = []
    for place, run in zip(stored, _runs(num_kv_heads, len(stored)), strict=True):
        if method == "own":
            pooled.append(rows[place])
        elif method.startswith("mean"):
            pooled.append(rows[run].mean(0))
            if method == "mean-vo":
                new[:, place] = columns[:, run].mean(1)
        elif method == "svd":
            pooled.append(_strongest(rows[run]))
        else:
            norms = rows[run].flatten(1).norm(dim=1)
            if method == "top-norm-vo":
                norms = torch.stack([(columns[:, h].flatten(0, 1) @ rows[h]).norm() for h in run])
            best = run[int(norms.argmax())]
            pooled.append(rows[best])
            if method == "top-norm-vo":
                new[:, place] = columns[:, best]
    return torch.cat(pooled).to(weight.dtype), new.flatten(1).to(output.dtype)


def _runs(total: int, count: int) -> list[list[int]]:
    bounds = [round(i * total / count) for i in range(count + 1)]
    return [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]


def _strongest(rows: Tensor) -> Tensor:
    """(n, D, hidden) -> (D, hidden): the best approximation of the stack by D rows, scaled like one head."""
    n, dim = rows.shape[:2]
    u, s, vh = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False)
    first = u[:dim, :dim] * s[:dim]  # those directions in the basis of the group's first head
    return first @ vh[:dim] if n > 1 else rows[0]
