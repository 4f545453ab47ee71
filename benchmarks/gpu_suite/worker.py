"""The process that measures: it works through the cells and appends what it finds to a log, line by line.

The log is JSON lines. A worker that starts with a log skips the cells that an earlier one began, so a cell
that takes the device down with it costs that cell and no more.
"""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fusedkv_ext as fkv
from fusedkv_ext.bench.measure import commit as tree_commit
from gpu_suite import triton_fused
from gpu_suite.cells import NO_TIME, TINY, Cell, Sizes
from gpu_suite.measure import DeadDevice, Lab, Row, brief
from gpu_suite.order import ordered_cells
from gpu_suite.supervise import read_log

DEAD_DEVICE = 3  # exit status


class Log:
    """Appends one JSON object per line; what is written is on disk when ``write`` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **content: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, **content}) + "\n")

    def begun(self) -> set[str]:
        return {event["cell"] for event in read_log(self.path) if event["event"] == "begin"}


def machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What a reader needs to know about where the numbers come from."""
    found: dict[str, Any] = {
        "commit": commit or tree_commit(),
        "fusedkv_ext": fkv.__version__,
        "torch": torch.__version__,
        "triton": getattr(triton_fused.triton, "__version__", None),
        "device": "cpu",
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {
            "device": p.name,
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "cuda": torch.version.cuda,
            **device_state(),
        }
    return found


def device_state() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi tells them; empty where it does not."""
    names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (x.strip() for x in done.stdout.splitlines()[0].split(",")), strict=False))


def run(
    log: Log,
    *,
    device: str,
    families: Iterable[str],
    only_quick: bool,
    compile_peers: bool,
    deadline: float | None,
    sizes: Sizes | None = None,
    commit: str | None = None,
) -> None:
    """Measures every cell that the log does not have yet. Raises DeadDevice when the device is lost."""
    torch.manual_seed(0)
    lab = Lab(torch.device(device), torch.bfloat16, compile_peers=compile_peers and device == "cuda")
    sizes = sizes or (Sizes() if lab.cuda else TINY)
    done = log.begun()
    with torch.no_grad():
        log.write("machine", **machine(lab.device, commit))
        log.write(
            "roofs", forms=lab.measure_roofs(), best=lab.roofs, after=device_state() if lab.cuda else {}
        )
        for cell in ordered_cells(sizes, families, only_quick):
            if cell.key in done:
                continue
            if deadline is not None and time.time() > deadline:
                log.write("not run", cell=cell.key, reason=NO_TIME)
                continue
            log.write("begin", cell=cell.key)
            measure(lab, cell, log)
        log.write("end", **(device_state() if lab.cuda else {}))


def measure(lab: Lab, cell: Cell, log: Log) -> None:
    lab.clean()
    began = time.monotonic()
    if cell.num_bytes > lab.free_bytes():
        need, free = cell.num_bytes / 1e9, lab.free_bytes() / 1e9
        log.write("not run", cell=cell.key, reason=f"needs {need:.0f} GB, {free:.0f} GB are free")
        return
    lab.partial = lambda row: log.write("partial", cell=cell.key, row=row.as_dict())
    try:
        for row in cell.measure(lab):
            log.write("row", cell=cell.key, row=row.as_dict())
        log.write("done", cell=cell.key, seconds=round(time.monotonic() - began, 2))
    except DeadDevice:
        raise
    except Exception as error:
        traceback.print_exc(limit=-6)
        dtype = str(lab.dtype).removeprefix("torch.")
        row = Row(cell.family, cell.name, "", dtype, error=brief(error))
        log.write("row", cell=cell.key, row=row.as_dict())
        lab.alive()
