"""Interleaved timing of models, and their cache sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fusedkv_ext.lab.timing import in_turns
from fusedkv_ext.layers.decoder import Decoder


def cache_bytes_per_token(model: Decoder, context: int) -> float:
    """Allocated cache bytes per token of one sequence with `context` tokens."""
    return model.make_cache(1, context).nbytes / context


@torch.inference_mode()
def first_token(models: Mapping[str, Decoder], prompt: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a prefill: from a prompt (1, S) and an empty cache to the first new token."""

    def call(model: Decoder) -> Callable[[], object]:
        cache = model.make_cache(1, prompt.shape[1])

        def run() -> Tensor:
            cache.reset()
            return model(prompt, cache=cache, logits_to_keep=1).argmax(-1)

        return run

    return in_turns({name: call(model) for name, model in models.items()}, repeats, prompt.device)


@torch.inference_mode()
def next_token(models: Mapping[str, Decoder], prompt: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of one greedy decode step after the prompt (1, S)."""
    warm_up = 3

    def call(model: Decoder) -> Callable[[], object]:
        cache = model.make_cache(1, prompt.shape[1] + warm_up + repeats)
        token = model(prompt, cache=cache, logits_to_keep=1).argmax(-1)

        def run() -> None:
            nonlocal token
            token = model(token, cache=cache, logits_to_keep=1).argmax(-1)

        return run

    return in_turns({name: call(model) for name, model in models.items()}, repeats, prompt.device, warm_up)
