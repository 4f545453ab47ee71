"""Runs families of the suite and makes the result: what benchmarks/cpu.py writes as JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from suite.clocks import HostClock
from suite.cpu import codes, decode, fuse, goals, models
from suite.cpu.settings import FAMILIES, Settings
from suite.machine import busy_seconds, machine
from suite.measure import Bench, Cell, Row
from suite.report import geomeans

FORMAT = 1


@dataclass(frozen=True)
class _Family:
    """inference: under inference mode. twins: small calls come before the timed ones; see Cell."""

    cells: Callable[[Settings], Iterator[Callable[[Settings], Cell]]]
    inference: bool
    twins: bool


_FAMILIES = {
    "decode": _Family(decode.cells, True, True),
    "coded": _Family(codes.cells, True, True),
    "fuse": _Family(fuse.cells, False, True),
    "prefill": _Family(models.prefill_cells, True, False),
    "train": _Family(models.train_cells, False, False),
    "model": _Family(models.model_cells, True, False),
}
assert tuple(_FAMILIES) == FAMILIES


def run(
    families: Sequence[str], settings: Settings, show: Callable[[Row], None] = lambda row: None
) -> dict[str, Any]:
    """Times all rows of the families, in the order of FAMILIES. show: called with each row when it is there.

    Raises WrongResult where something computes the wrong thing: then nothing about it is timed.
    """
    torch.manual_seed(0)
    began, others_began = time.monotonic(), busy_seconds()
    clock = HostClock(settings.rounds, settings.roof_bytes, settings.cold_bytes)
    bench, found = Bench(clock), {**machine(), "roofs": clock.roofs()}
    rows: list[Row] = []
    chosen = [name for name in FAMILIES if name in families]
    for name in chosen:
        family = _FAMILIES[name]
        for make in family.cells(settings):
            mode: AbstractContextManager = torch.inference_mode() if family.inference else nullcontext()
            with mode:
                cell = make(settings)
                if family.twins and cell.cold:
                    cell.twin = make(settings.twin())
                new = bench.rows(cell)
            for row in new:
                show(row)
            rows += new
    seconds = time.monotonic() - began
    others = (busy_seconds() - others_began) / seconds / (os.cpu_count() or 1)
    records = [asdict(row) for row in rows]
    return {
        "format": FORMAT,
        "settings": settings.name,
        "rounds": settings.rounds,
        "families": chosen,
        "machine": found | {"other_processes_percent": round(max(100 * others, 0.0), 1)},
        "seconds": round(seconds, 1),
        "rows": records,
        "geomean": geomeans(records),
        "goals": goals.judge(records, chosen),
    }
