"""fusedkv eval: perplexity, loss by position and retrieval from the context, of one or several checkpoints.

A checkpoint is the --out folder of a training run (its newest checkpoint), a folder with config.json
and model.safetensors, or a Hugging Face folder with any causal language model. Processes that torchrun starts
shard the heads of each model, and with them weights and cache. Models with codecs are scored as decoding
over coded caches computes them. docs/evaluation.md explains each number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from fusedkv_ext.cli.models import Loaded
    from fusedkv_ext.evaluation.needles import Questions
    from fusedkv_ext.evaluation.perplexity import Difference, Perplexity, Positions, Text, WindowLosses
    from fusedkv_ext.evaluation.retrieval import Retrieval
    from fusedkv_ext.training.data.tokenizer import Tokenizer

TASKS = ("perplexity", "positions", "retrieval")
DEFAULT_CONTEXT = 512
# Arguments that a result is kept with.
SETTINGS = ("stride", "max_tokens", "lengths", "depths", "examples", "keys", "seed", "style", "dtype")


def _tasks(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(TASKS)}, got {unknown[0]!r}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="folder of a run, checkpoint or model, or ORG/NAME",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="PATH",
        help="UTF-8 files or folders, all of them scored (default: what the default corpus holds out)",
    )
    parser.add_argument("--tasks", type=_tasks, default=list(TASKS), metavar="TASK,...", help=",".join(TASKS))
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens per window (default: as in training; {DEFAULT_CONTEXT} if unknown)",
    )
    parser.add_argument(
        "--stride", type=int, metavar="S", help="stride of the perplexity windows (default: --context)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=2**17,
        metavar="N",
        help="tokens to score; 0: all (default: %(default)s)",
    )
    retrieval = parser.add_argument_group("retrieval")
    retrieval.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens of the prompts (default: --context, and half of it from 512 on)",
    )
    retrieval.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0, 25, 50, 75, 100],
        metavar="PERCENT",
        help="depths of the needle in percent: 0 first, 100 last (default: 0 25 50 75 100)",
    )
    retrieval.add_argument(
        "--examples",
        type=int,
        default=25,
        metavar="N",
        help="examples per length and depth (default: %(default)s)",
    )
    retrieval.add_argument("--keys", type=int, default=4, metavar="K", help="keys to tell apart (default: 4)")
    retrieval.add_argument("--seed", type=int, default=0, help="seed of the examples (default: 0)")
    retrieval.add_argument(
        "--style", choices=("python", "prose"), default="python", help="style of the needles"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for eval.json and plots")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json (default: the checkpoint's own)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


@dataclass
class Subject:
    """A checkpoint that is evaluated, and its results."""

    name: str
    loaded: Loaded
    training: TrainConfig | None  # None: the checkpoint has no training configuration
    perplexity: Perplexity | None = None
    difference: Difference | None = None  # of its loss to that of the first checkpoint
    positions: Positions | None = None
    retrieval: Retrieval | None = None

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    def to_dict(self) -> dict[str, Any]:
        results = {name: getattr(self, name) for name in (*TASKS, "difference")}
        return {
            "checkpoint": str(self.loaded.folder),
            "plan": self.loaded.plan,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "cache_bytes_per_token": self.loaded.cache_bytes_per_token,
            **{name: result.to_dict() for name, result in results.items() if result is not None},
        }


def _names(paths: Sequence[str]) -> list[str]:
    """Names of the folders; a checkpoint within a run has its path as given."""
    from fusedkv_ext.lab.figures import distinct_names

    names = distinct_names([Path(path) for path in paths])
    return [
        path if Path(path).resolve().name.startswith("step-") else name
        for path, name in zip(paths, names, strict=True)
    ]


def _load(args: argparse.Namespace) -> list[Subject]:
    from fusedkv_ext.cli.models import load_model
    from fusedkv_ext.training.run_folder import training_config

    subjects = []
    for name, path in zip(_names(args.checkpoints), args.checkpoints, strict=True):
        loaded = load_model(path, args.tokenizer, device=args.device, dtype=args.dtype)
        subjects.append(Subject(name, loaded, training_config(loaded.folder)))
    if set(args.tasks) != {"perplexity"} and len({subject.tokenizer.identity for subject in subjects}) > 1:
        raise ConfigError(
            "the checkpoints must have one tokenizer for positions and retrieval, got different ones; "
            "compare bits per byte with --tasks perplexity, or evaluate the checkpoints one by one"
        )
    return subjects


def _context(args: argparse.Namespace, subjects: Sequence[Subject]) -> int:
    """--context, or the shortest training context of the models."""
    from fusedkv_ext.evaluation.perplexity import check_context

    trained = [subject.training.data.seq_len for subject in subjects if subject.training]
    limits = [subject.model.config.max_position_embeddings for subject in subjects]
    context = min(trained or [DEFAULT_CONTEXT, *limits]) if args.context is None else args.context
    for subject in subjects:
        for length in (context, *(args.lengths or ())):
            check_context(subject.model, length, subject.name)
    return context


def _text(args: argparse.Namespace, subjects: Sequence[Subject]) -> Text:
    """--text, or the part of the default corpus that all runs held out; such sets are nested."""
    from fusedkv_ext.evaluation.perplexity import read_text

    fractions = []
    for subject in subjects:
        if subject.training and not subject.training.data.text and not args.text:
            if subject.training.data.valid_text:
                raise ConfigError(
                    f"--text must be given for {subject.name}, which was trained on all of the default "
                    "corpus except its data.valid_text; give text that it has not seen"
                )
            fractions.append(subject.training.data.valid_fraction)
    return read_text(args.text, valid_fraction=min(fractions, default=0.02))


def _questions(args: argparse.Namespace, context: int, text: Text, tokenizer: Tokenizer) -> list[Questions]:
    from fusedkv_ext.evaluation.needles import make_questions

    return make_questions(
        tokenizer,
        text.documents,
        lengths=args.lengths or [length for length in (context // 2, context) if length >= 256] or [context],
        depths=[depth / 100 for depth in args.depths],
        examples=args.examples,
        keys=args.keys,
        seed=args.seed,
        style=args.style,
    )


def _results(subjects: Sequence[Subject], task: str) -> dict[str, Any]:
    """Name -> result of a task, for the subjects that have one."""
    return {s.name: getattr(s, task) for s in subjects if getattr(s, task) is not None}


def _losses(
    args: argparse.Namespace, subject: Subject, text: Text, ids: torch.Tensor, context: int
) -> WindowLosses | None:
    """Fills in perplexity and positions; returns the losses of the perplexity."""
    from fusedkv_ext.evaluation.perplexity import window_losses

    stride = context if args.stride is None else args.stride
    settings: dict[str, Any] = {"context": context, "max_tokens": args.max_tokens or None}
    losses = None
    if "perplexity" in args.tasks:
        losses = window_losses(subject.model, ids, stride=stride, **settings)
        subject.perplexity = losses.perplexity(text.tokens_per_byte(len(ids)))
    if "positions" in args.tasks:
        whole = losses if losses and stride == context else window_losses(subject.model, ids, **settings)
        subject.positions = whole.positions()
    return losses


def evaluate(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Subject]]:
    """Runs all tasks on all checkpoints: the output of --json, and the results per checkpoint."""
    from fusedkv_ext.cli.models import coded_passes
    from fusedkv_ext.evaluation.perplexity import paired_difference
    from fusedkv_ext.evaluation.retrieval import score_questions

    subjects = _load(args)
    context = _context(args, subjects)
    text = _text(args, subjects)
    say(f"text: {text.origin}, {text.bytes / 1e6:.2f} MB; context {context} tokens")
    questions = _questions(args, context, text, subjects[0].tokenizer) if "retrieval" in args.tasks else []
    encoded: dict[str, torch.Tensor] = {}
    first: WindowLosses | None = None
    for subject in subjects:
        identity = subject.tokenizer.identity
        if args.tasks != ["retrieval"]:
            say(f"{subject.name}: loss")
            if identity not in encoded:
                encoded[identity] = text.ids(subject.tokenizer)
            with coded_passes(subject.model):
                losses = _losses(args, subject, text, encoded[identity], context)
            if subject is subjects[0]:
                first = losses
            elif first and losses and identity == subjects[0].tokenizer.identity:
                subject.difference = paired_difference(losses, first)
        if questions:
            say(f"{subject.name}: retrieval")
            subject.retrieval = score_questions(subject.model, subject.tokenizer, questions)
    result = {
        "text": text.origin,
        "text_bytes": text.bytes,
        "settings": {"context": context, **{name: getattr(args, name) for name in SETTINGS}},
        "checkpoints": {subject.name: subject.to_dict() for subject in subjects},
    }
    return result, subjects


def _tables(subjects: Sequence[Subject]) -> str:
    from fusedkv_ext.lab import evaluation_report as report

    tables = []
    if results := _results(subjects, "perplexity"):
        sizes = {subject.name: subject.loaded.cache_bytes_per_token for subject in subjects}
        tables.append(report.perplexity_table(results, _results(subjects, "difference"), sizes))
    if results := _results(subjects, "positions"):
        tables.append(report.positions_table(results))
    if results := _results(subjects, "retrieval"):
        tables.append(report.retrieval_table(results))
    return "\n\n".join(tables)


def _write(folder: Path, result: dict[str, Any], subjects: Sequence[Subject]) -> list[Path]:
    from fusedkv_ext.lab import evaluation_report as report
    from fusedkv_ext.lab import figures

    path = folder / "eval.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written = [path]
    if results := _results(subjects, "positions"):
        written.append(figures.save(report.position_curves(results), folder / "positions.png"))
    if results := _results(subjects, "retrieval"):
        written.append(figures.save(report.retrieval_grids(results), folder / "retrieval.png"))
    return written


def run(args: argparse.Namespace) -> int:
    from fusedkv_ext.training import session

    with session.session():
        return _run(args, speaks=session.rank() == 0)


def _run(args: argparse.Namespace, speaks: bool) -> int:
    if args.out is not None:
        from fusedkv_ext.lab.figures import need_matplotlib

        need_matplotlib()
        args.out.mkdir(parents=True, exist_ok=True)  # before the work, so that an error comes early

    def say(line: str) -> None:
        if speaks:
            print(line, file=sys.stderr, flush=True)

    result, subjects = evaluate(args, say)
    if not speaks:
        return 0
    print(json.dumps(result, allow_nan=False) if args.json else _tables(subjects))
    if args.out is not None:
        for path in _write(args.out, result, subjects):
            print(f"wrote {path}", file=sys.stderr if args.json else sys.stdout)
    return 0
