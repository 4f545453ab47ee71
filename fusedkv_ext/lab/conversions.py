"""Tables and plot of the results of benchmarks/conversion.py: perplexity over cache bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedkv_ext.lab.figures import new_figure, tidy
from fusedkv_ext.lab.reporting import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stages of a conversion: (column title, color, marker).
STAGES = {
    "copied": ("weights copied", "#999999", "x"),
    "calibrated": ("calibrated", "#0072B2", "o"),
    "uptrained": ("uptrained", "#D55E00", "^"),
}


def _sorted(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows by decreasing cache size, then by increasing perplexity after calibration."""
    return sorted(result["rows"], key=lambda row: (-row["bytes"], row["calibrated"]))


def _shown(perplexity: float | None) -> str:
    if perplexity is None:
        return ""
    return f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:.0f}"


def conversion_table(result: dict[str, Any]) -> str:
    """Markdown table of the perplexities of every plan, by cache size."""
    rows = []
    for row in _sorted(result):
        size = f"{row['bytes'] / 1024:.1f}"
        share = f"{row['bytes'] / row['original_bytes']:.0%}"
        rows.append([row["label"], size, share, *(_shown(row.get(stage)) for stage in STAGES)])
    titles = ["plan", "KiB per token", "cache", *(title for title, *_ in STAGES.values())]
    return table(titles, rows, numbers=True)


def pooling_table(result: dict[str, Any]) -> str:
    """Markdown table of the perplexity of SkipV1Former with copied weights, by pooling of the value heads."""
    rows = [row for row in result["rows"] if "pooling" in row]
    ways = list(rows[0]["pooling"]) if rows else []
    cells = ([row["label"], *(_shown(row["pooling"][way]) for way in ways)] for row in rows)
    return table(["plan", *ways], cells, numbers=True)


def _places(rows: list[dict[str, Any]]) -> list[float]:
    """Cache sizes relative to the original. Plans of similar size are shifted so that none hides another."""
    places: list[float] = []
    for row in rows:  # by decreasing cache size
        wanted = row["bytes"] / row["original_bytes"]
        places.append(min(wanted, places[-1] - 0.014) if places else wanted)
    return places


def conversion_figure(result: dict[str, Any]) -> Figure:
    """Plots perplexity over cache size, one column of markers per plan, without markers beyond the axis."""
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
    axes.set_xlabel("cache bytes per token, relative to the original (plans of similar size are shifted)")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{result['model']}: one model, many caches", loc="left", fontsize=11)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
