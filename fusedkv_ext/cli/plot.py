"""fusedkv plot: plot the loss curves of runs together, or the result of a probe or of gradient norms.

The kind of plot follows from the file. A loss curve has the name of the file's folder. If names are equal,
they include the parent folders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedkv_ext.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = ("probe.json", "grads.json")  # files that are plotted in preference to metrics.jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="metrics.jsonl files, a probe.json or a grads.json, or the folders of such",
    )
    parser.add_argument(
        "--out", type=Path, help="picture to write: .png, .svg or .pdf (default: KIND.png, such as loss.png)"
    )
    parser.add_argument(
        "--unit",
        choices=("bits", "nats"),
        default="bits",
        help="of loss curves: bits per byte, or nats per token",
    )


def _file_in(path: Path) -> Path:
    """The file to plot in a folder; a file itself is returned unchanged."""
    if not path.is_dir():
        return path
    for name in (*RESULTS, "metrics.jsonl"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} must have one of {', '.join(RESULTS)} and metrics.jsonl, got none")


def _loss(files: Sequence[Path], unit: str) -> tuple[Figure, list[str]]:
    from fusedkv_ext.lab.figures import distinct_names, loss_curves
    from fusedkv_ext.training.metrics import read_metrics

    named = [path.parent if path.name == "metrics.jsonl" else path.with_suffix("") for path in files]
    curves = {}
    for name, path in zip(distinct_names(named), files, strict=True):
        records = read_metrics(path)
        if not any(record["kind"] == "train" for record in records):
            raise ValueError(f"{path} must have training records, got none yet; wait for the run")
        curves[name] = records
    return loss_curves(curves, unit=unit), list(curves)


def _result(path: Path) -> tuple[str, Figure]:
    """Kind and plot of a result file."""
    from fusedkv_ext.lab import gradients, probe, run_figures

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a {' or a '.join(RESULTS)}")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a {' or a '.join(RESULTS)}") from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "probe":
        return kind, run_figures.probe_maps(probe.read_probe(path, content))
    if kind == "grads":
        return kind, run_figures.gradient_norms(gradients.read_gradients(path, content))
    raise ValueError(
        f"{path} must be the probe.json of `fusedkv probe` or the grads.json of `fusedkv grads`, got kind "
        f"{kind!r}"
    )


def run(args: argparse.Namespace) -> int:
    if args.out is not None and args.out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out must end in .png, .svg or .pdf, got {args.out}")
    from fusedkv_ext.lab.figures import save

    files = [_file_in(path) for path in args.files]
    results = [path for path in files if path.suffix == ".json"]
    if results and len(files) > 1:
        raise ConfigError(
            f"a result file must be the only file to plot, got {len(files)} files with {results[0]}; plot it "
            "alone, or give metrics.jsonl only"
        )
    said: dict[str, Any] = {}
    if results:
        kind, figure = _result(results[0])
    else:
        kind = "loss"
        figure, said["curves"] = _loss(files, args.unit)
    out = save(figure, args.out or Path(f"{kind}.png"))
    print(json.dumps({"out": str(out), "kind": kind, **said}) if args.json else f"wrote {out}")
    return 0
