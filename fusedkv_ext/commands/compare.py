"""fusedkv compare: train several methods under one budget, and print what each reaches and costs.

Methods are names of the registry (`fusedkv plan` lists them), with options as in cla:factor=3; `all` stands
for every method and its variants. Every run is kept below --out: a comparison that was killed goes on where
it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fusedkv_ext.train.config import ConfigError, TrainConfig, load_toml

if TYPE_CHECKING:
    from fusedkv_ext.experiments.comparison import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", default="all", metavar="A,B,C", help="the first is the baseline (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="K", help="seeds 0..K-1 (default: %(default)s)"
    )
    parser.add_argument(
        "--config", default="tiny", metavar="NAME|FILE", help="sizes and budget (default: %(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example run.steps=100"
    )
    parser.add_argument(
        "--rates",
        metavar="LR,LR",
        help="learning rates, the same for all methods (default: the configuration's)",
    )
    parser.add_argument(
        "--equal",
        choices=("width", "parameters"),
        default="width",
        help="what is equal (default: %(default)s)",
    )
    parser.add_argument(
        "--text", nargs="+", metavar="PATH", help="UTF-8 files or folders (default: Python sources)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare"), help="folder of all runs (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads of a run (default: cores / jobs)"
    )


def _budget(args: argparse.Namespace) -> tuple[TrainConfig, tuple[float, ...]]:
    from fusedkv_ext.experiments import configs

    config = TrainConfig.from_dict(load_toml(configs.find(args.config)))
    pairs = []
    for entry in args.set:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, got {entry!r}")
        pairs.append((key.strip(), value.strip()))
    config = config.updated(pairs, as_text=True)
    if args.text:
        config = config.updated([("data.text", args.text)])
    if not args.rates:
        return config, (config.optim.lr,)
    try:
        rates = tuple(dict.fromkeys(float(rate) for rate in args.rates.split(",")))
    except ValueError as error:
        raise ConfigError(f"--rates must be numbers such as 1e-3,2e-3, got {args.rates!r}") from error
    for rate in rates:
        config.updated([("optim.lr", rate)])  # checks it
    return config, rates


def run(args: argparse.Namespace) -> int:
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    import torch

    from fusedkv_ext.experiments import compare, comparison
    from fusedkv_ext.experiments.entries import parse_all

    entries = parse_all(label.strip() for label in args.methods.split(",") if label.strip())
    if not entries:
        raise ConfigError("--methods names no method; try --methods vanilla,fusedkv or --methods all")
    config, rates = _budget(args)
    budget = compare.Budget(config, args.seeds, rates, args.equal)
    threads = args.threads or max(1, torch.get_num_threads() // args.jobs)
    said = sys.stderr if args.json else sys.stdout
    began, results = time.monotonic(), {}
    for key, result, left in compare.run_all(entries, budget, args.out, jobs=args.jobs, threads=threads):
        results[key] = result
        loss = result["valid_bits_per_byte"]
        ended = "diverged" if loss is None else f"{loss:.4f} bits/byte"
        print(f"{time.monotonic() - began:6.0f} s  {key}: {ended}; {left} runs left", file=said, flush=True)
    data = compare.load(budget)
    methods = compare.configs(entries, budget, data.info.vocab_size)
    print("timing training steps of all methods in turns", file=said, flush=True)
    speeds = compare.tokens_per_second(methods, data)
    result = comparison.summarise(budget, methods, results, speeds, asdict(data.info))
    _write(result, compare.curves(entries, budget, results, args.out), args.out)
    print(json.dumps(result) if args.json else comparison.text_table(result))
    print(f"wrote {args.out / 'comparison.json'} and pictures", file=said)
    return 0


def _write(result: Result, curves: dict[str, list[tuple[float, float]]], out: Path) -> None:
    from fusedkv_ext.experiments import comparison_plots
    from fusedkv_ext.figures import save

    (out / "comparison.json").write_text(json.dumps({**result, "curves": curves}, indent=1), encoding="utf-8")
    save(comparison_plots.loss_over_cache(result), out / "loss_over_cache.png")
    save(comparison_plots.loss_over_tokens(curves), out / "loss_over_tokens.png")
