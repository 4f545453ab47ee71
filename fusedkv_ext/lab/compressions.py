"""Tables and plot of the results of benchmarks/compression.py: perplexity over bytes of coded caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedkv_ext.lab.figures import new_figure, tidy
from fusedkv_ext.lab.reporting import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Families of codecs (color), and marks of the plans in their order.
FAMILIES = {
    "static": "#0072B2",
    "static e4m3": "#56B4E9",
    "rotated": "#D55E00",
    "rotated keys": "#E69F00",
    "KIVI": "#009E73",
    "weighted PCA": "#CC79A7",
}
MARKS = ("o", "s", "^")
LOW_RANK = "low rank"  # of the table of ranks


def _ratio(row: dict[str, Any], base: float) -> str:
    return f"{row['perplexity'] / base:.3f}x"


def _difference(row: dict[str, Any]) -> str:
    return f"{row['difference']:+.4f} ± {row['stderr']:.4f}"


def compression_table(result: dict[str, Any]) -> str:
    """Markdown table: every coding of every plan."""
    whole = result["plans"][0]["bytes"]
    rows = []
    for plan in result["plans"]:
        base = plan["perplexity"]["eval"]
        size = plan["bytes"]
        rows.append([plan["plan"], "raw", f"{size / 1024:.2f}", f"{size / whole:.0%}", f"{base:.2f}", "", ""])
        shown = [row for row in plan["rows"] if row["family"] in FAMILIES and row["text"] == "eval"]
        for row in sorted(shown, key=lambda row: (-row["bytes"], row["perplexity"])):
            rows.append(
                [
                    plan["plan"],
                    f"`{row['codecs']}`",
                    f"{row['bytes'] / 1024:.2f}",
                    f"{row['bytes'] / whole:.0%}",
                    f"{row['perplexity']:.2f}",
                    _ratio(row, base),
                    _difference(row),
                ]
            )
    titles = ["plan", "codecs", "KiB per token", "of the cache", "perplexity", "to raw", "nats per token"]
    return table(titles, rows, numbers=True)


def claims_table(result: dict[str, Any]) -> str:
    """Markdown table: one question at a time, and codecs on a text of another kind."""
    rows = []
    for plan in result["plans"]:
        for row in plan["rows"]:
            if row["family"] not in (*FAMILIES, LOW_RANK):
                base, text = plan["perplexity"][row["text"]], result[row["text"]]
                rows.append([plan["plan"], row["codecs"], text, _ratio(row, base), _difference(row)])
    return table(["plan", "codecs", "text", "perplexity to raw", "nats per token"], rows, numbers=True)


def ranks_table(result: dict[str, Any]) -> str:
    """Markdown table: fewer channels of keys or directions of a basis, and ranks that differ by layer."""
    rows = []
    for plan in result["plans"]:
        base = plan["perplexity"]["eval"]
        shown = [row for row in plan["rows"] if row["family"] == LOW_RANK]
        for row in sorted(shown, key=lambda row: (-row["bytes"], row["perplexity"])):
            size, perplexity = f"{row['bytes'] / plan['bytes']:.0%}", f"{row['perplexity']:.2f}"
            rows.append([row["codecs"], size, perplexity, _ratio(row, base), _difference(row)])
    return table(["codecs", "of the cache", "perplexity", "to raw", "nats per token"], rows, numbers=True)


def compression_figure(result: dict[str, Any]) -> Figure:
    """Plots perplexity over bytes: a line per family and plan, through the best coding of each size."""
    figure, axes = new_figure(8.4, 5.2)
    whole = result["plans"][0]["perplexity"]["eval"]
    top = 1.6 * whole
    for mark, plan in zip(MARKS, result["plans"], strict=False):
        base = plan["perplexity"]["eval"]
        for family, color in FAMILIES.items():
            rows = [row for row in plan["rows"] if row["family"] == family and row["text"] == "eval"]
            best: dict[float, float] = {}  # the line goes through the better of codecs with equal bytes
            for row in rows:
                best[row["bytes"]] = min(row["perplexity"], best.get(row["bytes"], top))
            points = [(size / 1024, value) for size, value in sorted(best.items()) if value < top]
            if points:
                line = "-" if len(points) > 1 else ""
                label = family if mark == MARKS[0] else None
                axes.plot(
                    *zip(*points, strict=True), line, marker=mark, color=color, label=label, markersize=5
                )
        axes.plot(plan["bytes"] / 1024, base, mark, color="black", markersize=7, label=f"{plan['plan']}, raw")
        axes.axhline(base, color="#BBBBBB", linewidth=0.6, linestyle="--", zorder=0)
    axes.set_yscale("log")
    ticks = [tick for tick in (10, 11, 12, 13, 14, 15, 16, 18, 20) if 0.97 * whole < tick < top]
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.97 * whole, top)
    axes.set_xlabel("KiB of cache per token")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{result['model']}: fewer layers store, or fewer bits", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


def trained_table(result: dict[str, Any]) -> str:
    """Markdown table of benchmarks/trained_codes.py: models that were trained with their plan."""
    rows = []
    for method, codings in result["methods"].items():
        for row in codings:
            spread = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            rows.append(
                [
                    method,
                    f"`{row['codecs']}`" if row["codecs"] != "raw" else "raw",
                    f"{row['bytes']:,.0f}",
                    f"{row['loss']:.4f}",
                    f"{row['difference']:+.4f}{spread}",
                ]
            )
    titles = ["method", "codecs", "bytes per token", "nats per token", "to vanilla, raw"]
    return table(titles, rows, numbers=True)


def trained_figure(result: dict[str, Any]) -> Figure:
    """Plots the loss over bytes: a line per method, through the best coding of each size."""
    figure, axes = new_figure(6.4, 4.2)
    for (method, codings), color in zip(result["methods"].items(), FAMILIES.values(), strict=False):
        best: dict[float, float] = {}
        for row in codings:
            best[row["bytes"]] = min(row["loss"], best.get(row["bytes"], float("inf")))
        axes.plot(*zip(*sorted(best.items()), strict=True), "-o", color=color, label=method, markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("bytes of cache per token")
    axes.set_ylabel("nats per token")
    axes.set_title("Trained with their plan, then coded", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


def peers_table(result: dict[str, Any]) -> str:
    """Markdown table of benchmarks/cache_peers.py: other caches of codes on the same text."""
    raw = result["rows"]["raw"]
    rows = []
    for name, row in result["rows"].items():
        ours = ":" in name
        rows.append(
            [
                f"`{name}`" if ours else name,
                f"{row['bytes'] / raw['bytes']:.0%}",
                f"{row['difference']:+.4f} ± {row['stderr']:.4f}" if row is not raw else "",
                f"{row['step_ms'] / raw['step_ms']:.2f}x",
            ]
        )
    titles = ["cache", "resident bytes, to raw", "nats per token, to raw", "time of a step, to raw"]
    return table(titles, rows, numbers=True)
