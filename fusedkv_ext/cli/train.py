"""fusedkv train: train a decoder with any cache plan on text files or on this machine's Python sources.

Every configuration key (`fusedkv train --keys` lists them) can be set in a TOML file (--config) or with
--set.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab.recipes import find, names
from fusedkv_ext.plan.labels import split_label
from fusedkv_ext.training.config import TrainConfig, known_keys, load_toml

if TYPE_CHECKING:
    from fusedkv_ext.training.progress import Progress

# Options that are shortcuts for a configuration key.
_SHORTCUTS = {
    "steps": "run.steps",
    "seed": "run.seed",
    "tokenizer": "data.tokenizer",
    "random_sources": "run.random_sources",
}


def add_configuration(parser: argparse.ArgumentParser, config: str | None = None) -> None:
    """Adds the options of all training commands; `config` is the default of --config."""
    parser.add_argument(
        "--text", nargs="+", metavar="PATH", help="UTF-8 files or folders (default: Python sources)"
    )
    parser.add_argument("--steps", metavar="N", help="total optimizer steps of the run")
    parser.add_argument(
        "--config",
        default=config,
        metavar="NAME|FILE",
        help=f"sizes and budget: {', '.join(names())}, or a TOML file with the sections model, data, optim, "
        "run, parallel" + (" (default: %(default)s)" if config else ""),
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of `fusedkv train --keys`, over that of --config; may be repeated: --set optim.lr=1e-3",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("run"), help="folder of the run (default: %(default)s)"
    )
    add_configuration(parser)
    parser.add_argument(
        "--valid-text", nargs="+", metavar="PATH", help="held-out text (default: some files of --text)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json (default: bytes)")
    parser.add_argument(
        "--plan",
        metavar="METHOD",
        help="a name that `fusedkv plan` lists, with options as in cla:factor=3, or a JSON file of a plan "
        "(default: fusedkv)",
    )
    parser.add_argument("--seed", metavar="N", help="seed of the weights and of the data order")
    parser.add_argument(
        "--random-sources",
        metavar="P",
        help="with --plan vanilla: each layer attends to an earlier layer's keys and values with probability "
        "P in each step (default: 0)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the newest checkpoint in --out, if any"
    )
    parser.add_argument("--stop-after", type=int, metavar="N", help="save and stop after step N")
    parser.add_argument(
        "--keys", action="store_true", help="list all configuration keys with their defaults, and exit"
    )


def changes(args: argparse.Namespace) -> Callable[[TrainConfig], TrainConfig]:
    """Changes of the command line to a configuration, in increasing priority: file, --set, options."""
    pairs = []
    for entry in args.set:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--set must be KEY=VALUE, got {entry!r}")
        pairs.append((key.strip(), value.strip()))
    given = vars(args)  # commands that train several models lack some of the options
    pairs += [(key, given[name]) for name, key in _SHORTCUTS.items() if given.get(name) is not None]
    if given.get("plan") is not None:
        name, options = _plan(given["plan"])
        pairs += [("model.plan", name), *((f"model.plan_options.{key}", value) for key, value in options)]
    lists = [(f"data.{name}", given[name]) for name in ("text", "valid_text") if given.get(name)]
    table = load_toml(find(args.config)) if args.config else None

    def change(config: TrainConfig) -> TrainConfig:
        if table is not None:
            config = config.merged(table)
        return config.updated(pairs, as_text=True).updated(lists)

    return change


def _plan(label: str) -> tuple[str, list[tuple[str, str]]]:
    """The name and the options of a plan; the path of a JSON file is a name."""
    if label.endswith(".json"):
        return label, []
    try:
        return split_label(label)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _print_keys() -> int:
    config = TrainConfig()
    for key in known_keys():
        section, name = key.split(".")
        print(f"{key} = {json.dumps(getattr(getattr(config, section), name))}")
    return 0


@contextmanager
def stop_signals(progress: Progress) -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second one at once."""
    caught: list[int] = []
    announced = False

    def handle(number: int, _frame: object) -> None:  # may interrupt a print, so it prints nothing
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    def should_stop() -> bool:
        nonlocal announced
        if caught and not announced:
            progress.line("interrupted: validating and saving a checkpoint; once more to stop at once")
            announced = True
        return bool(caught)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield should_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> int:
    if args.keys:
        return _print_keys()
    if args.stop_after is not None and args.stop_after < 1:
        raise ConfigError(f"--stop-after must be >= 1, got {args.stop_after}")
    from fusedkv_ext.training import session

    with session.session():
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    change = changes(args)
    from fusedkv_ext.training import loop, run_folder, session
    from fusedkv_ext.training.progress import make_progress

    progress = make_progress(sys.stderr if args.json else sys.stdout)
    try:
        newest = run_folder.latest(args.out / "checkpoints")
        if args.resume and session.from_rank_zero(newest is not None):
            this, warnings = loop.resume(args.out, change)
            progress.line(f"resuming {args.out} at step {this.trainer.step}")
            for warning in warnings:
                progress.line(f"warning: {warning}")
        else:
            this = loop.start(change(TrainConfig()), args.out)
        trainer = this.trainer
        loop.deterministic(trainer.device)
        progress.line(f"text: {trainer.data.info}")
        progress.line(
            f"model: {trainer.config.model.plan}, {trainer.num_parameters:,} parameters, {trainer.device}, "
            f"{trainer.config.run.precision}, {trainer.tokens_per_step:,} tokens per step"
        )
        with stop_signals(progress) as should_stop:
            result = loop.run(this, progress, stop_after=args.stop_after, should_stop=should_stop)
            interrupted = session.any_rank(should_stop())
    finally:
        progress.close()
    code = 130 if interrupted and not result.finished else 0
    if session.rank():
        return code
    if args.json:
        print(json.dumps(result.to_dict()))
    else:
        print(
            f"{'done' if result.finished else 'stopped'} at step {result.steps}: validation loss "
            f"{result.valid_loss:.4f}, {result.valid_bits_per_byte:.3f} bits/byte; "
            f"checkpoint {result.checkpoint}"
        )
    return code
