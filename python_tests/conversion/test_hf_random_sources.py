"""Uptraining with random sources: a plain model whose layers attend to keys and values of earlier layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from hf_uptraining import SMALL, one_thread_and_cache, weights, write_model, write_text
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fusedkv_ext.conversion.convert import convert_model
from fusedkv_ext.conversion.distill import LanguageModelParts
from fusedkv_ext.conversion.layer_sharing import layers_share
from fusedkv_ext.conversion.uptraining import uptrain
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.plan import CachePlan, LayerPlan, Segment

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
CONFIGS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_thread_and_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("sources", [[0, 0, 2, 2], [0, 1, 0, 0]], ids=str)
def test_a_pass_is_that_of_the_plan_with_these_sources(family: str, sources: list[int]):
    kind, config = CONFIGS[family]
    torch.manual_seed(0)
    model: Any = kind(config).double().eval()
    plan = CachePlan("given", tuple(LayerPlan(Segment((j,)), Segment((j,))) for j in sources))
    converted = convert_model(model, plan).model
    ids = torch.randint(64, (2, 20))
    parts = LanguageModelParts(model)
    with layers_share(model):
        found = parts(ids, sources).hidden
    torch.testing.assert_close(found, LanguageModelParts(converted)(ids).hidden, rtol=0, atol=1e-12)
    found.sum().backward()
    for i, layer in enumerate(model.model.layers):
        gradient = layer.self_attn.k_proj.weight.grad
        assert (gradient is not None and bool(gradient.any())) == (i in sources)


def test_without_sources_a_pass_is_as_before():
    kind, config = CONFIGS["llama"]
    model: Any = kind(config).eval()
    ids, parts = torch.randint(64, (2, 20)), LanguageModelParts(model)
    before = parts(ids).hidden
    with layers_share(model):
        assert torch.equal(parts(ids).hidden, before)
        assert torch.equal(parts(ids, [0, 1, 2, 3]).hidden, before)
        assert not torch.equal(parts(ids, [0, 0, 2, 3]).hidden, before)
    assert torch.equal(parts(ids).hidden, before)


def test_probability_zero_is_plain_uptraining_bit_for_bit(plain: Path, text: Path, tmp_path: Path):
    uptrain(plain, [text], tmp_path / "plain", **SMALL)
    for name, probability in (("zero", 0.0), ("half", 0.5)):
        uptrain(plain, [text], tmp_path / name, **SMALL, random_sources=probability)
    found = {name: weights(tmp_path / name) for name in ("plain", "zero", "half")}
    equal = {
        name: all(torch.equal(found["plain"][key], found[name][key]) for key in found["plain"])
        for name in ("zero", "half")
    }
    assert equal == {"zero": True, "half": False}


def test_a_resumed_run_draws_the_same(plain: Path, text: Path, tmp_path: Path):
    options = {**SMALL, "random_sources": 0.5}
    uptrain(plain, [text], tmp_path / "whole", **options)
    uptrain(plain, [text], tmp_path / "parts", stop_after=3, **options)
    uptrain(plain, [text], tmp_path / "parts", resume=True)
    whole, parts = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_cannot_be_drawn_is_refused(plain: Path, text: Path, tmp_path: Path):
    converted = write_model(tmp_path / "converted", plain)
    with pytest.raises(ConfigError, match="must be 0 for a model with a cache plan, got plan 'fusedkv'"):
        uptrain(converted, [text], tmp_path / "out", **SMALL, random_sources=0.5)
    with pytest.raises(ConfigError, match="random_sources must be a probability from 0 to 1, got 2"):
        uptrain(plain, [text], tmp_path / "out", **SMALL, random_sources=2.0)
