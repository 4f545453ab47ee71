"""Searches cache plans for a trained model by its second moments.

Second moments alone give the reconstruction error of the keys (values) of layer i from layers j and k, for
all i > k >= j: ``SourceTable``. The error is the one that conversion can reach. It includes the optimal
fusion weights and, for values, the optimal D x D map per head. The output projection absorbs that map, or
refitting finds it (absorb.py, refit.py). The cost of a reading layer is

    s_i ((1 - explained fraction of its keys) + (1 - explained fraction of its values))

with s_i the relative size of its attention output (``SecondMoments.share_of_stream``), or 1. The storage
layers are found by backward elimination. Of all layers that may stop storing, the one with the least
additional cost stops, until the budget is met. Layer 0 always stores; sources are earlier layers that store.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusedkv_ext.conversion.least_squares import metric_of
from fusedkv_ext.conversion.second_moments import SecondMoments
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment

__all__ = ["Found", "SourceTable", "prefix_costs", "search", "search_prefix"]

NAME = "fusedkv-search"
SIDES = ("key", "value")
RIDGE = 1e-3
PAIRS_AT_ONCE = 256


def readable_sources(model: PreTrainedModel, layer: int, sources: Sequence[int]) -> bool:
    """True if a layer may read the caches of ``sources``: those of layers with the same window."""
    types = getattr(model.config, "layer_types", None)
    return types is None or all(types[j] == types[layer] for j in sources)


class Found(NamedTuple):
    """A plan with its cost in the table, and the explained fraction per reading layer and side."""

    plan: CachePlan
    cost: float
    explained: dict[tuple[int, str], float]


class SourceTable:
    """The fractions of the variance of each layer that one or two earlier layers explain.

    Args:
        second_moments: of the model on a calibration text.
        model: the plain model.
        metric: see ``least_squares.fit``.
        weighted: True weights the cost of a layer by the relative size of its attention output.
        rounds: alternations between weights and maps, for values; 0 leaves out the maps.
    """

    def __init__(
        self,
        second_moments: SecondMoments,
        model: PreTrainedModel,
        *,
        metric: str = "score",
        weighted: bool = True,
        rounds: int = 2,
    ) -> None:
        layers, heads = second_moments.num_layers, second_moments.num_kv_heads
        self.num_layers = layers
        self.weights = [second_moments.share_of_stream(i) if weighted else 1.0 for i in range(layers)]
        # (target, source, source), symmetric; the diagonal is one source alone.
        self._explained = {side: torch.full((layers,) * 3, -math.inf, dtype=torch.float64) for side in SIDES}
        for i in range(1, layers):
            o_proj = model.get_decoder().layers[i].self_attn.o_proj
            pairs = torch.tensor([(j, k) for k in range(i) for j in range(k + 1)])
            for side, table in self._explained.items():
                errors, variance = torch.zeros(len(pairs), dtype=torch.float64), 0.0
                for head in range(heads):
                    weight = metric_of(second_moments, side, i, head, o_proj, metric)
                    own = float((second_moments.covariance(side, head, i, i) * weight).sum())
                    parts = pairs.split(PAIRS_AT_ONCE)
                    errors += torch.cat(
                        [_errors(second_moments, side, head, i, p, weight, rounds) for p in parts]
                    )
                    variance += own
                shares = 1 - errors / variance if variance else torch.ones(len(pairs), dtype=torch.float64)
                readable = torch.tensor([readable_sources(model, i, pair) for pair in pairs.tolist()])
                shares = torch.where(readable, shares, -math.inf)
                table[i, pairs[:, 0], pairs[:, 1]] = table[i, pairs[:, 1], pairs[:, 0]] = shares

    def explained(self, side: str, layer: int, sources: Sequence[int]) -> float:
        """The fraction of "key" or "value" of a layer that one or two earlier layers explain."""
        return float(self._explained[side][layer, sources[0], sources[-1]])

    def best(self, side: str, layer: int, storing: Collection[int]) -> tuple[tuple[int, ...], float]:
        """The best one or two sources among the storing layers below ``layer``, and what they explain."""
        earlier = torch.tensor(sorted(j for j in storing if j < layer))
        shares = self._explained[side][layer][earlier][:, earlier]
        j, k = divmod(int(shares.argmax()), len(earlier))
        return tuple(sorted({int(earlier[j]), int(earlier[k])})), float(shares[j, k])

    def reader_cost(self, side: str, layer: int, storing: Collection[int]) -> float:
        """The cost of one side of a layer that reads its best sources."""
        return self.weights[layer] * (1 - self.best(side, layer, storing)[1])


def _errors(
    second_moments: SecondMoments,
    side: str,
    head: int,
    layer: int,
    pairs: Tensor,
    metric: Tensor,
    rounds: int,
) -> Tensor:
    """Squared errors left by pairs of sources (P, 2), one source where both are the same: (P,)."""
    dim, layers = second_moments.head_dim, second_moments.num_layers
    cov = (second_moments.keys if side == "key" else second_moments.values)[head] / second_moments.tokens
    cov = cov.view(layers, dim, layers, dim).transpose(1, 2)
    own = (cov[layer, layer] * metric).sum()
    if side == "key":  # tied pairs: half-split RoPE
        a = (cov[:layer, :layer] * metric).unflatten(-1, (2, -1)).unflatten(-3, (2, -1)).sum((-2, -4))
        b = (cov[:layer, layer] * metric).sum(-1).unflatten(-1, (2, -1)).sum(-2)
        x, a, b = _best([[a[j, k] for k in pairs.T] for j in pairs.T], [b[j] for j in pairs.T])
        return own - (2 * b * x - x * (a @ x[..., None])[..., 0]).sum(1)
    between = [[cov[j, k] for k in pairs.T] for j in pairs.T]  # (P, D, D) each: E[k_j k_k^T]
    across = [cov[j, layer] for j in pairs.T]  # (P, D, D) each: E[k_j t^T]
    left, middle = metric, metric
    for step in range(1 + rounds):
        if step:
            w = x.unflatten(1, (2, dim)).unbind(1)
            fused = sum(w[j][:, :, None] * between[j][k] * w[k][:, None] for j in range(2) for k in range(2))
            maps = _solve(fused, sum(w[j][:, :, None] * across[j] for j in range(2))).mT
            left = maps.mT @ metric
            middle = left @ maps
        a = [[part * middle for part in row] for row in between]
        x, a, b = _best(a, [(part * left).sum(-1) for part in across])
    return own - (2 * b * x - x * (a @ x[..., None])[..., 0]).sum(1)


def _best(a: list[list[Tensor]], b: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The x that minimizes x^T a x - 2 b^T x, (P, 2C), with a and b, from blocks (P, C, C) and (P, C)."""
    whole, right = torch.cat([torch.cat(row, 2) for row in a], 1), torch.cat(b, 1)
    return _solve(whole, right[..., None])[..., 0], whole, right


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """Batched solution for positive semidefinite a, with a ridge towards 0."""
    strength = RIDGE * a.diagonal(dim1=1, dim2=2).mean(1)
    strength = torch.where(strength > 0, strength, 1.0)[:, None, None]
    factor = torch.linalg.cholesky(a + strength * torch.eye(a.shape[1], dtype=a.dtype))
    return torch.cholesky_solve(b, factor)


def search(
    table: SourceTable,
    *,
    storage_layers: int | None = None,
    budget: float | Fraction | None = None,
    separate: bool = False,
) -> Found:
    """The best plan within a budget: the layers that store, and the best sources of all other layers.

    Args:
        table: the explained fractions.
        storage_layers: the number of layers that store.
        budget: instead, the largest fraction of the plain model's cache.
        separate: True lets the keys and the values of a layer stop storing independently. Then n storage
            layers mean as many tensors as n layers have.

    Raises:
        ValueError: not exactly one of ``storage_layers`` and ``budget`` is given, or the budget leaves
            nothing to store.
    """
    layers = table.num_layers
    tensors = 2 * _storage_layers(layers, storage_layers, budget, separate)
    storing = {side: set(range(layers)) for side in SIDES}
    while sum(map(len, storing.values())) > tensors:
        choices = [SIDES] if not separate else [(side,) for side in SIDES]
        best: tuple[float, int, tuple[str, ...]] | None = None
        for sides in choices:
            for i in sorted(set.intersection(*(storing[side] for side in sides)) - {0}):
                cost = sum(_side_cost(table, side, storing[side] - {i}) for side in sides)
                cost -= sum(_side_cost(table, side, storing[side]) for side in sides)
                if best is None or cost < best[0]:
                    best = cost, i, sides
        assert best is not None, "the budget leaves at least layer 0, so that a layer may stop storing"
        for side in best[2]:
            storing[side].remove(best[1])
    return _found(table, storing, {})


def search_prefix(table: SourceTable, storage_layers: int, *, per_reader: bool = False) -> Found:
    """The best plan of FusedKV's form: the first n layers store and all others read.

    Args:
        table: the explained fractions.
        storage_layers: see ``search``.
        per_reader: True lets each reading layer have its own sources; otherwise all share one pair for keys
            and one for values.
    """
    n = int(_storage_layers(table.num_layers, storage_layers, None, False))
    readers = range(n, table.num_layers)
    shared: dict[str, tuple[int, ...]] = {}
    for side in SIDES if readers and not per_reader else ():
        choices: list[tuple[int, ...]] = [*((j,) for j in range(n)), *combinations(range(n), 2)]
        totals = [sum(table.weights[i] * table.explained(side, i, c) for i in readers) for c in choices]
        shared[side] = choices[totals.index(max(totals))]
    return _found(table, {side: set(range(n)) for side in SIDES}, shared)


def prefix_costs(table: SourceTable, *, per_reader: bool = False) -> list[tuple[int, float, float]]:
    """(n, mean explained fraction of the readers' keys, of their values) of ``search_prefix``, for n < L."""
    rows = []
    for n in range(1, table.num_layers):
        shares = search_prefix(table, n, per_reader=per_reader).explained
        keys, values = (
            sum(v for (_, s), v in shares.items() if s == side) / (table.num_layers - n) for side in SIDES
        )
        rows.append((n, keys, values))
    return rows


def _storage_layers(
    layers: int, storage_layers: int | None, budget: float | Fraction | None, separate: bool
) -> Fraction:
    if (storage_layers is None) == (budget is None):
        raise ValueError(
            "exactly one of storage_layers and budget (a fraction of the cache) must be given, got "
            f"storage_layers={storage_layers} and budget={budget}"
        )
    wanted = Fraction(storage_layers or 0) if budget is None else Fraction(str(budget)) * layers
    wanted = Fraction(math.floor(2 * wanted), 2) if separate else Fraction(math.floor(wanted))
    if not 1 <= wanted <= layers:
        given = f"storage_layers={storage_layers}" if budget is None else f"budget={budget}"
        raise ValueError(f"{given} must mean 1 to {layers} storage layers, got {float(wanted):g}")
    return wanted


def _side_cost(table: SourceTable, side: str, storing: set[int]) -> float:
    return sum(table.reader_cost(side, i, storing) for i in range(table.num_layers) if i not in storing)


def _found(table: SourceTable, storing: dict[str, set[int]], shared: dict[str, tuple[int, ...]]) -> Found:
    """The plan in which each layer that does not store reads its best sources, or those of ``shared``."""
    explained, rows, cost = {}, [], 0.0
    for i in range(table.num_layers):
        segments = []
        for side in SIDES:
            if i in storing[side]:
                segments.append(Segment((i,)))
                continue
            sources = shared.get(side) or table.best(side, i, storing[side])[0]
            explained[i, side] = table.explained(side, i, sources)
            cost += table.weights[i] * (1 - explained[i, side])
            segments.append(Segment(sources, fusion=Fusion("channel", (1 / len(sources),) * len(sources))))
        rows.append(LayerPlan(*segments))
    if math.isinf(cost):
        raise ValueError(
            "no plan of this size exists: layers with windows and layers without cannot read each other's "
            "caches; increase the number of storage layers"
        )
    return Found(CachePlan(NAME, tuple(rows)), cost, explained)
