"""The part of `fusedkv plan` for --cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fusedkv_ext.errors import ConfigError

if TYPE_CHECKING:
    from fusedkv_ext.distributed import Layout
    from fusedkv_ext.lab.planner.report import Row

DIMS = ("dp_replicate", "dp_shard", "cp", "tp")
METHODS = "vanilla,gqa,fusedkv,fusedkv-lite"
_TRAINING = ("batch", "accumulate", "checkpointing", "recompute_fusion")
_SERVING = ("prefill_chunk",)
OPTIONS = (
    "config",
    "set",
    "context",
    "train",
    "serve",
    "precision",
    "gpu_memory",
    "bandwidth",
    *_TRAINING,
    *_SERVING,
)
_SIZES = ("layers", "kv_heads", "head_dim", "kv_lora_rank", "rope_dim")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cluster",
        metavar="DIM=N,...",
        help="GPUs along dp_replicate, dp_shard, cp and tp, 1 if not given; or gpus=N instead of "
        f"dp_shard: gpus=64,tp=8. Without METHOD: {METHODS}",
    )
    group.add_argument(
        "--config",
        default="1.5b",
        metavar="NAME|FILE",
        help="shape of the model: 1.5b, 4b, 70b, ... or a TOML file, as for train (default: %(default)s)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of that configuration; may be repeated: --set model.num_key_value_heads=8",
    )
    group.add_argument(
        "--context",
        default="8k",
        metavar="N,...",
        help="tokens per sequence: 8k,32k,1m (default: %(default)s)",
    )
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--train", action="store_true", help="a training step (default)")
    modes.add_argument(
        "--serve",
        action="store_true",
        help="serving: tp GPUs shard the weights, and all groups of tp GPUs are replicas",
    )
    group.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="training: sequences per micro-batch and data rank (default: %(default)s)",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="training: micro-batches per step (default: %(default)s)",
    )
    group.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: %(default)s)")
    group.add_argument(
        "--checkpointing",
        choices=("none", "non_reentrant", "reentrant"),
        default="none",
        help="training: activation checkpointing of each layer (default: %(default)s)",
    )
    group.add_argument(
        "--recompute-fusion", action="store_true", help="training: recompute fused K/V in the backward"
    )
    group.add_argument(
        "--prefill-chunk",
        type=int,
        default=0,
        metavar="N",
        help="serving: prompt tokens per prefill step (default: all)",
    )
    group.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory of one GPU in 1e9 bytes (default: %(default)g)",
    )
    group.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="network bandwidth per GPU in training, memory bandwidth in serving; adds times in seconds",
    )


def refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises ConfigError if one of these options was given."""
    for name in names:
        if getattr(args, name) != args.parser.get_default(name):
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


def run(args: argparse.Namespace) -> int:
    refuse(args, _SIZES, "must not be given with --cluster, where --config has the sizes of the model")
    if args.serve:
        refuse(args, _TRAINING, "must not be given with --serve, because it is an option of training")
    else:
        refuse(args, (*_SERVING, "dtype"), "is an option of serving and needs --serve")
    for name in ("gpu_memory", "bandwidth"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be a positive number of GB, got {value:g}")
    try:
        layout = parse_layout(args.cluster)
        rows = _rows(args, layout)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    asked = {
        "mode": "serve" if args.serve else "train",
        "config": args.config,
        "layout": {name: getattr(layout, name) for name in DIMS},
        "precision": args.precision,
        "gpu_memory": args.gpu_memory * 1e9,
    }
    if args.serve:
        asked |= {"cache_dtype": args.dtype, "prefill_chunk": args.prefill_chunk}
    else:
        asked |= {name: getattr(args, name) for name in _TRAINING}
    if args.json:
        print(json.dumps({**asked, "rows": rows}))
        return 0
    _print(asked, rows, args)
    return 0


def parse_layout(text: str) -> Layout:
    """Parses `dp_shard=8,tp=2` or `gpus=64,tp=8`.

    Raises:
        ValueError: A name or number is invalid, or the number of GPUs does not divide.
    """
    from fusedkv_ext.distributed import Layout

    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, number = (x.strip() for x in part.partition("="))
        if name not in (*DIMS, "gpus") or name in sizes or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"--cluster must be NAME=N,..., with gpus, {', '.join(DIMS)} at most once and N >= 1, got "
                f"{part!r}"
            )
        sizes[name] = int(number)
    gpus = sizes.pop("gpus", None)
    if gpus is None:
        return Layout(**{"dp_shard": 1, **sizes})
    return Layout(*Layout(**sizes).sizes(gpus))


def _rows(args: argparse.Namespace, layout: Layout) -> list[Row]:
    import torch

    from fusedkv_ext.cli.train import changes
    from fusedkv_ext.lab.entries import parse_all
    from fusedkv_ext.lab.planner import Job, Server, report, shapes
    from fusedkv_ext.training.config import TrainConfig

    try:
        contexts = [report.parse_tokens(part.strip()) for part in args.context.split(",")]
    except ValueError:
        raise ConfigError(
            f"--context must be numbers of tokens, as in 8k,32k,1m, got {args.context!r}"
        ) from None
    config = changes(argparse.Namespace(config=shapes.find(args.config), set=args.set))(TrainConfig())
    memory = args.gpu_memory * 1e9
    bandwidth = None if args.bandwidth is None else args.bandwidth * 1e9
    element = 2 if args.precision == "bf16" else 4
    rows = []
    for entry in parse_all((args.name or METHODS).split(",")):
        sizes = shapes.shape(config, entry, recompute_fusion=args.recompute_fusion)
        for context in contexts:
            if args.serve:
                cache = getattr(torch, args.dtype).itemsize
                server = Server(sizes, layout.tp, context, element, cache, args.prefill_chunk)
                rows.append(report.serving_row(entry.label, server, memory, bandwidth))
            else:
                job = Job(
                    sizes, layout, args.batch, context, args.accumulate, args.precision, args.checkpointing
                )
                rows.append(report.training_row(entry.label, job, memory, bandwidth))
    return rows


def _print(asked: dict[str, Any], rows: list[Row], args: argparse.Namespace) -> None:
    from fusedkv_ext.lab.planner import report

    layout, memory = asked["layout"], f"{args.gpu_memory:g} GB of memory"
    if args.serve:
        print(f"{args.config}, served by {layout['tp']} GPU{'s' * (layout['tp'] > 1)} with {memory} each.")
        print(f"Weights in {args.precision}, cache in {args.dtype}. GB = 1e9 bytes, of one GPU.\n")
        print(report.serving_table(rows))
        print(
            "\ncache: of one sequence. sequences: that fit beside weights and the prefill of one prompt.\n"
            "cache read: by a token of one sequence, weights read: by a step. MB received: per token.\n"
            "prefill: working memory, and TFLOP of a prompt. decode: GFLOP of a token."
        )
        return
    dims = " x ".join(f"{name} {number}" for name, number in layout.items())
    fusing = ", fusing again in the backward" if args.recompute_fusion else ""
    messages = ", ".join(name for name in DIMS if rows[0]["traffic"][name])
    print(f"{args.config} on {dims} GPUs with {memory} each.")
    print(f"{args.precision}, micro-batch {args.batch}, {args.accumulate} per step, ", end="")
    print(f"activation checkpointing {args.checkpointing}{fusing}. GB = 1e9 bytes, of one GPU.\n")
    print(report.training_table(rows))
    print(
        "\nstate: weights, gradients, moments. gathered: weights that FSDP2 has whole for a while.\n"
        "loss: logits of a chunk, gradient of the head. peak: the largest moment, which has not all of them."
    )
    if messages:
        print(f"{messages}: received per step.")
