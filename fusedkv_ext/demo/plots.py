"""Pictures of runs: loss curves, bars of cache and time, learned fusion weights.

Figures are made without pyplot, so no window system and no global state is touched. Colours are those of
Okabe and Ito, which people with any kind of colour vision can tell apart; curves differ in line style as
well.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusedkv_ext.train.extras import need
from fusedkv_ext.train.metrics import Record, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_KNOWN = {"vanilla": "#4D4D4D", "fusedkv-lite": "#0072B2", "fusedkv": "#D55E00"}
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class FusedSource:
    """Weights of one source in one layer: `values` (G, D), drawn relative to `start`, their initial value."""

    layer: int
    side: str  # "keys" or "values"
    source: int
    values: Tensor
    start: float


def _figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    need("matplotlib", "Drawing")
    figure_module = need("matplotlib.figure", "Drawing")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(**grid)


def need_matplotlib() -> None:
    """Raises MissingExtra at once, rather than after minutes of training."""
    need("matplotlib", "Drawing")


def colour(name: str, index: int) -> str:
    """A fixed colour for the plans of the demo, others by turn."""
    return _KNOWN.get(name, _COLOURS[index % len(_COLOURS)])


def _tidy(axes: Axes, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a picture in one go: an old one stays until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        figure.savefig(scratch, format=path.suffix[1:])
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values."""
    return [
        sum(part) / len(part) for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    ]


def loss_curves(curves: Mapping[str, Sequence[Record]], unit: str = "bits") -> Figure:
    """Training loss (thin as recorded, thick as running mean) and validation loss (dots) over training
    tokens.

    curves: name -> metrics records. unit: "bits" per byte of text, or "nats" per token.
    """
    figure, axes = _figure(7.2, 4.4)
    field = "bits_per_byte" if unit == "bits" else "loss"
    late: list[float] = []
    for index, (name, records) in enumerate(curves.items()):
        shade = colour(name, index)
        for kind in ("train", "valid"):
            steps, losses = series(list(records), kind, field)
            tokens = [value / 1e6 for value in series(list(records), kind, "tokens")[1]] or steps
            if kind == "train":
                axes.plot(tokens, losses, color=shade, alpha=0.2, linewidth=0.8)
                smooth = _smooth(losses, max(1, len(losses) // 16))
                axes.plot(
                    tokens, smooth, color=shade, linestyle=_STYLES[index % 4], linewidth=1.8, label=name
                )
                late += losses[len(losses) // 10 :]
            else:
                axes.plot(
                    tokens,
                    losses,
                    "o",
                    color=shade,
                    markersize=4,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                )
                late += losses[1:]
    if late:  # the first steps from random weights would squeeze everything else
        margin = 0.08 * (max(late) - min(late) or 1.0)
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("bits per byte" if unit == "bits" else "nats per token")
    axes.set_title("Loss: lines training, dots validation", loc="left", fontsize=11)
    axes.legend(frameon=False)
    _tidy(axes)
    return figure


def bars(panels: Sequence[tuple[str, str, Mapping[str, float]]]) -> Figure:
    """One bar per model and panel, labelled with its value and its ratio to the first model.

    panels: (title, unit, name -> value).
    """
    figure, grid = _figure(3.2 * len(panels), 3.4, ncols=len(panels), squeeze=False)
    for axes, (title, unit, values) in zip(grid[0], panels, strict=True):
        first = next(iter(values.values()))
        shades = [colour(name, index) for index, name in enumerate(values)]
        drawn = axes.bar(list(values), list(values.values()), color=shades, width=0.62)
        for bar, value in zip(drawn, values.values(), strict=True):
            text = f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
            axes.annotate(
                f"{text}\n{value / first:.2f}×", (bar.get_x() + bar.get_width() / 2, value), xytext=(0, 2),
                textcoords="offset points", ha="center", va="bottom", fontsize=8,
            )  # fmt: skip
        axes.set_ylim(0, max(values.values()) * 1.22)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(unit, fontsize=9)
        axes.tick_params(axis="x", labelsize=8, length=0)
        axes.tick_params(axis="y", labelsize=8)
        _tidy(axes, grid=False)
    return figure


def fusion_weights(sources: Sequence[FusedSource]) -> Figure:
    """What the fusion weights have learned: change since the start, per layer (rows) and channel (columns).

    One panel per side and source layer; all share one diverging scale, white where nothing has changed.
    """
    panels = sorted({(item.side, item.source, item.start) for item in sources})
    if not panels:
        raise ValueError("sources must not be empty: this model has no fusion weights")
    figure, grid = _figure(7.2, 1.1 + 1.25 * len(panels), nrows=len(panels), squeeze=False, sharex=False)
    changes = [(item.values - item.start).flatten() for item in sources]
    # The 99.5th percentile: a single outlier must not bleach the rest.
    limit = max(float(change.abs().float().quantile(0.995)) for change in changes) or 1.0
    image = None
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
