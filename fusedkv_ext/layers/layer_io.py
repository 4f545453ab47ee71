"""Cache plan of one layer in whole heads: which heads of which layers it stores, mixes and reads.

This is resolved once per layer, so that a forward pass only indexes tensors. Tensors are (B, T, g, D) with
the g heads that their layer stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext.ops.functional import fuse_kv
from fusedkv_ext.plan import CachePlan

__all__ = ["HeadSlice", "SidePlan", "WeightedSum", "mixed", "mixes_any"]


class HeadSlice(NamedTuple):
    """A range of the stored heads of one layer."""

    layer: int
    index: int  # type: ignore[assignment]  # of the layer in (*source_layers, this layer)
    heads: slice | None  # None: all stored heads

    def of(self, stored: Tensor) -> Tensor:
        return stored if self.heads is None else stored[:, :, self.heads]


class WeightedSum(NamedTuple):
    """sum_j weight_j (.) tensor_j over the heads of one resolved segment."""

    tensors: tuple[HeadSlice, ...]
    segment: int | None  # index of the segment with the weights; None: all ones


class SidePlan(NamedTuple):
    """Keys or values of one layer in whole heads."""

    num_stored: int
    mixes: tuple[WeightedSum, ...]  # heads to store, one entry per segment; empty: projections as they are
    reads: tuple[WeightedSum, ...]  # inputs of attention, one entry per resolved segment

    @classmethod
    def resolve(
        cls, plan: CachePlan, layer: int, num_kv_heads: int, side: Literal["key", "value"]
    ) -> SidePlan:
        order = (*plan.source_layers(layer), layer)
        stored_heads = plan.stored_key_heads if side == "key" else plan.stored_value_heads
        stored = {j: stored_heads(j, num_kv_heads) for j in order}

        def heads(j: int, start: int, stop: int) -> HeadSlice:
            first, count = stored[j].index(start), stop - start
            return HeadSlice(
                j, order.index(j), None if count == len(stored[j]) else slice(first, first + count)
            )

        mixes, reads = [], []
        for index, resolved in enumerate(plan.segments(layer, num_kv_heads)):
            segment = resolved.key if side == "key" else resolved.value
            tensors = tuple(heads(j, resolved.start, resolved.stop) for j in segment.sources)
            terms = WeightedSum(tensors, None if segment.fusion is None else index)
            if layer in segment.sources:
                mixes.append(terms)
                terms = WeightedSum((heads(layer, resolved.start, resolved.stop),), None)
            reads.append(terms)
        as_projected = all(len(mix.tensors) == 1 and mix.segment is None for mix in mixes)
        return cls(len(stored[layer]), () if as_projected else tuple(mixes), tuple(reads))


def mixes_any(plan: CachePlan, layer: int, num_kv_heads: int) -> bool:
    """Whether layer ``layer`` mixes its projections with its sources before storage."""
    return any(SidePlan.resolve(plan, layer, num_kv_heads, side).mixes for side in ("key", "value"))


def mixed(
    available: Sequence[Tensor], mixes: Sequence[WeightedSum], weights: Sequence[Tensor | None] | None
) -> Tensor:
    """Computes the heads to store: each segment summed over its sources.

    Args:
        available: Tensors of the sources and of the layer itself.
        mixes: The sums, one per segment.
        weights: Fusion weights by resolved segment, or None.
    """
    parts = []
    for mix in mixes:
        tensors = [heads.of(available[heads.index]) for heads in mix.tensors]
        weight = None if mix.segment is None else weights[mix.segment]  # type: ignore[index]
        if len(tensors) == 1 and weight is None:
            parts.append(tensors[0])
        else:
            parts.append(fuse_kv(tensors, tensors[0].new_ones(1, 1, 1) if weight is None else weight))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
