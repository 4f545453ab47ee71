"""Side-by-side timing of models: one call of each in turn, so that a noisy machine disturbs all alike;
medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusedkv_ext.layers.decoder import Decoder


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each call. The order rotates, so that none always runs after the same other."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = _seconds(calls[name], device)
            if turn >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def cache_bytes_per_token(model: Decoder, context: int) -> float:
    """What a cache for `context` tokens of one sequence has really allocated, per token."""
    return model.make_cache(1, context).nbytes / context


@torch.inference_mode()
def first_token(models: Mapping[str, Decoder], prompt: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds from a prompt (1, S) and an empty cache to the first new token."""

    def call(model: Decoder) -> Callable[[], object]:
        cache = model.make_cache(1, prompt.shape[1])

        def run() -> Tensor:
            cache.reset()
            return model(prompt, cache=cache, logits_to_keep=1).argmax(-1)

        return run

    return in_turns({name: call(model) for name, model in models.items()}, repeats, prompt.device)


@torch.inference_mode()
def next_token(models: Mapping[str, Decoder], prompt: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of one greedy decoding step of one sequence whose cache holds the prompt (1, S)."""
    warm_up = 3

    def call(model: Decoder) -> Callable[[], object]:
        cache = model.make_cache(1, prompt.shape[1] + warm_up + repeats)
        token = model(prompt, cache=cache, logits_to_keep=1).argmax(-1)

        def run() -> None:
            nonlocal token
            token = model(token, cache=cache, logits_to_keep=1).argmax(-1)

        return run

    return in_turns({name: call(model) for name, model in models.items()}, repeats, prompt.device, warm_up)
