"""Common parts of all plots: figures, colors, atomic writing, and loss curves.

Figures are created without pyplot, so no window system and no global state are involved. The colors are Okabe
and Ito's palette, which is safe for color-blind readers. Curves also differ in line style.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.extras import need
from fusedkv_ext.training.metrics import Record, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_KNOWN = {"vanilla": "#4D4D4D", "fusedkv-lite": "#0072B2", "fusedkv": "#D55E00"}
_STYLES = ("-", "--", "-.", ":")


def new_figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """Creates a figure and its axes.

    Args:
        width: Width in inches.
        height: Height in inches.
        **grid: Arguments of `Figure.subplots`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    need("matplotlib", "Drawing")
    figure_module = need("matplotlib.figure", "Drawing")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(**grid)


def need_matplotlib() -> None:
    """Raises MissingExtra if matplotlib is not installed; called before training starts."""
    need("matplotlib", "Drawing")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many last parts as needed to distinguish them.

    Raises:
        ConfigError: Two paths are equal.
    """
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"paths must be unique, got {', '.join(map(str, paths))}; name each once")


def color(name: str, index: int) -> str:
    """A fixed color for the plans of the demo; other names cycle through the palette."""
    return _KNOWN.get(name, _COLORS[index % len(_COLORS)])


def line_style(index: int) -> str:
    """Line styles in a cycle."""
    return _STYLES[index % len(_STYLES)]


def tidy(axes: Axes, grid: bool = True) -> None:
    """Hides the top and right spines; `grid` adds thin horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure atomically and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        figure.savefig(scratch, format=path.suffix[1:])
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean over the last `width` values."""
    return [
        sum(part) / len(part) for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    ]


def loss_curves(curves: Mapping[str, Sequence[Record]], unit: str = "bits") -> Figure:
    """Plots training loss (thin: recorded, thick: running mean) and validation loss (dots) over tokens.

    Args:
        curves: Name -> metrics records.
        unit: "bits" per byte of text, or "nats" per token.
    """
    figure, axes = new_figure(7.2, 4.4)
    field = "bits_per_byte" if unit == "bits" else "loss"
    late: list[float] = []
    for index, (name, records) in enumerate(curves.items()):
        shade = color(name, index)
        for kind in ("train", "valid"):
            steps, losses = series(list(records), kind, field)
            tokens = [value / 1e6 for value in series(list(records), kind, "tokens")[1]] or steps
            if kind == "train":
                axes.plot(tokens, losses, color=shade, alpha=0.2, linewidth=0.8)
                smooth = _smooth(losses, max(1, len(losses) // 16))
                axes.plot(tokens, smooth, color=shade, linestyle=line_style(index), linewidth=1.8, label=name)
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
    if late:  # excludes the first steps, whose loss is far above the rest
        margin = 0.08 * (max(late) - min(late) or 1.0)
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("bits per byte" if unit == "bits" else "nats per token")
    axes.set_title("Loss: lines training, dots validation", loc="left", fontsize=11)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
