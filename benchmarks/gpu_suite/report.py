"""Result of a run: one JSON object, lines on the terminal, tables in markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from gpu_suite.cells import FAMILIES, NO_TIME

RowDict = dict[str, Any]
# Backends of one formulation: the fastest one counts.
COLUMNS = {"SDPA ": "SDPA", "concat SDPA ": "concat SDPA"}
TITLES = {
    "decode": "Cached attention, one query token",
    "latency": "Latency, one sequence",
    "ragged": "Ragged batches",
    "schedule": "Schedules",
    "fuse": "Fusing",
    "append": "Appending to the cache",
    "prefill": "Attention of a layer over a prompt",
    "model": "Whole decoders",
}


def collect(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The log as one object: machine, roofs, rows, what was not run, and geometric means per family."""
    result: dict[str, Any] = {"machine": {}, "at_end": {}, "roofs": {}, "rows": [], "not_run": {}}
    for event in events:
        kind = event["event"]
        content = {name: value for name, value in event.items() if name != "event"}
        if kind == "machine" and not result["machine"]:
            result["machine"] = content
        elif kind == "end":
            result["at_end"] = content
        elif kind == "roofs":
            result["roofs"] = content
        elif kind == "row":
            result["rows"].append(event["row"])
        elif kind == "not run":
            result["not_run"][event["cell"]] = event["reason"]
        elif kind == "worker lost":
            result.setdefault("workers_lost", []).append(event["reason"])
    result["geomean"] = {family: means(result["rows"], family) for family in present(result["rows"])}
    result["two_sources_per_byte"] = per_byte(result["rows"])
    return result


def present(rows: list[RowDict]) -> list[str]:
    return [family for family in FAMILIES if any(row["family"] == family for row in rows)]


def geomean(numbers: Iterable[float | None]) -> float | None:
    logs = [math.log(x) for x in numbers if x]
    return math.exp(sum(logs) / len(logs)) if logs else None


def means(rows: list[RowDict], family: str) -> dict[str, Any]:
    mine = [row for row in rows if row["family"] == family]
    return {
        "rows": len(mine),
        "errors": sum(row["error"] is not None for row in mine),
        "percent_of_roof": geomean(row.get("percent_of_roof") for row in mine),
        "x_peer": geomean(row.get("x_peer") for row in mine),
    }


def per_byte(rows: list[RowDict]) -> float | None:
    """Time of two sources over twice the time of one, over all decode shapes that have both."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["op"].startswith("decode, ") and "source" in row["op"] and row.get("us"):
            times.setdefault((row["family"], row["shape"]), {})[row["op"]] = row["us"]
    pairs = [t for t in times.values() if {"decode, 1 source", "decode, 2 sources"} <= t.keys()]
    return geomean(t["decode, 2 sources"] / (2 * t["decode, 1 source"]) for t in pairs)


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits, without exponents."""
    if x is None:
        return "-"
    if x == 0:
        return "0"
    return f"{x:.{max(digits - 1 - math.floor(math.log10(abs(x))), 0)}f}"


def line(row: RowDict) -> str:
    """op shape dtype | us | GB/s | TFLOP/s | % of roof | x peer"""
    head = f"{row['op']} {row['shape']} {row['dtype']}"
    if row["error"] is not None and row.get("us") is None:
        return f"{head} | {row['error']}"
    percent, x = row["percent_of_roof"], row["x_peer"]
    cells = [
        head,
        f"{number(row['us'])} us",
        f"{number(row['gb_per_s'])} GB/s",
        f"{number(row['tflop_per_s'])} TFLOP/s",
        "-" if percent is None else f"{percent:.0f}% of {row['roof']}",
        "-" if x is None else f"{x:.2f} x {row['peer']}",
    ]
    return " | ".join(cells if row["error"] is None else [*cells, row["error"]])


def show(event: dict[str, Any]) -> None:
    """One event of the log on the terminal."""
    kind = event["event"]
    if kind == "machine":
        print(", ".join(f"{name} {value}" for name, value in event.items() if name != "event"), flush=True)
    elif kind == "roofs":
        for roof, forms in event["forms"].items():
            unit = "TFLOP/s" if roof == "matmul" else "GB/s"
            text = ", ".join(f"{name} {number(rate, 4)}" for name, rate in forms.items())
            print(f"roof, {roof} ({unit}): {text}", flush=True)
    elif kind == "row":
        print(line(event["row"]), flush=True)
    elif kind == "not run" and event["reason"] != NO_TIME:
        print(f"not run: {event['cell']} ({event['reason']})", flush=True)
    elif kind == "worker lost":
        print(f"the measuring process was lost: {event['reason']}", flush=True)


def print_means(result: dict[str, Any]) -> None:
    late = sum(reason == NO_TIME for reason in result["not_run"].values())
    if late:
        print(f"not run: {late} cells ({NO_TIME})")
    for family, mean in result["geomean"].items():
        roof = "-" if mean["percent_of_roof"] is None else f"{mean['percent_of_roof']:.0f}%"
        x = "-" if mean["x_peer"] is None else f"{mean['x_peer']:.2f} x"
        print(f"geomean {family}: {roof} of roof, {x} peer, {mean['rows']} rows, {mean['errors']} errors")
    if result["two_sources_per_byte"] is not None:
        print(f"two sources take {result['two_sources_per_byte']:.3f} of twice the time of one")


# ---- markdown ------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """Tables for docs/performance.md; every number in them comes from the file."""
    machine, out = result["machine"], []
    facts = [f"{machine.get('device')}", f"torch {machine.get('torch')}", f"commit {machine.get('commit')}"]
    if "driver_version" in machine:
        facts.insert(1, f"driver {machine['driver_version']}")
    out.append(", ".join(facts) + ".")
    for roof, rate in result["roofs"].get("best", {}).items():
        unit, size = ("TFLOP/s", 1e12) if roof == "matmul" else ("GB/s", 1e9)
        out.append(f"* measured {roof} roof: {number(rate / size, 4)} {unit}")
    if result["two_sources_per_byte"] is not None:
        out.append(
            f"* two sources take {result['two_sources_per_byte']:.3f} times as long as twice one source "
            "(geometric mean over the shapes that have both)"
        )
    for family in present(result["rows"]):
        rows = [row for row in result["rows"] if row["family"] == family]
        out += ["", f"### {TITLES[family]}"]
        for group in same_peers(rows):
            out += ["", *table(group)]
        out += ["", *notes(rows)]
    if result["not_run"]:
        out += ["", f"Not run: {len(result['not_run'])} cells; the file has the reasons."]
    return "\n".join(out) + "\n"


def same_peers(rows: list[RowDict]) -> list[list[RowDict]]:
    """One table each for one and for two sources, whose peers differ; rows by the numbers in their shapes."""
    rows = [row for row in rows if row.get("us") is not None]
    rows.sort(key=lambda row: [int(n) for n in re.findall(r"\d+", row["shape"])])
    single = [row for row in rows if row["op"] == "decode, 1 source"]
    other = [row for row in rows if row["op"] != "decode, 1 source"]
    return [group for group in (other, single) if group]


def column(peer: str) -> str:
    return next((name for prefix, name in COLUMNS.items() if peer.startswith(prefix)), peer)


def table(rows: list[RowDict]) -> list[str]:
    """Times of ours, and for every peer how many times as long it took."""
    peers = list(dict.fromkeys(column(name) for row in rows for name in row["peers"]))
    fixed: dict[str, Callable[[RowDict], str]] = {
        "us": lambda row: number(row["us"]),
        "GB/s": lambda row: number(row["gb_per_s"]),
        "TFLOP/s": lambda row: number(row["tflop_per_s"]),
        "of roof": lambda row: (
            "-" if row["percent_of_roof"] is None else f"{row['percent_of_roof']:.0f} % of {row['roof']}"
        ),
    }
    titles = ["operation", "shape", *fixed, *(f"x {name}" for name in peers)]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [row["op"], row["shape"], *(text(row) for text in fixed.values())]
        for peer in peers:
            times = [found["us"] for name, found in row["peers"].items() if column(name) == peer]
            times = [us for us in times if us]
            cells.append(f"{min(times) / row['us']:.2f}" if times else "-")
        lines.append(f"| {' | '.join(cells)} |")
    mean = [geomean(row["percent_of_roof"] for row in rows), geomean(row["x_peer"] for row in rows)]
    if mean[0] is not None or mean[1] is not None:
        best = "" if mean[1] is None else f", {mean[1]:.2f} x the best peer"
        of_roof = "" if mean[0] is None else f"{mean[0]:.0f} % of the roof"
        lines += ["", f"Geometric mean: {of_roof}{best}".replace(": , ", ": ") + "."]
    return lines


def notes(rows: list[RowDict]) -> list[str]:
    """Errors of rows, why peers are missing, and whatever was not timed in a CUDA graph."""
    found = [
        f"* {row['op']} {row['shape']}: {row['error']}".replace(" :", ":") for row in rows if row["error"]
    ]
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, peer in row.get("peers", {}).items():
            if peer["us"] is None:
                reasons[name, peer["reason"]] = reasons.get((name, peer["reason"]), 0) + 1
            elif str(peer.get("timing", "")).startswith("stream ("):
                reasons[name, peer["timing"]] = reasons.get((name, peer["timing"]), 0) + 1
    found += [f"* {name}: {reason}, {count} rows" for (name, reason), count in reasons.items()]
    return found
