"""fusedkv uptrain: continue the training of a converted model on text.

FOLDER is a Hugging Face folder with a model that `fusedkv convert` wrote, or any other causal language model.
The model trains with or without the original as its teacher. The result is a folder of the same kind. The
budget is one of --minutes, --steps and --tokens. Under torchrun FSDP2 shards model, teacher and optimizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fusedkv_ext.cli.train import stop_signals

# Options without a value of their own here: the settings' defaults hold, and a resumed run keeps what it had.
_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--minutes", dict(type=float, help="budget: minutes of training; validation and saving come on top")),
    ("--steps", dict(type=int, help="budget: optimizer steps")),
    ("--tokens", dict(type=int, help="budget: tokens of text")),
    ("--train", dict(choices=("all", "changed", "lora"), help="what learns (default: all)")),
    ("--rank", dict(type=int, help="rank of LoRA's updates (default: 16)")),
    ("--distill", dict(nargs="+", choices=("logits", "layers"), help="imitate the teacher's logits, layers")),
    ("--teacher", dict(metavar="FOLDER", help="default: the original that conversion.json names")),
    ("--match", dict(choices=("attention", "hidden"), help="what `layers` compares (default: attention)")),
    ("--ce-weight", dict(type=float, help="weight of the cross entropy (default: 1)")),
    ("--kl-weight", dict(type=float, help="weight of the teacher's logits (default: 1)")),
    ("--layer-weight", dict(type=float, help="weight of the teacher's layers (default: 1)")),
    ("--temperature", dict(type=float, help="of both softmaxes when distilling logits (default: 1)")),
    ("--lr", dict(type=float, help="highest learning rate (default: by what learns)")),
    ("--original-lr", dict(type=float, help="last rate of the original's training: take 1.5 times that")),
    ("--fusion-lr", dict(type=float, help="fusion weights learn at this times the rate (default: 1)")),
    (
        "--random-sources",
        dict(type=float, metavar="P", help="probability of reading an earlier layer (default: 0)"),
    ),
    ("--schedule", dict(choices=("cosine", "linear"), help="cosine, or constant and then falling linearly")),
    ("--warmup", dict(type=float, help="share of the budget (default: 0.05)")),
    ("--weight-decay", dict(type=float, help="of matrices, not of fusion weights (default: 0.01)")),
    ("--grad-clip", dict(type=float, help="largest norm of the gradient; 0: none (default: 1)")),
    ("--batch-size", dict(type=int, help="sequences per step (default: 4)")),
    ("--accumulate", dict(type=int, help="parts in which a batch is run, for less memory (default: 1)")),
    ("--seq-len", dict(type=int, help="tokens per sequence (default: 512)")),
    ("--precision", dict(choices=("bf16", "fp32"), help="bf16: autocast around fp32 weights (default)")),
    ("--device", dict(help="cpu or cuda (default: cuda where there is one)")),
    ("--seed", dict(type=int, help="of the order of the text and of LoRA (default: 0)")),
    ("--tokenizer", dict(metavar="FILE", help="a tokenizer.json (default: that of FOLDER)")),
    ("--valid-text", dict(nargs="+", metavar="PATH", help="held-out text (default: 2 %% of --text)")),
    ("--valid-tokens", dict(type=int, help="held-out tokens to score (default: 16384)")),
    ("--valid-window", dict(type=int, help="tokens of context when scoring (default: 2048)")),
    ("--validations", dict(type=int, help="during the run (default: 10)")),
    ("--save-minutes", dict(type=float, help="between checkpoints (default: 10)")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a model, converted or not: folder, or ORG/NAME"
    )
    parser.add_argument("--text", nargs="+", metavar="PATH", help="UTF-8 files or folders to learn from")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint of a run with this --out that was stopped; options may be left out",
    )
    parser.add_argument("--stop-after", type=int, metavar="N", help="save and stop when step N is done")
    for name, options in _OPTIONS:
        parser.add_argument(name, default=argparse.SUPPRESS, **options)


def run(args: argparse.Namespace) -> int:
    from fusedkv_ext.training import session

    with session.session():
        return _uptrain(args)


def _uptrain(args: argparse.Namespace) -> int:
    from fusedkv_ext.cli.hub import local_folder
    from fusedkv_ext.conversion.uptraining import uptrain
    from fusedkv_ext.training import session
    from fusedkv_ext.training.progress import make_progress

    names = (name.removeprefix("--").replace("-", "_") for name, _ in _OPTIONS)
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if settings.get("teacher") is not None:
        settings["teacher"] = str(session.rank_zero_first(lambda: local_folder(settings["teacher"])))
    folder = session.rank_zero_first(lambda: local_folder(args.folder))
    for name in ("distill", "valid_text"):
        if name in settings:
            settings[name] = tuple(settings[name])
    progress = make_progress(sys.stderr if args.json else sys.stdout)
    try:
        with stop_signals(progress) as should_stop:
            result = uptrain(
                folder,
                args.text or (),
                args.out,
                resume=args.resume,
                progress=progress,
                should_stop=should_stop,
                stop_after=args.stop_after,
                **settings,
            )
            interrupted = session.any_rank(should_stop())
    finally:
        progress.close()
    code = 130 if interrupted and not result.finished else 0
    if session.rank():
        return code
    if args.json:
        print(json.dumps(result.to_dict()))
    else:
        _print(result)
    return code


def _print(result: Any) -> None:
    seen = f"{result.steps:,} steps, {result.tokens:,} tokens, {result.seconds / 60:.1f} minutes of training"
    if not result.finished:
        print(f"stopped after {seen}; go on with --resume")
        return
    print(f"{seen}; perplexity {result.perplexity_before:.3f} before, {result.perplexity_after:.3f} after")
    if result.original_loss is not None:
        reached = result.tokens_to_original
        print(
            f"the original's loss, {result.original_loss:.4f}: "
            + ("not reached" if reached is None else f"reached after {reached:,} tokens")
        )
    print(f"model: {result.folder}")
