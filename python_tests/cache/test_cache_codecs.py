"""KVCache of codes: what append writes, what attention reads, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import LAYERS, PLANS, randomise_fusion, tiny_config, tiny_decoder
from torch import Tensor

from fusedkv_ext.cache.cache_codecs import CacheCodecs
from fusedkv_ext.cache.codec import Codec, CodecPlan, Encoded
from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.plan import CachePlan

LABELS = ("int8", "fp8", "fp8:sinks=4", "int4:sinks=0", "int4")
LABELS += (
    "token",
    "token:bits=4,sinks=0",
    "turboquant:tail=0",
    "turboquant:key_bits=4,value_bits=4,sinks=0,tail=0",
)
SOME_PLANS = ("vanilla", "fusedkv", "fusedkv-lite", "yoco++", "skipv1", "patchwork", "dense-fusion")
BATCH, PROMPT, MAX_LEN = 3, 20, 32


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def make_model(plan: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(tiny_config(plan)).eval()
    randomise_fusion(model)
    return model


def codecs_of(model: Decoder, label: str | CodecPlan) -> CacheCodecs:
    """Fitted to a random text."""
    raw = model.make_cache(16, 64)
    with torch.no_grad():
        model(torch.randint(0, 61, (16, 60)), cache=raw)
    return CacheCodecs.fit(label, raw)


def filled(model: Decoder, codecs: CacheCodecs, page_size: int | None = None) -> KVCache:
    """A cache of codes after a prompt and one more token."""
    cache = model.make_cache(BATCH, MAX_LEN, page_size=page_size, codecs=codecs)
    ids = torch.randint(0, 61, (BATCH, PROMPT))
    with torch.no_grad():
        model(ids, cache=cache)
        model(ids[:, :1], cache=cache)
    return cache


def tokens_of(cache: KVCache, tensor: Tensor, b: int) -> Tensor:
    """The rows of sequence b in a tensor of the cache, (tokens, g, ...)."""
    count = cache.stored_lengths[b]
    if cache.block_table is None:
        return tensor[b, :count]
    return tensor[cache.block_table[b, : -(-count // cache.page_size)].long()].flatten(0, 1)[:count]


def decoded_copy(cache: KVCache, codecs: CacheCodecs) -> KVCache:
    """A raw, contiguous cache of what the codes stand for, behind the raw first tokens."""
    raw = KVCache(cache.plan, BATCH, cache.max_len, cache.num_kv_heads, cache.head_dim)
    raw.advance(list(cache.lengths))
    for i in cache.plan.storage_layers:
        for name in ("keys", "values"):
            own, copy = (getattr(x, f"_{name}")[i] for x in (cache, raw))
            for b in range(BATCH if own is not None else 0):
                rows, codec = tokens_of(cache, own, b), getattr(codecs, name)[i]
                if codec is not None:
                    scales = None if cache.scales is None else getattr(cache.scales, name)[i]
                    of_tokens = None if scales is None else tokens_of(cache, scales, b)
                    rows = codec.decode(Encoded(rows, of_tokens))
                if cache.first is not None:
                    first = getattr(cache.first, name)[i][b]
                    rows = torch.cat((first[: cache.lengths[b]], rows))
                copy[b, : len(rows)] = rows
    return raw


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(
    "plan", ["vanilla", "fusedkv", "fusedkv-lite", "yoco++", "skipv1", "patchwork", "dense-fusion"]
)
def test_attention_reads_codes_as_the_numbers_that_they_stand_for(
    plan: str, label: str, page_size: int | None
) -> None:
    model = make_model(plan)
    codecs = codecs_of(model, label)
    cache = filled(model, codecs, page_size)
    raw = decoded_copy(cache, codecs)
    for layer in model.model.layers:
        attention = layer.self_attn
        for steps in (1, PROMPT):  # rows of the first tokens too
            q = torch.randn(BATCH, steps, attention.num_heads, attention.head_dim)
            with torch.no_grad():
                actual, expected = attention._attend_cached(q, cache), attention._attend_cached(q, raw)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_ranges_hold_the_first_tokens_of_the_sample() -> None:
    model = make_model("vanilla")
    raw = model.make_cache(4, 16)
    with torch.no_grad():
        model(torch.randint(0, 61, (4, 12)), cache=raw)
    raw.keys(0)[:, :1] *= 100
    codecs = CacheCodecs.fit("int8", raw)
    first, codec = raw.keys(0)[:, :1], codecs.keys[0]
    assert (codec.decode(codec.encode(first)) - first).abs().max() < 0.01 * first.abs().max()


def test_readers_fold_the_scale_of_the_layer_that_stores() -> None:
    model = make_model("fusedkv")
    codecs = codecs_of(model, "int8")
    reader = model.model.layers[LAYERS - 1].self_attn
    assert codecs.values[LAYERS - 1] is None  # it has no scale of its own
    cache, q = filled(model, codecs), torch.randn(BATCH, 1, 4, 16)
    with torch.no_grad():
        before = reader._attend_cached(q, cache)
        for j in reader.source_layers:
            codecs.values[j].scale.mul_(2)
            codecs.values[j].center.mul_(2)
        codecs._folded.clear()
        torch.testing.assert_close(reader._attend_cached(q, cache), 2 * before)


@pytest.mark.parametrize("label", LABELS)
def test_append_writes_the_codes_of_the_codec(label: str) -> None:
    model = make_model("vanilla")
    codecs = codecs_of(model, label)
    cache, raw = model.make_cache(1, 8, codecs=codecs), model.make_cache(1, 8)
    new = torch.randn(2, 1, 5, 2, 16)
    for x in (cache, raw):
        x.advance(5)
        x.append(0, new[0], new[1])
    for tensors, side in ((cache.keys(0), codecs.keys), (cache.values(0), codecs.values)):
        expected = side[0].encode(new[0] if side is codecs.keys else new[1]).codes
        found = tensors[:, : 5 - codecs.codecs.sinks]
        assert found.dtype == expected.dtype
        expected = expected[:, codecs.codecs.sinks :]
        same = found.view(torch.uint8) == expected.view(torch.uint8)
        assert same.float().mean() > 0.99  # a tie may round the other way
        apart = side[0].values(found) - side[0].values(expected)
        assert apart.abs().max() <= (32 if label.startswith("fp8") else 1)
    if cache.scales is not None:
        n = codecs.codecs.sinks
        torch.testing.assert_close(
            cache.scales.keys[0][:, : 5 - n], codecs.keys[0].encode(new[0]).scales[:, n:]
        )


@pytest.mark.parametrize("label", LABELS)
def test_nbytes_are_those_of_the_codec_plan(label: str) -> None:
    model = make_model("fusedkv")
    codecs = codecs_of(model, label)
    cache = model.make_cache(BATCH, MAX_LEN, codecs=codecs)
    sizes, sinks = (cache.plan, 2, 16, torch.float32), codecs.codecs.sinks
    coded = (MAX_LEN - sinks) * codecs.codecs.bytes_per_token(*sizes)
    assert cache.nbytes == BATCH * (coded + codecs.codecs.raw_bytes(*sizes))


@pytest.mark.parametrize("label", [*LABELS, "turboquant", "int8:tail=5"])
@pytest.mark.parametrize("plan", SOME_PLANS)
def test_a_prompt_may_want_its_last_logits_only(plan: str, label: str) -> None:
    """The last layer that stores then has queries of one row and keys of all."""
    model = make_model(plan)
    codecs, ids = codecs_of(model, label), torch.randint(0, 61, (BATCH, PROMPT))
    some, whole = (model.make_cache(BATCH, MAX_LEN, codecs=codecs) for _ in range(2))
    with torch.no_grad():
        expected = model(ids, cache=whole)[:, -1:]
        got = model(ids, cache=some, logits_to_keep=1)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        for cache in (some, whole):
            got, expected = expected, model(ids[:, :1], cache=cache)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_reorder_and_crop_keep_the_codes_of_the_tokens() -> None:
    model = make_model("fusedkv")
    for label in LABELS:
        for page_size in (None, 4):
            cache = filled(model, codecs_of(model, label), page_size)
            before = decoded_rows(cache)
            cache.crop(10)
            cache.reorder([2, 0, 0])
            after = decoded_rows(cache)
            for b, source in enumerate([2, 0, 0]):
                for name, rows in after[b].items():
                    assert torch.equal(rows, before[source][name][: len(rows)]), name
                assert len(after[b]["codes"]) + len(after[b]["first"]) == 10


def decoded_rows(cache: KVCache) -> list[dict[str, Tensor]]:
    """The keys of layer 0, by sequence: raw first tokens, and the bytes and scales of the others."""
    tensor = cache.keys(0).view(torch.uint8)
    return [
        {
            "codes": tokens_of(cache, tensor, b).clone(),
            "first": cache.seq_lens.new_empty(0)
            if cache.first is None
            else cache.first.keys[0][b, : cache.lengths[b]].clone(),
            "scales": cache.seq_lens.new_empty(0)
            if cache.scales is None
            else tokens_of(cache, cache.scales.keys[0], b).clone(),
        }
        for b in range(BATCH)
    ]


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("steps", [[3, 1, 1, 1, 6, 1], [20, 1], [1] * 9])
def test_first_tokens_are_raw_whatever_the_steps(steps: list[int], page_size: int | None) -> None:
    """Against a raw cache: rotated keys are the same, and the others are codes of the same."""
    model = make_model("fusedkv")
    codecs = codecs_of(model, "int8:sinks=4")
    raw, cache = (
        model.make_cache(BATCH, MAX_LEN),
        model.make_cache(BATCH, MAX_LEN, page_size=page_size, codecs=codecs),
    )
    ids = torch.randint(0, 61, (BATCH, sum(steps)))
    for part in ids.split(steps, dim=1):
        with torch.no_grad():
            expected, got = model(part, cache=raw), model(part, cache=cache)
        assert (got - expected).norm() < 0.08 * expected.norm()
    copy, n = decoded_copy(cache, codecs), sum(steps)
    torch.testing.assert_close(copy.keys(0)[:, :4], raw.keys(0)[:, :4])
    step = codecs.keys[0].scale.max().item()
    torch.testing.assert_close(copy.keys(0)[:, :n], raw.keys(0)[:, :n], rtol=0, atol=0.51 * step)


@pytest.mark.parametrize("label", ["int4", "turboquant:tail=0"])
@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
def test_sequences_may_be_shorter_than_their_first_tokens(page_size: int | None, label: str) -> None:
    model = make_model("fusedkv-lite")
    codecs = codecs_of(model, label)
    cache = model.make_cache(BATCH, MAX_LEN, page_size=page_size, codecs=codecs)

    def step(count: int | list[int]) -> None:
        cache.advance(count)
        rows = max(count) if isinstance(count, list) else count
        for i in cache.plan.storage_layers:
            key, value = (
                None if side[i] is None else torch.randn(BATCH, rows, side[i].shape[2], 16)
                for side in (cache._keys, cache._values)
            )
            cache.append(i, key, value)

    step([2, 7, 20])
    for count in (1, 1, 1, 3):
        step(count)
        raw = decoded_copy(cache, codecs)
        for layer in model.model.layers:
            for rows in (1, 7):
                q = torch.randn(BATCH, rows, 4, 16)
                with torch.no_grad():
                    actual, expected = (layer.self_attn._attend_cached(q, x) for x in (cache, raw))
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    cache.crop(3)
    assert cache.lengths == (3, 3, 3) and cache.stored_lengths == (0, 0, 0)
    step(4)
    raw = decoded_copy(cache, codecs)
    q = torch.randn(BATCH, 7, 4, 16)
    with torch.no_grad():
        actual, expected = (model.model.layers[3].self_attn._attend_cached(q, x) for x in (cache, raw))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_first_tokens_leave_the_window() -> None:
    model = tiny_decoder("vanilla", sliding_window=6, layer_types=["sliding_attention"] * LAYERS).eval()
    codecs = codecs_of(model, "int8:sinks=4")
    raw, cache = model.make_cache(2, MAX_LEN), model.make_cache(2, MAX_LEN, codecs=codecs)
    ids = torch.randint(0, 61, (2, 24))
    for part in ids.split([12, 6, 1, 5], dim=1):
        with torch.no_grad():
            expected, got = model(part, cache=raw), model(part, cache=cache)
        assert (got - expected).norm() < 0.08 * expected.norm()


def test_a_copied_cache_has_its_own_first_tokens_and_scales() -> None:
    model = make_model("fusedkv")
    cache = filled(model, codecs_of(model, "turboquant:tail=0"))
    twin = copy.deepcopy(cache)
    ids = torch.randint(0, 61, (BATCH, 7))
    with torch.no_grad():
        expected = model(ids, cache=copy.deepcopy(cache))
        cache.reset()
        model(ids, cache=cache)
    assert twin.lengths == (PROMPT + 1,) * BATCH
    assert not torch.equal(twin.first.keys[0], cache.first.keys[0])
    assert not torch.equal(twin.scales.keys[0], cache.scales.keys[0])
    with torch.no_grad():
        assert torch.equal(model(ids, cache=twin), expected)


def test_a_cache_needs_room_beyond_its_first_tokens() -> None:
    model = make_model("vanilla")
    with pytest.raises(ValueError, match="max_len must exceed the 4 first tokens that stay raw, got 4"):
        model.make_cache(1, 4, codecs=codecs_of(model, "int4"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("kivi:group=16", "scales per channel or per token"),
        ("turboquant:bits=3,tail=0", "8 or 4 bits and scales per channel or per token, got grid3"),
        ("pca:rank=8,sinks=0", "scales per channel or per token, got raw, rank 8"),
        ("int4:bits=3,sinks=0", "8 or 4 bits"),
    ],
)
def test_what_the_cache_cannot_hold_is_refused(label: str, message: str) -> None:
    model = make_model("vanilla")
    with pytest.raises(ValueError, match=message):
        codecs_of(model, label)


def test_codecs_for_another_plan_or_head_dim_are_refused() -> None:
    codecs = codecs_of(make_model("vanilla"), "int8")
    with pytest.raises(ValueError, match="stores no keys"):
        make_model("fusedkv").make_cache(1, 8, codecs=codecs)
    with pytest.raises(ValueError, match="for the 5 layers"):
        KVCache(CachePlan.named("vanilla", 5), 1, 8, 2, 16, codecs=codecs)
    with pytest.raises(ValueError, match="head dim"):
        KVCache(PLANS["vanilla"], 1, 8, 2, 32, codecs=codecs)


def test_sources_of_one_sum_must_be_coded_alike() -> None:
    model = make_model("fusedkv")
    int8, fp8, raw = Codec("int", 8, "channel"), Codec("e4m3", 0, "channel"), Codec()
    plan = CodecPlan("mixed", [(int8, int8), (fp8, fp8), (raw, raw), (raw, raw)])
    with pytest.raises(ValueError, match="coded alike"):
        model.make_cache(1, 8, codecs=codecs_of(model, plan))


def test_one_layer_has_one_codebook() -> None:
    model = make_model("vanilla")
    grid, linear = Codec("grid", 4, "token", rotate=True), Codec("int", 4, "token")
    plan = CodecPlan("mixed", [(grid, linear)] * LAYERS)
    with pytest.raises(ValueError, match="layer 0: 4-bit codes of keys and values must be of one kind"):
        codecs_of(model, plan)


def test_a_coded_cache_is_no_sample_to_fit_to() -> None:
    model = make_model("vanilla")
    codecs = codecs_of(model, "int8")
    with pytest.raises(ValueError, match="raw keys and values"):
        CacheCodecs.fit("int8", model.make_cache(1, 8, codecs=codecs))
    with pytest.raises(ValueError, match="more than"):
        CacheCodecs.fit("int8", model.make_cache(1, 8))


def test_more_bits_are_closer_to_the_numbers() -> None:
    model = make_model("fusedkv")
    ids = torch.randint(0, 61, (2, 30))

    def logits(label: str | None) -> Tensor:
        cache = model.make_cache(2, 30, codecs=None if label is None else codecs_of(model, label))
        with torch.no_grad():
            return torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(30)], 1)

    raw = logits(None)
    errors = [
        float((logits(label) - raw).norm() / raw.norm()) for label in ("int8", "int4:sinks=0,source_factor=1")
    ]
    assert 0 < errors[0] < errors[1]
