"""The process that measures: it works through the cells and appends what it finds to a log, line by line.

The log is JSON lines. A worker that starts with a log skips the cells that an earlier one began, so a cell
that takes the device down with it costs that cell and no more.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fusedkv_ext as fkv
from suite import machine
from suite.clocks import DeadDevice
from suite.gpu import decode, many_rows, model, operations, prefill, triton_fused
from suite.gpu.lab import Lab
from suite.gpu.supervise import read_log
from suite.gpu.tasks import FAMILIES, NO_TIME, TINY, Sizes, Task
from suite.measure import Row, brief

DEAD_DEVICE = 3  # exit status
QUICK_PRIORITY = 1


class Log:
    """Appends one JSON object per line; what is written is on disk when ``write`` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **content: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **content}) + "\n")

    def begun(self) -> set[str]:
        return {event["cell"] for event in read_log(self.path) if event["event"] == "begin"}


def facts(lab: Lab, commit: str | None) -> dict[str, Any]:
    """What a reader needs to know about where the numbers come from."""
    found = {**machine.machine(), "device": "cpu", "fusedkv_ext": fkv.__version__}
    found |= {"triton": getattr(triton_fused.triton, "__version__", None)}
    found |= machine.gpu(lab.device) if lab.cuda else {}
    return found | ({"commit": commit} if commit else {})


def all_tasks(sizes: Sizes) -> Iterator[Task]:
    yield from decode.decode_tasks(sizes)
    yield from decode.coded_tasks(sizes)
    yield from decode.latency_tasks(sizes)
    yield from decode.head_dim_tasks(sizes)
    yield from decode.layout_tasks(sizes)
    yield from decode.ragged_tasks(sizes)
    yield from decode.schedule_tasks(sizes)
    yield from many_rows.crossover_tasks(sizes)
    yield from many_rows.chunked_tasks(sizes)
    yield from operations.fuse_tasks(sizes)
    yield from operations.append_tasks(sizes)
    yield from prefill.prefill_tasks(sizes)
    yield from model.model_tasks(sizes)


def ordered_tasks(sizes: Sizes, families: Iterable[str], quick: bool, headline: bool = False) -> list[Task]:
    """By importance; within one importance the families take turns, in the order that FAMILIES has."""
    wanted, last = set(families), 0 if headline else QUICK_PRIORITY if quick else math.inf
    seen: Counter[tuple[str, int]] = Counter()
    tasks: list[tuple[tuple[int, int, int], Task]] = []
    for task in all_tasks(sizes):
        if task.family in wanted and task.priority <= last:
            turn = seen[task.family, task.priority]
            seen[task.family, task.priority] += 1
            tasks.append(((task.priority, turn, FAMILIES.index(task.family)), task))
    return [task for _, task in sorted(tasks, key=lambda item: item[0])]


def run(
    log: Log,
    *,
    device: str,
    families: Iterable[str],
    only_quick: bool,
    compile_peers: bool,
    deadline: float | None,
    only_headline: bool = False,
    sizes: Sizes | None = None,
    commit: str | None = None,
) -> None:
    """Measures every cell that the log does not have yet. Raises DeadDevice when the device is lost."""
    torch.manual_seed(0)
    lab = Lab(torch.device(device), torch.bfloat16, compile_peers=compile_peers and device == "cuda")
    sizes = sizes or (Sizes() if lab.cuda else TINY)
    done = log.begun()
    with torch.no_grad():
        log.write("machine", **facts(lab, commit))
        forms = lab.measure_roofs()
        log.write("roofs", forms=forms, best=lab.clock.rates, after=machine.gpu_state() if lab.cuda else {})
        for task in ordered_tasks(sizes, families, only_quick, only_headline):
            if task.key in done:
                continue
            if deadline is not None and time.time() > deadline:
                log.write("not run", cell=task.key, reason=NO_TIME)
                continue
            log.write("begin", cell=task.key)
            measure(lab, task, log)
        log.write("end", **(machine.gpu_state() if lab.cuda else {}))


def measure(lab: Lab, task: Task, log: Log) -> None:
    lab.clock.recover()
    began = time.monotonic()
    if task.num_bytes > lab.free_bytes():
        need, free = task.num_bytes / 1e9, lab.free_bytes() / 1e9
        log.write("not run", cell=task.key, reason=f"needs {need:.0f} GB, {free:.0f} GB are free")
        return
    lab.bench.partial = lambda row: log.write("partial", cell=task.key, row=asdict(row))
    # A sign of life before each peer: compiling one may take longer than a whole cell should.
    lab.bench.trying = lambda peer: log.write("peer", cell=task.key, peer=peer)
    try:
        for row in task.measure(lab):
            log.write("row", cell=task.key, row=asdict(row))
        log.write("done", cell=task.key, seconds=round(time.monotonic() - began, 2))
    except DeadDevice:
        raise
    except Exception as error:
        traceback.print_exc(limit=-6)
        dtype = str(lab.dtype).removeprefix("torch.")
        row = Row(task.family, task.name, dtype=dtype, error=brief(error))
        log.write("row", cell=task.key, row=asdict(row))
        lab.clock.recover()
