"""Perplexity over cache bytes: one trained model under many cache plans, converted, calibrated, uptrained.

    python benchmarks/conversion.py MODEL --text TRAIN.txt --eval EVAL.txt --work DIR --json FILE

For every plan: perplexity with the weights merely copied, after calibration on --text, and after --uptrain
tokens of uptraining on --text from there. Every model is judged on the same tokens of --eval, which training
never sees; the original is uptrained too, as the control. What is in --work already is not done again.
docs/conversion.md has the table and the picture, made by `make docs`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fusedkv_ext as fkv
from fusedkv_ext.conversion import calibration_windows, convert_model, save_conversion, uptrain
from fusedkv_ext.conversion.plan_search import SourceTable, search
from fusedkv_ext.conversion.pooling import POOLING
from fusedkv_ext.conversion.second_moments import SecondMoments, collect
from fusedkv_ext.evaluation.perplexity import perplexity, read_text
from fusedkv_ext.hf import cache_bytes_per_token, config_for
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer
from fusedkv_ext.lab.reporting import write
from fusedkv_ext.plan import CachePlan

CALIBRATION_TOKENS, CALIBRATION_WINDOW, JUDGED_TOKENS, WINDOW = 16384, 512, 8192, 2048


def by_turns(name: str, first: CachePlan, second: CachePlan) -> CachePlan:
    """The layers of two plans by turns."""
    pairs = zip(first.layers, second.layers, strict=True)
    return CachePlan(name, tuple(pair[i % 2] for i, pair in enumerate(pairs)))


def plans(model: Any, second_moments: SecondMoments) -> Iterator[tuple[str, CachePlan]]:
    """Label and plan."""
    num_layers, num_kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    named: Callable[..., CachePlan] = CachePlan.named
    yield "vanilla", named("vanilla", num_layers)
    for share in (0.8, 0.5):
        n = round(share * num_layers)
        for name in ("fusedkv", "fusedkv-lite", "yoco"):
            yield f"{name} n={n}", named(name, num_layers, storage_layers=n)
    table = SourceTable(second_moments, model)
    for share in (0.8, 0.5):
        n = round(share * num_layers)
        yield f"search n={n}", search(table, storage_layers=n).plan
    yield "cla 2", named("cla", num_layers, factor=2)
    if num_kv_heads % 2 == 0:
        yield "skipv1", named("skipv1", num_layers)
    else:  # half of the value heads on average: a third less and two thirds less by turns, if there are three
        shares = (num_kv_heads // 2, num_kv_heads // 2 + 1)
        skips = [named("skipv1", num_layers, skip=f"{heads}/{num_kv_heads}") for heads in shares]
        yield "skipv1 by turns", by_turns("skipv1-by-turns", *skips)
    yield "cla-v 2", named("cla-v", num_layers, factor=2)
    yield "svformer", named("svformer", num_layers)
    yield f"yoco-v n={num_layers // 2}", named("yoco-v", num_layers)
    n = num_layers // 4
    yield f"fusedkv n={n}", named("fusedkv", num_layers, storage_layers=n)
    yield "cla 3", named("cla", num_layers, factor=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--uptrain", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--only", nargs="+", metavar="LABEL")
    args = parser.parse_args()

    model = load_causal_lm(args.model)
    config = model.config
    tokenizer = load_tokenizer(args.model, config.vocab_size)
    judged = read_text([args.eval]).ids(tokenizer).long()[: JUDGED_TOKENS + 1]
    text = read_text([args.text]).ids(tokenizer).long()
    windows = calibration_windows(text, CALIBRATION_TOKENS, CALIBRATION_WINDOW)

    def judge(which: Any) -> float:
        return perplexity(which, judged, context=WINDOW).perplexity

    given = {name: str(getattr(args, name).resolve()) for name in ("model", "text", "eval")}
    args.work.mkdir(parents=True, exist_ok=True)
    record = args.work / "made_from.txt"
    if record.exists() and json.loads(record.read_text()) != given:
        parser.error(f"{args.work} holds results of {record.read_text()}; choose another --work")
    write(record, json.dumps(given))
    moments_file = args.work / "moments.pt"
    if not moments_file.exists():
        torch.save(collect(model, windows), moments_file)
    second_moments = torch.load(moments_file, weights_only=False)
    result: dict[str, Any] = {
        "model": args.model.name,
        "text": args.text.name,
        "eval": args.eval.name,
        "torch": torch.__version__,
        "calibration_tokens": windows.numel(),
        "judged_tokens": JUDGED_TOKENS,
        "window": WINDOW,
        "uptrain_tokens": args.uptrain,
        "original": judge(model),
        "rows": [],
    }
    for label, plan in plans(model, second_moments):
        if args.only and label not in args.only:
            continue
        folder = args.work / label.replace(" ", "_")
        row_file = args.work / f"{folder.name}.json"
        row = json.loads(row_file.read_text()) if row_file.exists() else {"label": label}
        if "calibrated" not in row:
            shutil.rmtree(folder, ignore_errors=True)
            row["copied"] = judge(convert_model(model, plan).model)
            began = time.perf_counter()
            done = convert_model(model, plan, calibration=windows, second_moments=second_moments)
            row["calibration_seconds"] = time.perf_counter() - began
            row["calibrated"] = judge(done.model)
            row["plan"] = plan.to_dict()
            for name, kind in (("bytes", config_for(config, plan)), ("original_bytes", config)):
                row[name] = cache_bytes_per_token(kind, torch.bfloat16)
            save_conversion(done, folder, args.model, {})
            write(row_file, json.dumps(row, indent=1) + "\n")
        trained = args.work / f"{folder.name}_uptrained_{args.uptrain}"
        if label.startswith("skipv1") and "pooling" not in row:
            ways = {way: judge(convert_model(model, plan, pooling=way).model) for way in POOLING}
            row["pooling"] = ways
            write(row_file, json.dumps(row, indent=1) + "\n")
        if args.uptrain and row.get("uptrain_tokens") != args.uptrain:
            if not trained.exists():
                uptrain(
                    folder,
                    [args.text],
                    trained,
                    tokens=args.uptrain,
                    resume=True,
                    batch_size=2,
                    seq_len=512,
                    validations=0,
                    valid_tokens=2048,
                    valid_text=(str(args.eval),),
                )
            row["uptrain_tokens"], row["uptrained"] = args.uptrain, judge(load_causal_lm(trained))
            record = json.loads((trained / "conversion.json").read_text())["uptraining"]
            row["uptrain_seconds"] = record["seconds"]
            shutil.rmtree(trained)
            write(row_file, json.dumps(row, indent=1) + "\n")
        print(label, {name: value for name, value in row.items() if name != "plan"}, flush=True)
        result["rows"].append(row)
    write(args.json, json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.json} (fusedkv_ext {fkv.__version__})")


if __name__ == "__main__":
    main()
