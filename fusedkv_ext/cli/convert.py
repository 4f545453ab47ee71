"""fusedkv convert: give a trained Llama or Qwen3 another cache plan, calibrated in closed form on text.

MODEL is a Hugging Face folder, or a model of its Hub as ORG/NAME or ORG/NAME@REVISION. The result is such a
folder. Layers without keys and values of their own read those of the plan's source layers. With --calibrate,
least squares solves for their fusion weights and the output projections of their attention and feed-forward
networks. There is no training; `fusedkv uptrain` continues from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from fusedkv_ext.cli.hub import local_folder
from fusedkv_ext.errors import ConfigError

REFITTED = ["o_proj", "down_proj"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Llama or Qwen3: folder, or ORG/NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--plan",
        metavar="METHOD",
        help="a name that `fusedkv plan` lists, with options as in cla:factor=3, or a JSON file of a plan",
    )
    which.add_argument(
        "--search",
        choices=("prefix", "layers", "kvsharer"),
        help="find the plan on the text of --calibrate: the sources of FusedKV's form (prefix); which layers "
        "store, and the sources of the others (layers); whole caches as KVSharer shares them",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--storage-layers", type=int, metavar="N", help="number of storage layers")
    size.add_argument(
        "--budget", type=float, metavar="SHARE", help="with --search: fraction of the cache to keep, 0 to 1"
    )
    parser.add_argument("--calibrate", nargs="+", metavar="PATH", help="UTF-8 text to fit the model to")
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        help="calibration tokens, spread over the text (default: %(default)s)",
    )
    parser.add_argument("--window", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument(
        "--metric",
        choices=("score", "plain"),
        default="score",
        help="what fusion weights are fitted to: attention scores and outputs, or plain keys and values "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="maps of keys (where RoPE lets them pass) and values, absorbed into the projections",
    )
    parser.add_argument(
        "--refit",
        nargs="*",
        choices=("o_proj", "down_proj"),
        default=REFITTED,
        help="projections to refit; none after a bare --refit (default: both)",
    )
    parser.add_argument(
        "--pooling",
        default="mean-v",
        choices=("mean-v", "mean-vo", "top-norm-v", "top-norm-vo", "svd", "own"),
        help="how a layer with fewer value heads gets them (default: %(default)s)",
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        metavar="PATH",
        help="text to score before and after (default: that of --calibrate)",
    )
    parser.add_argument(
        "--eval-tokens", type=int, default=8192, help="tokens to score (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json (default: that of MODEL)")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda if available)")


def _plan(args: argparse.Namespace, num_layers: int) -> Any:
    from fusedkv_ext.lab.entries import parse
    from fusedkv_ext.plan import METHODS, CachePlan

    entry = parse(args.plan)
    options = dict(entry.options)
    if entry.method.endswith(".json"):
        if args.storage_layers is not None:
            raise ConfigError("--storage-layers needs a named plan, got a file, which defines them already")
        return CachePlan.from_json(Path(entry.method).read_text("utf-8"))
    if METHODS[entry.method].kv_heads(8) != 8:
        raise ConfigError(
            f"--plan must keep the number of KV heads, got {entry.method}, which changes "
            "num_key_value_heads; choose a plan whose layers share caches"
        )
    if args.storage_layers is not None and "storage_layers" not in METHODS[entry.method].options:
        raise ConfigError(
            f"--storage-layers needs a plan with the option storage_layers, got {entry.method}; leave it out"
        )
    if args.storage_layers is not None:
        options["storage_layers"] = args.storage_layers
    return CachePlan.named(entry.method, num_layers, **options)


def _storage_layers(args: argparse.Namespace, layers: int) -> int:
    """The number of storage layers of a searched plan."""
    n = args.storage_layers
    if n is None:
        n = int(Fraction(str(args.budget)) * layers)  # 0.58 * 50 < 29
    if not 1 <= n <= layers:
        raise ConfigError(
            f"the number of storage layers must be from 1 to {layers}, got {n}; change --storage-layers or "
            "--budget"
        )
    return n


def check_out(out: Path) -> None:
    """Checks that a new folder can be written.

    Raises:
        ConfigError: It exists, or its parent is not a writable folder.
    """
    if out.exists():
        raise ConfigError(f"--out must not exist, got {out}; choose another folder")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"--out must be in a folder, got a path in {parent}, which is not one")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out must be in a writable folder, got a path in {parent}")


def _check(args: argparse.Namespace) -> None:
    """Checks options that do not depend on the model, then finds or downloads the model."""
    check_out(args.out)
    if args.search and (not args.calibrate or (args.storage_layers is None and args.budget is None)):
        raise ConfigError("--search needs --calibrate, and --storage-layers or --budget")
    if args.budget is not None and (args.plan or not 0 < args.budget <= 1):
        raise ConfigError(f"--budget must be above 0 and at most 1, with --search, got {args.budget}")
    if not args.calibrate:
        other = {"--metric": args.metric != "score", "--refit": args.refit != REFITTED}
        given = {"--repair": args.repair, **other}
        for name in (name for name, value in given.items() if value):
            raise ConfigError(f"{name} needs --calibrate; add it, or leave {name} out")
    args.model = local_folder(args.model)


def check_calibration(args: argparse.Namespace, positions: int) -> None:
    """Checks the numbers of tokens that do not depend on the text, for a model with `positions`."""
    from fusedkv_ext.conversion.convert import LEAST_TOKENS

    if not 2 <= args.window <= positions:
        raise ConfigError(f"--window must be from 2 to the model's {positions} positions, got {args.window}")
    least = max(LEAST_TOKENS, args.window)
    if args.tokens < least:
        raise ConfigError(f"--tokens must be at least {least}, got {args.tokens}")


def _searched(args: argparse.Namespace, model: Any, windows: Any, second_moments: Any) -> Any:
    """The plan that --search finds."""
    from fusedkv_ext.conversion.kvsharer import kvsharer
    from fusedkv_ext.conversion.plan_search import SourceTable, search, search_prefix

    layers = model.config.num_hidden_layers
    n = _storage_layers(args, layers)
    if args.search == "kvsharer":  # on 30 texts of 64 tokens, as the paper does
        return kvsharer(model, windows[:, :64][:30], n)
    table = SourceTable(second_moments, model)
    if args.search == "prefix":
        return search_prefix(table, n).plan
    return search(table, storage_layers=n).plan


def run(args: argparse.Namespace) -> int:
    from fusedkv_ext.extras import need

    need("transformers", "Converting a model", "hf")
    from fusedkv_ext.conversion.convert import (
        calibration_windows,
        check_plain,
        convert_model,
        save_conversion,
    )
    from fusedkv_ext.conversion.explained_variance import explained_table
    from fusedkv_ext.conversion.second_moments import collect
    from fusedkv_ext.evaluation.perplexity import perplexity, read_text
    from fusedkv_ext.hf.config import config_for
    from fusedkv_ext.hf.loading import load_causal_lm, load_config, load_tokenizer
    from fusedkv_ext.lab.reporting import aligned
    from fusedkv_ext.training.trainer import resolve_device

    _check(args)
    out = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    config = load_config(args.model)
    plan = None if args.search else _plan(args, config.num_hidden_layers)
    config_for(config, plan or "vanilla")  # the errors that need no weights
    try:
        check_plain(config)
    except ValueError as error:
        raise ConfigError(f"{args.model}: {error}") from error
    if args.search:
        _storage_layers(args, config.num_hidden_layers)
    scored = args.eval or args.calibrate
    tokenizer: Any = load_tokenizer(args.model, config.vocab_size, args.tokenizer) if scored else None
    context = min(2048, config.max_position_embeddings)
    windows: Any = None
    if args.calibrate:
        check_calibration(args, config.max_position_embeddings)
        windows = calibration_windows(
            read_text(args.calibrate).ids(tokenizer).long(), args.tokens, args.window
        )
    text = None if scored is None else read_text(scored).ids(tokenizer)
    model = load_causal_lm(args.model, device=resolve_device(args.device))
    before: Any = None
    if text is not None:
        before = perplexity(model, text, context=context, max_tokens=args.eval_tokens)
        say(f"original: perplexity {before.perplexity:.2f} over {before.tokens:,} tokens")
    second_moments = None
    if plan is None:
        second_moments = collect(model, windows)
        plan = _searched(args, model, windows, second_moments)
        say(str(plan))
    conversion = convert_model(
        model,
        plan,
        calibration=windows,
        metric=args.metric,
        repair=args.repair,
        refitted=args.refit,
        pooling=args.pooling,
        second_moments=second_moments,
        progress=say,
    )
    if conversion.explained:
        say(aligned(explained_table(conversion.plan, conversion.explained, conversion.repairs)))
    report: dict[str, Any] = {}
    if text is not None:
        after = perplexity(conversion.model, text, context=context, max_tokens=args.eval_tokens)
        say(f"converted: perplexity {after.perplexity:.2f}")
        report["perplexity"] = {
            "before": before.perplexity,
            "after": after.perplexity,
            "tokens": after.tokens,
            "text": [str(path) for path in scored],
        }
    save_conversion(conversion, args.out, args.model, report, tokenizer if args.tokenizer else None)
    _report(args, say)
    return 0


def _report(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    record = json.loads((args.out / "conversion.json").read_text("utf-8"))
    if args.json:
        print(json.dumps({"folder": str(args.out), **record}))
        return
    was, now = record["cache_bytes_per_token"]["original"], record["cache_bytes_per_token"]["converted"]
    say(f"cache: {now:,} bytes per token, {1 - now / was:.1%} less than {was:,}; model: {args.out}")
