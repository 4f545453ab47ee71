"""What benchmarks/conversion.py measured: a table of perplexity over cache bytes, and its picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedkv_ext.lab.figures import new_figure, tidy
from fusedkv_ext.lab.reporting import table

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


def _places(rows: list[dict[str, Any]]) -> list[float]:
    """Cache relative to the original's; plans of nearly one size side by side, so that none hides another."""
    places: list[float] = []
    for row in rows:  # from the largest cache to the smallest
        wanted = row["bytes"] / row["original_bytes"]
        places.append(min(wanted, places[-1] - 0.014) if places else wanted)
    return places


def conversion_figure(result: dict[str, Any]) -> Figure:
    """Perplexity over cache size, one column of marks per plan; what lies beyond the axis is left out."""
    figure, axes = new_figure(8.4, 5.2)
    original, rows = result["original"], _sorted(result)
    top, places = 12 * original, _places(rows)
    for stage, (title, color, mark) in STAGES.items():
        points = [(x, row[stage]) for x, row in zip(places, rows, strict=True) if row.get(stage, top) < top]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=color, label=title, markersize=6)
    for x, row in zip(places, rows, strict=True):
        heights = [row[stage] for stage in STAGES if row.get(stage, top) < top]
        if heights:
            axes.plot([x, x], [min(heights), max(heights)], color="#DDDDDD", linewidth=1, zorder=0)
            axes.annotate(
                row["label"],
                (x, min(heights)),
                xytext=(0, -7),
                textcoords="offset points",
                fontsize=7,
                rotation=90,
                va="top",
                ha="center",
            )
    axes.axhline(original, color="#4D4D4D", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    lowest = min(row[stage] for row in rows for stage in STAGES if stage in row)
    axes.set_ylim(0.6 * lowest, top)
    axes.set_yticks(ticks := [t for t in (10, 12, 15, 20, 30, 50, 100) if t < top], [f"{t}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("cache bytes per token, relative to the original (plans of one size side by side)")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{result['model']}: one model, many caches", loc="left", fontsize=11)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
