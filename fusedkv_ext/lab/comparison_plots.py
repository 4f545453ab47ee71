"""Plots of a comparison: loss over tokens, and loss over cache bytes with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fusedkv_ext.lab.figures import line_style, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which is safe for color-blind readers; one color per family of methods.
_FAMILIES = {
    "vanilla": "#4D4D4D",
    "gqa": "#4D4D4D",
    "mqa": "#4D4D4D",
    "fusedkv": "#D55E00",
    "dense": "#D55E00",
    "yoco": "#0072B2",
    "cla": "#56B4E9",
    "skip": "#009E73",
    "skipv1": "#009E73",
    "skipkv1": "#009E73",
    "resformer": "#CC79A7",
    "svformer": "#CC79A7",
}


def _color(label: str) -> str:
    family = label.split(":")[0].split("-")[0].rstrip("+")
    return _FAMILIES.get(family, "#E69F00")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = new_figure(width, height)
    tidy(axes)
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.6)
    return figure, axes


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Positions nearest to ascending heights (least squares) that are at least `gap` apart."""
    # Isotonic regression of height - k * gap by pooling adjacent violators.
    pools: list[list[float]] = []
    for k, height in enumerate(heights):
        pools.append([height - k * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = [fmean(pool) for pool in pools for _ in pool]
    return [x + k * gap for k, x in enumerate(level)]


def _names(axes: Axes, points: Sequence[tuple[float, float, str]], beside: float) -> None:
    """Writes the names of (height, x, name) points at x = `beside` without overlap."""
    low, high = axes.get_ylim()
    points = sorted(points)
    for (height, x, name), at in zip(points, _apart([y for y, *_ in points], (high - low) / 44), strict=True):
        axes.annotate(
            name,
            (x, height),
            xytext=(beside, at),
            fontsize=6.5,
            color=_color(name),
            va="center",
            arrowprops={"arrowstyle": "-", "color": _color(name), "linewidth": 0.3, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def loss_over_tokens(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Plots the validation loss over training tokens.

    Args:
        curves: Name -> points (tokens, bits per byte), mean over seeds. May be empty if all methods diverged.
    """
    figure, axes = _axes(8.4, 6.0)
    for index, (name, points) in enumerate(curves.items()):
        tokens = [point[0] / 1e6 for point in points]
        losses = [point[1] for point in points]
        style = line_style(index)
        axes.plot(tokens, losses, style, color=_color(name), linewidth=1.3, marker="o", markersize=2.5)
    late = [point[1] for points in curves.values() for point in points[len(points) // 2 :]]
    if late:
        margin = 0.06 * (max(late) - min(late)) or 0.01
        axes.set_ylim(min(late) - margin, max(late) + margin)
        end = max(points[-1][0] for points in curves.values()) / 1e6
        axes.set_xlim(right=end)
        _names(axes, [(points[-1][1], end, name) for name, points in curves.items()], end * 1.02)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("validation loss, bits per byte")
    axes.set_title("Validation loss, mean over seeds", loc="left", fontsize=11)
    return figure


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of the methods on the Pareto front of cache size and loss."""
    finished = [row for row in rows if row["loss_mean"] is not None]
    best, front = float("inf"), []
    for row in sorted(finished, key=lambda row: (row["cache_bytes_per_token"], row["loss_mean"])):
        if row["loss_mean"] < best:
            best = row["loss_mean"]
            front.append(row["label"])
    return front


def loss_over_cache(result: Mapping[str, Any]) -> Figure:
    """Plots loss over cache bytes per token, with the Pareto front as a line.

    Error bars are one standard deviation over seeds. Variants are rings without error bars.

    Args:
        result: A result of `comparison.summarize`.
    """
    figure, axes = _axes(8.4, 6.0)
    rows = [row for row in result["rows"] if row["loss_mean"] is not None]
    by_label = {row["label"]: row for row in rows}
    for row in rows:
        size, loss, label = row["cache_bytes_per_token"], row["loss_mean"], row["label"]
        if row["options"]:  # a variant
            axes.plot(size, loss, "o", color=_color(label), fillstyle="none", markersize=4)
        else:
            axes.errorbar(
                size,
                loss,
                yerr=row["loss_sd"],
                fmt="o",
                color=_color(label),
                markersize=5,
                linewidth=0.8,
                capsize=2,
                alpha=0.8,
            )
    front = [by_label[label] for label in pareto(rows)]
    x, y = ([row[key] for row in front] for key in ("cache_bytes_per_token", "loss_mean"))
    axes.plot(x, y, color="#999999", linewidth=1, linestyle="--", zorder=0)
    widest = max((row["cache_bytes_per_token"] for row in rows), default=1)
    axes.set_xlim(0, 1.02 * widest)
    columns: list[list[tuple[float, float, str]]] = []
    for row in sorted(rows, key=lambda row: row["cache_bytes_per_token"]):
        size = row["cache_bytes_per_token"]
        if not columns or size - columns[-1][-1][1] > 0.1 * widest:
            columns.append([])
        columns[-1].append((row["loss_mean"], size, row["label"]))
    for column in columns:
        _names(axes, column, column[-1][1] + 0.03 * widest)
    axes.set_xlabel("cache bytes per token (bfloat16)")
    axes.set_ylabel("validation loss, bits per byte")
    what = f"{result['seeds']} seeds, {result['tokens'] / 1e6:.2g} M tokens"
    axes.set_title(
        f"Loss over cache ({what}); rings: variants; dashed: Pareto front", loc="left", fontsize=11
    )
    return figure
