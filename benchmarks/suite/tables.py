"""Results as tables, and the documents that are made from them.

    PYTHONPATH=benchmarks python -m suite.tables ROOT

fills what stands between `<!-- generated: KIND FILE -->` and `<!-- end -->` in ROOT's documents from
ROOT/benchmarks/results/FILE and draws the pictures of ROOT/docs/img. KIND is one of BLOCKS.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedkv_ext.lab import reporting
from suite.cpu import goals, plots
from suite.cpu.decode import BATCH, CONTEXT, SHORT
from suite.cpu.settings import FAMILIES
from suite.gpu.tasks import TITLES
from suite.report import by_time, means, number, share, times
from suite.serving import report as serving

Result = dict[str, Any]
Record = dict[str, Any]

DOCUMENTS = ("docs/performance.md", "docs/serving.md", "README.md")
PICTURES = {"docs/img/cpu_decode.png": "cpu_2threads.json"}
RESULTS = "benchmarks/results"
_CURVES = (CONTEXT, BATCH)


def figure(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    if unit == "x":
        return f"{value:.3f}x" if value < 2 else times(value)
    return f"{value:.0f} %" if unit == "%" else f"{value:.1f} {unit}"


def _met(goal: Record) -> str:
    return {True: "met", False: "not met", None: "-"}[goal["met"]]


def _bound(goal: Record) -> str:
    number = {"x": "{:g}x", "%": "{:g} %"}.get(goal["unit"], "{:g} " + goal["unit"])
    return ("at least " if goal["at_least"] else "at most ") + number.format(goal["threshold"])


def summary(result: Result) -> str:
    """What benchmarks/cpu.py prints at its end: geometric means, goals, how quiet the machine was."""
    lines = means(result)
    lines.append("")
    for goal in result["goals"]:
        measured = figure(goal["measured"], goal["unit"])
        lines.append(f"{_met(goal):8} {measured:>12}  {_bound(goal):15} {goal['family']}: {goal['goal']}")
    lines += ["", closing(result)]
    return "\n".join(lines)


def closing(result: Result) -> str:
    busy = result["machine"]["other_processes_percent"]
    judged = [goal for goal in result["goals"] if goal["met"] is not None]
    text = f"{sum(goal['met'] for goal in judged)} of {len(judged)} goals met, {result['seconds']:.0f} s"
    if result["settings"] != "full":
        text += f"; a {result['settings']} run has small models and few rounds: an indication"
    text += f"; other processes used {busy:.0f}% of the CPUs meanwhile"
    return text + (": run it again on a quiet machine" if busy > 5 else "")


# In documents


def _size(number: int) -> str:
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


def conditions(result: Result) -> str:
    """The machine, the roofs and the run, as sentences."""
    m = result["machine"]
    caches = ", ".join(f"{level} {_size(size)}" for level, size in m["cache_bytes"].items())
    read, copy = (m["roofs"][name] for name in ("read", "copy"))
    return (
        f"{m['cpu']}, {m['threads']} threads, kernels for {m['level']}, caches as the system tells them: "
        f"{caches}; torch {m['torch']}, Python {m['python']}, commit {m['commit']}. Roofs before the first "
        f"row, median (quartiles): read {read['gb_per_s']:.1f} GB/s ({read['low']:.1f} to "
        f"{read['high']:.1f}), copy {copy['gb_per_s']:.1f} ({copy['low']:.1f} to {copy['high']:.1f}). "
        f"{result['rounds']} rounds, {result['seconds']:.0f} s in all; other processes used "
        f"{m['other_processes_percent']:.1f} % of the CPUs.\n"
    )


def goals_table(result: Result) -> str:
    rows = [
        [goal["family"], goal["goal"], _bound(goal), figure(goal["measured"], goal["unit"]), _met(goal)]
        for goal in result["goals"]
    ]
    return reporting.table(["family", "the worst of its rows", "goal", "measured", ""], rows)


def _microseconds(row: Record) -> str:
    def short(us: float) -> str:
        return f"{us:,.1f}" if us < 100 else f"{us:,.0f}"

    return f"{short(row['us'])} ({short(row['us_low'])} to {short(row['us_high'])})"


def _beside(row: Record, versus: bool) -> str:
    parts = [f"{times(peer['x'])} {name}" for name, peer in by_time(row)]
    if versus and row["versus"]:
        parts.append(f"{times(row['versus']['x'])} of the time of {row['versus']['to']}")
    parts += [f"{name}: none" for name, peer in row["peers"].items() if "reason" in peer]
    return ", ".join(parts)


def _shares(row: Record) -> list[str]:
    bandwidth = f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else ""
    return [bandwidth, share(row)]


def _operations(rows: Sequence[Record], versus: bool = False) -> str:
    titles = ["operation", "shape", "dtype", "us (quartiles)", "GB/s", "of the roof", "times as fast as"]
    lines = [
        [r["op"], r["shape"], r["dtype"], _microseconds(r), *_shares(r), _beside(r, versus)] for r in rows
    ]
    if any(row.get("tflop_per_s") for row in rows):
        titles.insert(5, "TFLOP/s")
        for row, cells in zip(rows, lines, strict=True):
            cells.insert(5, number(row["tflop_per_s"]))
    return reporting.table(titles, lines)


def _variants(rows: Sequence[Record]) -> str:
    """Rows that are compared with one of ours."""
    lines = []
    for row in rows:
        ratio = f"{times(row['versus']['x'])} {row['versus']['to']}" if row["versus"] else ""
        lines.append([row["op"], row["shape"], row["dtype"], _microseconds(row), *_shares(row), ratio])
    titles = ["operation", "shape", "dtype", "us (quartiles)", "GB/s", "of the roof", "time, to"]
    return reporting.table(titles, lines)


def _models(rows: Sequence[Record]) -> str:
    lines = []
    for row in rows:
        p = dict(row["params"])
        plan = p.pop("plan")
        ratio = times(row["versus"]["x"]) if row["versus"] else ""
        shape = " ".join(f"{name}={value}" for name, value in p.items())
        peak = f"{row['peak_mb']:,.0f}" if row["peak_mb"] else ""
        lines.append([row["op"], shape, row["dtype"], plan, _microseconds(row), ratio, peak])
    titles = ["what", "shape", "dtype", "plan", "us (quartiles)", "to vanilla", "peak MB"]
    return reporting.table(titles, lines)


def rows_tables(result: Result) -> str:
    """All rows, in a section for each family."""
    parts = []
    for family in FAMILIES:
        rows = [row for row in result["rows"] if row["family"] == family]
        if not rows:
            continue
        parts.append(f"### {family}\n")
        if family in ("prefill", "train", "model"):
            parts.append(_models(rows))
            continue
        curves = [row for row in rows if row["op"] in _CURVES]
        if family == "coded":
            parts.append(_operations(rows, versus=True))
            continue
        variants = [row for row in rows if "decode, " in row["op"] and row["op"] not in (*_CURVES, SHORT)]
        rest = [row for row in rows if row not in curves and row not in variants]
        parts.append(_operations(rest))
        for more, write in ((variants, _variants), (curves, _operations)):
            if more:
                parts.append(write(more))
        mean = result["geomean"][family]
        parts.append(
            f"Geometric means: {mean['percent_of_roof']:.0f} % of the roof, {mean['x_best']:.2f} times as "
            "fast as the best peer of each row.\n"
        )
    return "\n".join(parts)


def headline(result: Result) -> str:
    """A few rows for the README."""
    chosen = goals.select(result["rows"], "decode", "bfloat16")
    lines = []
    for row in chosen:
        p = row["params"]
        what = "plain cache" if p["m"] == 1 else f"FusedKV, {p['m']} + {p['m']} sources"
        lines.append(
            [
                f"{what}, {p['T']:,} tokens, {p['R']} query head{'s' if p['R'] > 1 else ''} per KV head",
                f"{row['us'] / 1e3:.1f} ms",
                f"{row['gb_per_s']:.1f}",
                f"{row['percent_of_roof']:.0f} %",
                f"{times(row['x_best'])} {row['best_peer']}",
            ]
        )
    titles = ["decode, one token, bfloat16", "time", "GB/s", "of the read roof", "as fast as torch's best"]
    return reporting.table(titles, lines)


# Of the GPU suite


def gpu_tables(result: Result) -> str:
    """All rows in Markdown; every number comes from the file."""
    machine, parts = result["machine"], []
    facts = [f"{machine.get('device')}", f"torch {machine.get('torch')}", f"commit {machine.get('commit')}"]
    if "driver_version" in machine:
        facts.insert(1, f"driver {machine['driver_version']}")
    parts.append(", ".join(facts) + ".\n")
    for roof, rate in result["roofs"].get("best", {}).items():
        unit, size = ("TFLOP/s", 1e12) if roof == "matmul" else ("GB/s", 1e9)
        parts.append(f"* measured {roof} roof: {number(rate / size, 4)} {unit}")
    if result["two_sources_per_byte"] is not None:
        parts.append(
            f"* two sources take {result['two_sources_per_byte']:.3f} times as long as twice one source "
            "(geometric mean over the shapes that have both)"
        )
    for family, title in TITLES.items():
        rows = [row for row in result["rows"] if row["family"] == family]
        if rows:
            parts.append(f"\n### {title}\n")
            parts += [_operations(group, versus=True) for group in _same_peers(rows)]
            parts += _notes(rows)
    parts += [f"\n{line}." for line in means(result)]
    if result["not_run"]:
        parts.append(f"\nNot run: {len(result['not_run'])} cells; the file has the reasons.")
    return "\n".join(parts) + "\n"


def _same_peers(rows: list[Record]) -> list[list[Record]]:
    """One table each for one and for two sources, whose peers differ; rows by the numbers in their shapes."""
    rows = [row for row in rows if row.get("us") is not None]
    rows.sort(key=lambda row: [int(n) for n in re.findall(r"\d+", row["shape"])])
    single = [row for row in rows if row["op"].startswith("decode, 1 source")]
    other = [row for row in rows if row not in single]
    return [group for group in (other, single) if group]


def _notes(rows: list[Record]) -> list[str]:
    """Errors of rows, why peers are missing, and whatever was not timed in a CUDA graph."""
    found = [
        " ".join(filter(None, ("*", row["op"], row["shape"]))) + f": {row['error']}"
        for row in rows
        if row["error"]
    ]
    reasons: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for name, peer in row["peers"].items():
            reason = peer.get("reason") or str(peer.get("timing", ""))
            if "reason" in peer or reason.startswith("stream ("):
                reasons[name, reason] += 1
    return found + [f"* {name}: {reason}, {count} rows" for (name, reason), count in reasons.items()]


BLOCKS: dict[str, Callable[[Result], str]] = {
    "conditions": conditions,
    "goals": goals_table,
    "rows": rows_tables,
    "headline": headline,
    "serving": serving.document,
    "serving-pressure": serving.pressure_table,
}


def filled(text: str, results: Path) -> str:
    """A document with every generated block made anew from the files of the folder ``results``."""
    return reporting.filled_from_results(text, BLOCKS, results)


def main(root: Path) -> None:
    for name in DOCUMENTS:
        path = root / name
        path.write_text(filled(path.read_text(), root / RESULTS))
        print(f"wrote {path}")
    for name, source in PICTURES.items():
        plots.overview(json.loads((root / RESULTS / source).read_text()), root / name)
        print(f"wrote {root / name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
