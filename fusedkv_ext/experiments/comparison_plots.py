"""Pictures of a comparison: loss over tokens, and loss over cache bytes with its Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusedkv_ext.figures import line_style, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito, which people with any kind of colour vision can tell apart; one per family of methods.
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


def _colour(label: str) -> str:
    family = label.split(":")[0].split("-")[0].rstrip("+")
    return _FAMILIES.get(family, "#E69F00")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = new_figure(width, height)
    tidy(axes)
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.6)
    return figure, axes


def _spread_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], x: float) -> None:
    """Names beside the ends of lines, moved apart so that none covers another: (height, name, colour)."""
    low, high = axes.get_ylim()
    gap = (high - low) / 42
    at = float("-inf")
    for height, name, colour in sorted(labels):
        at = max(height, at + gap)
        axes.annotate(
            name, (x, height), xytext=(x * 1.03, at), fontsize=7, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4}, annotation_clip=False,
        )  # fmt: skip


def loss_over_tokens(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Validation loss, mean over the seeds, of each method: name -> (tokens, bits per byte) points."""
    figure, axes = _axes(8.4, 6.0)
    ends = []
    for index, (name, points) in enumerate(curves.items()):
        tokens = [point[0] / 1e6 for point in points]
        losses = [point[1] for point in points]
        style = line_style(index)
        axes.plot(tokens, losses, style, color=_colour(name), linewidth=1.3, marker="o", markersize=2.5)
        ends.append((losses[-1], name, _colour(name)))
    late = [point[1] for points in curves.values() for point in points[len(points) // 2 :]]
    margin = 0.06 * (max(late) - min(late))
    axes.set_ylim(min(late) - margin, max(late) + margin)
    _spread_labels(axes, ends, max(axes.get_xlim()[1], 1e-9) / 1.05)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("validation loss, bits per byte")
    axes.set_title("Validation loss, mean over seeds", loc="left", fontsize=11)
    return figure


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of the methods than which no other has both a smaller cache and a lower loss."""
    finished = [row for row in rows if row["loss_mean"] is not None]
    best, front = float("inf"), []
    for row in sorted(finished, key=lambda row: (row["cache_bytes_per_token"], row["loss_mean"])):
        if row["loss_mean"] < best:
            best = row["loss_mean"]
            front.append(row["label"])
    return front


def loss_over_cache(result: Mapping[str, Any]) -> Figure:
    """Loss against cache bytes per token, bars of one standard deviation over the seeds, front as a line."""
    figure, axes = _axes(8.4, 6.0)
    rows = [row for row in result["rows"] if row["loss_mean"] is not None]
    by_label = {row["label"]: row for row in rows}
    for row in rows:
        axes.errorbar(
            row["cache_bytes_per_token"], row["loss_mean"], yerr=row["loss_sd"], fmt="o",
            color=_colour(row["label"]), markersize=5, linewidth=1, capsize=2,
        )  # fmt: skip
    front = [by_label[label] for label in pareto(rows)]
    x, y = ([row[key] for row in front] for key in ("cache_bytes_per_token", "loss_mean"))
    axes.plot(x, y, color="#999999", linewidth=1, linestyle="--", zorder=0)
    _name_points(axes, rows)
    axes.set_xlim(left=0)
    axes.set_xlabel("cache bytes per token (bfloat16)")
    axes.set_ylabel("validation loss, bits per byte")
    title = (
        f"Loss over cache, {result['seeds']} seeds, {result['tokens'] / 1e6:.2g} M tokens; dashed: the front"
    )
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def _name_points(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Names to the right of the points, those of one column moved apart."""
    low, high = axes.get_ylim()
    gap = (high - low) / 45
    columns: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        columns.setdefault(row["cache_bytes_per_token"], []).append(row)
    for x, column in columns.items():
        at = float("-inf")
        for row in sorted(column, key=lambda row: row["loss_mean"]):
            at = max(row["loss_mean"], at + gap)
            axes.annotate(
                row["label"], (x, row["loss_mean"]), xytext=(x + 0.012 * axes.get_xlim()[1], at),
                fontsize=6.5, color=_colour(row["label"]), va="center",
                arrowprops={"arrowstyle": "-", "color": _colour(row["label"]), "linewidth": 0.3},
            )  # fmt: skip
