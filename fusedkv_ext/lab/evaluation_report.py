"""Tables and plots of an evaluation of named models on the same text and questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusedkv_ext.evaluation.needles import GUESS_NLL
from fusedkv_ext.evaluation.perplexity import Difference, Perplexity, Positions
from fusedkv_ext.evaluation.retrieval import Retrieval, Score
from fusedkv_ext.lab import figures
from fusedkv_ext.lab.reporting import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _percent(depth: float | None) -> str:
    """The depth of a cell in percent."""
    return f"{(depth or 0.0) * 100:g}%"


def _number(value: float, error: float | None, digits: int = 3, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}")


def _share(value: float, error: float) -> str:
    return f"{value:.0%} ±{error * 100:.0f}"


def _between(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def perplexity_table(
    results: Mapping[str, Perplexity],
    differences: Mapping[str, Difference],
    cache_bytes: Mapping[str, float | None],
) -> str:
    """Table with one line per model.

    Args:
        results: The perplexity of each model.
        differences: Paired differences to the first model, for the models that have them.
        cache_bytes: Cache bytes per token of each model, or None.
    """
    first = next(iter(results.values()))
    rows = []
    for name, result in results.items():
        versus = differences.get(name)
        rows.append(
            (
                name,
                _number(result.loss, result.stderr, 4),
                "" if versus is None else _number(versus.loss, versus.stderr, 4, "+"),
                "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
                f"{result.perplexity:.3f}",
                f"{result.tokens:,}",
                f"{result.windows:,}",
                "" if (size := cache_bytes.get(name)) is None else f"{size:,.0f} B/token",
            )
        )
    head = ("model", "nats/token", "less first", "bits/byte", "perplexity", "tokens", "windows", "cache")
    title = f"Perplexity: windows of {first.context} tokens, stride {first.stride}; ± one standard error"
    return f"{title}\n{aligned([head, *rows], rule=False)}"


def positions_table(results: Mapping[str, Positions]) -> str:
    """Table with one line per bucket of positions and one column per model."""
    first = next(iter(results.values()))
    rows = [
        (_between(*ends), *(_number(result.loss[i], result.stderr[i]) for result in results.values()))
        for i, ends in enumerate(zip(first.first, first.last, strict=True))
    ]
    title = "Loss by position: nats per token, by the number of tokens before the target token"
    return f"{title}\n{aligned([('before', *results), *rows], rule=False)}"


def retrieval_table(results: Mapping[str, Retrieval]) -> str:
    """Table with one line per task, length and model: means over all depths, then the accuracy per depth."""

    def row(name: str, retrieval: Retrieval, total: Score) -> tuple[str, ...]:
        place = total.task, total.length
        return (
            name,
            total.task,
            str(total.length),
            _share(total.exact, total.exact_stderr),
            _share(total.choice, total.choice_stderr),
            _number(total.nll, total.nll_stderr, 2),
            _number(total.gain, total.gain_stderr, 2),
            *(f"{cell.choice:.0%}" for cell in retrieval.cells if (cell.task, cell.length) == place),
        )

    first = next(iter(results.values()))
    total = first.totals[0]
    lines = range(len(first.totals))
    rows = [row(name, result, result.totals[i]) for i in lines for name, result in results.items()]
    depths = dict.fromkeys(f"at {_percent(cell.depth)}" for cell in first.cells)
    head = ("model", "task", "tokens", "exact", "choice", "nats", "gain", *depths)
    return (
        f"Retrieval: {total.examples} examples per line. exact: greedy answer right. choice: right value "
        f"most likely of {round(1 / total.chance)}\n(chance {total.chance:.0%}), then by needle depth. "
        f"nats: of the right value (random digits: {GUESS_NLL:.2f}).\n"
        f"gain: nats without the needle minus nats with it.\n{aligned([head, *rows], rule=False)}"
    )


def position_curves(curves: Mapping[str, Positions]) -> Figure:
    """Plots the loss over the number of preceding tokens, with bands of one standard error per model."""
    figure, axes = figures.new_figure(7.2, 4.4)
    for index, (name, curve) in enumerate(curves.items()):
        shade = figures.color(name, index)
        middle = [(first * last) ** 0.5 for first, last in zip(curve.first, curve.last, strict=True)]
        style = figures.line_style(index)
        axes.plot(middle, curve.loss, color=shade, linestyle=style, linewidth=1.8, label=name)
        errors = [error or 0.0 for error in curve.stderr]
        low, high = ([x + sign * e for x, e in zip(curve.loss, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(middle, low, high, color=shade, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens of context before the target token")
    axes.set_ylabel("nats per token")
    axes.set_title("Loss by position; bands: one standard error over windows", loc="left", fontsize=11)
    axes.legend(frameon=False)
    figures.tidy(axes)
    return figure


def retrieval_grids(scores: Mapping[str, Retrieval]) -> Figure:
    """Plots the accuracy of choices by depth (rows) and length (columns), one panel per task and model."""
    first = next(iter(scores.values()))
    tasks = list(dict.fromkeys(cell.task for cell in first.cells))
    lengths = list(dict.fromkeys(cell.length for cell in first.cells))
    depths = list(dict.fromkeys(cell.depth for cell in first.cells))
    width = 1.4 + len(scores) * (0.9 + 0.55 * len(lengths))
    height = 0.6 + len(tasks) * (0.7 + 0.3 * len(depths))
    figure, grid = figures.new_figure(width, height, nrows=len(tasks), ncols=len(scores), squeeze=False)
    image: Any = None
    for row, task in enumerate(tasks):
        for column, (name, retrieval) in enumerate(scores.items()):
            axes = grid[row, column]
            share = {(cell.depth, cell.length): cell.choice for cell in retrieval.cells if cell.task == task}
            picture = [[share[depth, length] for length in lengths] for depth in depths]
            image = axes.imshow(picture, aspect="auto", cmap="cividis", vmin=0.0, vmax=1.0)
            for y, values in enumerate(picture):
                for x, value in enumerate(values):
                    shade = "black" if value > 0.5 else "white"
                    axes.text(x, y, f"{value:.0%}", ha="center", va="center", color=shade, fontsize=7)
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [_percent(depth) for depth in depths])
            axes.tick_params(length=0, labelsize=7)
            axes.set_title(f"{name}\n{task}", loc="left", fontsize=8)
    chance = first.cells[0].chance
    figure.suptitle(f"Retrieval: accuracy of choices, chance {chance:.0%}", fontsize=9)
    figure.supxlabel("context, tokens", fontsize=8)
    figure.supylabel("depth of the needle", fontsize=8)
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.8)
    bar.set_label("right value chosen", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
