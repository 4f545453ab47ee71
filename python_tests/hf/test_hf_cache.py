"""Caches of transformers under our models: what they hold, and that they can be cut, reordered and reused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import IMPLEMENTATIONS, LAYERS, close, left_padded, tiny_model, tokens
from tiny import PLANS
from transformers import DynamicCache, StaticCache

import fusedkv_ext.hf as hf
from fusedkv_ext.hf.cache import HAS_DUMMY_LAYER

EVERY_PLAN = sorted(PLANS)
TOKENS = 9


def held(cache) -> int:
    """Elements of all tensors that the layers of a cache hold."""
    sides = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() for x in sides if x is not None)


@pytest.mark.parametrize("plan", EVERY_PLAN)
@torch.no_grad()
def test_cache_bytes_per_token_is_what_the_tensors_hold(plan: str) -> None:
    model, ids = tiny_model("llama", plan), tokens(2, TOKENS)
    expected = hf.cache_bytes_per_token(model.config, torch.float32) * ids.numel()
    for cache in (DynamicCache(config=model.config), DynamicCache(), model(ids).past_key_values):
        if not cache.get_seq_length():
            model(ids, past_key_values=cache)
        assert held(cache) * 4 == expected
    static = StaticCache(config=model.config, max_cache_len=2 * TOKENS)
    model(ids, past_key_values=static)
    assert held(static) * 4 == 2 * expected


@pytest.mark.parametrize("plan", EVERY_PLAN)
@torch.no_grad()
def test_caches_can_be_cropped_reordered_repeated_and_selected(plan: str) -> None:
    model, ids = tiny_model("qwen3", plan), tokens(3, TOKENS)
    order = torch.tensor([2, 0, 0])
    for make in (lambda: DynamicCache(config=model.config), DynamicCache):
        cache = make()
        model(ids, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == TOKENS - 4
        close(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:])
        cache.reorder_cache(order)
        more = tokens(3, 2)
        expected = model(torch.cat((ids[order], more), dim=1)).logits[:, -2:]
        close(model(more, past_key_values=cache).logits, expected)
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        chosen = order[[1, 1, 0, 0]]
        more = tokens(4, 1)
        expected = model(torch.cat((ids[chosen], more), dim=1)).logits[:, -1:]
        close(model(more, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("plan", EVERY_PLAN)
@torch.no_grad()
def test_static_caches_give_the_same_logits_padded_or_not(plan: str) -> None:
    model = tiny_model("llama", plan)
    ids = tokens(3, TOKENS)
    padded, mask = left_padded(ids, [2, 0, 0])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids).logits
    alone = model(padded[:1, 2:]).logits
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        static = StaticCache(config=model.config, max_cache_len=20)
        pieces = [slice(0, 6), slice(6, 7), slice(7, 9)]
        out = [model(ids[:, now], past_key_values=static).logits for now in pieces]
        close(torch.cat(out, dim=1), expected)
        static.reset()
        for now in pieces:
            seen = torch.cat((mask[:, : now.stop], torch.zeros(3, 0, dtype=mask.dtype)), dim=1)
            inputs = {"attention_mask": seen, "position_ids": positions[:, now]}
            last = model(padded[:, now], past_key_values=static, **inputs).logits
        close(last[0], alone[0, -2:])
        close(last[1:], expected[1:, -2:])


@torch.no_grad()
def test_static_caches_can_be_reordered() -> None:
    for plan in ("fusedkv", "skipv1-yoco", "yoco-v"):
        model, ids, order = tiny_model("llama", plan), tokens(3, TOKENS), torch.tensor([1, 1, 0])
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids, past_key_values=cache)
        cache.reorder_cache(order)
        more = tokens(3, 1)
        expected = model(torch.cat((ids[order], more), dim=1)).logits[:, -1:]
        close(model(more, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("plan", ["fusedkv", "cla", "skipv1", "svformer"])
@torch.no_grad()
def test_layers_that_store_nothing_hold_nothing(plan: str) -> None:
    model, ids = tiny_model("qwen3", plan), tokens(2, TOKENS)
    for cache in (DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, 16)):
        model(ids, past_key_values=cache)
        for i in range(LAYERS):
            if PLANS[plan].reads_only(i):
                assert i >= len(cache.layers) or cache.layers[i].keys is None
            else:
                layer = cache.layers[i]
                assert layer.keys.shape[1] == len(PLANS[plan].stored_key_heads(i, 4))
                assert layer.values.shape[1] == len(PLANS[plan].stored_value_heads(i, 4))
    names = [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    if HAS_DUMMY_LAYER:
        readers = [PLANS[plan].reads_only(i) for i in range(LAYERS)]
        assert [name == "DummyLayer" for name in names] == readers
    else:
        assert len(names) == PLANS[plan].prefill_layers
