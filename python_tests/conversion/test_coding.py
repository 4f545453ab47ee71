"""Codecs for a model: what is sampled, what an error costs, and what a simulated pass computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_folders import tiny_llama
from hf_tiny import LAYERS, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fusedkv_ext.cache.codec import RAW, CodecPlan
from fusedkv_ext.conversion import code_model, collect_stored, simulated
from fusedkv_ext.hf.attention import PlanAttention
from fusedkv_ext.hf.versions import CACHE
from fusedkv_ext.layers.layer_io import mixed

PLANS = ["vanilla", "fusedkv", "fusedkv-lite", "skipv1", "patchwork", "resformer", "cla"]


def attentions(model: PreTrainedModel) -> list[Any]:
    return [layer.self_attn for layer in model.get_decoder().layers]


@contextmanager
def watched(model: PreTrainedModel, see: Callable[..., None]) -> Iterator[None]:
    """Calls see(layer, query, stream, output) for every attention of a pass."""
    state: dict[int, Tensor] = {}
    attend = PlanAttention._attend

    def seen(layer: Any, query: Tensor, *rest: Any) -> Any:
        state[layer.layer_idx] = query
        return attend(layer, query, *rest)

    hooks, streams = [], {}
    for layer in model.get_decoder().layers:
        hooks.append(
            layer.register_forward_pre_hook(lambda m, args: streams.update({m.self_attn.layer_idx: args[0]}))
        )
        hooks.append(
            layer.self_attn.register_forward_hook(
                lambda m, _, out: see(m, state[m.layer_idx], streams[m.layer_idx], out[0])
            )
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanAttention, "_attend", seen)
        yield
    for hook in hooks:
        hook.remove()


def effect(layer: Any, side: int, source: int, head: int, error: Tensor, stored: list[int]) -> Tensor:
    """What an error (D,) of one stored head of layer ``source`` does to the heads that ``layer`` reads."""
    tensors: list[Tensor | None] = []
    for j in (*layer._sources, layer.layer_idx):
        x = torch.zeros(1, 1, stored[j], len(error))
        if j == source and head < stored[j]:
            x[:, :, head] = error
        tensors.append(x)
    reads = (layer._keys, layer._values)[side].reads
    with torch.no_grad():
        weights = layer._weights(side, torch.zeros(1, 8, 1, len(error)))
        return mixed(tensors, reads, weights)[0, 0].double()  # (G, D)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_the_cost_of_an_error_is_summed_over_the_layers_that_read_it(plan: str) -> None:
    """Against brute force: put the error into one stored head, and see what scores and outputs become."""
    model, ids = tiny_model("llama", plan), tokens(3, 16)
    queries: dict[int, Tensor] = {}
    shares: dict[int, Tensor] = {}

    def see(layer: Any, query: Tensor, stream: Tensor, out: Tensor) -> None:
        queries[layer.layer_idx] = query.permute(0, 2, 1, 3).flatten(0, 1).double()  # (tokens, H, D)
        shares[layer.layer_idx] = (out.double().square().sum(-1) / stream.double().square().sum(-1)).mean()

    with watched(model, see):
        model(ids, use_cache=False)
    samples = collect_stored(model, ids, positions=ids.shape[1], batch_size=3)
    layers = attentions(model)
    for side, name in enumerate(("keys", "values")):
        stored = [(x.k_heads, x.v_heads)[side] for x in layers]
        assert {i for i, s in samples if s == name} == {i for i, count in enumerate(stored) if count}
        for source, count in enumerate(stored):
            for head in range(count):
                error, expected = torch.randn(8), 0.0
                for i, layer in enumerate(layers):
                    if source != i and source not in layer._sources:
                        continue
                    change = effect(layer, side, source, head, error, stored).repeat_interleave(2, 0)
                    if side == 0:
                        cost = torch.einsum("thd,hd->th", queries[i], change).square().sum(1).mean()
                    else:
                        weight = layer.o_proj.weight.double().unflatten(1, (8, 8))
                        cost = torch.einsum("ohd,hd->ho", weight, change).square().sum()
                    expected += float(shares[i] * cost)
                metric = samples[source, name].metric[head]
                found = (error.double() @ metric @ error.double()).item()
                assert found == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_samples_are_what_caches_store_without_the_first_tokens() -> None:
    model, ids = tiny_model("llama", "patchwork"), tokens(2, 12)
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    samples = collect_stored(model, ids, positions=12)
    for i in (0, 1):
        layer = cache.layers[i]
        for name, x in (("keys", layer.keys), ("values", layer.values)):
            expected = x[:, :, 4:].transpose(1, 2).flatten(0, 1)
            torch.testing.assert_close(samples[i, name].vectors, expected, rtol=1e-5, atol=1e-6)
            first = x[:, :, :4].transpose(1, 2).flatten(0, 1)
            torch.testing.assert_close(samples[i, name].first, first, rtol=1e-5, atol=1e-6)
    few = collect_stored(model, ids, rows=4)
    assert len(few[0, "keys"].vectors) == 4


@pytest.mark.parametrize("label", ["int8", "int8:sinks=4"])
@torch.no_grad()
def test_static_ranges_of_8_bits_hold_the_first_tokens(label: str) -> None:
    model, ids = tiny_model("llama", "vanilla"), tokens(8, 16)
    samples = collect_stored(model, ids)
    wide = {key: x._replace(first=x.first * 100) for key, x in samples.items()}
    scales = []
    for found in (samples, wide):
        code_model(model, label, found)
        scales.append(attentions(model)[0].key_codec.scale.clone())
    assert (scales[1] > 10 * scales[0]).all()


@torch.no_grad()
def test_sequences_are_shifted_over_all_positions() -> None:
    """Values and layers' outputs stay, and keys are those of the later positions."""
    model, ids = tiny_model("llama", "vanilla"), tokens(2, 12)
    near, far = (collect_stored(model, ids, positions=n) for n in (12, 112))
    shift = torch.tensor([[0], [100]]) + torch.arange(12)
    cache = DynamicCache(config=model.config)
    model(ids, position_ids=shift, **{CACHE: cache})
    for i in (0, 3):
        torch.testing.assert_close(near[i, "values"].vectors, far[i, "values"].vectors, rtol=1e-3, atol=1e-3)
        expected = cache.layers[i].keys[:, :, 4:].transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(far[i, "keys"].vectors, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="positions must be at least"):
        collect_stored(model, ids, positions=11)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_a_simulated_pass_without_codes_has_the_plain_logits(plan: str) -> None:
    model, ids = tiny_model("qwen3", plan).double(), tokens(2, 14)
    expected = model(ids, use_cache=False).logits
    code_model(model, CodecPlan("raw", [(RAW, RAW)] * LAYERS, 1, 2), {})
    with simulated(model):
        found = model(ids, use_cache=False).logits
        last = model(ids, use_cache=False, logits_to_keep=2).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, expected[:, -2:], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_simulated_pass_respects_windows() -> None:
    full, sliding = "full_attention", "sliding_attention"
    windows = dict(sliding_window=4, use_sliding_window=True, layer_types=[full, sliding, full, sliding])
    model, ids = tiny_model("qwen3", "vanilla", **windows).double(), tokens(2, 14)
    expected = model(ids, use_cache=False).logits
    code_model(model, CodecPlan("raw", [(RAW, RAW)] * LAYERS), {})
    with simulated(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_simulation_ends_with_its_block() -> None:
    model, ids = tiny_model("llama", "fusedkv"), tokens(1, 12)
    expected = model(ids, use_cache=False).logits
    with pytest.raises(ValueError, match="model must have codecs, got a config without cache_codecs"):
        with simulated(model):
            pass
    code_model(model, "int4:bits=2,sinks=0", collect_stored(model, tokens(4, 32)))
    with pytest.raises(KeyError), simulated(model):
        assert not torch.equal(model(ids, use_cache=False).logits, expected)
        raise KeyError
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_damaged_calibration_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama", "fusedkv")
    samples = collect_stored(model, tokens(4, 32))
    code_model(model, "int8", samples)
    before = {name: x.clone() for name, x in model.named_buffers()}
    samples[1, "values"].vectors[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="sample must be finite, got NaN or inf"):
        code_model(model, "turboquant", samples)
    assert model.config.codecs.name == "int8"
    after = dict(model.named_buffers())
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def test_codecs_need_a_plan_and_enough_tokens() -> None:
    with pytest.raises(
        TypeError, match="model must have a cache plan, got LlamaForCausalLM; convert it first"
    ):
        collect_stored(tiny_llama(), tokens(2, 16))
    model = tiny_model("llama", "fusedkv")
    with pytest.raises(ValueError, match="ids must have more than 5 tokens per sequence, got 5"):
        collect_stored(model, tokens(2, 5))
    with pytest.raises(ValueError, match="codecs must be for the 4 layers"):
        code_model(model, CodecPlan("raw", [(RAW, RAW)]), {})
    assert model.config.codecs is None
