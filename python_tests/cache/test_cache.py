"""KVCache: layout, lengths, pages. What it holds is compared with lists of tokens kept by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tiny import NAMED, PLANS
from torch import Tensor

from fusedkv_ext.cache import kv_cache
from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.errors import CacheFullError
from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary
from fusedkv_ext.plan import CachePlan

HEADS, DIM = 2, 16
KINDS = {"contiguous": None, "paged": 4}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def make_cache(plan: str = "fusedkv", batch: int = 3, max_len: int = 20, **options: object) -> KVCache:
    return KVCache(PLANS[plan], batch, max_len, HEADS, DIM, **options)


def tokens(cache: KVCache, layer: int, b: int) -> tuple[Tensor, Tensor]:
    """The valid keys and values of sequence b, (length, heads, D) each."""
    length = cache.lengths[b]
    found = []
    for tensor in (cache.keys(layer), cache.values(layer)):
        if cache.block_table is None:
            found.append(tensor[b, :length])
        else:
            pages = cache.block_table[b, : -(-length // cache.page_size)].long()
            found.append(tensor[pages].flatten(0, 1)[:length])
    return tuple(found)


def append_random(cache: KVCache, steps: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Fills the rows of a step in all storage layers; returns them."""
    rows = {}
    for layer in cache.plan.storage_layers:
        shape = (cache.batch_size, steps, HEADS, DIM)
        rows[layer] = torch.randn(shape), torch.randn(shape)
        cache.append(layer, *rows[layer])
    return rows


@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
def test_fusedkv_needs_exactly_half_of_vanillas_bytes(page_size: int | None) -> None:
    vanilla = make_cache("vanilla", page_size=page_size)
    assert vanilla.nbytes == 4 * 2 * 3 * 20 * HEADS * DIM * 4
    assert make_cache("fusedkv", page_size=page_size).nbytes * 2 == vanilla.nbytes


@pytest.mark.parametrize("plan", PLANS)
def test_bytes_are_those_of_the_plan(plan: str) -> None:
    cache = make_cache(plan, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 20 * PLANS[plan].bytes_per_token(HEADS, DIM, torch.bfloat16)


def test_layout() -> None:
    cache = make_cache("skipv1")
    assert cache.keys(1).shape == (3, 20, 2, DIM) and cache.values(1).shape == (3, 20, 1, DIM)
    assert cache.block_table is None and cache.free_pages is None
    paged = make_cache("skipv1", page_size=8, num_pages=5)
    assert paged.keys(1).shape == (5, 8, 2, DIM) and paged.values(1).shape == (5, 8, 1, DIM)
    assert paged.block_table.shape == (3, 3) and paged.block_table.dtype == torch.int32
    assert paged.seq_lens.tolist() == [0, 0, 0] and paged.seq_lens.dtype == torch.int32
    assert "pages of 8" in repr(paged) and "fusedkv" in repr(make_cache())


@pytest.mark.parametrize("plan", NAMED)
def test_layers_that_only_read_own_nothing(plan: str) -> None:
    cache = make_cache(plan)
    for layer in set(range(4)) - set(PLANS[plan].storage_layers):
        with pytest.raises(ValueError, match=f"stores keys, got {layer};"):
            cache.keys(layer)
        with pytest.raises(ValueError, match=f"stores values, got {layer};"):
            cache.values(layer)


@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
def test_ragged_prompts_then_single_tokens(page_size: int | None) -> None:
    cache = make_cache(page_size=page_size)
    lengths = [5, 0, 9]
    cache.advance(torch.tensor(lengths))
    rows = append_random(cache, 9)
    assert cache.lengths == (5, 0, 9) and cache.seq_lens.tolist() == lengths
    assert cache.positions(2).tolist() == [[3, 4], [-2, -1], [7, 8]]
    for layer, (key, value) in rows.items():
        for b, length in enumerate(lengths):
            held = tokens(cache, layer, b)
            assert torch.equal(held[0], key[b, 9 - length :]) and torch.equal(held[1], value[b, 9 - length :])
    cache.advance(1)
    step = append_random(cache, 1)
    assert cache.lengths == (6, 1, 10)
    assert torch.equal(tokens(cache, 0, 2)[0], torch.cat((rows[0][0][2], step[0][0][2])))


@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
def test_a_layer_that_stores_one_side_only(page_size: int | None) -> None:
    cache = make_cache("svformer", page_size=page_size)
    cache.advance(6)
    key = torch.randn(3, 6, HEADS, DIM)
    cache.append(1, key, None)
    pages = slice(None) if page_size is None else cache.block_table[0, :2].long()
    held = cache.keys(1)[0, :6] if page_size is None else cache.keys(1)[pages].flatten(0, 1)[:6]
    assert torch.equal(held, key[0])
    with pytest.raises(ValueError, match="values: no\\), got key: yes, value: yes"):
        cache.append(1, key, key)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
def test_keys_and_queries_are_rotated_on_the_way(page_size: int | None, interleaved: bool) -> None:
    rope = RotaryEmbedding(DIM, interleaved=interleaved)
    options = {"rotary": rope.tables(20), "rotary_interleaved": interleaved}
    caches = [make_cache("svformer", page_size=page_size) for _ in range(2)]
    for cache in caches:
        for layer in range(PLANS["svformer"].num_layers):
            for tensor in (cache._keys[layer], cache._values[layer]):
                if tensor is not None:
                    tensor.zero_()
        cache.advance([6, 3, 0])
    cos, sin = rope.cos_sin(caches[0].positions(6))
    query = torch.randn(3, 6, 4, DIM)
    rotated = apply_rotary(query, cos, sin, interleaved)
    for layer in range(PLANS["svformer"].num_layers):
        key = torch.randn(3, 6, HEADS, DIM)
        value = key if layer == 0 else None
        caches[0].append(layer, apply_rotary(key, cos, sin, interleaved), value)
        got = caches[1].rope_append(layer, query, key, value, **options)
        torch.testing.assert_close(caches[1].keys(layer), caches[0].keys(layer))
        torch.testing.assert_close(got[0], rotated[0])
        torch.testing.assert_close(got[1, 3:], rotated[1, 3:])
        fewer = caches[1].rope_append(layer, query[:, -2:], key, value, **options)
        assert torch.equal(fewer, got[:, -2:])
    assert torch.equal(caches[1].values(0), caches[0].values(0))
    reading = make_cache(page_size=page_size)
    reading.advance([6, 3, 0])
    assert torch.equal(reading.rope_append(3, query, None, None, **options), got)
    reading.append(3, None, None)  # nothing to store


def test_positions_of_equally_long_sequences() -> None:
    cache = make_cache()
    cache.advance(7)
    assert cache.positions(3).tolist() == [4, 5, 6]


@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
def test_a_failed_advance_changes_nothing(page_size: int | None) -> None:
    cache = make_cache(page_size=page_size)
    cache.advance([4, 6, 0])
    before = cache.lengths, cache.free_pages
    for bad, message in (
        (15, "max_len=20 tokens, got 6 \\+ 15 for sequence 1"),
        ([1, 1], "n must have one number for each of 3 sequences, got 2"),
        ([1, 1, -1], "must not be negative"),
        ([1, 2, 2], "got 1 for sequence 0 with 4 tokens and 2 for another"),
        (torch.ones(3), "1-D integer tensor"),
        (torch.ones(3, 1, dtype=torch.int64), "1-D integer tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.advance(bad)
    assert (cache.lengths, cache.free_pages) == before
    assert cache.seq_lens.tolist() == [4, 6, 0]


def test_the_pool_may_be_smaller_than_the_sequences_together() -> None:
    cache = make_cache(page_size=4, num_pages=5)
    cache.advance([8, 4, 4])
    with pytest.raises(CacheFullError, match=r"need 3 more pages of 4 tokens, got 1 free of 5"):
        cache.advance(1)
    assert cache.lengths == (8, 4, 4) and cache.free_pages == 1
    cache.free(0)
    assert cache.lengths == (0, 4, 4) and cache.free_pages == 3
    cache.advance(1)
    assert cache.free_pages == 0


def test_appending_without_room_is_an_error() -> None:
    cache = make_cache()
    rows = torch.randn(3, 2, HEADS, DIM)
    with pytest.raises(ValueError, match="must get the 0 rows of this step, got 2"):
        cache.append(0, rows, rows)
    cache.advance(3)
    with pytest.raises(ValueError, match="must get the 3 rows of this step, got 2"):
        cache.append(0, rows, rows)
    with pytest.raises(ValueError, match=r"layer 3 must get what it stores \(keys: no"):
        cache.append(3, rows, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch_size must be a positive int, got 0"),
        ({"max_len": -1}, "max_len must be a positive int"),
        ({"page_size": 0}, "page_size must be a positive int"),
        ({"page_size": 4, "num_pages": 0}, "num_pages must be a positive int"),
        ({"num_pages": 4}, "num_pages must be None without page_size, got 4"),
    ],
)
def test_bad_sizes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(**options)


def test_bad_indices() -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match="b must be in 0..2, got 3"):
        cache.free(3)
    with pytest.raises(ValueError, match=r"index\[1\] must be in 0..2, got -1"):
        cache.reorder([0, -1, 2])
    with pytest.raises(ValueError, match="index must have one number for each of 3"):
        cache.reorder(torch.tensor([0]))
    with pytest.raises(ValueError, match="length must not be negative"):
        cache.crop(-2)


@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
def test_a_cache_made_in_inference_mode_works_outside(page_size: int | None) -> None:
    with torch.inference_mode():
        cache = make_cache(page_size=page_size)
        cache.advance(3)
    cache.advance(2)
    append_random(cache, 2)
    cache.reorder([2, 0, 0])
    cache.reset()
    assert cache.lengths == (0, 0, 0)


def test_shared_pages_are_copied_when_written() -> None:
    cache = make_cache("yoco", batch=2, page_size=4, num_pages=3)
    cache.advance([6, 0])
    append_random(cache, 6)
    cache.reorder([0, 0])
    assert cache.free_pages == 1 and cache.block_table[0].equal(cache.block_table[1])
    old = tokens(cache, 0, 0)[0].clone()
    cache.advance(1)  # one owner gets a copy of the shared last page, the last one free; the other keeps it
    assert cache.free_pages == 0 and cache.block_table[0, 1] != cache.block_table[1, 1]
    step = append_random(cache, 1)
    for b in range(2):
        assert torch.equal(tokens(cache, 0, b)[0], torch.cat((old, step[0][0][b])))


class Twin:
    """A cache, and beside it the rows that each sequence should hold."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(cache.batch_size)]
        self.was_reordered = False

    def step(self, choose: random.Random) -> None:
        getattr(
            self, choose.choice(["grow"] * 5 + ["refill", "crop", "crop_each", "reorder", "free", "reset"])
        )(choose)
        self.check()

    def grow(self, choose: random.Random) -> None:
        self._advance([choose.randint(1, 5)] * len(self.rows))

    def refill(self, choose: random.Random) -> None:
        """New prompts of any length in empty places, where the others get as many tokens as the longest."""
        longest = choose.randint(1, 6)
        counts = [choose.randint(0, longest) if not rows else longest for rows in self.rows]
        self._advance(counts)

    def _advance(self, counts: list[int]) -> None:
        try:
            self.cache.advance(counts if len(set(counts)) > 1 else counts[0])
        except CacheFullError:
            return
        if max(counts) == 0:
            return
        new = append_random(self.cache, max(counts))[0]
        for b, count in enumerate(counts):
            self.rows[b] += [(new[0][b, i], new[1][b, i]) for i in range(max(counts) - count, max(counts))]

    def crop(self, choose: random.Random) -> None:
        length = choose.randint(0, 12)
        self.cache.crop(length)
        self.rows = [rows[:length] for rows in self.rows]

    def crop_each(self, choose: random.Random) -> None:
        lengths = [choose.randint(0, len(rows) + 2) for rows in self.rows]
        self.cache.crop(lengths)
        self.rows = [rows[:length] for rows, length in zip(self.rows, lengths, strict=True)]

    def reorder(self, choose: random.Random) -> None:
        index = [choose.randrange(len(self.rows)) for _ in self.rows]
        self.cache.reorder(torch.tensor(index))
        self.rows = [list(self.rows[i]) for i in index]
        self.was_reordered = True

    def free(self, choose: random.Random) -> None:
        b = choose.randrange(len(self.rows))
        self.cache.free(b)
        self.rows[b] = []

    def reset(self, choose: random.Random) -> None:
        self.cache.reset()
        self.rows = [[] for _ in self.rows]
        self.was_reordered = False

    def check(self) -> None:
        assert self.cache.lengths == tuple(map(len, self.rows)) == tuple(self.cache.seq_lens.tolist())
        for b, rows in enumerate(self.rows):
            for side, held in enumerate(tokens(self.cache, 0, b)):
                assert torch.equal(held, torch.stack([row[side] for row in rows]) if rows else held[:0])
        if self.cache.block_table is not None:
            self.check_pages()

    def check_pages(self) -> None:
        cache, table = self.cache, self.cache._table
        used = [[page for page in row if page >= 0] for row in cache.block_table.tolist()]
        assert [len(pages) for pages in used] == [-(-length // cache.page_size) for length in cache.lengths]
        owners = Counter(page for pages in used for page in pages)
        assert len(owners) + cache.free_pages == table.num_pages
        assert table._owners == [owners[page] for page in range(table.num_pages)]
        assert self.was_reordered or set(owners.values()) <= {1}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"page_size": 4}, {"page_size": 3, "num_pages": 17}], ids=str)
def test_any_sequence_of_calls_keeps_tokens_and_pages(options: dict, seed: int) -> None:
    twin = Twin(make_cache("yoco", batch=4, **options))
    choose = random.Random(seed)
    for _ in range(60):
        twin.step(choose)
    pages = None if not options else twin.cache._table.num_pages
    twin.reset(choose)
    assert twin.cache.free_pages == pages


def test_layers_that_ask_alike_share_the_schedule_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here the cache only says that it is on one, and the planner counts."""
    made: list[dict] = []
    monkeypatch.setattr(kv_cache, "decode_schedule", lambda seq_lens, **sizes: made.append(sizes) or object())
    cache = KVCache(CachePlan.named("fusedkv", 4), 2, 30, 2, 8, page_size=16)
    assert cache.schedule(1, 4, 2) is None and not made  # the CPU needs none
    cache.device = torch.device("cuda")
    cache.advance(3)
    first = cache.schedule(1, 4, 2)
    assert cache.schedule(1, 4, 2) is first and made[0]["capacity"] == 32
    assert cache.schedule(1, 4, 2, (7, 0)) is not first  # another window, another cut
    for change in (lambda: cache.advance(1), cache.begin_step, lambda: cache.crop(2), cache.reset):
        before = cache.schedule(1, 4, 2)
        change()
        assert cache.schedule(1, 4, 2) is not before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a torch built with CUDA")
@pytest.mark.parametrize("options", [{}, {"page_size": 4}], ids=str)
def test_a_step_never_waits_for_the_gpu(options: dict) -> None:
    """New pages, new lengths, copies on write and a new order go to the device from pinned memory."""
    cache = KVCache(CachePlan.named("fusedkv", 4), 3, 40, 2, 8, device="cuda", **options)
    cache.advance([3, 5, 7])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            cache.advance(1)
        cache.reorder([1, 1, 2])
        cache.advance(1)
        cache.crop(9)
        cache.free(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.seq_lens.tolist() == [9, 0, 9]
    if cache.block_table is not None:
        assert torch.equal(cache.block_table.cpu(), cache._table.rows)
