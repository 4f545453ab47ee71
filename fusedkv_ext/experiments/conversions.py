"""What benchmarks/conversion.py measured: a table of perplexity over cache bytes, and its picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedkv_ext.documents import table
from fusedkv_ext.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The columns and marks: how far a model was taken.
STAGES = {
    "copied": ("weights copied", "#999999", "x"),
    "calibrated": ("calibrated", "#0072B2", "o"),
    "uptrained": ("uptrained", "#D55E00", "^"),
}


def _sorted(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The original first, then from the largest cache to the smallest, the best first."""
    return sorted(result["rows"], key=lambda row: (-row["bytes"], row["calibrated"]))


def _shown(perplexity: float | None) -> str:
    if perplexity is None:
        return ""
    return f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:.0f}"


def conversion_table(result: dict[str, Any]) -> str:
    """Perplexities of every plan, by cache size."""
    rows = []
    for row in _sorted(result):
        size = f"{row['bytes'] / 1024:.1f}"
        share = f"{row['bytes'] / row['original_bytes']:.0%}"
        rows.append([row["label"], size, share, *(_shown(row.get(stage)) for stage in STAGES)])
    titles = ["plan", "KiB per token", "cache", *(title for title, *_ in STAGES.values())]
    return table(titles, rows, numbers=True)


def pooling_table(result: dict[str, Any]) -> str:
    """Perplexity of SkipV1Former with the weights copied, by the way that value heads are pooled."""
    rows = [row for row in result["rows"] if "pooling" in row]
    ways = list(rows[0]["pooling"]) if rows else []
    cells = ([row["label"], *(_shown(row["pooling"][way]) for way in ways)] for row in rows)
    return table(["plan", *ways], cells, numbers=True)


def conversion_figure(result: dict[str, Any]) -> Figure:
    """Perplexity over cache size, one line of marks per plan; what lies beyond the axis is left out."""
    figure, axes = new_figure(8.4, 5.2)
    original = result["original"]
    top = 12 * original
    for stage, (title, colour, mark) in STAGES.items():
        shown = [row for row in result["rows"] if row.get(stage, top) < top]
        points = [(row["bytes"] / row["original_bytes"], row[stage]) for row in shown]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=colour, label=title, markersize=6)
    for row in result["rows"]:
        heights = [row[stage] for stage in STAGES if stage in row and row[stage] < top]
        x = row["bytes"] / row["original_bytes"]
        if len(heights) > 1:
            axes.plot([x, x], [min(heights), max(heights)], color="#DDDDDD", linewidth=1, zorder=0)
        if heights:
            axes.annotate(
                row["label"], (x, min(heights)), xytext=(4, -3), textcoords="offset points", fontsize=6.5,
                rotation=-30, va="top",
            )  # fmt: skip
    axes.axhline(original, color="#4D4D4D", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_yticks(ticks := [t for t in (10, 12, 15, 20, 30, 50, 100) if t < top], [f"{t}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("cache bytes per token, relative to the original")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{result['model']}: one model, many caches", loc="left", fontsize=11)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
