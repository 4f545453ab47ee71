"""Loss over cache bytes of models that were trained with their cache plan, raw and coded.

    fusedkv compare --methods vanilla,fusedkv,fusedkv-lite,yoco --seeds 3 --out compare
    python benchmarks/trained_codes.py compare --json FILE

Reads the runs of a comparison on the default corpus. Codecs are fitted to one part of the text that training
held out. They are judged on another, as decoding token by token computes it. Differences are to the method
vanilla with a raw cache, seed by seed, and have the standard error of their mean over the seeds.
docs/compression.md has the table and the picture, made by `make docs`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.conversion.coding import code_model, collect_stored, simulated
from fusedkv_ext.evaluation.language_model import LanguageModel
from fusedkv_ext.evaluation.perplexity import read_text, window_losses
from fusedkv_ext.hf import cache_bytes_per_token, from_decoder
from fusedkv_ext.lab.reporting import write
from fusedkv_ext.training import run_folder
from fusedkv_ext.training.data.tokenizer import saved_tokenizer

BASE = "vanilla"
FITTED_TOKENS, JUDGED_TOKENS = 16384, 32768
# Every token is coded: windows are short here, and raw first and last tokens would be most of them.
CODECS = [
    "int8",
    "int4:sinks=0,source_factor=1",
    "turboquant:bits=4,sinks=0,tail=0,source_factor=1",
    "turboquant:bits=3,sinks=0,tail=0,source_factor=1",
    "turboquant:bits=2,sinks=0,tail=0,source_factor=1",
]


def measure(folder: Path, text: Any) -> dict[str, dict[str, float]]:
    """Loss and bytes per token of one run, by the label of the codecs."""
    checkpoint = run_folder.resolve(folder)
    config = run_folder.training_config(checkpoint)
    assert config is not None
    context = config.data.seq_len
    ids: Tensor = text.ids(saved_tokenizer(checkpoint)).long()
    model = from_decoder(load_pretrained(checkpoint))
    fitted = ids[-FITTED_TOKENS:].view(-1, context)
    judged = ids[: -len(fitted.flatten())][: JUDGED_TOKENS + 1]

    def loss() -> float:
        found = window_losses(LanguageModel(model), judged, context=context, max_tokens=JUDGED_TOKENS)
        return found.perplexity().loss

    rows = {"raw": {"loss": loss(), "bytes": float(cache_bytes_per_token(model.config, torch.bfloat16))}}
    samples = collect_stored(model, fitted, positions=context)
    for label in CODECS:
        code_model(model, label, samples)
        with simulated(model):
            size = float(cache_bytes_per_token(model.config, torch.bfloat16))
            rows[label] = {"loss": loss(), "bytes": size}
        print(folder, label, rows[label], flush=True)
    return rows


def summary(
    rows: list[dict[str, dict[str, float]]], base: list[dict[str, dict[str, float]]]
) -> list[dict[str, Any]]:
    """Means over the seeds of one method, a row for each coding."""
    found = []
    for label in rows[0]:
        losses = [row[label]["loss"] for row in rows]
        differences = [a - b["raw"]["loss"] for a, b in zip(losses, base, strict=True)]
        spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
        found.append(
            {
                "codecs": label,
                "bytes": rows[0][label]["bytes"],
                "loss": statistics.fmean(losses),
                "difference": statistics.fmean(differences),
                "stderr": spread,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    text, measured = read_text([]), {}
    for method in sorted((args.comparison / "runs").iterdir(), key=lambda path: path.name != BASE):
        measured[method.name] = [measure(run, text) for run in sorted(method.iterdir())]
        result = {
            "text": text.origin,
            "torch": torch.__version__,
            "judged_tokens": JUDGED_TOKENS,
            "seeds": len(measured[BASE]),
            "methods": {name: summary(runs, measured[BASE]) for name, runs in measured.items()},
        }
        write(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
