"""``attn_implementation="fusedkv"`` on plain models of transformers: what they ask for, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from fusedkv_ext.hf.interface import fusedkv_attention_forward
from fusedkv_ext.hf.versions import CACHE

IDS = torch.arange(2, 14)[None]
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
)
# What attention has beyond Llama's, and the keyword that carries it.
MODELS: dict[str, tuple[PreTrainedConfig, str | None]] = {
    "llama": (LlamaConfig(**SIZES), None),
    "gpt-oss": (GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), None),
    "gpt-oss with a window": (
        GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=4),
        None,
    ),
    "gemma2": (Gemma2Config(**SIZES, attn_logit_softcapping=1.0), None),
    "gemma2 with a window": (Gemma2Config(**SIZES, attn_logit_softcapping=1.0, sliding_window=4), None),
    "gemma2 without a cap": (Gemma2Config(**SIZES, attn_logit_softcapping=None), None),
    "t5": (
        T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        "position_bias",
    ),
}


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Sinks, caps and biases with which a model that leaves them out differs."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "sinks" in name:
                weight.fill_(3.0)
            elif weight.dim() > 1:
                weight.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_plain_model_computes_what_eager_attention_does_or_names_what_is_missing(kind: str) -> None:
    config, keyword = MODELS[kind]
    model = lively(AutoModel.from_config(config, attn_implementation="eager"))
    inputs = {"decoder_input_ids": IDS[:, :5]} if kind == "t5" else {"use_cache": False}
    expected = model(IDS, **inputs).last_hidden_state
    model.set_attn_implementation("fusedkv")
    try:
        found = model(IDS, **inputs).last_hidden_state
    except ValueError as error:
        assert keyword is not None and keyword in str(error)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    """Enough of an attention module for the function."""

    is_causal, layer_idx, num_key_value_groups = True, 0, 1


def inputs() -> Tensor:
    """Queries, keys and values: (3, B, H, S, D)."""
    return torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0))


def attend(**keywords: Any) -> Tensor:
    return fusedkv_attention_forward(Attention(), *inputs(), None, **keywords)[0]


@torch.no_grad()
def test_a_position_bias_is_added_to_the_scores() -> None:
    bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    q, k, v = inputs()
    later = torch.ones(5, 5).triu(1).bool()
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(later, float("-inf"))
    torch.testing.assert_close(attend(position_bias=bias), (scores.softmax(-1) @ v).transpose(1, 2))


@pytest.mark.parametrize("kind", ["gpt-oss", "gpt-oss with a window", "gemma2", "gemma2 with a window"])
@torch.no_grad()
def test_sinks_and_soft_caps_of_padded_batches_and_decoding(kind: str) -> None:
    """Left padding makes masks; a cache makes few rows at the end, which the kernel takes."""
    config, _ = MODELS[kind]
    model = lively(AutoModel.from_config(config, attn_implementation="eager"))
    ids = IDS.repeat(2, 4)  # 48 rows: more than the kernel folds
    padding = torch.ones_like(ids)
    padding[1, :9] = 0
    for steps in (0, 1, 3):
        results = []
        for name in ("eager", "fusedkv"):
            model.set_attn_implementation(name)
            first = model(ids[:, : 48 - steps], attention_mask=padding[:, : 48 - steps], use_cache=True)
            last = first.last_hidden_state
            if steps:
                cache = {CACHE: first.past_key_values}
                last = model(ids[:, 48 - steps :], attention_mask=padding, **cache).last_hidden_state
            results.append(last)
        tokens = padding[:, -results[0].shape[1] :, None].bool()
        found, expected = (x.masked_fill(~tokens, 0) for x in results[::-1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_sinks_get_the_gradients_of_eager_attention(masked: bool) -> None:
    config, _ = MODELS["gpt-oss"]
    model = lively(AutoModel.from_config(config, attn_implementation="eager"))
    padding = torch.ones_like(IDS)
    padding[:, : 3 if masked else 0] = 0
    gradients = []
    for name in ("eager", "fusedkv"):
        model.set_attn_implementation(name)
        model.zero_grad()
        out = model(IDS, attention_mask=padding, use_cache=False).last_hidden_state
        (out * padding[..., None]).square().sum().backward()
        gradients.append([x.grad.clone() for name, x in model.named_parameters() if "sinks" in name])
    assert gradients[0] and all(float(x.abs().max()) > 0 for x in gradients[0])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scores", [{"softcap": 1.0}, {"s_aux": torch.ones(2)}], ids=str)
def test_sinks_and_soft_caps_refuse_what_they_cannot_be_combined_with(scores: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dropout must be left out"):
        attend(dropout=0.5, **scores)
    with pytest.raises(ValueError, match="position_bias must be left out"):
        attend(position_bias=torch.zeros(1, 2, 5, 5), **scores)


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_a_mask_goes_with_sinks_and_soft_caps(additive: bool) -> None:
    """Any mask; rows that see nothing give zeros."""
    q, k, v = inputs()
    mask = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[..., 3, :] = False
    sinks = torch.tensor([0.5, -0.5])
    given = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf")) if additive else mask
    found, _ = fusedkv_attention_forward(Attention(), q, k, v, given, softcap=2.0, s_aux=sinks)
    scores = (2 * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / 2)).masked_fill(~mask, float("-inf"))
    scores = torch.cat((scores, sinks[None, :, None, None].expand(1, 2, 5, 1)), dim=-1)
    torch.testing.assert_close(found, (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2))


@pytest.mark.parametrize("keyword", ["a_keyword_of_tomorrow"])
def test_keywords_that_attention_does_not_know_are_refused_unless_none(keyword: str) -> None:
    torch.testing.assert_close(attend(**{keyword: None, "position_bias": None}), attend())
    for value in (torch.ones(2), 30.0):
        with pytest.raises(ValueError, match=keyword):
            attend(**{keyword: value})
