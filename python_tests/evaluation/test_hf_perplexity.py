"""hf.perplexity: the loss of a model of transformers is what torch says it is, whatever is done in parts."""

from __future__ import annotations

import copy
import math
from typing import Any

import hf_folders
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.evaluation import perplexity as evaluate
from fusedkv_ext.evaluation.language_model import LanguageModel
from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.hf import cache_bytes_per_token


def text_of(length: int) -> Tensor:
    return torch.randint(hf_folders.SIZES["vocab_size"], (length,))


def oracle(model: Any, ids: Tensor, window: int) -> float:
    """Mean loss in fp64, windows side by side: each feeds `window` tokens and scores the one after each."""
    wide, losses = copy.deepcopy(model).double(), []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, window):
            fed = ids[start : start + window][: len(ids) - 1 - start]
            logits = wide(input_ids=fed[None], use_cache=False).logits[0]
            losses.append(F.cross_entropy(logits, ids[start + 1 : start + 1 + len(fed)], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("plan", [None, "fusedkv", "fusedkv-lite"])
@pytest.mark.parametrize(("tokens", "window"), [(100, 256), (100, 32), (97, 32), (33, 32), (2, 8)])
def test_loss_is_the_cross_entropy_of_every_token_but_the_first(
    plan: str | None, tokens: int, window: int
) -> None:
    model, ids = hf_folders.tiny_llama(), text_of(tokens)
    model = hf_folders.converted(model, plan) if plan else model
    found = perplexity(model, ids, context=window)
    assert found.tokens == tokens - 1
    assert found.loss == pytest.approx(oracle(model, ids, window), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_a_text_of_one_window_has_the_loss_that_transformers_gives() -> None:
    model, ids = hf_folders.tiny_llama(), text_of(50)
    with torch.no_grad():
        expected = model(input_ids=ids[None], labels=ids[None]).loss.item()
    assert perplexity(model, ids, context=50).loss == pytest.approx(expected, rel=1e-5)


def test_overlapping_windows_score_every_token_once_with_more_context() -> None:
    model, ids = hf_folders.tiny_llama(), text_of(97)
    found = perplexity(model, ids, context=32, stride=8)
    assert found.tokens == 96 and found.windows == 1 + (96 - 32) // 8
    losses = []
    with torch.no_grad():
        for target in range(1, 97):
            start = 0 if target <= 32 else -(-(target - 32) // 8) * 8
            logits = model(input_ids=ids[None, start:target]).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[ids[target]].item())
    assert found.loss == pytest.approx(sum(losses) / 96, rel=1e-5)


@pytest.mark.parametrize("logits", [1, 5 * 264, 10**9])
def test_the_loss_does_not_depend_on_how_many_logits_are_taken_at_once(
    logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = hf_folders.tiny_llama(), text_of(70)
    expected = oracle(model, ids, 64)
    monkeypatch.setattr(evaluate, "_LOSS_LOGITS", logits)
    assert perplexity(model, ids, context=64).loss == pytest.approx(expected, rel=1e-6)


def test_losses_of_a_bfloat16_model_are_computed_in_fp32() -> None:
    model, ids = hf_folders.tiny_llama().bfloat16(), text_of(129)
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits[0]
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.double(), ids[1:]).item()
    assert perplexity(model, ids, context=128).loss == pytest.approx(expected, rel=1e-6)


def test_a_model_that_gives_all_logits_is_scored_all_the_same() -> None:
    """Some models of transformers have no logits_to_keep."""
    model, ids = hf_folders.tiny_llama(), text_of(60)
    expected = perplexity(model, ids, context=24, stride=6)
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache)
    assert perplexity(model, ids, context=24, stride=6).loss == pytest.approx(expected.loss, rel=1e-6)


def test_the_model_stays_in_training_mode_and_gets_no_gradients() -> None:
    model = hf_folders.tiny_llama(attention_dropout=0.5).train()
    first, second = (perplexity(model, ids, context=32).loss for ids in [text_of(60)] * 2)
    assert first == second and model.training and model.model.layers[0].self_attn.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(context=300), ConfigError, "context must be at most .* of the model .*, got 300"),
        (dict(context=0), ConfigError, "context must be at least 1 token"),
        (dict(context=16, stride=0), ConfigError, "stride must be from 1"),
    ],
)
def test_arguments_that_cannot_be_are_named(
    arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        perplexity(hf_folders.tiny_llama(), text_of(400), **arguments)


@pytest.mark.parametrize("ids", [torch.zeros(1, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)])
def test_a_text_that_cannot_be_scored_is_an_error(ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"ids must have shape \(T,\) with T >= 2, got"):
        perplexity(hf_folders.tiny_llama(), ids)


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "fusedkv-lite", "yoco", "cla", "skipv1"])
def test_the_measured_cache_is_what_the_plan_says(plan: str) -> None:
    model = hf_folders.converted(hf_folders.tiny_llama(), plan)
    expected = cache_bytes_per_token(model.config, torch.float32)
    assert LanguageModel(model).cache_bytes_per_token() == expected
    assert LanguageModel(model.bfloat16()).cache_bytes_per_token() == expected / 2


@pytest.mark.parametrize("plan", [None, "fusedkv", "fusedkv-lite"])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(plan: str | None) -> None:
    model = hf_folders.tiny_llama()
    model = LanguageModel(hf_folders.converted(model, plan) if plan else model)
    ids, other = text_of(20)[None], text_of(7)[None]
    with torch.no_grad():
        expected = model(ids)
        cache = model.make_cache(1, 40)
        model(ids[:, :12], cache=cache)
        model(other, cache=cache)
        cache.crop(12)
        torch.testing.assert_close(model(ids[:, 12:], cache=cache, logits_to_keep=3), expected[:, -3:])
        cache.crop(0)
        torch.testing.assert_close(model(ids, cache=cache), expected)
