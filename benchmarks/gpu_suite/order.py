"""All cells, the most important ones of all families first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from gpu_suite import decode, model, operations, prefill
from gpu_suite.cells import FAMILIES, Cell, Sizes

QUICK_PRIORITY = 1


def all_cells(sizes: Sizes) -> Iterator[Cell]:
    yield from decode.decode_cells(sizes)
    yield from decode.latency_cells(sizes)
    yield from decode.ragged_cells(sizes)
    yield from decode.schedule_cells(sizes)
    yield from operations.fuse_cells(sizes)
    yield from operations.append_cells(sizes)
    yield from prefill.prefill_cells(sizes)
    yield from model.model_cells(sizes)


def ordered_cells(sizes: Sizes, families: Iterable[str], quick: bool) -> list[Cell]:
    """By importance; within one importance the families take turns, in the order that FAMILIES has."""
    wanted = set(families)
    turns: Counter[tuple[str, int]] = Counter()
    cells: list[tuple[tuple[int, int, int], Cell]] = []
    for cell in all_cells(sizes):
        if cell.family in wanted and not (quick and cell.priority > QUICK_PRIORITY):
            turn = turns[cell.family, cell.priority]
            turns[cell.family, cell.priority] += 1
            cells.append(((cell.priority, turn, FAMILIES.index(cell.family)), cell))
    return [cell for _, cell in sorted(cells, key=lambda item: item[0])]
