"""How a number of coefficients is divided among the tensors that a cache stores, for codecs with a rank.

* uniform: the same rank everywhere.
* ramp: LoRC's rule (arXiv:2410.03111), falling ranks from the first layer to the last. The product of the
  condition numbers of the weights that follow bounds how much an error of a layer grows.
* water-filling: each next coefficient goes where it saves the most of the error, by the eigenvalues of the
  weighted covariance. It is the division with the least error on the calibration text.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusedkv_ext.cache.codec import Codec, CodecPlan, Coding
from fusedkv_ext.cache.codec.fit import spectrum
from fusedkv_ext.conversion.coding import StoredSample
from fusedkv_ext.plan.pieces import SIDES, Side

__all__ = ["RULES", "divide_ranks"]

Place = tuple[int, Side]
Samples = dict[Place, StoredSample]


def divide_ranks(rule: str, codecs: CodecPlan, model: PreTrainedModel, samples: Samples) -> CodecPlan:
    """Codecs with other ranks that together have no more coefficients.

    Args:
        rule: "uniform", "ramp" or "water-filling".
        codecs: Codecs for the model, those that have a rank with one rank for all layers. Others stay.
        model: The model whose cache they write, for the weights of "ramp".
        samples: Of ``collect_stored``.

    Returns:
        The codecs, with the rule in their name.

    Raises:
        ValueError: The rule is unknown, no codec has a rank, or ranks differ between layers.
    """
    if rule not in RULES:
        raise ValueError(f"rank budget must be one of {', '.join(RULES)}, got {rule!r}")
    ranked = {
        (i, side): codecs.codec(i, side)
        for i in range(codecs.num_layers)
        for side in SIDES
        if codecs.codec(i, side).rank is not None
    }
    if not ranked:
        raise ValueError(f"codecs must have a rank for a rank budget, got {codecs.name}")
    for side in SIDES:
        found = sorted({codec.rank or 0 for (_, own), codec in ranked.items() if own == side})
        if len(found) > 1:
            raise ValueError(f"codecs must have one rank for all {side} for a rank budget, got {found}")
    ranks = RULES[rule](ranked, model, samples)
    layers = []
    for i in range(codecs.num_layers):
        pair = (
            replace(codecs.codec(i, side), rank=ranks[i, side])
            if (i, side) in ranks
            else codecs.codec(i, side)
            for side in SIDES
        )
        layers.append(Coding(*pair))
    return CodecPlan(f"{codecs.name}, {rule}", layers, codecs.sinks, codecs.tail)


def _uniform(ranked: dict[Place, Codec], model: PreTrainedModel, samples: Samples) -> dict[Place, int]:
    return {place: codec.rank or 0 for place, codec in ranked.items()}


def _water_filling(ranked: dict[Place, Codec], model: PreTrainedModel, samples: Samples) -> dict[Place, int]:
    savings: dict[Place, Tensor] = {}
    steps: dict[Place, int] = {}
    heads = {place: samples[place].vectors.shape[1] for place in ranked}
    for place, codec in ranked.items():
        vectors, metric, _ = samples[place]
        steps[place] = _step(codec, vectors.shape[2])
        savings[place] = spectrum(codec, vectors, metric).sum(0).unflatten(0, (-1, steps[place])).sum(-1)
    ranks = dict(steps)  # every tensor keeps something
    left = sum(heads[place] * ((codec.rank or 0) - ranks[place]) for place, codec in ranked.items())

    def per_coefficient(place: Place) -> float:
        """Of the next step of coefficients; they fall, so that the best next one is best for all of them."""
        return float(savings[place][ranks[place] // steps[place]]) / (heads[place] * steps[place])

    dims = {place: samples[place].vectors.shape[2] for place in ranked}
    heap = [(-per_coefficient(place), place) for place in ranked if ranks[place] < dims[place]]
    heapq.heapify(heap)
    while heap:
        _, place = heapq.heappop(heap)
        cost = heads[place] * steps[place]
        if cost > left:
            continue
        left -= cost
        ranks[place] += steps[place]
        if ranks[place] < dims[place]:
            heapq.heappush(heap, (-per_coefficient(place), place))
    return ranks


def _ramp(ranked: dict[Place, Codec], model: PreTrainedModel, samples: Samples) -> dict[Place, int]:
    """r = low + (high - low) t with t from 1 in the first layer to 0 in the last: LoRC's

        r_l = r_max (1 - (max log K - log K_l) / (max log K - min log K) (1 - r_min / r_max))

    with K_l the product of the condition numbers of W_K and W_V from layer l on. The paper takes r_min and
    r_max as given. Here r_min is half of the uniform rank, and r_max follows from the budget.
    """
    layers = sorted({i for i, _ in ranked})
    attentions: list[Any] = [layer.self_attn for layer in model.get_decoder().layers]
    logs = [
        sum(_log_condition(getattr(attentions[i], name)) for name in ("k_proj", "v_proj")) for i in layers
    ]
    tail = torch.tensor(logs, dtype=torch.float64).flip(0).cumsum(0).flip(0)  # log K_l
    spread = (tail.max() - tail.min()).clamp_min(1e-12)
    place_in_ramp = dict(zip(layers, (1 - (tail.max() - tail) / spread).tolist(), strict=True))
    ranks: dict[Place, int] = {}
    for side in SIDES:
        places = [place for place in ranked if place[1] == side]
        if not places:
            continue
        codec, dim = ranked[places[0]], samples[places[0]].vectors.shape[2]
        step, uniform = _step(codec, dim), codec.rank or 0
        t = torch.tensor([place_in_ramp[i] for i, _ in places], dtype=torch.float64)
        low = uniform / 2
        high = min(float(dim), low + (uniform - low) / max(float(t.mean()), 1e-12))
        wanted = low + (high - low) * t
        wanted = wanted + (uniform - wanted.mean())  # where high would exceed the head dim
        ranks.update(zip(places, _rounded(wanted.clamp(step, dim), step, uniform * len(places)), strict=True))
    return ranks


def _log_condition(projection: Any) -> float:
    """log of the largest singular value of a weight over the smallest; 0 without a weight."""
    weight = getattr(projection, "weight", None)
    if weight is None:
        return 0.0
    values = torch.linalg.svdvals(weight.detach().double().cpu())
    return float((values[0] / values[-1].clamp_min(1e-12)).log())


def _rounded(wanted: Tensor, step: int, total: int) -> list[int]:
    """Multiples of ``step`` near ``wanted`` whose sum is at most ``total``: the largest remainders go up."""
    parts = wanted / step
    found = parts.floor().clamp_min(1)
    for j in (parts - found).argsort(descending=True).tolist():
        if (found.sum() + 1) * step <= total and parts[j] > found[j]:
            found[j] += 1
    return [int(n) * step for n in found]


def _step(codec: Codec, head_dim: int) -> int:
    """The least number of coefficients by which a rank may grow."""
    for step in (1, 2, 4):
        try:
            replace(codec, rank=step).channels(head_dim)
        except ValueError:
            continue
        return step
    return 8


RULES: dict[str, Callable[[dict[Place, Codec], PreTrainedModel, Samples], dict[Place, int]]] = {
    "uniform": _uniform,
    "ramp": _ramp,
    "water-filling": _water_filling,
}
