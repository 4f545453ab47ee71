"""Linear maps on what a layer reads, absorbed into its own projections: repair that changes no cache.

A reading layer i takes, per KV head, a linear map of what its sources give:

    values:  V_i ~ A (sum_j b_j (.) V_j)        absorbed into the output projection:  O (A v) = (O A) v
    keys:    K_i ~ Z (sum_j a_j (.) K_j)        absorbed into the query projection:   q . (Z k) = (Z^T q) . k

A is any D x D matrix. Z has to be absorbed in front of RoPE, whose rotation R_m of position m stands between
projection and score. That is exact for one complex number z_p per RoPE pair p, a scaled 2 x 2 rotation:

    1. R_m and Z are both block diagonal, a complex number per pair: R_m multiplies pair p by e^{i m theta_p}.
    2. Complex numbers commute: Z^T R_m = R_m Z^T, where Z^T multiplies by the conjugate of z_p.
    3. So (R_m q)^T Z (R_n k) = (Z^T R_m q)^T R_n k = (R_m (Z^T q))^T (R_n k) for all positions m and n.

Any other Z does not commute with all R_m, and no constant change of the projection makes up for it. Fusion
weights stay real, so with several sources Z is a factor that they have in common. Where a norm stands between
the query projection and RoPE (Qwen3), nothing of Z can pass: its scale is the same for all heads, and differs
between the two channels of a pair.

Maps and weights are solved for in turn, each in closed form, from second moments (moments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedkv_ext.conversion.least_squares import Quadratic, metric_of, quadratic, regularized, set_weights
from fusedkv_ext.conversion.second_moments import Moments
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
    """Share of the variance of a layer's "key"s or "value"s, all heads together, that its sources explain
    without and with maps."""

    layer: int
    side: str
    before: float
    after: float


@torch.no_grad()
def absorb(
    converted: PreTrainedModel,
    original: PreTrainedModel,
    moments: Moments,
    *,
    keys: bool | None = None,
    values: bool = True,
    metric: str = "score",
    ridge: float = 1e-3,
    rounds: int = 8,
) -> list[Repair]:
    """Finds maps for all heads that come from other layers alone, and changes weights of ``converted``.

    converted: a model on a plan whose other weights are those of ``original``; its fusion weights, if it has
    any, are solved for anew together with the maps. Refit projections after this, not before: what the maps
    mend would be mended twice. keys: None means where it can be done; True raises ValueError where a norm of
    the queries forbids it. metric: see ``solve.fit``. ridge: of weights towards the plan's initial ones and
    of maps towards 1, times the mean of the diagonal. rounds: of maps and weights in turn.

    Returns what the sources explained before and after, layer by layer.
    """
    layers = converted.get_decoder().layers
    normed = any(getattr(layer.self_attn, "q_norm", None) is not None for layer in layers)
    if keys and normed:
        raise ValueError(
            f"maps of keys cannot be absorbed into {type(converted).__name__}: its q_norm stands between the "
            "query projection and RoPE; use keys=False"
        )
    sides = [
        side for side, wanted in (("key", not normed if keys is None else keys), ("value", values)) if wanted
    ]
    plan, report = converted.config.plan, []
    for i, layer in enumerate(layers):
        attention, o_proj = layer.self_attn, original.get_decoder().layers[i].self_attn.o_proj
        for side in sides:
            totals = torch.zeros(3, dtype=torch.float64)  # variance, error before, error after
            for read in reads(plan, i, side, moments, attention.kv_fusion):
                metrics = [metric_of(moments, side, i, head, o_proj, metric) for head in read.heads]
                maps, errors = _solve(read, moments, metrics, ridge, rounds)
                totals += errors
                for head, linear in zip(read.heads, maps, strict=True):
                    if side == "key":
                        absorb_into_query(attention.q_proj, head, linear, moments.num_kv_heads)
                    else:
                        absorb_into_output(attention.o_proj, head, linear, moments.num_kv_heads)
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
    plan: CachePlan, layer: int, side: str, moments: Moments, fusion: FusionWeights | None
) -> Iterator[Read]:
    fused = {part.segment: part for part in fusion.fused_segments if part.side == side} if fusion else {}
    for segment in plan.layers[layer].keys if side == "key" else plan.layers[layer].values:
        if layer not in segment.sources:
            heads = range(*(int(bound * moments.num_kv_heads) for bound in segment.heads))
            yield Read(layer, side, segment, heads, fusion, fused.get(segment))


def _solve(
    read: Read, moments: Moments, metrics: list[Tensor], ridge: float, rounds: int
) -> tuple[list[Tensor], Tensor]:
    """The map of each head, with the weights set to go with them; variance and errors before and after."""
    sources, fused = read.segment.sources, read.fused
    eye = torch.eye(moments.head_dim, dtype=torch.float64)

    def errors(maps: list[Tensor]) -> list[Quadratic]:
        return [
            quadratic(moments, read.side, head, read.layer, sources, metric, linear)
            for head, metric, linear in zip(read.heads, metrics, maps, strict=True)
        ]

    def best_maps(weights: Tensor) -> list[Tensor]:
        found = []
        for head, metric, weight in zip(read.heads, metrics, weights, strict=True):
            fusing, to_target = _fused(moments, read, head, weight)
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
        weights = weights_of(read, moments)
        before, maps = total(maps, weights), best_maps(weights)
    else:
        weights = set_weights(read.fusion, fused, errors(maps), ridge)
        before = total(maps, weights)
        if read.side == "key" and len(sources) > 1:
            maps = [
                _common_phase(moments, read, head, m, ridge)
                for head, m in zip(read.heads, metrics, strict=True)
            ]
            weights = set_weights(read.fusion, fused, errors(maps), ridge)
        for _ in range(rounds):
            maps = best_maps(weights)
            weights = set_weights(read.fusion, fused, errors(maps), ridge)
    variance = sum(float(e.c) for e in errors(maps))
    return maps, torch.tensor([variance, before, total(maps, weights)], dtype=torch.float64)


def weights_of(read: Read, moments: Moments) -> Tensor:
    """The weights that a segment has, (heads, m, D) float64."""
    fused = read.fused
    if fused is None:
        return torch.ones(len(read.heads), len(read.segment.sources), moments.head_dim, dtype=torch.float64)
    rows = torch.stack([read.fusion.get_parameter(name).detach().double().cpu() for name in fused.names], 1)
    expanded = rows * fused.fusion.multiplier @ read.fusion.expansion(fused).double().cpu().mT
    return expanded.expand(len(read.heads), -1, -1)


def _fused(moments: Moments, read: Read, head: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """E[f f^T] and E[f t^T] of the weighted sum f of the sources and the layer's own t, weights (m, D)."""
    pairs = list(zip(read.segment.sources, weights, strict=True))
    own = sum(
        a[:, None] * moments.covariance(read.side, head, j, k) * b[None] for j, a in pairs for k, b in pairs
    )
    cross = sum(a[:, None] * moments.covariance(read.side, head, j, read.layer) for j, a in pairs)
    return own, cross


def value_map(fused: Tensor, to_target: Tensor, ridge: float) -> Tensor:
    """A of E|t - A f|^2 + ridge |A - 1|^2 at its minimum, (D, D); the same for every metric of t.

    fused, to_target: E[f f^T] and E[f t^T].
    """
    return regularized(fused, to_target, ridge, torch.eye(len(fused), dtype=fused.dtype)).mT


def key_map(fused: Tensor, to_target: Tensor, metric: Tensor, ridge: float) -> Tensor:
    """Z of E[e^T M e], e = t - Z f, at its minimum, ridge towards 1: (D, D), a complex number per pair.

    fused, to_target: E[f f^T] and E[f t^T]. metric: M.
    """
    (z,) = _complex_weights([[fused]], [to_target], metric, ridge, torch.ones(1, dtype=fused.dtype))
    return _scaled_rotation(z)


def _common_phase(moments: Moments, read: Read, head: int, metric: Tensor, ridge: float) -> Tensor:
    """Where to start with several sources: the rotation that makes their complex weights z_j most real.

    With u_j the energy of source j in a pair, sum_j u_j Re(z_j e^{-i phi})^2 is greatest at
    phi = arg(sum_j u_j z_j^2) / 2.
    """
    sources, cov = read.segment.sources, moments.covariance
    between = [[cov("key", head, j, k) for k in sources] for j in sources]
    to_target = [cov("key", head, j, read.layer) for j in sources]
    z = _complex_weights(between, to_target, metric, ridge, torch.zeros(len(sources), dtype=metric.dtype))
    energy = torch.stack([between[j][j].diagonal().unflatten(0, (2, -1)).sum(0) for j in range(len(sources))])
    phase = (energy * z.square()).sum(0).angle() / 2
    return _scaled_rotation(torch.polar(torch.ones_like(phase), phase))


def _complex_weights(
    between: list[list[Tensor]], to_target: list[Tensor], metric: Tensor, ridge: float, start: Tensor
) -> Tensor:
    """The complex weights z (m, D / 2) of sum_j z_j k_j that explain a target best, ridge towards start (m,).

    A complex weight of k is a real one of k and one of J k, k turned by 90 degrees, both tied per pair.
    between, to_target: E[k_j k_k^T] and E[k_j t^T].
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
    """q -> Z^T q of the query heads of one KV head, in place: as Z (D, D) on its keys. Z must be a complex
    number per RoPE pair."""
    for parameter in (q_proj.weight, q_proj.bias):
        if parameter is not None:
            rows = parameter.view(num_kv_heads, -1, len(linear), *parameter.shape[1:])[head]
            rows.copy_(torch.einsum("de,hd...->he...", linear.to(rows.device), rows.double()))


@torch.no_grad()
def absorb_into_output(o_proj: nn.Linear, head: int, linear: Tensor, num_kv_heads: int) -> None:
    """O -> O A on the columns of the query heads of one KV head, in place: as A (D, D) on its values."""
    columns = o_proj.weight.unflatten(1, (num_kv_heads, -1, len(linear)))[:, head]
    columns.copy_(columns.double() @ linear.to(columns.device))
