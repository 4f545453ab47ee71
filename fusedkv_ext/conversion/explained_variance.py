"""Explained variance: the fraction of the original's keys and values that the sources explain, per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from fusedkv_ext.conversion.absorb import Repair, reads, weights_of
from fusedkv_ext.conversion.least_squares import metric_of, quadratic
from fusedkv_ext.conversion.second_moments import SecondMoments
from fusedkv_ext.plan import CachePlan

__all__ = ["explained_layers", "explained_table"]


@torch.no_grad()
def explained_layers(
    converted: PreTrainedModel,
    original: PreTrainedModel,
    second_moments: SecondMoments,
    metric: str = "score",
) -> dict[tuple[int, str], float]:
    """(layer, "key" or "value") -> the fraction of the variance that the fusion weights explain.

    All heads that come from other layers alone count together. Maps absorbed into projections do not count.

    Args:
        converted: the converted model.
        original: the plain model.
        second_moments: of the original over the calibration text.
        metric: see ``least_squares.fit``.
    """
    found = {}
    for i, layer in enumerate(converted.get_decoder().layers):
        o_proj = original.get_decoder().layers[i].self_attn.o_proj
        for side in ("key", "value"):
            variance = error = 0.0
            for read in reads(converted.config.plan, i, side, second_moments, layer.self_attn.kv_fusion):
                for head, weights in zip(read.heads, weights_of(read, second_moments), strict=True):
                    weighing = metric_of(second_moments, side, i, head, o_proj, metric)
                    one = quadratic(second_moments, side, head, i, read.segment.sources, weighing)
                    variance += float(one.c)
                    error += float(one.c) * (1 - one.explained(weights)) if one.c else 0.0
            if variance:
                found[i, side] = 1 - error / variance
    return found


def explained_table(
    plan: CachePlan, explained: Mapping[tuple[int, str], float], repairs: Sequence[Repair] = ()
) -> list[list[str]]:
    """Rows for ``reporting.aligned``: a header, then each reading layer, its sources and explained percent.

    With ``repairs`` the rows also have what the sources explain with maps.
    """
    mapped = {(repair.layer, repair.side): repair.after for repair in repairs}
    header = ["layer", "keys of", "explained", "values of", "explained"]
    if mapped:
        header = [*header[:3], "with map", *header[3:], "with map"]
    rows = [header]
    for i in range(plan.num_layers):
        if not {(i, "key"), (i, "value")} & set(explained):
            continue
        row = [str(i)]
        for side, sources in (("key", plan.key_sources(i)), ("value", plan.value_sources(i))):
            row += [", ".join(map(str, sources)), _percent(explained.get((i, side)))]
            row += [_percent(mapped.get((i, side)))] if mapped else []
        rows.append(row)
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
