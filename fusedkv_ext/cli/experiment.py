"""Common parts of the commands that train several runs: their options, and an interruptible session."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedkv_ext.cli.train import add_configuration, changes, stop_signals
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.training.config import TrainConfig

if TYPE_CHECKING:
    from fusedkv_ext.training.progress import Progress


def add_arguments(parser: argparse.ArgumentParser, out: str, config: str | None = None) -> None:
    """Adds the common options, with the defaults of --out and --config."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        help="folder of runs and result; the same command resumes (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="K",
        help="runs of each model, with the seeds run.seed, run.seed + 1, ... (default: %(default)s)",
    )
    add_configuration(parser, config)


def configuration(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration: defaults of the command, changed by the command line."""
    if args.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {args.seeds}")
    return changes(args)(TrainConfig().updated((defaults or {}).items()))


@contextmanager
def session(args: argparse.Namespace, config: TrainConfig) -> Iterator[tuple[Progress, Callable[[], bool]]]:
    """Yields a progress display and a stop condition; reports missing packages before training."""
    from fusedkv_ext.lab.figures import need_matplotlib
    from fusedkv_ext.training import loop
    from fusedkv_ext.training.progress import make_progress
    from fusedkv_ext.training.trainer import resolve_device

    need_matplotlib()
    loop.deterministic(resolve_device(config.run.device))
    progress = make_progress(sys.stderr if args.json else sys.stdout)
    try:
        with stop_signals(progress) as should_stop:
            yield progress, should_stop
    finally:
        progress.close()


def stopped(args: argparse.Namespace) -> int:
    """Prints how to resume; returns the exit code."""
    print(f"stopped; the same command with --out {args.out} resumes", file=sys.stderr)
    return 130
