"""Folders of models with codecs: every number survives, and what does not belong together is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import LAYERS, MODELS, lively, sizes, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig

from fusedkv_ext.conversion.coding import code_model, collect_stored
from fusedkv_ext.hf import FusedKVLlamaConfig, cache_bytes_per_token, config_for
from fusedkv_ext.hf.loading import load_causal_lm
from fusedkv_ext.plan import CachePlan

LABELS = ["int8", "fp8", "turboquant:balance=true", "kivi:group=8", "pca:rank=6", "pca:rank=6,bits=4"]


def coded(
    label: str = "int8", family: str = "llama", plan: str = "fusedkv", **options: Any
) -> PreTrainedModel:
    model = tiny_model(family, plan, **options)
    code_model(model, label, collect_stored(model, tokens(8, 32)))
    return model


def numbers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All numbers of the codecs by name."""
    return {name: x for name, x in model.named_buffers() if "_codec." in name}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("family", MODELS)
def test_numbers_of_codecs_survive_a_folder_in_float32_whatever_the_dtype(
    family: str, label: str, tmp_path: Path
) -> None:
    model = coded(label, family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["cache_codecs"] == model.config.codecs.to_dict() and "cache_plan" in config
    expected = numbers(model)
    assert bool(expected) == ("kivi" not in label)
    for dtype in (None, torch.bfloat16, torch.float64):
        loaded = load_causal_lm(tmp_path, dtype=dtype)
        found = numbers(loaded)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert x.dtype == torch.float32 and x.device.type == "cpu"
            assert torch.equal(x, expected[name]), name
        assert loaded.dtype == (dtype or torch.float32)
    x = tokens(1, 9)
    options = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(load_causal_lm(tmp_path).generate(x, **options), model.generate(x, **options))


def test_a_cast_of_the_model_leaves_the_numbers_of_its_codecs_alone() -> None:
    model = coded("pca:rank=6,bits=4")
    expected = {name: x.clone() for name, x in numbers(model).items()}
    for cast in (torch.bfloat16, torch.float64, torch.float32):
        found = numbers(model.to(cast))
        assert all(x.dtype == torch.float32 and torch.equal(x, expected[name]) for name, x in found.items())
        assert model.lm_head.weight.dtype == cast


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("load", [load_causal_lm, AutoModelForCausalLM.from_pretrained])
def test_a_checkpoint_without_the_numbers_of_its_codecs_is_refused(
    load: Callable[[Path], PreTrainedModel], tmp_path: Path
) -> None:
    coded().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: {k: x for k, x in state.items() if "_codec." not in k})
    with pytest.raises(ValueError, match=r"must have the numbers of the codecs 'int8'.*fusedkv compress"):
        load(tmp_path)
    edit_config(tmp_path, lambda config: config.pop("cache_codecs"))
    assert load(tmp_path).config.codecs is None


def test_numbers_for_other_heads_are_refused(tmp_path: Path) -> None:
    coded().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda state: {k: x[:2] if "_codec." in k else x for k, x in state.items()})
    with pytest.raises(ValueError, match="must have the numbers of the codecs 'int8'"):
        load_causal_lm(tmp_path)


def test_a_plain_checkpoint_takes_codecs_that_need_no_numbers_and_no_others(tmp_path: Path) -> None:
    plain = lively(LlamaForCausalLM(LlamaConfig(**sizes())))
    plain.save_pretrained(tmp_path)
    plan = CachePlan.named("vanilla", LAYERS).to_dict()
    kind = MODELS["llama"]
    model = kind.from_pretrained(
        tmp_path, config=FusedKVLlamaConfig(**sizes(cache_plan=plan, cache_codecs="kivi:group=8"))
    )
    assert not numbers(model) and model.config.codecs.token_group == 8
    assert model.generate(tokens(1, 60), max_new_tokens=4, do_sample=False).shape == (1, 64)
    with pytest.raises(ValueError, match="codecs 'int8' that its config names"):
        kind.from_pretrained(
            tmp_path, config=FusedKVLlamaConfig(**sizes(cache_plan=plan, cache_codecs="int8"))
        )


def future(config: dict[str, Any]) -> None:
    config["cache_codecs"]["format"] = 2


def other_plan(config: dict[str, Any]) -> None:
    config["cache_plan"] = CachePlan.named("yoco", LAYERS, storage_layers=1).to_dict()
    del config["k_source_layers"], config["v_source_layers"]


def other_depth(config: dict[str, Any]) -> None:
    del config["cache_codecs"]["layers"][0]


def other_head_dim(config: dict[str, Any]) -> None:
    config["head_dim"] = 4


def unknown_field(config: dict[str, Any]) -> None:
    config["cache_codecs"]["entropy"] = True


REFUSED = {
    future: "format of the codecs must be at most 1, got 2; upgrade fusedkv_ext",
    other_plan: "layer 1 keys: the codec must be raw, got .* plan 'yoco' stores no keys there",
    other_depth: "codecs must be for the 4 layers of plan 'fusedkv', got 3",
    other_head_dim: "layer 0 keys: rank must be at most the head dim 4, got 6",
    unknown_field: "codecs have no field 'entropy'",
}


@pytest.mark.parametrize("change", REFUSED)
def test_codecs_that_do_not_fit_the_model_are_named(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    coded("pca:rank=6").save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(ValueError, match=REFUSED[change]) as caught:
        load_causal_lm(tmp_path)
    assert "config.json" in str(caught.value)


def test_another_plan_drops_the_codecs() -> None:
    config = coded().config
    assert config.codecs is not None and config_for(config, "yoco").codecs is None
    whole = cache_bytes_per_token(config_for(config, config.plan), torch.bfloat16)
    assert cache_bytes_per_token(config, torch.bfloat16) == whole / 2


def test_layers_with_a_window_stay_raw_with_a_label_and_are_refused_otherwise() -> None:
    full, sliding = "full_attention", "sliding_attention"
    windows = dict(sliding_window=4, use_sliding_window=True, layer_types=[full, full, sliding, sliding])
    model = coded("int8", "qwen3", "vanilla", **windows)
    assert [layer.keys.is_raw for layer in model.config.codecs.layers] == [False, False, True, True]
    everywhere = coded("int8", "qwen3", "vanilla").config.codecs
    with pytest.raises(ValueError, match="layer 2 keys: the codec must be raw.* sliding window"):
        code_model(model, everywhere, {})
