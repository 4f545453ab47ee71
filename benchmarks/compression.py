"""Perplexity over cache bytes: one trained model, three cache plans, every coding scheme.

    python benchmarks/compression.py MODEL --text TEXT --eval EVAL [--other OTHER] --work DIR --json FILE

Codecs are fitted to --text and judged on the same tokens of --eval, in one pass that computes what decoding
token by token over coded caches would. Differences are paired. --other is a text of another kind: are scales
fitted to --text good for it? What is in --work already is not done again. docs/compression.md has the table
and the picture, made by `make docs`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.cache.codec import RAW, Codec, CodecPlan, Coding
from fusedkv_ext.conversion import calibration_windows, convert_model
from fusedkv_ext.conversion.coding import code_model, collect_stored, simulated
from fusedkv_ext.conversion.plan_search import SourceTable, search
from fusedkv_ext.conversion.rank_budget import RULES, divide_ranks
from fusedkv_ext.conversion.second_moments import collect
from fusedkv_ext.evaluation.language_model import LanguageModel
from fusedkv_ext.evaluation.perplexity import WindowLosses, paired_difference, read_text, window_losses
from fusedkv_ext.hf.config import head_dim_of, named_codecs
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer
from fusedkv_ext.lab.reporting import write
from fusedkv_ext.plan import CachePlan

CALIBRATION_TOKENS, CALIBRATION_WINDOW, JUDGED_TOKENS, WINDOW = 16384, 512, 8192, 2048
STORAGE_LAYERS = 24

# Lines of the picture: (family, label of the codecs).
LINES = [
    ("static", "int8"),
    ("rotated", "turboquant:bits=4"),
    ("rotated", "turboquant:key_bits=3,value_bits=1"),
    ("static", "int4:tail=128"),
    ("rotated", "turboquant:bits=3"),
    ("KIVI", "kivi:bits=4"),
    ("KIVI", "kivi:bits=2"),
    ("weighted PCA", "pca:rank=48"),
    ("rotated", "turboquant:key_bits=4,value_bits=2"),
    ("rotated", "turboquant:key_bits=2,value_bits=4"),
    ("rotated", "turboquant:bits=2"),
    ("static e4m3", "fp8"),
    ("rotated", "turboquant:bits=4,tail=0"),
    ("rotated", "turboquant:bits=4,tail=16"),
    ("rotated", "turboquant:bits=2,balance=true"),
    ("rotated", "turboquant:key_bits=3,value_bits=1,balance=true"),
]
ON_FUSED_PLANS = 3  # of them, on the plans with fewer storage layers
# On a text of another kind.
OTHER = ("int8", "turboquant:bits=4")


def one_side(
    keys: Codec, values: Codec, layers: int, name: str, only: set[int] | None = None, tail: int = 128
) -> CodecPlan:
    """The same codecs in all layers, or in some."""
    pairs = [Coding(keys, values) if only is None or i in only else Coding(RAW, RAW) for i in range(layers)]
    return CodecPlan(name, pairs, sinks=4, tail=tail)


def claims(layers: int) -> Iterator[CodecPlan]:
    """Codecs of one side alone, to compare scales and rotation."""
    kinds = {
        "static per channel": Codec("int", 4, "channel"),
        "per token": Codec("int", 4, "token"),
        "rotated, per token": Codec("int", 4, "token", rotate=True),
    }
    for what, codec in kinds.items():
        yield one_side(codec, RAW, layers, f"keys 4 bits, {what}")
        yield one_side(RAW, codec, layers, f"values 4 bits, {what}")


def source_claims(plan: CachePlan) -> Iterator[CodecPlan]:
    """Two bits in as many layers: those that others read, and two in between that only they read."""
    codec = Codec("grid", 2, "token", rotate=True)
    read = sorted({j for i in range(plan.num_layers) for j in plan.source_layers(i)} & {*plan.storage_layers})
    others = [i for i in plan.storage_layers if i not in read]
    apart = {others[len(others) * (k + 1) // (len(read) + 1)] for k in range(len(read))}
    yield one_side(codec, codec, plan.num_layers, "2 bits in the layers that others read", set(read))
    yield one_side(codec, codec, plan.num_layers, "2 bits in as many other layers", apart)


def low_rank(layers: int) -> Iterator[str | CodecPlan]:
    """ThinK's 20, 40, 50 and 60 % fewer channels of keys, as many directions, and ranks by layer."""
    for rank in (52, 38, 32, 26):
        yield f"think:rank={rank}"
        yield one_side(Codec(rank=rank), RAW, layers, f"keys in {rank} directions", tail=32)
    for rule in RULES:
        yield f"pca:rank=38, {rule}"


def cases(plan: CachePlan, claim: bool, other: bool) -> Iterator[tuple[str, str | CodecPlan, str]]:
    """Family, codecs and text: the lines of the picture, or the questions of the second table."""
    whole = len(plan.storage_layers) == plan.num_layers
    if not claim:
        for family, label in LINES if whole else LINES[:ON_FUSED_PLANS]:
            yield family, label, "eval"
    elif whole:
        for codecs in claims(plan.num_layers):
            yield "claim", codecs, "eval"
        for codecs in low_rank(plan.num_layers):
            yield "low rank", codecs, "eval"
        for label in OTHER if other else ():
            yield "other text", label, "other"
    elif plan.name == "fusedkv":
        for codecs in source_claims(plan):
            yield "claim", codecs, "eval"


class Subject:
    """A plan and its rows. The model is converted when the first row is missing."""

    def __init__(self, convert: Callable[[], Any], windows: Tensor, plan: CachePlan, file: Path) -> None:
        self.convert, self.windows, self.plan, self.file = convert, windows, plan, file
        self.record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
        self.base: dict[str, WindowLosses] = {}

    @cached_property
    def model(self) -> Any:
        return self.convert()

    @cached_property
    def samples(self) -> Any:
        """What the model stores on the calibration text."""
        return collect_stored(self.model, self.windows)

    def losses(self, ids: Tensor) -> WindowLosses:
        return window_losses(LanguageModel(self.model), ids, context=WINDOW, max_tokens=JUDGED_TOKENS)

    def measure(self, family: str, codecs: str | CodecPlan, text: str, ids: Tensor) -> bool:
        """Adds a row, unless it is there already."""
        name = codecs if isinstance(codecs, str) else codecs.name
        if any((row["codecs"], row["text"]) == (name, text) for row in self.record["rows"]):
            return False
        if text not in self.base:
            self.base[text] = self.losses(ids)
            self.record.setdefault("perplexity", {})[text] = self.base[text].perplexity().perplexity
        if isinstance(codecs, str) and ", " in codecs:
            label, rule = codecs.split(", ")
            codecs = divide_ranks(rule, named_codecs(label, self.model.config), self.model, self.samples)
        fitted = code_model(self.model, codecs, self.samples)
        with simulated(self.model):
            found = self.losses(ids)
        difference = paired_difference(found, self.base[text])
        sizes = self.model.config.num_key_value_heads, head_dim_of(self.model.config)
        row = {
            "family": family,
            "codecs": name,
            "text": text,
            "bytes": float(fitted.bytes_per_token(self.plan, *sizes, torch.bfloat16)),
            "raw_bytes": fitted.raw_bytes(self.plan, *sizes, torch.bfloat16),
            "perplexity": found.perplexity().perplexity,
            "difference": difference.loss,
            "stderr": difference.stderr,
        }
        self.record["rows"].append(row)
        write(self.file, json.dumps(self.record, indent=1) + "\n")
        print(self.record["plan"], {key: value for key, value in row.items() if key != "family"}, flush=True)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    model = load_causal_lm(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    texts = {"eval": args.eval, **({"other": args.other} if args.other else {})}
    judged = {name: read_text([path]).ids(tokenizer)[: JUDGED_TOKENS + 1] for name, path in texts.items()}
    windows = calibration_windows(
        read_text([args.text]).ids(tokenizer).long(), CALIBRATION_TOKENS, CALIBRATION_WINDOW
    )
    args.work.mkdir(parents=True, exist_ok=True)
    layers = model.config.num_hidden_layers
    moments = collect(model, windows)
    searched = search(SourceTable(moments, model), storage_layers=STORAGE_LAYERS).plan
    plans = {
        "vanilla": CachePlan.named("vanilla", layers),
        f"search n={STORAGE_LAYERS}": searched,
        f"fusedkv n={STORAGE_LAYERS}": CachePlan.named("fusedkv", layers, storage_layers=STORAGE_LAYERS),
    }
    result: dict[str, Any] = {
        "model": args.model.name,
        **{name: path.name for name, path in (("text", args.text), *texts.items())},
        "torch": torch.__version__,
        "calibration_tokens": windows.numel(),
        "judged_tokens": JUDGED_TOKENS,
        "window": WINDOW,
        "plans": [],
    }
    subjects = []
    sizes = model.config.num_key_value_heads, head_dim_of(model.config)
    for name, plan in plans.items():

        def convert(plan: CachePlan = plan) -> Any:
            return convert_model(model, plan, calibration=windows, second_moments=moments).model

        subject = Subject(convert, windows, plan, args.work / f"{name.replace(' ', '_')}.json")
        whole = plan.bytes_per_token(*sizes, torch.bfloat16)
        subject.record |= {"plan": name, "bytes": whole, "cache_plan": plan.to_dict()}
        subjects.append(subject)
        result["plans"].append(subject.record)
    for claim in (False, True):
        for subject in subjects:
            for family, codecs, text in cases(subject.plan, claim, args.other is not None):
                if subject.measure(family, codecs, text, judged[text]):
                    write(args.json, json.dumps(result, indent=1) + "\n")
    write(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
