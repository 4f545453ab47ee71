"""Which releases of transformers and others were tested; no keyword and no cache is lost silently."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from hf_tiny import close, tiny_model, tokens
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from fusedkv_ext.hf import versions
from fusedkv_ext.hf.versions import CACHE, TESTED, untested, warn_if_untested


def test_the_installed_release_of_transformers_is_one_that_is_called_tested() -> None:
    assert untested("transformers", transformers.__version__) is None


@pytest.mark.parametrize("name", list(TESTED))
def test_a_release_outside_the_tested_range_gives_a_warning_that_names_the_range(name: str) -> None:
    oldest, newest = TESTED[name]
    newer = Version(newest)
    assert untested(name, newest) is None
    assert untested(name, f"{newest}.99") is None  # patch releases count as tested
    for found in (f"{newer.major}.{newer.minor + 1}.0", f"{newer.major + 1}.0"):
        message = untested(name, found)
        assert message is not None and f"{name} {found}" in message and newest in message
    if oldest is not None:
        assert untested(name, oldest) is None
        message = untested(name, f"{Version(oldest).major}.{Version(oldest).minor - 1}.9")
        assert message is not None and f"{oldest} to {newest}" in message


def test_untested_releases_warn_and_packages_that_are_not_there_do_not(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise versions.PackageNotFoundError(name)
        return {"transformers": "99.0", "torch": TESTED["torch"][1], "accelerate": "99.1"}[name]

    monkeypatch.setattr(versions, "version", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_untested()
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2 and "transformers 99.0" in told[0] and "accelerate 99.1" in told[1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_the_cache_is_taken_under_the_name_of_this_release_and_under_the_old_one(family: str) -> None:
    model, ids = tiny_model(family, "fusedkv"), tokens(2, 7)
    expected = model(ids, use_cache=False).logits
    for name in {CACHE, "past_key_values"}:
        for run in (model, model.model):
            cache = DynamicCache(config=model.config)
            for now in (slice(0, 4), slice(4, 7)):
                out = run(ids[:, now], **{name: cache})
            assert cache.get_seq_length() == 7
        logits = model(ids[:, :1], **{name: DynamicCache(config=model.config)}).logits
        close(logits, expected[:, :1])
    if CACHE != "past_key_values":
        with pytest.raises(TypeError, match="must be given once, got also"):
            model(ids, **{CACHE: DynamicCache(), "past_key_values": DynamicCache()})
    assert out.last_hidden_state.shape[:2] == (2, 3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_keyword_that_attention_does_not_know_is_refused_unless_it_is_none(family: str) -> None:
    model, ids = tiny_model(family, "fusedkv"), tokens(2, 7)
    close(model(ids, kv_store=None).logits, model(ids).logits)
    with pytest.raises(ValueError, match="'kv_store'.*5.17 to"):
        model(ids, kv_store=DynamicCache())


def forget(model: Any, name: str, monkeypatch) -> None:
    """As a transformers whose layers hand the cache on in a way that attention does not see."""
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def without(*args: Any, _forward=forward, **kwargs: Any) -> Any:
            kwargs.pop(name, None)
            return _forward(*args, **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", without)


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1-yoco", "vanilla"])
@torch.no_grad()
def test_a_cache_that_no_layer_was_handed_is_noticed(plan: str, monkeypatch) -> None:
    model, ids = tiny_model("llama", plan), tokens(2, 7)
    forget(model, CACHE, monkeypatch)
    model(ids, use_cache=False)
    for inputs in ({"use_cache": True}, {CACHE: DynamicCache()}, {CACHE: StaticCache(model.config, 16)}):
        with pytest.raises(RuntimeError, match="the cache did not grow: no layer was handed it"):
            model(ids, **inputs)
    with pytest.raises(RuntimeError, match="the cache did not grow"):
        model.generate(ids, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_a_cache_that_does_not_keep_what_it_is_given_is_noticed() -> None:
    class Forgetful(DynamicCache):
        def update(self, key: Any, value: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            return key, value

    model = tiny_model("llama", "fusedkv")
    with pytest.raises(RuntimeError, match="the cache did not grow: it holds 0 tokens, not 7"):
        model(tokens(2, 7), **{CACHE: Forgetful()})


def test_checkpointing_without_a_cache_is_no_lost_cache() -> None:
    model, ids = tiny_model("llama", "fusedkv").train(), tokens(2, 7)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=True).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None
