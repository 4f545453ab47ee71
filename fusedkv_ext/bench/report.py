"""Tables of results: on the screen while they come, and in the documents.

    python -m fusedkv_ext.bench.report ROOT

fills what stands between `<!-- generated: KIND FILE -->` and `<!-- end -->` in ROOT's documents from
ROOT/benchmarks/results/FILE and draws the pictures of ROOT/docs/img. KIND is one of BLOCKS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedkv_ext.bench import goals
from fusedkv_ext.bench.decode import BATCH, CONTEXT, SHORT
from fusedkv_ext.bench.settings import FAMILIES
from fusedkv_ext.lab import reporting

Result = dict[str, Any]
Record = dict[str, Any]

DOCUMENTS = ("docs/performance.md", "README.md")
PICTURES = {"docs/img/cpu_decode.png": "cpu_2threads.json"}
RESULTS = "benchmarks/results"
_CURVES = (CONTEXT, BATCH)


# On the screen

HEADER = (
    f"{'operation':30} {'shape':44} {'dtype':9} {'us':>10} {'quartiles':>19} {'GB/s':>6} {'roof':>5} "
    f"{'of it':>5}  x of peers"
)


def line(row: Record) -> str:
    spread = f"{row['us_low']:.1f}..{row['us_high']:.1f}"
    bandwidth = f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else ""
    roof, share = (row["roof"], f"{row['percent_of_roof']:.0f}%") if row["roof"] else ("", "")
    notes = [f"{peer['x']:.2f} {name}" for name, peer in _by_time(row)]
    if row["versus"]:
        notes.append(f"{times(row['versus']['x'])} of the time of {row['versus']['to']}")
    if row["peak_mb"]:
        notes.append(f"peak {row['peak_mb']:.0f} MB")
    return (
        f"{row['op']:30} {row['shape']:44} {row['dtype']:9} {row['us']:10.1f} {spread:>19} {bandwidth:>6} "
        f"{roof:>5} {share:>5}  {'; '.join(notes)}"
    ).rstrip()


def _by_time(row: Record) -> list[tuple[str, Record]]:
    """The peers that ran, the fastest first."""
    ran = [(name, peer) for name, peer in row["peers"].items() if "x" in peer]
    return sorted(ran, key=lambda item: item[1]["us"])


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.95 else f"{ratio:.1f}x"


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
    """What `fusedkv bench` prints at its end: geometric means, goals, how quiet the machine was."""
    lines = []
    for family, mean in result["geomean"].items():
        parts = []
        if "percent_of_roof" in mean:
            parts.append(f"{mean['percent_of_roof']:.0f}% of the roof")
        if "x_best" in mean:
            parts.append(f"{mean['x_best']:.2f} x the best peer")
        if parts:
            lines.append(f"geometric mean of {family}: {', '.join(parts)}")
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


def _beside(row: Record) -> str:
    parts = [f"{times(peer['x'])} {name}" for name, peer in _by_time(row)]
    parts += [f"{name}: none" for name, peer in row["peers"].items() if "reason" in peer]
    return ", ".join(parts)


def _shares(row: Record) -> list[str]:
    if not row["roof"]:
        return [f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else "", ""]
    return [f"{row['gb_per_s']:.1f}", f"{row['percent_of_roof']:.0f} % of {row['roof']}"]


def _operations(rows: Sequence[Record]) -> str:
    return reporting.table(
        ["operation", "shape", "dtype", "us (quartiles)", "GB/s", "of the roof", "times as fast as"],
        [[r["op"], r["shape"], r["dtype"], _microseconds(r), *_shares(r), _beside(r)] for r in rows],
    )


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


BLOCKS: dict[str, Callable[[Result], str]] = {
    "conditions": conditions,
    "goals": goals_table,
    "rows": rows_tables,
    "headline": headline,
}


def filled(text: str, results: Path) -> str:
    """A document with every generated block made anew from the files of the folder ``results``."""
    return reporting.filled_from_results(text, BLOCKS, results)


def main(root: Path) -> None:
    from fusedkv_ext.bench import plots

    for name in DOCUMENTS:
        path = root / name
        path.write_text(filled(path.read_text(), root / RESULTS))
        print(f"wrote {path}")
    for name, source in PICTURES.items():
        plots.overview(json.loads((root / RESULTS / source).read_text()), root / name)
        print(f"wrote {root / name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
