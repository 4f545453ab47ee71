"""The process that watches: starts a worker, prints its rows, replaces it when it dies or hangs.

It touches neither torch nor the device, so nothing that happens there can end it: the rows found so far
always reach the result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from suite.gpu.tasks import NO_TIME

POLL_SECONDS = 0.2
MAX_WORKERS = 8


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines; a worker that was killed may have left half of one."""
    text = path.read_text() if path.exists() else ""
    events = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def supervise(
    command: list[str],
    log: Path,
    *,
    stall_seconds: float,
    deadline: float | None,
    show: Callable[[dict[str, Any]], None],
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Runs ``command`` until a worker ends well; returns the log. ``show`` gets every event once.

    A worker that writes nothing for ``stall_seconds``, or that still runs at the deadline (``time.time()``),
    is killed with all its children.
    """
    shown = 0
    for _ in range(MAX_WORKERS):
        worker = subprocess.Popen(command, start_new_session=True, env=environment)
        last_sign, reason = time.monotonic(), None
        try:
            while True:
                ended = worker.poll() is not None
                events = read_log(log)
                for event in events[shown:]:
                    show(event)
                    last_sign = time.monotonic()
                shown = len(events)
                if ended:
                    break
                if time.monotonic() - last_sign > stall_seconds:
                    reason = f"no progress in {stall_seconds:.0f} s"
                elif deadline is not None and time.time() > deadline:
                    reason = NO_TIME
                if reason is not None:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            status = worker.wait()
        if status == 0 and reason is None:
            return events
        events = read_log(log)
        with log.open("a") as file:
            file.write("\n")
            for event in lost(events, reason or said(status)):
                file.write(json.dumps(event) + "\n")
        if deadline is not None and time.time() > deadline or not progressed(events):
            break
    events = read_log(log)
    for event in events[shown:]:
        show(event)
    return events


def said(status: int) -> str:
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process ended with {status}"


def progressed(events: list[dict[str, Any]]) -> bool:
    """Whether any worker came as far as a cell: if not, the next one will not either."""
    return any(event["event"] == "begin" for event in events)


def lost(events: list[dict[str, Any]], reason: str) -> list[dict[str, Any]]:
    """What to write down for the cell during which a worker was lost: its partial row, or none, and why."""
    begun = [event["cell"] for event in events if event["event"] == "begin"]
    over = {event["cell"] for event in events if event["event"] in ("done", "not run", "lost")}
    over |= {event["cell"] for event in events if event["event"] == "row" and event["row"]["error"]}
    if not begun or begun[-1] in over:
        return [{"event": "worker lost", "reason": reason}]
    cell = begun[-1]
    if reason == NO_TIME:
        return [{"event": "not run", "cell": cell, "reason": reason}]
    mine = [event for event in events if event.get("cell") == cell]
    finished = {(e["row"]["op"], e["row"]["shape"]) for e in mine if e["event"] == "row"}
    partial = [e["row"] for e in mine if e["event"] == "partial"]
    found = [row for row in partial[-1:] if (row["op"], row["shape"]) not in finished]
    if found:
        tried = [e["peer"] for e in mine if e["event"] == "peer"]
        during = f"while {tried[-1]} was tried" if tried else "while its peers were measured"
        row = found[0] | {"error": f"{during}: {reason}"}
    else:
        family, name = cell.split(": ", 1)
        row = {"family": family, "op": name, "shape": "", "dtype": "", "us": None, "error": reason}
        row["peers"] = {}
    return [{"event": "lost", "cell": cell}, {"event": "row", "cell": cell, "row": row}]


if __name__ == "__main__":
    sys.exit("run benchmarks/gpu.py")
