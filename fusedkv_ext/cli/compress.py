"""fusedkv compress: write the cache of a Llama or Qwen3 in 8, 4 or 2 bits, with codecs fitted to text.

MODEL is a folder of `fusedkv convert`, a plain Llama or Qwen3 as a Hugging Face folder, or a model of its Hub
as ORG/NAME or ORG/NAME@REVISION. A plain one gets the plan vanilla. The result is such a folder, which
`fusedkv generate` and `fusedkv eval` load. Perplexity is that of decoding token by token. There is no
training, and no weight changes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedkv_ext.cli.convert import check_calibration, check_out
from fusedkv_ext.cli.hub import local_folder
from fusedkv_ext.errors import ConfigError

if TYPE_CHECKING:
    from fusedkv_ext.cache.codec import CodecPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Llama or Qwen3: folder, or ORG/NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--codecs",
        required=True,
        metavar="LABEL",
        help="a scheme with options, such as int8 or kivi:bits=2,group=32 (docs/compression.md has all), or "
        "a JSON file of a CodecPlan",
    )
    parser.add_argument(
        "--rank-budget",
        choices=("uniform", "ramp", "water-filling"),
        default="uniform",
        help="how schemes with a rank divide it among the layers (default: %(default)s)",
    )
    parser.add_argument(
        "--calibrate", nargs="+", required=True, metavar="PATH", help="UTF-8 text to fit the codecs to"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        help="calibration tokens, spread over the text (default: %(default)s)",
    )
    parser.add_argument("--window", type=int, default=512, help="tokens per sequence (default: %(default)s)")
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


def _codecs(label: str, budget: str, config: Any) -> CodecPlan:
    """The codecs of --codecs, checked against the model."""
    from fusedkv_ext.cache.codec import CodecPlan
    from fusedkv_ext.hf.config import check_codecs, named_codecs

    try:
        if label.endswith(".json"):
            codecs = CodecPlan.from_json(Path(label).read_text("utf-8"))
        else:
            codecs = named_codecs(label, config)
        check_codecs(codecs, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--codecs {label}: {error}") from error
    if budget != "uniform" and not any(codec.rank for layer in codecs.layers for codec in layer):
        raise ConfigError(f"--rank-budget must be uniform with codecs without a rank, got {budget}")
    if codecs.is_raw:
        raise ConfigError(f"--codecs must code some keys or values, got {label}, in which all are raw")
    return codecs


def run(args: argparse.Namespace) -> int:
    from fusedkv_ext.extras import need

    need("transformers", "Compressing a model", "hf")
    from fusedkv_ext.conversion.coding import code_model, collect_stored, save_coded, simulated
    from fusedkv_ext.conversion.convert import calibration_windows, convert_model
    from fusedkv_ext.conversion.rank_budget import divide_ranks
    from fusedkv_ext.evaluation.language_model import LanguageModel
    from fusedkv_ext.evaluation.perplexity import paired_difference, read_text, window_losses
    from fusedkv_ext.hf.config import PlanConfig, config_for
    from fusedkv_ext.hf.loading import load_causal_lm, load_config, load_tokenizer
    from fusedkv_ext.training.trainer import resolve_device

    check_out(args.out)
    if args.eval_tokens < 1:
        raise ConfigError(f"--eval-tokens must be at least 1, got {args.eval_tokens}")
    args.model = local_folder(args.model)
    config = load_config(args.model)
    on_plan = config if isinstance(config, PlanConfig) else config_for(config, "vanilla")
    codecs = _codecs(args.codecs, args.rank_budget, on_plan)
    check_calibration(args, config.max_position_embeddings)
    tokenizer = load_tokenizer(args.model, config.vocab_size, args.tokenizer)
    windows = calibration_windows(read_text(args.calibrate).ids(tokenizer).long(), args.tokens, args.window)
    scored = args.eval or args.calibrate
    ids = read_text(scored).ids(tokenizer)
    if len(ids) < 2:
        raise ConfigError(f"--eval must have at least 2 tokens, got {len(ids)}")
    context = min(2048, config.max_position_embeddings, len(ids) - 1)
    say = _speaker(args)

    model = load_causal_lm(args.model, device=resolve_device(args.device))
    if not isinstance(config, PlanConfig):
        model = convert_model(model, "vanilla").model
    settings: dict[str, Any] = {"context": context, "max_tokens": args.eval_tokens}
    losses = window_losses(LanguageModel(model), ids, **settings)
    before = losses.perplexity()
    say(f"original: perplexity {before.perplexity:.3f} over {before.tokens:,} tokens")
    samples = collect_stored(model, windows)
    if args.rank_budget != "uniform":
        codecs = divide_ranks(args.rank_budget, codecs, model, samples)
    code_model(model, codecs, samples)
    with simulated(model):
        coded = window_losses(LanguageModel(model), ids, **settings)
    after, difference = coded.perplexity(), paired_difference(coded, losses)
    report = {
        "calibration": {"tokens": windows.numel(), "window": args.window},
        "perplexity": {
            "before": before.perplexity,
            "after": after.perplexity,
            "difference": difference.loss,
            "stderr": difference.stderr,
            "tokens": after.tokens,
            "text": [str(path) for path in scored],
        },
    }
    record = save_coded(model, args.out, args.model, report, tokenizer if args.tokenizer else None)
    _report(args, record, say)
    return 0


def _speaker(args: argparse.Namespace) -> Callable[[str], None]:
    """Prints lines: on stderr with --json."""
    out = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    return say


def _report(args: argparse.Namespace, record: dict[str, Any], say: Callable[[str], None]) -> None:
    if args.json:
        print(json.dumps({"folder": str(args.out), **record}))
        return
    scores, codecs = record["perplexity"], record["codecs"]
    error = "" if scores["stderr"] is None else f" +- {scores['stderr']:.5f}"
    say(
        f"{codecs['name']}: perplexity {scores['after']:.3f}; loss {scores['difference']:+.5f}{error} nats "
        "per token, paired"
    )
    was, now = record["bytes_per_token"]["before"], record["bytes_per_token"]["after"]
    line = f"cache: {now / 1024:.2f} KiB per token, {now / was:.1%} of {was / 1024:.2f}"
    if record["raw_bytes"]:
        line += (
            f"; the first {codecs['sinks']} and last {codecs['tail']} tokens of a sequence stay raw, "
            f"{record['raw_bytes'] / 1024:,.1f} KiB"
        )
    say(f"{line}; model: {args.out}")
