"""fusedkv plan: show which layer takes its keys and values from where, and what its cache costs.

Without a name, lists the known plans.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from fusedkv_ext.train.config import ConfigError, literal

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="name of the plan; none: list them")
    parser.add_argument(
        "--layers", type=int, default=24, metavar="N", help="number of layers (default: %(default)s)"
    )
    parser.add_argument(
        "--kv-heads", type=int, metavar="G", help="key/value heads of a layer, for the bytes per token"
    )
    parser.add_argument(
        "--head-dim", type=int, default=128, metavar="D", help="channels of a head (default: %(default)s)"
    )
    parser.add_argument(
        "--kv-lora-rank",
        type=int,
        metavar="R",
        help="channels of the latent: bytes per token of multi-head latent attention instead",
    )
    parser.add_argument(
        "--rope-dim",
        type=int,
        default=64,
        metavar="D",
        help="channels of its rotated key (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the plan"
    )


def _options(entries: list[str]) -> dict[str, Any]:
    options = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--option takes KEY=VALUE, got {entry!r}")
        options[key] = literal(value)
    return options


def _list(as_json: bool) -> int:
    from fusedkv_ext.plan import METHODS

    if as_json:
        print(json.dumps({name: {"equation": m.equation, "paper": m.paper} for name, m in METHODS.items()}))
        return 0
    width = max(map(len, METHODS))
    for name, method in METHODS.items():
        print(f"{name:<{width}}  {method.equation}  ({method.paper})")
    print(
        "\nfusedkv plan NAME shows one. "
        "Layers count from 1 in these formulas, from 0 in tables and code."
    )
    return 0


def run(args: argparse.Namespace) -> int:
    if args.name is None:
        return _list(args.json)
    import torch

    from fusedkv_ext.plan import METHODS, CachePlan

    try:
        plan = CachePlan.named(args.name, args.layers, **_options(args.option))
        vanilla = CachePlan.named("vanilla", args.layers)
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
    print(plan)
    method = METHODS[plan.name]
    options = ", ".join(f"{name}={json.dumps(value)}" for name, value in method.options.items())
    print(f"\n{method.summary}\n")
    print(f"paper: {method.paper}; layers counted from 1: {method.equation}")
    print(f"options (--option KEY=VALUE): {options or 'none'}")
    if sizes:
        print(
            f"size: {sizes[0]:,} bytes per token with {shape} in {args.dtype}, "
            f"{sizes[0] / sizes[1]:.3f} of vanilla's {sizes[1]:,}"
        )
    return 0
