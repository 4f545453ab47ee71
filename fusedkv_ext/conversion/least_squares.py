"""Fusion weights in closed form: regularized least squares on the second moments of a text.

A layer reads keys k_j of its sources where the original model has its own key k. For each KV head the weights
a minimize

    E[ e^T M e ],   e = k - sum_j a_j (.) k_j

M = 1 gives the reconstruction error; M = E[q q^T] gives the squared error of the attention scores. For values
M = O^T O, with O the columns of the output projection that the query heads of this KV head use. That is the
squared error of the attention output in the residual stream. Tied weights (per RoPE pair, per head, over
heads) are solved for as one unknown.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedkv_ext.conversion.second_moments import SecondMoments
from fusedkv_ext.layers.fusion import FusedSegment, FusionWeights

__all__ = [
    "Quadratic",
    "explained",
    "fit",
    "metric_of",
    "output_metric",
    "quadratic",
    "regularized",
    "set_weights",
]

METRICS = ("score", "plain")


class Quadratic(NamedTuple):
    """x^T a x - 2 b^T x + c over the weights x of m sources, (m * D,): a squared error per token."""

    a: Tensor  # (m * D, m * D)
    b: Tensor  # (m * D,)
    c: Tensor  # ()

    def explained(self, weights: Tensor) -> float:
        """1 - error / variance at weights (m, D): 1 is exact, 0 is as bad as zeros."""
        x = weights.reshape(-1).to(self.a)
        return float(1 - (x @ self.a @ x - 2 * self.b @ x + self.c) / self.c)


def output_metric(o_proj: nn.Linear, head: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """O^T O over the query heads of one KV head, (D, D) float64."""
    columns = o_proj.weight.detach().double().cpu().unflatten(1, (num_kv_heads, -1, head_dim))[:, head]
    return torch.einsum("ohd,ohe->de", columns, columns)


def quadratic(
    second_moments: SecondMoments,
    side: str,
    head: int,
    layer: int,
    sources: tuple[int, ...],
    metric: Tensor,
    linear: Tensor | None = None,
) -> Quadratic:
    """The error of reconstructing one side of a layer from its sources, for one KV head.

    Args:
        second_moments: of the calibration text.
        side: "key" or "value".
        layer: the layer that is reconstructed.
        sources: the layers that it reads.
        head: the KV head.
        metric: (D, D) float64, symmetric.
        linear: (D, D), a map on the weighted sum of the sources, or None.
    """
    linear = torch.eye(second_moments.head_dim, dtype=torch.float64) if linear is None else linear
    across = linear.mT @ metric
    between = across @ linear
    a = [[second_moments.covariance(side, head, j, k) * between for k in sources] for j in sources]
    b = [(second_moments.covariance(side, head, j, layer) * across).sum(1) for j in sources]
    own = (second_moments.covariance(side, head, layer, layer) * metric).sum()
    return Quadratic(torch.cat([torch.cat(row, 1) for row in a]), torch.cat(b), own)


def regularized(a: Tensor, b: Tensor, ridge: float, start: Tensor) -> Tensor:
    """The x that minimizes x^T a x - 2 b^T x + s |x - start|^2, s = ridge * mean of the diagonal of a."""
    scale = a.diagonal().mean()
    strength = ridge * scale if scale else torch.ones_like(scale)  # every x has the same error: use start
    return torch.linalg.solve(a + strength * torch.eye(len(a), dtype=a.dtype), b + strength * start)


def metric_of(
    second_moments: SecondMoments, side: str, layer: int, head: int, o_proj: nn.Linear, metric: str = "score"
) -> Tensor:
    """M of one KV head, (D, D) float64.

    Args:
        second_moments: of the calibration text.
        o_proj: the output projection of the original's layer.
        side: "key" or "value".
        layer: the layer.
        head: the KV head.
        metric: "score" or "plain".

    Raises:
        ValueError: ``metric`` is neither of them.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if metric == "plain":
        return torch.eye(second_moments.head_dim, dtype=torch.float64)
    if side == "key":
        return second_moments.query_metric(layer, head)
    return output_metric(o_proj, head, second_moments.num_kv_heads, second_moments.head_dim)


@torch.no_grad()
def fit(
    fusion: FusionWeights,
    segment: FusedSegment,
    second_moments: SecondMoments,
    o_proj: nn.Linear,
    *,
    metric: str = "score",
    ridge: float = 1e-3,
) -> None:
    """Solves for the weights of one fused segment of a layer and sets them.

    Args:
        fusion: the fusion weights of the layer.
        segment: the segment.
        second_moments: of the calibration text.
        o_proj: the output projection of the original's layer.
        metric: "score" (the squared error of the scores; for values, of the attention output) or "plain".
        ridge: strength of the regularization towards the plan's initial weights (0 for random ones), times
            the mean of the diagonal. It keeps nearly equal sources from getting large weights of opposite
            signs.
    """
    errors = [
        quadratic(
            second_moments,
            segment.side,
            head,
            fusion.layer,
            segment.segment.sources,
            metric_of(second_moments, segment.side, fusion.layer, head, o_proj, metric),
        )
        for head in range(segment.start, segment.stop)
    ]
    set_weights(fusion, segment, errors, ridge)


@torch.no_grad()
def set_weights(
    fusion: FusionWeights, segment: FusedSegment, errors: list[Quadratic], ridge: float
) -> Tensor:
    """Sets the weights of one fused segment to the minimum of the errors of its heads.

    Args:
        fusion: the fusion weights of the layer.
        segment: the segment.
        errors: one for each KV head of the segment.
        ridge: see ``fit``.

    Returns:
        The effective weights, (heads, m, D) float64.

    Raises:
        ValueError: the solution is not finite.
    """
    sources = segment.segment.sources
    one = fusion.expansion(segment).double()  # (D, C): a row of a parameter to its channels
    basis = torch.block_diag(*[one] * len(sources))  # (m * D, m * C)
    start = torch.tensor(_initial(segment), dtype=torch.float64).repeat_interleave(one.shape[1])
    heads = len(errors)
    if segment.shared:  # one set of weights for all heads: their errors add up
        errors = [Quadratic(*(sum(parts) for parts in zip(*errors, strict=True)))]
    rows = []
    for a, b, _ in errors:
        a, b = basis.mT @ a @ basis, basis.mT @ b
        rows.append(regularized(a, b, ridge, start).view(len(sources), -1))
    found = torch.stack(rows, 1)  # (m, rows, C)
    if not torch.isfinite(found).all():
        raise ValueError(
            f"{segment.side} weights of layer {fusion.layer} must be finite, got NaN or infinity; "
            "calibrate on more or other text"
        )
    for name, weight in zip(segment.names, found / segment.fusion.multiplier, strict=True):
        fusion.get_parameter(name).copy_(weight)
    fusion.clear_cache()
    return (found @ one.mT).transpose(0, 1).expand(heads, -1, -1)


def _initial(segment: FusedSegment) -> tuple[float, ...]:
    init = segment.fusion.init
    return (0.0,) * len(segment.names) if isinstance(init, str) else init


def explained(
    second_moments: SecondMoments,
    side: str,
    layer: int,
    head: int,
    sources: tuple[int, ...],
    weights: Tensor | None,
    o_proj: nn.Linear,
    metric: str = "score",
) -> float:
    """The fraction of one head's variance that weights (m, D) explain; None means all ones."""
    error = quadratic(
        second_moments,
        side,
        head,
        layer,
        sources,
        metric_of(second_moments, side, layer, head, o_proj, metric),
    )
    if weights is None:
        weights = torch.ones(len(sources), second_moments.head_dim)
    return error.explained(weights)
