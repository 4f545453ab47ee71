"""Coded caches of transformers beside ours: perplexity, bytes that are resident, time of a decoding step.

    pip install optimum-quanto turboquant "numpy<2.4"
    python benchmarks/cache_peers.py MODEL --text TEXT --eval EVAL --json FILE

optimum-quanto compiles an extension when it is first used: ninja has to be on the path.

Every cache decodes the same windows of --eval, all in one batch: a prompt, then token after token, each step
over the cache as it is. The peers are `QuantizedCache` with optimum-quanto and the package turboquant, in
their defaults: both keep 128 raw last tokens. Bytes are those of all tensors that the cache holds at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from turboquant import TurboQuantCache

from fusedkv_ext.conversion import calibration_windows, convert_model
from fusedkv_ext.conversion.coding import code_model, collect_stored
from fusedkv_ext.evaluation.perplexity import read_text
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer
from fusedkv_ext.hf.versions import CACHE
from fusedkv_ext.lab.reporting import write

CALIBRATION_TOKENS, CALIBRATION_WINDOW = 16384, 512
OURS = ["turboquant:bits=4", "int4:tail=128", "turboquant:bits=2", "kivi:bits=2"]


class CalledWithThree(TurboQuantCache):  # type: ignore[misc]  # the package is not typed
    """turboquant 0.2.0 under newer transformers, which passes more arguments. It does not read them."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        return super().update(keys, values, layer)


def resident_bytes(cache: Any) -> int:
    """Bytes of the storages of all tensors that a cache refers to."""
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # with the objects, so that no other gets the id of one that is gone

    def visit(x: Any) -> None:
        if id(x) in seen or isinstance(x, (str, int, float, bool, type(None), torch.nn.Module)):
            return
        seen[id(x)] = x
        if isinstance(x, Tensor):
            if hasattr(x, "__tensor_flatten__"):  # a quantized tensor of several plain ones
                for name in x.__tensor_flatten__()[0]:
                    visit(getattr(x, name))
            else:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, (list, tuple, set)):
            for y in x:
                visit(y)
        elif isinstance(x, dict):
            visit(list(x.values()))
        elif hasattr(x, "__dict__"):
            visit(x.__dict__)

    visit(cache.layers)
    return sum(storages.values())


@torch.inference_mode()
def decode(model: Any, cache: Any, windows: Tensor, prompt: int) -> dict[str, Any]:
    """Scores the tokens after the prompt one by one.

    Returns:
        The mean loss in nats, the bytes at the end, and the median time of the last quarter of the steps.
    """
    model(windows[:, :prompt], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    losses, times = [], []
    for t in range(prompt, windows.shape[1] - 1):
        began = time.perf_counter()
        logits = model(windows[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits[:, -1]
        times.append(time.perf_counter() - began)
        losses.append(torch.nn.functional.cross_entropy(logits.float(), windows[:, t + 1], reduction="none"))
    loss = torch.stack(losses).mean(0)  # by window
    return {
        "loss": loss.mean().item(),
        "losses": loss.tolist(),
        "bytes": resident_bytes(cache),
        "step_ms": 1e3 * statistics.median(times[-len(times) // 4 :]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    args = parser.parse_args()

    plain = load_causal_lm(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(args.model, plain.config.vocab_size)
    ids = read_text([args.eval]).ids(tokenizer).long()
    windows = ids[: args.windows * args.window].view(args.windows, args.window)
    text = read_text([args.text]).ids(tokenizer).long()
    calibration = calibration_windows(text, CALIBRATION_TOKENS, CALIBRATION_WINDOW)
    model = convert_model(plain, "vanilla").model
    samples = collect_stored(model, calibration)

    def quanto(bits: int) -> Any:
        return plain, QuantizedCache("quanto", plain.config, nbits=bits)

    def ours(label: str) -> Any:
        code_model(model, label, samples)
        return model, DynamicCache(config=model.config)

    contestants: dict[str, Callable[[], Any]] = {
        "raw": lambda: (plain, DynamicCache(config=plain.config)),
        "QuantizedCache, 4 bits": lambda: quanto(4),
        "QuantizedCache, 2 bits": lambda: quanto(2),
        "TurboQuantCache, 4 bits": lambda: (plain, CalledWithThree(bits=4)),
        "TurboQuantCache, 2 bits": lambda: (plain, CalledWithThree(bits=2)),
        **{label: (lambda label=label: ours(label)) for label in OURS},
    }
    rows: dict[str, Any] = {}
    for name, make in contestants.items():
        subject, cache = make()
        row = decode(subject, cache, windows, args.prompt)
        base = rows.get("raw", row)
        apart = [a - b for a, b in zip(row["losses"], base["losses"], strict=True)]
        row["difference"] = statistics.fmean(apart)
        row["stderr"] = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
        rows[name] = row
        print(name, {key: value for key, value in row.items() if key != "losses"}, flush=True)
        result = {
            "model": args.model.name,
            "eval": args.eval.name,
            "torch": torch.__version__,
            **{key: getattr(args, key) for key in ("windows", "window", "prompt")},
            "rows": rows,
        }
        write(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
