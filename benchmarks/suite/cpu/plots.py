"""Pictures of a result: time and bandwidth over the context, cost per token over the batch, roofs as lines.

Colors are those of Okabe and Ito, which people with any kind of color vision can tell apart; curves
differ in style as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedkv_ext.lab.figures import new_figure, save, tidy
from suite.cpu.decode import BATCH, CONTEXT
from suite.cpu.goals import select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]

_OURS = {1: ("#0072B2", "fusedkv_ext, 1 source"), 2: ("#D55E00", "fusedkv_ext, 2 sources")}
_TORCH = {1: ("#56B4E9", "torch's best, 1 source"), 2: ("#E69F00", "torch's best, 2 sources")}
_ROOF = {"color": "#4D4D4D", "linestyle": ":", "linewidth": 1.4}


def _curves(axes: Axes, rows: list[dict], over: str, of: Callable[[dict, float], float]) -> None:
    """Ours and torch's best for one source and two; of(row, us): what to draw."""
    for m in (1, 2):
        mine = [row for row in rows if row["params"]["m"] == m]
        x = [row["params"][over] for row in mine]
        color, name = _OURS[m]
        axes.plot(x, [of(row, row["us"]) for row in mine], "o-", color=color, markersize=3.5, label=name)
        low, high = ([of(row, row[key]) for row in mine] for key in ("us_low", "us_high"))
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        color, name = _TORCH[m]
        best = [of(row, row["peers"][row["best_peer"]]["us"]) for row in mine]
        axes.plot(x, best, "s--", color=color, markersize=3, linewidth=1.2, label=name)


def _tidy(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    powers = [1 << i for i in range(20) if low <= 1 << i <= high]
    shown = powers[:: 1 if len(powers) < 8 else 2]
    axes.set_xticks(shown, [f"{x >> 10}k" if x >= 1024 else str(x) for x in shown])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    tidy(axes)
    axes.legend(frameon=False, fontsize=7)


def _roof_us(row: dict) -> float:
    return row["num_bytes"] / row["roof_gb_per_s"] / 1e3


def time_over_context(axes: Axes, result: Result) -> None:
    rows = select(result["rows"], CONTEXT)
    _curves(axes, rows, "T", lambda row, us: us)
    two = [row for row in rows if row["params"]["m"] == 2]
    axes.plot(
        [row["params"]["T"] for row in two],
        [_roof_us(row) for row in two],
        **_ROOF,
        label="read roof, 2 sources",
    )
    axes.set_yscale("log")
    _tidy(axes, "Time of one token", "cached tokens", "us")


def bandwidth_over_context(axes: Axes, result: Result) -> None:
    rows = select(result["rows"], CONTEXT)
    _curves(axes, rows, "T", lambda row, us: row["num_bytes"] / us / 1e3)
    one = [row for row in rows if row["params"]["m"] == 1]
    axes.plot(
        [row["params"]["T"] for row in one], [row["roof_gb_per_s"] for row in one], **_ROOF, label="read roof"
    )
    axes.set_ylim(bottom=0)
    _tidy(axes, "Bandwidth achieved", "cached tokens", "GB/s of keys and values")


def cost_over_batch(axes: Axes, result: Result) -> None:
    rows = select(result["rows"], BATCH)
    _curves(axes, rows, "B", lambda row, us: us / row["params"]["B"])
    two = [row for row in rows if row["params"]["m"] == 2]
    axes.plot(
        [row["params"]["B"] for row in two],
        [_roof_us(row) / row["params"]["B"] for row in two],
        **_ROOF,
        label="read roof, 2 sources",
    )
    axes.set_ylim(bottom=0)
    tokens = rows[0]["params"]["T"] if rows else 0
    _tidy(axes, f"Cost per token at {tokens:,} cached tokens", "sequences", "us per sequence")


PANELS = {
    "time_over_context": time_over_context,
    "bandwidth_over_context": bandwidth_over_context,
    "cost_over_batch": cost_over_batch,
}


def save_all(result: Result, folder: Path) -> list[Path]:
    """One PNG per panel. Nothing without the family "decode"."""
    if "decode" not in result["families"]:
        return []
    written = []
    for name, draw in PANELS.items():
        figure, axes = new_figure(4.2, 3.5)
        draw(axes, result)
        written.append(save(figure, folder / f"{name}.png"))
    return written


def overview(result: Result, path: Path) -> None:
    """All panels side by side."""
    figure, all_axes = new_figure(4.2 * len(PANELS), 3.5, ncols=len(PANELS))
    for axes, draw in zip(all_axes, PANELS.values(), strict=True):
        draw(axes, result)
    save(figure, path)
