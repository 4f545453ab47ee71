"""fusedkv plot: draw the loss curves of one or several runs into one picture.

The name of a curve is the name of the file's folder, or the plan where folders do not differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fusedkv_ext.train.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl files, or the folders of runs")
    parser.add_argument(
        "--out", type=Path, default=Path("loss.png"), help="picture to write: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--unit", choices=("bits", "nats"), default="bits", help="bits per byte, or nats per token"
    )


def run(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out must end in .png, .svg or .pdf, got {args.out}")
    from fusedkv_ext.demo import plots
    from fusedkv_ext.train.metrics import read_metrics

    files = [path / "metrics.jsonl" if path.is_dir() else path for path in args.metrics]
    curves = {}
    for path in files:
        records = read_metrics(path)
        if not any(record["kind"] == "train" for record in records):
            raise ValueError(f"{path} holds no training records yet")
        name = path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem
        curves[name if name not in curves else str(path)] = records
    figure = plots.loss_curves(curves, unit=args.unit)
    plots.save(figure, args.out)
    print(json.dumps({"out": str(args.out), "curves": list(curves)}) if args.json else f"wrote {args.out}")
    return 0
