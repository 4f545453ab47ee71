"""Results on the terminal while they come, and what is computed from rows. Works without torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from suite.gpu.tasks import NO_TIME

Record = dict[str, Any]  # a Row as a dictionary, as it comes out of a JSON file

_COLUMNS = "{:30} {:44} {:9} | {:>10} {:>19} | {:>6} | {:>7} | {:>14} | {}"
HEADER = _COLUMNS.format(
    *("operation", "shape", "dtype", "us", "quartiles", "GB/s", "TFLOP/s", "of the roof", "x of peers")
)


def line(row: Record) -> str:
    head = (row["op"], row["shape"], row["dtype"])
    if row["us"] is None:
        return f"{' '.join(head)} | {row['error']}"
    spread = f"{row['us_low']:.1f}..{row['us_high']:.1f}"
    bandwidth = f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else ""
    notes = [f"{peer['x']:.2f} {name}" for name, peer in by_time(row)]
    if row["versus"]:
        notes.append(f"{times(row['versus']['x'])} of the time of {row['versus']['to']}")
    if row["peak_mb"]:
        notes.append(f"peak {row['peak_mb']:.0f} MB")
    notes += [row["error"]] if row["error"] else []
    numbers = (f"{row['us']:.1f}", spread, bandwidth, number(row["tflop_per_s"]), share(row))
    return _COLUMNS.format(*head, *numbers, "; ".join(notes))


def share(row: Record) -> str:
    """Of the roof, and of the limit where that is known."""
    parts = [f"{row['percent_of_roof']:.0f} % of {row['roof']}"] if row["percent_of_roof"] else []
    if row.get("percent_of_limit"):
        parts.append(
            f"{row['percent_of_limit']:.0f} % of the limit (products {row['products_gb_per_s']:.0f} GB/s)"
        )
    return ", ".join(parts)


def by_time(row: Record) -> list[tuple[str, Record]]:
    """The peers that ran, the fastest first."""
    ran = [(name, peer) for name, peer in row["peers"].items() if "x" in peer]
    return sorted(ran, key=lambda item: item[1]["us"])


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.95 else f"{ratio:.1f}x"


def number(x: float | None, digits: int = 3) -> str:
    """So many significant digits, without exponents; empty for None."""
    if x is None:
        return ""
    return f"{x:.{max(digits - 1 - math.floor(math.log10(abs(x))), 0)}f}" if x else "0"


def geomean(numbers: Iterable[float | None]) -> float | None:
    found = [math.log(x) for x in numbers if x]
    return math.exp(statistics.fmean(found)) if found else None


def geomeans(rows: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Per family, of the share of the roof and of the ratio to the best peer, over the rows that have it."""
    found: dict[str, dict[str, float]] = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        means = {
            name: geomean(row.get(name) for row in rows if row["family"] == family)
            for name in ("percent_of_roof", "x_best")
        }
        found[family] = {name: mean for name, mean in means.items() if mean is not None}
    return found


def means(result: Record) -> list[str]:
    """The geometric means as lines."""
    lines = []
    for family, mean in result["geomean"].items():
        parts = []
        if "percent_of_roof" in mean:
            parts.append(f"{mean['percent_of_roof']:.0f}% of the roof")
        if "x_best" in mean:
            parts.append(f"{mean['x_best']:.2f} x the best peer")
        if parts:
            lines.append(f"geometric mean of {family}: {', '.join(parts)}")
    return lines


# The log of the GPU suite


def collect(events: Iterable[Record]) -> Record:
    """The log as one object: machine, roofs, rows, what was not run, and geometric means per family."""
    result: Record = {"machine": {}, "at_end": {}, "roofs": {}, "rows": [], "not_run": {}}
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
    result["geomean"] = geomeans(result["rows"])
    result["two_sources_per_byte"] = per_byte(result["rows"])
    return result


def merged(checked: Record) -> Record:
    """The benchmarks in a report of scripts/gpu_check.sh as one. Of a row that two have, the later one."""
    parts = list(checked["benchmarks"].values())
    rows: dict[tuple[str, str, str], Record] = {}
    for row in (row for part in parts for row in part["rows"]):
        key = row["family"], row["op"], row["shape"]
        if key not in rows or not row["error"]:
            rows[key] = row
    found = list(rows.values())
    result = parts[0] | {"rows": found, "geomean": geomeans(found), "two_sources_per_byte": per_byte(found)}
    result["machine"] = parts[0]["machine"] | {"commit": checked["commit"]}
    result["not_run"] = {cell: reason for part in parts for cell, reason in part["not_run"].items()}
    return result


def per_byte(rows: list[Record]) -> float | None:
    """Time of two sources over twice the time of one, over all decode shapes that have both."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["op"].startswith("decode, ") and "source" in row["op"] and row.get("us"):
            times.setdefault((row["family"], row["shape"]), {})[row["op"]] = row["us"]
    pairs = [t for t in times.values() if {"decode, 1 source", "decode, 2 sources"} <= t.keys()]
    return geomean(t["decode, 2 sources"] / (2 * t["decode, 1 source"]) for t in pairs)


def show(event: Record) -> None:
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


def closing(result: Record) -> list[str]:
    """What benchmarks/gpu.py prints at its end."""
    lines = means(result)
    late = sum(reason == NO_TIME for reason in result["not_run"].values())
    if late:
        lines.append(f"not run: {late} cells ({NO_TIME})")
    errors = sum(row["error"] is not None for row in result["rows"])
    lines.append(f"{len(result['rows'])} rows, {errors} errors")
    if result["two_sources_per_byte"] is not None:
        lines.append(f"two sources take {result['two_sources_per_byte']:.3f} of twice the time of one")
    return lines
