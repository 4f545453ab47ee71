"""Coded caches of transformers: decoding is what the simulation says, raw rows are raw, sizes are real."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import LAYERS, left_padded, tiny_model, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import QuantizedLayer

from fusedkv_ext.cache.codec import RAW, SCHEMES, Codec, CodecPlan, TensorCodec
from fusedkv_ext.conversion.coding import code_model, collect_stored, simulated
from fusedkv_ext.evaluation.language_model import LanguageModel, resident_bytes
from fusedkv_ext.hf import cache_bytes_per_token
from fusedkv_ext.hf.cache import LayerCache
from fusedkv_ext.hf.coded_cache import CodedDynamicLayer
from fusedkv_ext.hf.versions import CACHE

LABELS = {
    "int8": "int8",
    "fp8": "fp8",
    "int4": "int4:sinks=2",
    "token": "token:bits=4,tail=3",
    "kivi": "kivi:group=4,tail=4",
    "turboquant": "turboquant:bits=3,sinks=2,tail=4,balance=true",
    "rotate-keys": "rotate-keys:group=4,sinks=1,tail=2",
    "pca": "pca:rank=6,bits=4",
    "pca raw": "pca:rank=6,sinks=0",
    "think": "think:rank=6,tail=2",
    "think in codes": "think:rank=6,bits=4,tail=2",
}
FUSED = ("fusedkv", "fusedkv-lite", "skipv1", "patchwork", "resformer")
GREEDY = dict(max_new_tokens=20, do_sample=False)


def coded(label: str, plan: str = "fusedkv", family: str = "llama", **options: Any) -> PreTrainedModel:
    """In float64: the sums of two orders then differ too little to flip a code."""
    model = tiny_model(family, plan, **options).double()
    code_model(model, label, collect_stored(model, tokens(8, 32)))
    return model


def decode(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits (B, S, V) of tokens that are fed one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return torch.cat([model(x, **{CACHE: cache}).logits for x in ids.split(1, dim=1)], dim=1)


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def test_every_scheme_is_tested() -> None:
    assert {label.partition(":")[0] for label in LABELS.values()} == set(SCHEMES)


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "llama") for name in LABELS), ("int4", "qwen3"), ("turboquant", "qwen3")]
)
@torch.no_grad()
def test_decoding_token_by_token_is_the_simulation(name: str, family: str) -> None:
    model, ids = coded(LABELS[name], family=family), tokens(2, 24)
    plain = model(ids, use_cache=False).logits
    with simulated(model):
        expected = model(ids, use_cache=False).logits
    assert same(decode(model, ids), expected)
    assert not same(plain, expected, 1e-4), "the codec changes something"


@pytest.mark.parametrize("plan", FUSED)
@torch.no_grad()
def test_decoding_is_the_simulation_on_plans_that_fuse_cut_and_mix(plan: str) -> None:
    label = "turboquant:bits=2,sinks=2,tail=3,source_factor=1"
    model, ids = coded(label, plan), tokens(2, 16)
    with simulated(model):
        expected = model(ids, use_cache=False).logits
    assert same(decode(model, ids), expected)
    assert not same(model(ids, use_cache=False).logits, expected, 1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "fusedkv"])
@torch.no_grad()
def test_every_attention_reads_the_same_codes(implementation: str) -> None:
    model, ids = coded("int4"), tokens(2, 12)
    model.set_attn_implementation("eager")
    expected = decode(model, ids)
    model.set_attn_implementation(implementation)
    assert same(decode(model, ids), expected)


@torch.no_grad()
def test_a_window_reads_codes_of_a_layer_without_one() -> None:
    full, sliding = "full_attention", "sliding_attention"
    windows = dict(sliding_window=4, use_sliding_window=True, layer_types=[full, full, sliding, sliding])
    model, ids = coded("int4:sinks=1", "fusedkv", "qwen3", **windows), tokens(1, 14)
    with simulated(model):
        expected = model(ids, use_cache=False).logits
    assert same(decode(model, ids), expected)


# Who reads what


@torch.no_grad()
def test_readers_use_the_codec_of_their_source_and_never_their_own() -> None:
    """Another engine let reading layers use a scale of their own."""
    model, ids = coded("int4"), tokens(1, 12)
    layers = [layer.self_attn for layer in model.get_decoder().layers]
    readers = [x for x in layers if x.plan.reads_only(x.layer_idx)]
    assert readers and all(x.key_codec is None and x.value_codec is None for x in readers)

    def both() -> tuple[Tensor, Tensor]:
        with simulated(model):
            return model(ids, use_cache=False).logits, decode_outside(model, ids)

    def decode_outside(model: PreTrainedModel, ids: Tensor) -> Tensor:
        held = {x: x.__dict__.pop("_attend") for x in layers}
        try:
            return decode(model, ids)
        finally:
            for x, attend in held.items():
                x.__dict__["_attend"] = attend

    expected = both()
    for x in readers:
        x.key_codec = TensorCodec(Codec("int", 2, "channel"), 4, 8)  # never fitted: it would ruin everything
        x.value_codec = TensorCodec(Codec("int", 2, "channel"), 4, 8)
    for found, wanted in zip(both(), expected, strict=True):
        assert torch.equal(found, wanted)
    source = layers[0].key_codec
    source.scale.mul_(8)
    for found, wanted in zip(both(), expected, strict=True):
        assert not same(found, wanted, 1e-2)


@torch.no_grad()
def test_first_and_last_tokens_are_bit_equal_to_the_raw_ones() -> None:
    model, ids = coded("turboquant:bits=2,sinks=3,tail=5", "vanilla"), tokens(2, 20)
    cache = DynamicCache(config=model.config)
    decode(model, ids[:, :-1], cache)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    update = CodedDynamicLayer.update

    def recorded(layer: CodedDynamicLayer, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen[cache.layers.index(layer)] = update(layer, key, value, *rest)
        return seen[cache.layers.index(layer)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodedDynamicLayer, "update", recorded)
        decode(model, ids[:, -1:], cache)
    raw = DynamicCache(config=model.config)
    first = model.get_decoder().layers[0].self_attn
    first.key_codec = first.value_codec = None  # layer 0 sees the same stream with and without codes
    decode(model, ids, raw)
    for found, expected in zip(seen[0], (raw.layers[0].keys, raw.layers[0].values), strict=True):
        assert torch.equal(found[:, :, :3], expected[:, :, :3])
        assert torch.equal(found[:, :, -5:], expected[:, :, -5:])
        middle = (found - expected)[:, :, 3:-5].abs()
        assert middle.amax(-1).min() > 1e-4, "every other token is coded"


@torch.no_grad()
def test_a_prompt_sees_itself_raw_and_is_stored_as_codes() -> None:
    model, ids = coded("int4:sinks=0"), tokens(2, 12)
    raw = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    assert same(model(ids, **{CACHE: cache}).logits, raw, 1e-9)
    assert all(layer.sides[0].num_coded == 12 for layer in cache.layers[:2])
    longer = torch.cat((ids, tokens(2, 1)), dim=1)
    step = model(longer[:, -1:], **{CACHE: cache}).logits
    assert not same(step, model(longer, use_cache=False).logits[:, -1:], 1e-4)


# generate


def reference(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """generate that recomputes everything at every step. Exact from a prompt of one token on."""
    torch.manual_seed(0)
    with simulated(model):
        return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=20),
    "beams": dict(do_sample=False, num_beams=3),
    "sampled beams": dict(do_sample=True, num_beams=2),
    "several beams": dict(do_sample=False, num_beams=3, num_return_sequences=3),
    "several samples": dict(do_sample=True, num_return_sequences=3),
}
ROTATED, GROUPS = "turboquant:bits=2,sinks=2,tail=4", "kivi:group=4,tail=4"


@pytest.mark.parametrize(
    ("label", "way"),
    [*((ROTATED, way) for way in WAYS), (GROUPS, "greedy"), (GROUPS, "beams"), ("int8", "greedy")],
)
def test_generate_has_the_tokens_of_the_simulation(label: str, way: str) -> None:
    options = WAYS[way]
    model, ids = coded(label), tokens(2, 1)
    expected = reference(model, ids, max_new_tokens=14, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, max_new_tokens=14, **options), expected)
    assert len({tuple(row) for row in expected.tolist()}) == len(expected)


def test_a_padded_batch_has_the_tokens_of_its_sequences_alone() -> None:
    """With no first tokens raw: those of a padded row are padding."""
    model, ids = coded("int4:sinks=0,tail=3"), tokens(3, 10)
    padded, mask = left_padded(ids, [0, 4, 7])
    together = model.generate(padded, attention_mask=mask, **GREEDY)
    for row, count in enumerate([0, 4, 7]):
        alone = model.generate(ids[row : row + 1, count:], **GREEDY)
        assert torch.equal(together[row, count:], alone[0])


def test_a_simulated_pass_refuses_padding() -> None:
    model, ids = coded("int8"), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with simulated(model), pytest.raises(ValueError, match="attention_mask must be all ones"):
        model(ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("label", ["int8", "turboquant:bits=2,sinks=2,tail=4"])
def test_a_kept_cache_continues_a_conversation(label: str) -> None:
    model, start, then = coded(label), tokens(1, 1), tokens(1, 1)
    expected = reference(model, start, **GREEDY)
    longer = torch.cat((expected, then), dim=1)
    expected = reference(model, longer, **GREEDY)
    cache = DynamicCache(config=model.config)
    torch.manual_seed(0)
    found = model.generate(start, **{CACHE: cache}, **GREEDY)
    # The last new token is not in the cache yet: feed it alone, as steps do.
    decode(model, found[:, -1:], cache)
    longer = torch.cat((found, then), dim=1)
    seen = torch.ones_like(longer)  # token 0 is padding otherwise
    found = model.generate(longer, attention_mask=seen, **{CACHE: cache}, **GREEDY)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == found.shape[1] - 1


@pytest.mark.parametrize("label", ["int8", "kivi:group=4,tail=12", "int8:sinks=1,tail=8"])
def test_assisted_decoding_takes_back_what_is_rejected(label: str) -> None:
    model, ids = coded(label), tokens(1, 4).repeat(1, 4)
    cache = DynamicCache(config=model.config)
    options = dict(prompt_lookup_num_tokens=3, max_new_tokens=16, do_sample=False)
    found = model.generate(ids, **{CACHE: cache}, **options)
    assert found.shape == (1, 32) and cache.get_seq_length() <= 31
    small = coded("int8", "yoco")
    found = model.generate(ids, assistant_model=small, max_new_tokens=16, do_sample=False)
    assert found.shape == (1, 32)


# Changes of the cache


@pytest.mark.parametrize("label", ["int4:sinks=2", "turboquant:bits=3,sinks=2,tail=4", "kivi:group=4,tail=8"])
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_one_that_never_had_more(label: str) -> None:
    model, ids, other = coded(label), tokens(2, 20), tokens(2, 5)
    cropped, short = DynamicCache(config=model.config), DynamicCache(config=model.config)
    decode(model, ids, cropped)
    keep = 20 - 4  # within the raw tail where there is one, so the same tokens are codes afterwards
    cropped.crop(-4)
    decode(model, ids[:, :keep], short)
    assert cropped.get_seq_length() == short.get_seq_length() == keep
    for a, b in zip(cropped.layers[:2], short.layers[:2], strict=True):
        for one, two in zip(a.sides, b.sides, strict=True):
            assert torch.equal(one.decoded()[:, :8], two.decoded()[:, :8])
    found, expected = (decode(model, other, cache) for cache in (cropped, short))
    # Tokens that had become codes stay codes after the crop, so only codes without a tail are alike.
    assert found.isfinite().all() and (not label.startswith("int4") or same(found, expected, 1e-9))
    cropped.crop(-cropped.get_seq_length())
    assert cropped.get_seq_length() == 0
    again = DynamicCache(config=model.config)
    assert same(decode(model, ids, cropped), decode(model, ids, again), 1e-9)


@torch.no_grad()
def test_a_crop_into_a_group_is_refused_and_changes_nothing() -> None:
    model, ids = coded("kivi:group=4,tail=4"), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    decode(model, ids, cache)
    before = [[x.clone() for side in layer.sides for x in side.tensors()] for layer in cache.layers[:2]]
    with pytest.raises(ValueError, match="must not end within a group of 4 tokens .*, got 14 tokens"):
        cache.crop(-6)
    after = [[x for side in layer.sides for x in side.tensors()] for layer in cache.layers[:2]]
    assert all(
        torch.equal(a, b)
        for one, two in zip(before, after, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    cache.crop(-8)
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="tokens_to_remove must be at most 0, got 3"):
        cache.layers[0].crop(3)


@torch.no_grad()
def test_reordered_repeated_and_selected_sequences_keep_their_own_codes() -> None:
    model, ids, then = coded("turboquant:bits=3,sinks=2,tail=4"), tokens(3, 14), tokens(4, 4)
    cache, order = DynamicCache(config=model.config), torch.tensor([2, 0, 1])
    decode(model, ids, cache)
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3, 4]))
    fresh = DynamicCache(config=model.config)
    decode(model, ids[[2, 2, 0, 1]], fresh)
    assert same(decode(model, then, cache), decode(model, then, fresh), 1e-9)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert same(decode(model, ids, cache), decode(model, ids), 1e-9)


# Bytes


@pytest.mark.parametrize("name", LABELS)
@torch.no_grad()
def test_resident_bytes_are_the_formula(name: str) -> None:
    model, ids = tiny_model("llama", "fusedkv"), tokens(3, 24)
    code_model(model, LABELS[name], collect_stored(model, tokens(8, 32)))
    model.to(torch.bfloat16)
    codecs, config = model.config.codecs, model.config
    cache = DynamicCache(config=config)
    model(ids[:, :9], **{CACHE: cache})
    decode(model, ids[:, 9:], cache)
    per_token = cache_bytes_per_token(config, torch.bfloat16)
    coded_tokens = len(codecs.coded_tokens(24))
    raw = config.plan.bytes_per_token(4, 8, torch.bfloat16)
    assert resident_bytes(cache) == 3 * (coded_tokens * per_token + (24 - coded_tokens) * raw)
    assert LanguageModel(model).cache_bytes_per_token() == per_token
    assert per_token < raw


def test_generate_reports_the_bytes_that_its_cache_held() -> None:
    model = tiny_model("llama", "fusedkv")
    adapter = LanguageModel(model)
    assert adapter.resident_cache_bytes is None
    adapter.generate(tokens(1, 8), 9)
    whole = cache_bytes_per_token(model.config, torch.float32)
    assert adapter.resident_cache_bytes == 16 * whole
    code_model(model, "int8", collect_stored(model, tokens(8, 32)))
    adapter.generate(tokens(1, 8), 9)
    assert adapter.resident_cache_bytes == 4 * whole


# What is refused


class Lossless(QuantizedLayer):
    """A quantized layer of transformers."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def test_caches_that_cannot_hold_codes_are_refused() -> None:
    model, ids = coded("int8"), tokens(1, 6)
    filled = DynamicCache()
    filled.update(torch.zeros(1, 4, 3, 8).double(), torch.zeros(1, 4, 3, 8).double(), 0)
    for cache, name in (
        (StaticCache(config=model.config, max_cache_len=16), "a StaticLayer"),
        (Cache(layers=[Lossless() for _ in range(LAYERS)]), "a Lossless"),
        (filled, "a DynamicLayer"),
    ):
        with pytest.raises(ValueError, match=f"must be a DynamicCache, .* with codecs, got {name}"):
            model.generate(ids, **{CACHE: cache}, max_new_tokens=2)
    paged = LayerCache(object(), 0, "fusedkv", {}, CodedDynamicLayer)  # as continuous batching has
    with pytest.raises(ValueError, match="must be a DynamicCache, .* with codecs, got object"):
        paged.store(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8), 4)
    with pytest.raises(ValueError, match="must be a DynamicCache, .* got a StaticLayer"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    assert model.generate(ids, **{CACHE: DynamicCache()}, max_new_tokens=2).shape == (1, 8)


def test_codecs_of_one_side_leave_the_other_as_it_is() -> None:
    model, ids = tiny_model("llama", "vanilla").double(), tokens(2, 12)
    pair = (Codec("int", 4, "channel"), RAW)
    code_model(model, CodecPlan("keys", [pair] * LAYERS, 1, 2), collect_stored(model, tokens(8, 32)))
    with simulated(model), torch.no_grad():
        expected = model(ids, use_cache=False).logits
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        assert same(decode(model, ids, cache), expected)
    keys, values = cache.layers[0].sides
    assert keys.num_coded == 9 and values.num_coded == 0 and values.num_tokens == 12
