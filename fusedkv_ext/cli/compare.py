"""fusedkv compare: train several methods with one budget, and print the result and cost of each.

Methods are names from `fusedkv plan`, with options as in cla:factor=3, or JSON files of plans. `all` is every
method of that list with its variants, which takes hours. Every run is stored below --out. The same command
resumes the comparison and does not repeat finished runs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fusedkv_ext.cli import experiment
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.training.config import TrainConfig

if TYPE_CHECKING:
    from fusedkv_ext.lab.compare import Budget
    from fusedkv_ext.lab.comparison import Result
    from fusedkv_ext.lab.entries import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", default="all", metavar="A,B,C", help="the first is the baseline (default: %(default)s)"
    )
    experiment.add_arguments(parser, out="compare", config="tiny")
    parser.add_argument(
        "--rates",
        metavar="LR,LR",
        help="learning rates to try, the same for all methods (default: the configuration's)",
    )
    parser.add_argument(
        "--equal",
        choices=("width", "parameters"),
        default="width",
        help="width: all models have the same sizes; parameters: feed-forward networks are resized until "
        "all have as many parameters as the baseline (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="concurrent runs (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads per run (default: cores / jobs)"
    )


def _rates(text: str | None, config: TrainConfig) -> tuple[float, ...]:
    if not text:
        return (config.optim.lr,)
    try:
        rates = tuple(dict.fromkeys(float(rate) for rate in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--rates must be numbers such as 1e-3,2e-3, got {text!r}") from error
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ConfigError(f"--rates must differ within six digits, got {text!r}")
    for rate in rates:
        config.updated([("optim.lr", rate)])  # checks it
    return rates


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1 or args.threads < 0:
        raise ConfigError(f"--jobs must be >= 1 and --threads >= 0, got {args.jobs} and {args.threads}")
    from fusedkv_ext.lab import compare, runs
    from fusedkv_ext.lab.entries import parse_all
    from fusedkv_ext.lab.figures import need_matplotlib
    from fusedkv_ext.training import session

    entries = parse_all(args.methods.split(","))
    if not entries:
        raise ConfigError("--methods must name a method, got none; try --methods vanilla,fusedkv")
    config = experiment.configuration(args)
    budget = compare.Budget(config, args.seeds, _rates(args.rates, config), args.equal)
    need_matplotlib()

    def say(line: str) -> None:
        if session.rank() == 0:
            print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    try:
        with _interrupts() as interrupted, session.session():
            result = _compare(args, entries, budget, say, interrupted)
    except (KeyboardInterrupt, runs.Stopped):
        return experiment.stopped(args)
    if result is not None:
        print(json.dumps(result) if args.json else _text(result))
    return 0


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; yields whether one has come.

    Python drops an exception that a signal raises inside a weak reference's callback, so runs also ask.
    """
    caught: list[int] = []

    def handle(number: int, _frame: object) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compare(
    args: argparse.Namespace,
    entries: list[Entry],
    budget: Budget,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Result | None:
    """Trains and times all methods, and writes the result; None on all ranks except rank 0."""
    import torch

    from fusedkv_ext.lab import compare, comparison
    from fusedkv_ext.training import session

    threads = args.threads or max(1, torch.get_num_threads() // args.jobs)
    data = compare.load(budget)
    methods = compare.configs(entries, budget, data.info.vocab_size)
    run = budget.config.run
    say(f"text: {data.info}")
    known = len(compare.plan_runs(entries, budget, {}))
    say(
        f"{'at least ' if len(budget.rates) > 1 else ''}{known} runs of {run.steps} steps below {args.out}, "
        f"{args.jobs} at a time; a line as each ends"
    )
    began, results = time.monotonic(), {}
    all_runs = compare.run_all(
        entries, budget, args.out, jobs=args.jobs, threads=threads, should_stop=should_stop
    )
    for key, result, left in all_runs:
        results[key] = result
        loss = result["valid_bits_per_byte"]
        ended = "diverged" if loss is None else f"{loss:.4f} bits/byte"
        say(f"{time.monotonic() - began:6.0f} s  {key}: {ended}; runs left: {left}")
    say("timing training steps of all methods in turns")
    speeds = compare.tokens_per_second(methods, data, threads)
    if session.rank():
        return None
    result = comparison.summarize(budget, methods, results, speeds, asdict(data.info))
    for path in _write(result, compare.curves(entries, budget, results, args.out), args.out):
        say(f"wrote {path}")
    return result


def _write(result: Result, curves: dict[str, list[tuple[float, float]]], out: Path) -> list[Path]:
    from fusedkv_ext.lab import comparison_plots
    from fusedkv_ext.lab.figures import save
    from fusedkv_ext.lab.reporting import write

    path = out / "comparison.json"
    write(path, json.dumps({**result, "curves": curves}, indent=1))
    return [
        path,
        save(comparison_plots.loss_over_cache(result), out / "loss_over_cache.png"),
        save(comparison_plots.loss_over_tokens(curves), out / "loss_over_tokens.png"),
    ]


def _text(result: Result) -> str:
    """The table, and the meaning of its columns."""
    from fusedkv_ext.lab.comparison import text_table

    seeds = "one seed" if result["seeds"] == 1 else f"mean ± standard deviation of {result['seeds']} seeds"
    return (
        f"\n{text_table(result)}\n\nValidation loss in bits per byte, {seeds}; differences seed by seed.\n"
        f"Cache: bfloat16, all layers of one sequence. Training: {result['tokens']:,} tokens a run, equal "
        f"{result['equal']};\nlr is the one of --rates at which the method's first seed ended lowest."
    )
