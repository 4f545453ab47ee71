"""Plots of the demo: bars of cache size and time, learned fusion weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusedkv_ext.lab.figures import color, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FusedSource:
    """Fusion weights of one source in one layer.

    Attributes:
        layer: The layer that fuses.
        side: "keys" or "values".
        source: The source layer.
        values: The weights, (G, D).
        start: Their initial value. The plot shows the difference.
    """

    layer: int
    side: str
    source: int
    values: Tensor
    start: float


def bars(panels: Sequence[tuple[str, str, Mapping[str, float]]]) -> Figure:
    """Plots one bar per model and panel, labeled with its value and its ratio to the first model.

    Args:
        panels: (title, unit, name -> value) of each panel.
    """
    figure, grid = new_figure(3.2 * len(panels), 3.4, ncols=len(panels), squeeze=False)
    for axes, (title, unit, values) in zip(grid[0], panels, strict=True):
        first = next(iter(values.values()))
        shades = [color(name, index) for index, name in enumerate(values)]
        drawn = axes.bar(list(values), list(values.values()), color=shades, width=0.62)
        for bar, value in zip(drawn, values.values(), strict=True):
            text = f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
            axes.annotate(
                f"{text}\n{value / first:.2f}×",
                (bar.get_x() + bar.get_width() / 2, value),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
        axes.set_ylim(0, max(values.values()) * 1.22)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(unit, fontsize=9)
        axes.tick_params(axis="x", labelsize=8, length=0)
        axes.tick_params(axis="y", labelsize=8)
        tidy(axes, grid=False)
    return figure


def fusion_weights(sources: Sequence[FusedSource]) -> Figure:
    """Plots the change of the fusion weights in training, per layer (rows) and channel (columns).

    There is one panel per side and source layer. All share one diverging color scale; white is no change.

    Raises:
        ValueError: `sources` is empty.
    """
    panels = sorted({(item.side, item.source, item.start) for item in sources})
    if not panels:
        raise ValueError("sources must not be empty: this model has no fusion weights")
    figure, grid = new_figure(7.2, 1.1 + 1.25 * len(panels), nrows=len(panels), squeeze=False, sharex=False)
    changes = [(item.values - item.start).flatten() for item in sources]
    # The 99.5th percentile, so that outliers do not determine the color scale.
    limit = max(float(change.abs().float().quantile(0.995)) for change in changes) or 1.0
    image: Any = None
    for axes, (side, source, start) in zip(grid[:, 0], panels, strict=True):
        rows = [item for item in sources if (item.side, item.source, item.start) == (side, source, start)]
        rows.sort(key=lambda item: item.layer)
        heads, dim = rows[0].values.shape
        picture = [(item.values - start).flatten().tolist() for item in rows]
        image = axes.imshow(
            picture, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        axes.set_yticks(range(len(rows)), [f"layer {item.layer}" for item in rows], fontsize=8)
        for head in range(1, heads):
            axes.axvline(head * dim - 0.5, color="#888888", linewidth=0.6)
        axes.set_xticks(
            [head * dim + dim / 2 - 0.5 for head in range(heads)], [f"head {h}" for h in range(heads)]
        )
        axes.tick_params(length=0, labelsize=8)
        axes.set_title(f"{side} of layer {source}: weights start at {start:g}", loc="left", fontsize=10)
    bar = figure.colorbar(image, ax=grid[:, 0].tolist(), shrink=0.8, pad=0.02)
    bar.set_label("weight − start", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure
