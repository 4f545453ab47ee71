"""Configs: what they show, what they refuse, and what transformers' caches read in them."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import CONFIGS, LAYERS, sizes
from tiny import PLANS
from transformers import AutoConfig, BertConfig, GemmaConfig, LlamaConfig, Qwen3Config, T5Config

import fusedkv_ext as fkv
import fusedkv_ext.hf as hf
from fusedkv_ext.plan import CachePlan

FAMILIES = sorted(CONFIGS)
PLAIN = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def config(family: str = "llama", plan: str = "fusedkv", **options):
    return CONFIGS[family](**sizes(cache_plan=PLANS[plan].to_dict(), **options))


def test_hf_is_an_attribute_of_the_package() -> None:
    assert fkv.hf is hf
    with pytest.raises(AttributeError, match="no attribute 'huggingface'"):
        _ = fkv.huggingface


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_config_comes_back_from_its_file(family: str, plan: str, tmp_path) -> None:
    config(family, plan).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"fusedkv_{family}"
    assert saved["k_source_layers"] == [list(PLANS[plan].key_sources(i)) for i in range(LAYERS)]
    assert saved["v_source_layers"] == [list(PLANS[plan].value_sources(i)) for i in range(LAYERS)]
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is CONFIGS[family] and again.plan == PLANS[plan]
    before, after = config(family, plan).to_dict(), again.to_dict()
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= {"transformers_version", "_name_or_path"} and before.keys() <= after.keys()


def test_a_plan_can_be_given_by_its_name() -> None:
    named = hf.FusedKVLlamaConfig(**sizes(cache_plan="fusedkv-lite"))
    assert named.plan == CachePlan.named("fusedkv-lite", LAYERS)
    assert named.to_dict()["cache_plan"] == named.plan.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_for_keeps_everything_but_the_plan(family: str) -> None:
    plain = PLAIN[family](**sizes(rms_norm_eps=1e-4, tie_word_embeddings=True, attention_bias=True))
    ours = hf.config_for(plain, "fusedkv")
    assert type(ours) is CONFIGS[family] and ours.plan == CachePlan.named("fusedkv", LAYERS)
    new = {"model_type", "cache_plan", "cache_codecs", "k_source_layers", "v_source_layers"}
    new.add("transformers_version")
    before, after = plain.to_dict(), ours.to_dict()
    assert {k: v for k, v in after.items() if k not in new} == {
        k: v for k, v in before.items() if k not in new
    }
    assert hf.config_for(plain, "cla:factor=4").plan == CachePlan.named("cla", 4, factor=4)
    again = hf.config_for(ours, PLANS["cla"])
    assert again.plan == PLANS["cla"] and again.rms_norm_eps == 1e-4


@pytest.mark.parametrize(
    ("other", "message"),
    [(BertConfig(), "another model"), (T5Config(), "encoder-decoder"), (GemmaConfig(), "llama and qwen3")],
)
def test_config_for_refuses_other_models(other, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.config_for(other, "fusedkv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_plan": CachePlan.named("yoco", 6).to_dict()}, "has 6 layers, but num_hidden_layers is 4"),
        ({"cache_plan": "skipv1", "num_key_value_heads": 1}, "num_kv_heads must be a multiple of 2, got 1"),
        ({"cache_plan": "no-such-plan"}, "plan name must be one of .*, got 'no-such-plan'"),
        ({"cache_plan": {"format": 99}}, "format of the cache plan must be at most 1, got 99"),
        (
            {"cache_plan": "yoco", "k_source_layers": [[0], [1], [0], [1]]},
            "contradicts cache_plan, in layer 2",
        ),
        ({"cache_plan": "yoco", "v_source_layers": [[0]]}, "v_source_layers contradicts"),
    ],
)
def test_impossible_configs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.FusedKVLlamaConfig(**sizes(**options))


def test_wrong_types_are_refused() -> None:
    with pytest.raises(Exception, match="cache_plan"):
        hf.FusedKVLlamaConfig(**sizes(cache_plan=3))
    plain = LlamaConfig(**sizes())
    with pytest.raises(TypeError, match="plan must be a CachePlan"):
        hf.config_for(plain, 3)
    with pytest.raises(TypeError, match="must be a config"):
        hf.config_for({}, "yoco")


def test_a_config_without_a_plan_says_so_when_it_is_used() -> None:
    empty = hf.FusedKVLlamaConfig()
    assert empty.kv_sharing_modes is None and empty.num_kv_shared_layers == 0
    with pytest.raises(ValueError, match="has no cache_plan"):
        hf.FusedKVLlamaForCausalLM(empty)


def test_full_attention_cannot_read_the_cache_of_a_window() -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer 2 has full attention but reads the cache of layer 1"):
        config("qwen3", "yoco", layer_types=types, use_sliding_window=True, sliding_window=4)


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_sharing_modes_say_who_stores_and_who_is_read(plan: str) -> None:
    modes, plan = config(plan=plan).kv_sharing_modes, PLANS[plan]
    read = {j for i in range(LAYERS) for j in plan.source_layers(i)}
    assert [mode == "reuse" for mode in modes] == [plan.reads_only(i) for i in range(LAYERS)]
    assert {i for i, mode in enumerate(modes) if mode == "store"} == read
    shared = config(plan=plan.name if plan.name in PLANS else "patchwork").num_kv_shared_layers
    assert all(plan.reads_only(i) for i in range(LAYERS - shared, LAYERS))


def test_cache_bytes_count_what_the_plan_stores() -> None:
    plain = LlamaConfig(**sizes())
    whole = 2 * LAYERS * 4 * 8 * 2
    assert hf.cache_bytes_per_token(plain, torch.bfloat16) == whole
    assert hf.cache_bytes_per_token(config(plan="vanilla"), torch.bfloat16) == whole
    assert hf.cache_bytes_per_token(config(plan="fusedkv"), torch.bfloat16) == whole // 2
    assert hf.cache_bytes_per_token(config(plan="svformer"), torch.float32) == 2 * whole * 5 // 8


def test_the_tensor_parallel_plan_shards_weights_by_head() -> None:
    shared = config(plan="fusedkv").base_model_tp_plan
    assert shared["layers.*.self_attn.kv_fusion.key_0"] == "colwise"
    assert shared["layers.*.self_attn.q_proj"] == "colwise"
    assert not any("kv_fusion" in name for name in config(plan="skipv1").base_model_tp_plan)
    assert not any("kv_fusion" in name for name in LlamaConfig.base_model_tp_plan)
