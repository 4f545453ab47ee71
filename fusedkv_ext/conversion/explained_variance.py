"""What the sources of a converted model explain of the original's keys and values, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from fusedkv_ext.conversion.absorb import Repair, reads, weights_of
from fusedkv_ext.conversion.least_squares import metric_of, quadratic
from fusedkv_ext.conversion.second_moments import Moments
from fusedkv_ext.plan import CachePlan

__all__ = ["explained_layers", "explained_table"]


@torch.no_grad()
def explained_layers(
    converted: PreTrainedModel, original: PreTrainedModel, moments: Moments, metric: str = "score"
) -> dict[tuple[int, str], float]:
    """(layer, "key" or "value") -> the share of variance that its fusion weights explain, all heads that come
    from other layers alone taken together. Maps that projections absorbed are not counted.

    metric: see ``solve.fit``.
    """
    found = {}
    for i, layer in enumerate(converted.get_decoder().layers):
        o_proj = original.get_decoder().layers[i].self_attn.o_proj
        for side in ("key", "value"):
            variance = error = 0.0
            for read in reads(converted.config.plan, i, side, moments, layer.self_attn.kv_fusion):
                for head, weights in zip(read.heads, weights_of(read, moments), strict=True):
                    weighing = metric_of(moments, side, i, head, o_proj, metric)
                    one = quadratic(moments, side, head, i, read.segment.sources, weighing)
                    variance += float(one.c)
                    error += float(one.c) * (1 - one.explained(weights)) if one.c else 0.0
            if variance:
                found[i, side] = 1 - error / variance
    return found


def explained_table(
    plan: CachePlan, explained: Mapping[tuple[int, str], float], repairs: Sequence[Repair] = ()
) -> list[list[str]]:
    """Rows for ``documents.aligned``, a header first: each layer that reads, its sources, and what they
    explain in per cent; with ``repairs`` also what they explain with maps."""
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
