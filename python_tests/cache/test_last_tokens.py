"""KVCache of codes with raw last tokens: every row reads its last n tokens raw, whatever the steps were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cache_codecs import codecs_of, decoded_copy, make_model
from tiny import LAYERS, tiny_decoder
from torch import Tensor

from fusedkv_ext.cache.cache_codecs import CacheCodecs
from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.cache.last_tokens import SPARE
from fusedkv_ext.layers.decoder import Decoder

BATCH, MAX_LEN, TAIL = 3, 120, 5
LABELS = ("int8", "fp8:sinks=4", "int4", "token:bits=4,sinks=0", "turboquant")
PLANS = ("vanilla", "fusedkv", "fusedkv-lite", "yoco++", "skipv1", "patchwork", "dense-fusion")


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def with_tail(label: str, tail: int = TAIL) -> str:
    return f"{label}{',' if ':' in label else ':'}tail={tail}"


class Pair:
    """A cache of codes, and a raw cache that gets the same rows."""

    def __init__(self, model: Decoder, codecs: CacheCodecs, page_size: int | None) -> None:
        self.model, self.codecs = model, codecs
        self.coded = model.make_cache(BATCH, MAX_LEN, page_size=page_size, codecs=codecs)
        self.raw = model.make_cache(BATCH, MAX_LEN)

    def step(self, count: int | list[int]) -> None:
        rows = max(count) if isinstance(count, list) else count
        for cache in (self.coded, self.raw):
            cache.advance(count)
        for i in self.raw.plan.storage_layers:
            pair = [
                None if side[i] is None else torch.randn(BATCH, rows, side[i].shape[2], 16)
                for side in (self.raw._keys, self.raw._values)
            ]
            for cache in (self.coded, self.raw):
                cache.append(i, *pair)

    def both(self, name: str, *args: Any) -> None:
        for cache in (self.coded, self.raw):
            getattr(cache, name)(*args)

    def seen_at(self, back: int) -> KVCache:
        """What the rows ``back`` before the last ones should read: a raw cache."""
        found, raw = decoded_copy(self.coded, self.codecs), self.raw
        lengths = [max(length - back, 0) for length in raw.lengths]
        for i in raw.plan.storage_layers:
            for mixed, history in ((found._keys[i], raw._keys[i]), (found._values[i], raw._values[i])):
                for b, length in enumerate(lengths if mixed is not None else ()):
                    begin = max(length - self.codecs.codecs.tail, 0)
                    mixed[b, begin:length] = history[b, begin:length]
        found.crop(lengths)
        return found

    def check(self, rows: int) -> None:
        for layer in self.model.model.layers:
            attention = layer.self_attn
            q = torch.randn(BATCH, rows, attention.num_heads, attention.head_dim)
            with torch.no_grad():
                actual = attention._attend_cached(q, self.coded)
                for back in range(rows):
                    row = slice(rows - 1 - back, rows - back)
                    expected = attention._attend_cached(q[:, row], self.seen_at(back))
                    atol = 1e-4 * expected.abs().max().item()
                    torch.testing.assert_close(actual[:, row], expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("plan", "page_size"), [("fusedkv", None), *((plan, 4) for plan in PLANS)])
def test_each_row_reads_its_last_tokens_raw(plan: str, label: str, page_size: int | None) -> None:
    """Through prompts of different lengths, single tokens, a step that needs the larger ring, and a crop."""
    model = make_model(plan)
    pair = Pair(model, codecs_of(model, with_tail(label)), page_size)
    pair.step([2, 7, 30])
    pair.check(6)
    for count in (1, 1, 1, 40, 1, 3):
        pair.step(count)
        pair.check(min(count, 2))
    pair.both("crop", [length - SPARE for length in pair.raw.lengths])
    pair.check(1)  # raw rows as before: the ring still has them
    pair.both("reorder", [2, 0, 0])
    pair.step(2)
    pair.check(3)


@pytest.mark.parametrize("label", LABELS)
def test_a_long_crop_reads_codes_where_raw_rows_are_gone(label: str) -> None:
    model = make_model("fusedkv")
    codecs = codecs_of(model, with_tail(label))
    pair = Pair(model, codecs, page_size=4)
    pair.step([90, 80, 70])
    for _ in range(20):  # the ring of the prompt is gone
        pair.step(1)
    pair.both("crop", [40, 7, 200])
    kept = decoded_copy(pair.coded, codecs)
    for i in pair.raw.plan.storage_layers:
        for b in (0, 1):  # the third sequence is unchanged
            pair.raw.keys(i)[b], pair.raw.values(i)[b] = kept.keys(i)[b], kept.values(i)[b]
    pair.check(1)
    for count in (1, 2, 1):
        pair.step(count)
        pair.check(count)
    pair.both("free", 1)
    pair.check(1)


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv"])
@pytest.mark.parametrize("window", [3, TAIL, TAIL + 1, 30])
def test_windows_shorter_and_longer_than_the_tail(plan: str, window: int) -> None:
    layer_types = ["sliding_attention"] * LAYERS
    model = tiny_decoder(plan, sliding_window=window, layer_types=layer_types).eval()
    pair = Pair(model, codecs_of(model, with_tail("int4")), None)
    for count in ([2, 7, 30], 1, 40, 1):
        pair.step(count)
        pair.check(2)


@pytest.mark.parametrize("label", ["int8:tail=8", "turboquant:tail=8"])
@pytest.mark.parametrize("steps", [[40, 1, 1, 20], [1] * 62, [31, 31]])
def test_logits_do_not_depend_on_the_steps(label: str, steps: list[int]) -> None:
    model = make_model("fusedkv")
    codecs = codecs_of(model, label)
    ids = torch.randint(0, 61, (BATCH, 62))
    cache, whole = (model.make_cache(BATCH, 62, codecs=codecs) for _ in range(2))
    with torch.no_grad():
        expected = model(ids, cache=whole)
        got = torch.cat([model(part, cache=cache) for part in ids.split(steps, dim=1)], dim=1)
    # A code may round the other way: a step of other length sums in another order.
    assert (got - expected).norm() < 2e-3 * expected.norm()  # one raw token more: 6e-3


def test_raw_last_tokens_bring_the_logits_closer() -> None:
    model = make_model("fusedkv")
    ids = torch.randint(0, 61, (BATCH, 40))

    def logits(codecs: CacheCodecs | None) -> Tensor:
        with torch.no_grad():
            return model(ids, cache=model.make_cache(BATCH, 40, codecs=codecs))

    raw = logits(None)
    errors = [
        float((logits(codecs_of(model, f"turboquant:key_bits=4,value_bits=4,tail={n}")) - raw).norm())
        for n in (0, 8, 40)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5 * raw.norm()


def test_memory_is_that_of_the_codes_and_one_ring() -> None:
    model = make_model("fusedkv")
    codecs = codecs_of(model, "int8:tail=128,sinks=4")
    cache = model.make_cache(1, 4096, codecs=codecs)
    before = cache.nbytes
    sizes = (cache.plan, 2, 16, torch.float32)
    a_row = codecs.codecs.raw_bytes(*sizes) // (4 + 128)
    assert before == (4096 - 4) * codecs.codecs.bytes_per_token(*sizes) + (4 + 128 + SPARE) * a_row
    cache.advance(1000)
    assert cache.nbytes == before + 1136 * a_row  # 128 + 999, in pages of 16
    cache.advance(1)
    assert cache.nbytes == before


def test_the_small_ring_stays_where_it_is() -> None:
    """A CUDA graph of a decode step knows its address."""
    model = make_model("fusedkv")
    pair = Pair(model, codecs_of(model, with_tail("int4")), None)
    pair.step(1)
    addresses = [x.data_ptr() for x in pair.coded.last.tensors]
    for count in (50, 1, 30, 2):
        pair.step(count)
    assert [x.data_ptr() for x in pair.coded.last.tensors] == addresses


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_its_own_last_tokens(make: Callable[[KVCache], KVCache]) -> None:
    model = make_model("fusedkv")
    cache = model.make_cache(BATCH, MAX_LEN, codecs=codecs_of(model, with_tail("turboquant")))
    ids = torch.randint(0, 61, (BATCH, 50))
    with torch.no_grad():
        model(ids, cache=cache)
        twin = make(cache)
        expected = model(ids[:, :7], cache=cache)
        cache.reset()
        model(ids, cache=cache)
        assert torch.equal(model(ids[:, :7], cache=twin), expected)


def test_a_tail_longer_than_the_cache_keeps_all_raw() -> None:
    model = make_model("fusedkv")
    ids = torch.randint(0, 61, (BATCH, 20))
    cache, raw = (model.make_cache(BATCH, 20, codecs=c) for c in (codecs_of(model, "int4:tail=128"), None))
    with torch.no_grad():
        for part in ids.split([12, 1, 7], dim=1):
            torch.testing.assert_close(model(part, cache=cache), model(part, cache=raw))


def test_rows_of_another_step_are_refused_before_anything_is_written() -> None:
    model = make_model("fusedkv")
    pair = Pair(model, codecs_of(model, with_tail("int4")), None)
    pair.step(4)
    cache = pair.coded
    parts = [*cache.first.tensors, *cache.last.tensors, cache.keys(0)]
    before = [x.clone() for x in parts]
    cache.advance(1)
    wrong = torch.randn(BATCH, 3, 2, 16)
    with pytest.raises(ValueError, match="must get the 1 rows of this step, got 3"):
        cache.append(0, wrong, wrong)
    assert all(torch.equal(x, y) for x, y in zip(parts, before, strict=True))
