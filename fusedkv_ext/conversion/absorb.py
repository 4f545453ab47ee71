"""Linear maps on the sources of a layer, absorbed into its own projections. The cache does not change.

A reading layer i applies a linear map per KV head to the mix of its sources:

    values:  V_i ~ A (sum_j b_j (.) V_j)        absorbed into the output projection:  O (A v) = (O A) v
    keys:    K_i ~ Z (sum_j a_j (.) K_j)        absorbed into the query projection:   q . (Z k) = (Z^T q) . k

A is any D x D matrix. Z must be absorbed before RoPE, whose rotation R_m of position m stands between
projection and score. That is exact for one complex number z_p per RoPE pair p, a scaled 2 x 2 rotation:

    1. R_m and Z are both block diagonal, a complex number per pair: R_m multiplies pair p by e^{i m theta_p}.
    2. Complex numbers commute: Z^T R_m = R_m Z^T, where Z^T multiplies by the conjugate of z_p.
    3. So (R_m q)^T Z (R_n k) = (Z^T R_m q)^T R_n k = (R_m (Z^T q))^T (R_n k) for all positions m and n.

Any other Z does not commute with all R_m, and no constant change of the projection compensates for it. Fusion
weights stay real, so several sources share one factor Z. If a norm stands between the query projection and
RoPE (Qwen3), no part of Z can be absorbed. The scale of the norm is the same for all heads, and differs
between the two channels of a pair.

Maps and weights are solved for alternately, each in closed form, from second moments (second_moments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedkv_ext.conversion.least_squares import Quadratic, metric_of, quadratic, regularized, set_weights
from fusedkv_ext.conversion.second_moments import SecondMoments
from fusedkv_ext.layers.fusion import FusedSegment, FusionWeights
from fusedkv_ext.plan import CachePlan, Segment

__all__ = [
    "Repair",
    "absorb",
    "absorb_into_output",
    "absorb_into_query",
    "key_map",
    "value_map",
    "reads",
    "weights_of",
]


class Repair(NamedTuple):
    """The fraction of the variance of one side of a layer that its sources explain, without and with maps.

    All heads count together. ``side`` is "key" or "value".
    """

    layer: int
    side: str
    before: float
    after: float


@torch.no_grad()
def absorb(
    converted: PreTrainedModel,
    original: PreTrainedModel,
    second_moments: SecondMoments,
    *,
    keys: bool | None = None,
    values: bool = True,
    metric: str = "score",
    ridge: float = 1e-3,
    rounds: int = 8,
) -> list[Repair]:
    """Solves for maps of all heads that come from other layers alone, and changes weights of ``converted``.

    Refit projections after this, not before. Otherwise the refit corrects the same error twice.

    Args:
        converted: a model with a plan, whose other weights are those of ``original``. Its fusion weights, if
            any, are solved for together with the maps.
        original: the plain model.
        second_moments: of the original over the calibration text.
        keys: True also maps keys; None does so where possible.
        metric: see ``least_squares.fit``.
        ridge: strength of the regularization, of weights towards the plan's initial ones and of maps towards
            1, times the mean of the diagonal.
        rounds: number of alternations between maps and weights.

    Returns:
        The fractions that the sources explained before and after, layer by layer.

    Raises:
        ValueError: ``keys`` is True and a norm of the queries prevents it.
    """
    layers = converted.get_decoder().layers
    normed = any(getattr(layer.self_attn, "q_norm", None) is not None for layer in layers)
    if keys and normed:
        raise ValueError(
            f"keys must be False or None for {type(converted).__name__}, got True: its q_norm stands between "
            "the query projection and RoPE, so maps of keys cannot be absorbed"
        )
    sides = [
        side for side, wanted in (("key", not normed if keys is None else keys), ("value", values)) if wanted
    ]
    plan, report = converted.config.plan, []
    for i, layer in enumerate(layers):
        attention, o_proj = layer.self_attn, original.get_decoder().layers[i].self_attn.o_proj
        for side in sides:
            totals = torch.zeros(3, dtype=torch.float64)  # variance, error before, error after
            for read in reads(plan, i, side, second_moments, attention.kv_fusion):
                metrics = [metric_of(second_moments, side, i, head, o_proj, metric) for head in read.heads]
                maps, errors = _solve(read, second_moments, metrics, ridge, rounds)
                totals += errors
                for head, linear in zip(read.heads, maps, strict=True):
                    if side == "key":
                        absorb_into_query(attention.q_proj, head, linear, second_moments.num_kv_heads)
                    else:
                        absorb_into_output(attention.o_proj, head, linear, second_moments.num_kv_heads)
            if totals[0] > 0:
                variance, before, after = totals.tolist()
                report.append(Repair(i, side, 1 - before / variance, 1 - after / variance))
    return report


class Read(NamedTuple):
    """A segment of a layer whose heads come from other layers alone."""

    layer: int
    side: str
    segment: Segment
    heads: range
    fusion: FusionWeights | None
    fused: FusedSegment | None  # its weights; None: ones


def reads(
    plan: CachePlan, layer: int, side: str, second_moments: SecondMoments, fusion: FusionWeights | None
) -> Iterator[Read]:
    fused = {part.segment: part for part in fusion.fused_segments if part.side == side} if fusion else {}
    for segment in plan.layers[layer].keys if side == "key" else plan.layers[layer].values:
        if layer not in segment.sources:
            heads = range(*(int(bound * second_moments.num_kv_heads) for bound in segment.heads))
            yield Read(layer, side, segment, heads, fusion, fused.get(segment))


def _fusion(read: Read) -> FusionWeights:
    """The fusion weights of a segment that has some."""
    assert read.fusion is not None
    return read.fusion


def _solve(
    read: Read, second_moments: SecondMoments, metrics: list[Tensor], ridge: float, rounds: int
) -> tuple[list[Tensor], Tensor]:
    """The map of each head, with the weights set to match; the variance, and the errors before and after."""
    sources, fused = read.segment.sources, read.fused
    eye = torch.eye(second_moments.head_dim, dtype=torch.float64)

    def errors(maps: list[Tensor]) -> list[Quadratic]:
        return [
            quadratic(second_moments, read.side, head, read.layer, sources, metric, linear)
            for head, metric, linear in zip(read.heads, metrics, maps, strict=True)
        ]

    def best_maps(weights: Tensor) -> list[Tensor]:
        found = []
        for head, metric, weight in zip(read.heads, metrics, weights, strict=True):
            fusing, to_target = _fused(second_moments, read, head, weight)
            found.append(
                value_map(fusing, to_target, ridge)
                if read.side == "value"
                else key_map(fusing, to_target, metric, ridge)
            )
        return found

    def total(maps: list[Tensor], weights: Tensor) -> float:
        return sum(float(e.c) * (1 - e.explained(w)) for e, w in zip(errors(maps), weights, strict=True))

    maps = [eye] * len(read.heads)
    if fused is None or not fused.fusion.learnable:
        weights = weights_of(read, second_moments)
        before, maps = total(maps, weights), best_maps(weights)
    else:
        weights = set_weights(_fusion(read), fused, errors(maps), ridge)
        before = total(maps, weights)
        if read.side == "key" and len(sources) > 1:
            maps = [
                _common_phase(second_moments, read, head, m, ridge)
                for head, m in zip(read.heads, metrics, strict=True)
            ]
            weights = set_weights(_fusion(read), fused, errors(maps), ridge)
        for _ in range(rounds):
            maps = best_maps(weights)
            weights = set_weights(_fusion(read), fused, errors(maps), ridge)
    variance = sum(float(e.c) for e in errors(maps))
    return maps, torch.tensor([variance, before, total(maps, weights)], dtype=torch.float64)


def weights_of(read: Read, second_moments: SecondMoments) -> Tensor:
    """The effective weights of a segment, (heads, m, D) float64."""
    fused = read.fused
    if fused is None:
        return torch.ones(
            len(read.heads), len(read.segment.sources), second_moments.head_dim, dtype=torch.float64
        )
    fusion = _fusion(read)
    rows = torch.stack([fusion.get_parameter(name).detach().double().cpu() for name in fused.names], 1)
    expanded = rows * fused.fusion.multiplier @ fusion.expansion(fused).double().cpu().mT
    return expanded.expand(len(read.heads), -1, -1)


def _fused(second_moments: SecondMoments, read: Read, head: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """E[f f^T] and E[f t^T] of the weighted sum f of the sources and the layer's own t; weights (m, D)."""
    pairs = list(zip(read.segment.sources, weights, strict=True))
    own = sum(
        a[:, None] * second_moments.covariance(read.side, head, j, k) * b[None]
        for j, a in pairs
        for k, b in pairs
    )
    cross = sum(a[:, None] * second_moments.covariance(read.side, head, j, read.layer) for j, a in pairs)
    return own, cross


def value_map(fused: Tensor, to_target: Tensor, ridge: float) -> Tensor:
    """The A that minimizes E|t - A f|^2 + ridge |A - 1|^2, (D, D). It is the same for every metric of t.

    Args:
        fused: E[f f^T].
        to_target: E[f t^T].
        ridge: strength of the regularization.
    """
    return regularized(fused, to_target, ridge, torch.eye(len(fused), dtype=fused.dtype)).mT


def key_map(fused: Tensor, to_target: Tensor, metric: Tensor, ridge: float) -> Tensor:
    """The Z that minimizes E[e^T M e], e = t - Z f, with a ridge towards 1; a complex number per pair.

    Args:
        fused: E[f f^T].
        to_target: E[f t^T].
        metric: M.
        ridge: strength of the regularization.
    """
    (z,) = _complex_weights([[fused]], [to_target], metric, ridge, torch.ones(1, dtype=fused.dtype))
    return _scaled_rotation(z)


def _common_phase(
    second_moments: SecondMoments, read: Read, head: int, metric: Tensor, ridge: float
) -> Tensor:
    """The start for several sources: the rotation that makes their complex weights z_j most nearly real.

    With u_j the energy of source j in a pair, sum_j u_j Re(z_j e^{-i phi})^2 has its maximum at phi =
    arg(sum_j u_j z_j^2) / 2.
    """
    sources, cov = read.segment.sources, second_moments.covariance
    between = [[cov("key", head, j, k) for k in sources] for j in sources]
    to_target = [cov("key", head, j, read.layer) for j in sources]
    z = _complex_weights(between, to_target, metric, ridge, torch.zeros(len(sources), dtype=metric.dtype))
    energy = torch.stack([between[j][j].diagonal().unflatten(0, (2, -1)).sum(0) for j in range(len(sources))])
    phase = (energy * z.square()).sum(0).angle() / 2
    return _scaled_rotation(torch.polar(torch.ones_like(phase), phase))


def _complex_weights(
    between: list[list[Tensor]], to_target: list[Tensor], metric: Tensor, ridge: float, start: Tensor
) -> Tensor:
    """The complex weights z (m, D / 2) of sum_j z_j k_j that explain a target best.

    A complex weight of k is a real weight of k plus one of J k, which is k turned by 90 degrees; both are
    tied per pair.

    Args:
        between: E[k_j k_k^T].
        to_target: E[k_j t^T].
        start: the center of the ridge.
        ridge: strength of the regularization.
    """
    dim = len(metric)
    turn = _scaled_rotation(torch.full((dim // 2,), 1j, dtype=torch.complex128))
    pair = torch.eye(dim // 2, dtype=torch.float64).repeat(2, 1)  # (D, D / 2)
    spread = torch.block_diag(*[pair] * (2 * len(to_target)))
    both = torch.cat((torch.eye(dim, dtype=torch.float64), turn))  # (2D, D)
    a = torch.cat([torch.cat([both @ c @ both.mT for c in row], 1) for row in between])
    a = spread.mT @ (a * metric.repeat(2 * len(to_target), 2 * len(to_target))) @ spread
    b = torch.cat([(part @ c * metric).sum(1) for c in to_target for part in both.split(dim)]) @ spread
    wanted = torch.stack((start, torch.zeros_like(start)), 1).flatten().repeat_interleave(dim // 2)
    x = regularized(a, b, ridge, wanted)
    return torch.complex(*x.view(len(to_target), 2, -1).unbind(1))


def _scaled_rotation(z: Tensor) -> Tensor:
    """The matrix (D, D) that multiplies pair p, channels p and p + D/2, by z_p."""
    real, imag = torch.diag(z.real), torch.diag(z.imag)
    return torch.cat((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)))


@torch.no_grad()
def absorb_into_query(q_proj: nn.Linear, head: int, linear: Tensor, num_kv_heads: int) -> None:
    """q -> Z^T q of the query heads of one KV head, in place. It is equivalent to Z (D, D) on the keys.

    Z must be a complex number per RoPE pair.
    """
    for parameter in (q_proj.weight, q_proj.bias):
        if parameter is not None:
            rows = parameter.view(num_kv_heads, -1, len(linear), *parameter.shape[1:])[head]
            rows.copy_(torch.einsum("de,hd...->he...", linear.to(rows.device), rows.double()))


@torch.no_grad()
def absorb_into_output(o_proj: nn.Linear, head: int, linear: Tensor, num_kv_heads: int) -> None:
    """O -> O A on the columns of the query heads of one KV head, in place: as A (D, D) on the values."""
    columns = o_proj.weight.unflatten(1, (num_kv_heads, -1, len(linear)))[:, head]
    columns.copy_(columns.double() @ linear.to(columns.device))
