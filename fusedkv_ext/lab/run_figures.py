"""Plots of the experiments: heat maps of fusion weights, and gradient norms per layer and over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusedkv_ext.lab.figures import color, line_style, new_figure, tidy
from fusedkv_ext.lab.gradients import PROJECTIONS, Gradients
from fusedkv_ext.lab.probe import Probe
from fusedkv_ext.lab.runs import Spread
from fusedkv_ext.plan.pieces import SIDES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NUMBERS = 100  # largest number of cells that are labeled


def probe_maps(probe: Probe) -> Figure:
    """Plots the mean fusion weights over seeds, with keys on the left and values on the right.

    Rows are reconstruction layers, the deepest on top. Columns are source layers. Diamonds mark centers of
    mass. Both maps share one color scale.
    """
    rows, columns = len(probe.reconstruction_layers), len(probe.source_layers)
    figure, panels = new_figure(2.6 + 0.9 * columns, 1.6 + 0.42 * rows, ncols=2)
    pictures = {
        side: [
            [Spread.of(cell).mean for cell in zip(*layer, strict=True)]
            for layer in zip(*getattr(probe, side), strict=True)
        ]
        for side in SIDES
    }
    weights = [x for picture in pictures.values() for row in picture for x in row]
    limit = max(map(abs, weights)) or 1.0
    signed = min(weights) < 0
    image: Any = None
    for axes, side in zip(panels, SIDES, strict=True):
        image = axes.imshow(
            pictures[side],
            cmap="RdBu_r" if signed else "Blues",
            vmin=-limit if signed else 0.0,
            vmax=limit,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        _numbers(axes, pictures[side], limit)
        centers = [Spread.of(layer).mean for layer in zip(*probe.centers(side), strict=True)]
        axes.plot(
            [_column(probe.source_layers, center) for center in centers],
            range(rows),
            "D",
            color="#222222",
            markerfacecolor="white",
            markersize=4.5,
        )
        axes.set_xticks(range(columns), probe.source_layers, fontsize=8)
        axes.set_yticks(range(rows), probe.reconstruction_layers, fontsize=8)
        axes.tick_params(length=0)
        axes.set_xlabel("source layer (from 0)", fontsize=9)
        axes.set_title(f"{side}: center {probe.center(side):.2f}", loc="left", fontsize=10)
    panels[0].set_ylabel("reconstruction layer", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels), pad=0.02)
    bar.set_label("fusion weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _numbers(axes: Axes, picture: Sequence[Sequence[float]], limit: float) -> None:
    """Writes the weights above the diamonds."""
    if len(picture) * len(picture[0]) > _MOST_NUMBERS:
        return
    for y, row in enumerate(picture):
        for x, weight in enumerate(row):
            shade = "white" if abs(weight) > 0.6 * limit else "#222222"
            axes.text(x, y + 0.2, f"{weight:.2f}", ha="center", va="center", fontsize=6.5, color=shade)


def _column(layers: Sequence[int], position: float) -> float:
    """Converts a layer position to a column position by interpolation."""
    for column, (left, right) in enumerate(zip(layers, layers[1:], strict=False)):
        if position <= right:
            return column + (position - left) / (right - left)
    return float(len(layers) - 1)


def gradient_norms(found: Gradients) -> Figure:
    """Plots gradient norms, one column per projection.

    The upper row has norms per layer: means over steps and seeds, with standard deviations over seeds. The
    lower row has norms over training: thin lines per shallow layer, thick lines for their mean.
    """
    figure, grid = new_figure(10.5, 6.2, nrows=2, ncols=len(PROJECTIONS), sharey="row")
    for column, name in enumerate(PROJECTIONS):
        for p, plan in enumerate(found.plans):
            _per_layer(grid[0][column], found, p, name, color(plan, p))
            _over_steps(grid[1][column], found, p, name, color(plan, p))
        grid[0][column].set_title(name, loc="left", fontsize=10)
        grid[0][column].set_xlabel("layer (from 0)", fontsize=9)
        grid[1][column].set_xlabel("step", fontsize=9)
        for row in range(2):
            grid[row][column].set_yscale("log")
            grid[row][column].tick_params(labelsize=8)
            tidy(grid[row][column])
    grid[0][0].set_ylabel(f"norm, mean of steps {found.span[0]}..{found.span[1]}", fontsize=9)
    grid[1][0].set_ylabel(f"norm, layers 0..{found.shallow_layers[-1]}", fontsize=9)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle("L2 norm of the gradient of each projection's weight, before clipping", fontsize=11)
    return figure


def _per_layer(axes: Axes, found: Gradients, plan: int, projection: str, shade: str) -> None:
    columns = list(zip(*found.means[plan][projection], strict=True))
    layers = [layer for layer, values in enumerate(columns) if None not in values]
    spreads = [Spread.of(columns[layer]) for layer in layers]
    norms, deviations = [spread.mean for spread in spreads], [spread.sd or 0.0 for spread in spreads]
    axes.errorbar(
        layers,
        norms,
        yerr=deviations,
        color=shade,
        linestyle=line_style(plan),
        linewidth=1.5,
        marker="o",
        markersize=3.5,
        capsize=2,
        label=found.plans[plan],
    )


def _over_steps(axes: Axes, found: Gradients, plan: int, projection: str, shade: str) -> None:
    columns = list(zip(*found.series[plan][projection], strict=True))
    curves = [columns[layer] for layer in found.shallow_layers if None not in columns[layer]]
    for curve in curves:
        axes.plot(found.steps, curve, color=shade, alpha=0.25, linewidth=0.8)
    if curves:
        mean = [Spread.of(values).mean for values in zip(*curves, strict=True)]
        axes.plot(found.steps, mean, color=shade, linestyle=line_style(plan), linewidth=1.8)
