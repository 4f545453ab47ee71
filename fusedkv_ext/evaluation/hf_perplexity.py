"""Perplexity of a causal language model of transformers: the windows and sums of `fusedkv eval`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedkv_ext.evaluation import perplexity as evaluate
from fusedkv_ext.evaluation.language_model import LanguageModel
from fusedkv_ext.evaluation.perplexity import Perplexity


def perplexity(
    model: Any, ids: Tensor, window: int = 2048, stride: int | None = None, max_tokens: int | None = None
) -> Perplexity:
    """Mean loss in nats per token, its exponential, and the number of tokens judged.

    model: a causal language model of transformers, in any dtype; losses are computed in fp32, a few rows of
    logits at a time, and summed in fp64. ids: (T,) integers. window: tokens that are fed at once, without a
    cache; a text of T <= window tokens is one window, which judges its T - 1 last tokens. stride: 1..window,
    None: window. max_tokens: judge about that many, in windows spread evenly over the text.
    experiments/evaluate.py says which token is judged with which context.

    Raises ConfigError for a window beyond the model's positions and for numbers out of range, ValueError for
    a text of fewer than two tokens, RuntimeError when a loss is not finite.
    """
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids must be one text of at least 2 tokens, got shape {tuple(ids.shape)}")
    context = min(window, len(ids) - 1)
    return evaluate.perplexity(
        LanguageModel(model),
        ids,
        context=context,
        stride=None if stride is None else min(stride, context),
        max_tokens=max_tokens,
    )
