"""Loading, saving and training: checkpoints bit by bit, gradients, recomputed activations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import CONFIGS, IMPLEMENTATIONS, MODELS, close, lively, sizes, tiny_model, tokens
from tiny import PLANS
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fusedkv_ext.hf as hf
from fusedkv_ext.layers.fusion import FusionWeights

FAMILIES = sorted(MODELS)
PLAIN = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
PARTIAL = {"patchwork", "skipv1", "skipv1-yoco", "skipkv1"}


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_saved_model_comes_back_bit_by_bit(plan: str, tmp_path) -> None:
    for family in FAMILIES:
        model = tiny_model(family, plan, tie_word_embeddings=family == "llama")
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is MODELS[family] and again.config._attn_implementation == "fusedkv"
        before, after = model.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        base = AutoModel.from_pretrained(tmp_path)
        assert all(torch.equal(x, before[f"model.{name}"]) for name, x in base.state_dict().items())


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_plain_checkpoint_lacks_the_fusion_weights_only(plan: str, tmp_path) -> None:
    for family in FAMILIES:
        config, plain = PLAIN[family]
        plain = lively(plain(config(**sizes())))
        plain.save_pretrained(tmp_path)
        ours = hf.config_for(plain.config, PLANS[plan])
        if plan in PARTIAL:
            with pytest.raises(ValueError, match="must be converted: fkv.conversion.convert_model"):
                MODELS[family].from_pretrained(tmp_path, config=ours)
            continue
        model, info = MODELS[family].from_pretrained(
            tmp_path, config=ours, dtype=torch.bfloat16, output_loading_info=True
        )
        names = {name for name, _ in model.named_parameters() if "kv_fusion" in name}
        assert set(info["missing_keys"]) == names
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        states = plain.state_dict()
        for name, weight in model.named_parameters():
            assert weight.dtype == (torch.float32 if name in names else torch.bfloat16)
            if name not in names:
                assert torch.equal(weight, states[name].bfloat16())
        for module in model.modules():
            if isinstance(module, FusionWeights):
                fresh = FusionWeights(PLANS[plan], module.layer, 4, 8)
                for (name, weight), other in zip(module.named_parameters(), fresh.parameters(), strict=True):
                    assert "normal" in fusion_inits(plan) or torch.equal(weight, other), name


def fusion_inits(plan: str) -> set[object]:
    parts = [part for layer in PLANS[plan].layers for part in (*layer.keys, *layer.values)]
    return {part.fusion.init for part in parts if part.fusion is not None}


def test_fusion_weights_that_a_checkpoint_has_are_not_initialised_again(tmp_path) -> None:
    """One of four is missing: it starts at the plan's value, the others keep theirs."""
    from safetensors.torch import load_file, save_file

    model = tiny_model("llama", "fusedkv")
    model.save_pretrained(tmp_path)
    states = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.3.self_attn.kv_fusion.value_1"
    del states[gone]
    save_file(states, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in again.named_parameters():
        if name == gone:
            assert torch.equal(weight, FusionWeights(PLANS["fusedkv"], 3, 4, 8).value_1)
        elif "kv_fusion" in name:
            assert torch.equal(weight, model.get_parameter(name))


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_gradients_do_not_depend_on_the_implementation_nor_on_checkpointing(plan: str) -> None:
    model, ids = tiny_model("qwen3", plan, "eager").train(), tokens(2, 11)
    expected = gradients(model, ids)
    assert expected.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            found = gradients(model, ids)
            model.gradient_checkpointing_disable()
            assert found.keys() == expected.keys()
            for name in expected:
                close(found[name], expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_trains_in_bf16(family: str) -> None:
    """Gradients of the parameters within bf16's rounding of those in fp32, fusion weights among them."""
    model, ids = tiny_model(family, "fusedkv").train(), tokens(4, 16)
    expected = gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, ids)
    for name in expected:
        assert found[name].dtype == torch.float32
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, name


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_model("llama", "fusedkv")
    for options in ({"use_reentrant": True}, {}):
        with pytest.raises(ValueError, match="use_reentrant=True gives wrong gradients"):
            model.gradient_checkpointing_enable(options)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing


def test_models_are_made_without_memory_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MODELS["llama"](CONFIGS["llama"](**sizes(cache_plan="fusedkv")))
    assert all(weight.is_meta for weight in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights()
    fresh = FusionWeights(PLANS["fusedkv"], 2, 4, 8)
    for module in model.modules():
        if isinstance(module, FusionWeights):
            module.reset_parameters()
            for weight, other in zip(module.parameters(), fresh.parameters(), strict=True):
                assert torch.equal(weight, other)


def test_dropout_of_attention_is_at_work_in_training_only() -> None:
    model, ids = tiny_model("llama", "fusedkv", attention_dropout=0.5), tokens(1, 12)
    once, again = model(ids).logits, model(ids).logits
    assert torch.equal(once, again)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_a_layer_alone_says_what_it_misses() -> None:
    model = tiny_model("llama", "fusedkv")
    x = torch.randn(1, 3, 48)
    positions = model.model.rotary_emb(x, torch.arange(3)[None])
    with pytest.raises(ValueError, match="layer 3 of plan 'fusedkv' needs keys and values of layer 0"):
        model.model.layers[3](x, position_embeddings=positions)
