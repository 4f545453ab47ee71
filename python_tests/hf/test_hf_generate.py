"""``generate`` in all its forms, against decoding without a cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import IMPLEMENTATIONS, Ops, left_padded, sizes, tiny_model, tokens
from tiny import PLANS
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    Qwen3Config,
    StaticCache,
    set_seed,
)

EVERY_PLAN = sorted(PLANS)
SOME_PLANS = ("fusedkv", "fusedkv-lite", "cla", "skipv1", "skipv1-yoco", "yoco++", "patchwork")
NEW = 6


def greedy(model, ids, **options):
    # Without a mask transformers takes every pad_token_id for padding, also one that the model has generated.
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


@pytest.mark.parametrize("plan", EVERY_PLAN)
def test_greedy_with_a_dynamic_and_a_static_cache_is_greedy_without(plan: str) -> None:
    model, ids = tiny_model("llama", plan), tokens(2, 7)
    expected = greedy(model, ids, use_cache=False)
    assert expected.shape == (2, 7 + NEW)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        assert torch.equal(greedy(model, ids), expected)
        assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)


@pytest.mark.parametrize("plan", SOME_PLANS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding_does_not_change_what_is_generated(plan: str, cache: str | None) -> None:
    model, padding = tiny_model("qwen3", plan), [4, 0, 1]
    ids, mask = left_padded(tokens(3, 9), padding)
    batch = greedy(model, ids, attention_mask=mask, cache_implementation=cache)
    for row, count in enumerate(padding):
        alone = greedy(model, ids[row : row + 1, count:], use_cache=False)
        assert torch.equal(batch[row : row + 1, count:], alone)


@pytest.mark.parametrize("plan", SOME_PLANS)
def test_beams_do_not_depend_on_the_cache(plan: str) -> None:
    model, (ids, mask) = tiny_model("llama", plan), left_padded(tokens(2, 7), [2, 0])
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    expected = greedy(model, ids, use_cache=False, **options)
    assert torch.equal(greedy(model, ids, **options), expected)
    assert torch.equal(greedy(model, ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("plan", SOME_PLANS)
def test_sampling_with_a_seed_draws_the_same_tokens_with_every_implementation(plan: str) -> None:
    model, ids = tiny_model("qwen3", plan), tokens(2, 7)
    drawn = []
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        set_seed(7)
        drawn.append(model.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=20, temperature=0.8))
    assert all(torch.equal(some, drawn[0]) for some in drawn)
    assert not torch.equal(drawn[0], greedy(model, ids))


@pytest.mark.parametrize("plan", SOME_PLANS)
def test_guessed_tokens_are_verified_and_cropped(plan: str) -> None:
    """Prompt lookup and an assistant model: both guess several tokens and take wrong ones back."""
    model, ids = tiny_model("llama", plan), tokens(1, 4).repeat(1, 4)
    expected = greedy(model, ids, max_new_tokens=12, use_cache=False)
    assert torch.equal(greedy(model, ids, max_new_tokens=12, prompt_lookup_num_tokens=3), expected)
    assistant = tiny_model("llama", "fusedkv-lite")
    assert torch.equal(greedy(model, ids, max_new_tokens=12, assistant_model=assistant), expected)


@pytest.mark.parametrize("plan", SOME_PLANS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_prompt_in_chunks_is_the_same_prompt(plan: str, cache: str | None, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # chunks compile, at a price
    model, ids = tiny_model("llama", plan), tokens(2, 13)
    options = {"prefill_chunk_size": 5, "cache_implementation": cache}
    assert torch.equal(greedy(model, ids, **options), greedy(model, ids, use_cache=False))


@pytest.mark.parametrize("plan", SOME_PLANS)
def test_a_cache_of_the_user_is_continued(plan: str) -> None:
    model, ids = tiny_model("qwen3", plan), tokens(2, 7)
    expected = greedy(model, ids, use_cache=False, max_new_tokens=NEW + 3)
    for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, 32)):
        first = greedy(model, ids, past_key_values=cache, max_new_tokens=3)
        assert torch.equal(first, expected[:, : 7 + 3])
        assert torch.equal(greedy(model, first, past_key_values=cache), expected)


def test_generating_computes_one_position_of_the_prompt_and_fuses_nothing() -> None:
    model, ids = tiny_model("llama", "fusedkv"), tokens(2, 40)
    rows: list[int] = []
    model.model.layers[-1].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[1])
    )
    with Ops() as ops:
        greedy(model, ids)
    assert rows == [1] * NEW
    assert ops.calls["fuse_kv"] == ops.calls["fuse_kv_pair"] == 0, "a single row of a prompt folds too"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generate_stops_and_pads_as_the_plain_model(family: str) -> None:
    ours = tiny_model(family, "vanilla")
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[family]
    plain = AutoModelForCausalLM.from_config(config(**sizes())).eval()
    plain.load_state_dict(ours.state_dict())
    ids = tokens(3, 6)
    free = greedy(plain, ids, max_new_tokens=10)
    stop = int(free[0, 8])
    options = {"max_new_tokens": 10, "eos_token_id": stop}
    assert torch.equal(greedy(ours, ids, **options), greedy(plain, ids, **options))


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1"])
def test_continuous_batching_gives_the_same_tokens(plan: str) -> None:
    model = tiny_model("llama", plan, "sdpa")
    prompts = [tokens(n).tolist() for n in (5, 9)]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
    out = model.generate_batch(inputs=prompts, generation_config=settings)
    found = [request.generated_tokens for request in out.values()]
    assert found == [greedy(model, torch.tensor([ids]))[0, len(ids) :].tolist() for ids in prompts]
