"""fusedkv plan: show the source layers of each layer's keys and values, and the size of the cache.

Without a name, lists all methods. With --cluster: memory and traffic per GPU for a model shape and one or
several methods, in training or, with --serve, in serving. These numbers come from formulas; nothing is run
(docs/scale.md).
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from fusedkv_ext.cli import cluster
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab.entries import parse

if TYPE_CHECKING:
    from fusedkv_ext.plan.registry import Method

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="METHOD",
        help="a name, with options as in cla:factor=3, or a JSON file of a plan; none: list all names. With "
        "--cluster several, as vanilla,cla:factor=3",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=8,
        metavar="N",
        help="number of layers; a file has its own (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-heads", type=int, metavar="G", help="key/value heads per layer, for the bytes per token"
    )
    parser.add_argument(
        "--head-dim", type=int, default=128, metavar="D", help="channels per head (default: %(default)s)"
    )
    parser.add_argument(
        "--kv-lora-rank",
        type=int,
        metavar="R",
        help="channels of the latent, for the bytes per token of multi-head latent attention",
    )
    parser.add_argument(
        "--rope-dim",
        type=int,
        default=64,
        metavar="D",
        help="channels of the rotated key of the latent (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of the cache (default: %(default)s)"
    )
    cluster.add_arguments(parser.add_argument_group("on a cluster"))


def _list(as_json: bool) -> int:
    from fusedkv_ext.plan import METHODS

    if as_json:
        print(json.dumps({name: _described(method) for name, method in METHODS.items()}))
        return 0
    rows = [("method", "cache, vanilla = 1", "paper")]
    rows += [(method.name, method.cache, method.paper) for method in METHODS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nfusedkv plan NAME shows one: its equations, options, table and cache. "
        "L: layers, n: layers that store.\n"
        "fusedkv compare --methods A,B,... trains and compares them."
    )
    return 0


def _described(method: Method) -> dict[str, Any]:
    about = ("equation", "keys", "values", "paper", "cache", "summary", "options")
    return {name: getattr(method, name) for name in about}


def _about(method: Method) -> str:
    """Paper, equations and options of a method, for the terminal."""
    lines = [f"{method.name}  ({method.paper})", f"  keys:   {method.keys}", f"  values: {method.values}"]
    summary = " ".join(method.summary.replace("``", "").split())
    lines += textwrap.wrap(summary, 100, initial_indent="  ", subsequent_indent="  ")
    if method.options:
        defaults = ":".join(f"{name}={json.dumps(value)}" for name, value in method.options.items())
        lines.append(f"  options and their defaults: {method.name}:{defaults}".replace('"', ""))
    return "\n".join([*lines, "  Layers count from 1 in these lines, from 0 below and in code.\n"])


def run(args: argparse.Namespace) -> int:
    if args.cluster is not None:
        return cluster.run(args)
    cluster.refuse(args, cluster.OPTIONS, "needs --cluster, as in --cluster gpus=8,tp=2")
    if args.name is None:
        return _list(args.json)
    import torch

    from fusedkv_ext.plan import METHODS, CachePlan
    from fusedkv_ext.training.config import ModelSection
    from fusedkv_ext.training.trainer import resolve_plan

    entry = parse(args.name)
    try:
        section = ModelSection(
            plan=entry.method,
            plan_options=dict(entry.options),
            num_hidden_layers=args.layers,
        )
        plan = resolve_plan(section)
        vanilla = CachePlan.named("vanilla", plan.num_layers)
        sizes, shape = None, ""
        dtype = getattr(torch, args.dtype)
        if args.kv_lora_rank is not None:
            latent = (args.kv_lora_rank, args.rope_dim, dtype)
            sizes = (plan.latent_bytes_per_token(*latent), vanilla.latent_bytes_per_token(*latent))
            shape = f"latents of {args.kv_lora_rank} and rotated keys of {args.rope_dim} channels"
        elif args.kv_heads is not None:
            heads = (args.kv_heads, args.head_dim, dtype)
            sizes = (plan.bytes_per_token(*heads), vanilla.bytes_per_token(*heads))
            shape = f"{args.kv_heads} KV heads of {args.head_dim}"
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if args.json:
        result: dict[str, Any] = {
            "plan": plan.to_dict(),
            "storage_layers": list(plan.storage_layers),
            "prefill_layers": plan.prefill_layers,
            "cache_ratio": float(plan.cache_ratio),
        }
        if sizes:
            result |= {"bytes_per_token": sizes[0], "vanilla_bytes_per_token": sizes[1]}
        print(json.dumps(result))
        return 0
    if entry.method in METHODS:
        print(_about(METHODS[entry.method]))
    print(plan)
    if sizes:
        print(
            f"size: {sizes[0]:,} bytes per token with {shape} in {args.dtype}, "
            f"{sizes[0] / sizes[1]:.3f} of vanilla's {sizes[1]:,}"
        )
    return 0
