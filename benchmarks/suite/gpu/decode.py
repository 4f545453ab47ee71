"""Families of attention with few query tokens: decode, coded, latency, head_dim, layout, ragged, schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fusedkv_ext as fkv
from suite.gpu import peers
from suite.gpu.inputs import CodedInputs, Decode, DecodeInputs
from suite.gpu.lab import Lab
from suite.gpu.tasks import TINY, Sizes, Task
from suite.measure import Call, Entry, Peer, Row


def ours(
    x: DecodeInputs, view: Callable[[Tensor], list[Tensor]] | None = None, **options: object
) -> list[Call]:
    """view: of a buffer as the sources' caches; ``x.paged`` by default."""
    caches = view or x.paged

    def run(i: int) -> Tensor:
        return fkv.fused_kv_attn_with_kvcache(
            x.q,
            caches(x.key_buffers[i]),
            caches(x.value_buffers[i]),
            x.key_weights,
            x.value_weights,
            cache_seqlens=x.seqlens,
            block_table=x.table,
            **options,
        )

    return x.on_sets(run)


def plan(x: DecodeInputs, batch_invariant: bool = False) -> Tensor:
    """What all layers of a step share."""
    s = x.shape
    return fkv.decode_schedule(
        x.seqlens,
        query_length=s.steps,
        num_heads=s.heads,
        num_kv_heads=s.kv_heads,
        capacity=s.capacity,
        batch_invariant=batch_invariant,
    )


def _entry(op: str, x: DecodeInputs, mine: list[Call], peers: dict[str, Peer], view: str = "paged") -> Entry:
    s, check = x.shape, partial(x.check, "fusedkv_ext", view, ours=True)
    size = s.cache_bytes(x.element_bytes)
    return Entry(op, op, s.params, x.q.dtype, mine, check, size, "read", peers, flops=s.flops)


def _against_peers(family: str, shape: Decode, compiled: bool) -> Callable[[Lab], Iterator[Row]]:
    def measure(lab: Lab) -> Iterator[Row]:
        x, op = DecodeInputs(shape, lab), _op(shape)
        rivals = peers.decode_peers(x, compiled=compiled)
        own = _entry(op, x, ours(x), rivals)
        shared = _entry(f"{op}, shared schedule", x, ours(x, schedule=plan(x)), rivals)
        yield from lab.rows(family, own, shared)

    return measure


def _op(shape: Decode) -> str:
    return f"decode, {shape.sources} source{'s' if shape.sources > 1 else ''}"


def _cell(family: str, shape: Decode, priority: int) -> Task:
    return Task(
        family,
        f"{_op(shape)} {shape}",
        priority,
        # Rotating sets add up to less than this again.
        int(1.1 * shape.allocated_bytes()) + (1 << 30),
        _against_peers(family, shape, compiled=priority == 0),
    )


def _grid_priority(B: int, T: int, ratio: int, page: int | None, sizes: Sizes) -> int:
    """0: the headline; 1: one step away from it and the corners; 2 and more: the rest of the grid."""
    b, t, r, p = (
        sizes.batches.index(B),
        sizes.contexts.index(T),
        sizes.ratios.index(ratio),
        sizes.pages.index(page),
    )
    away = (b != 1) + (t != 1) + (r != 1)
    if p == 0:
        corner = (b, t, r) in ((0, 0, 1), (2, 1, 0), (2, 1, 2))
        return 0 if away == 0 else 1 if away == 1 or corner else 2
    return 1 if away == 0 else 2 + p


def decode_tasks(sizes: Sizes) -> Iterator[Task]:
    grid = itertools.product(sizes.batches, sizes.contexts, sizes.ratios, sizes.pages, (2, 1))
    for B, T, ratio, page, m in grid:
        G = sizes.kv_heads
        shape = Decode((T,) * B, ratio * G, G, sizes.head_dim, m, page)
        yield _cell("decode", shape, _grid_priority(B, T, ratio, page, sizes))


def coded_tasks(sizes: Sizes) -> Iterator[Task]:
    """The headline over caches of codes. The roof is the time of reading the codes."""
    B, T, ratio, G = sizes.batches[1], sizes.contexts[1], sizes.ratios[1], sizes.kv_heads
    for m, bits in itertools.product((2, 1), (8, 4)):
        shape = Decode((T,) * B, ratio * G, G, sizes.head_dim, m, sizes.pages[0])
        room = int(1.1 * shape.allocated_bytes(bits / 8)) + (1 << 30)
        yield Task("coded", f"{_op(shape)}, int{bits} {shape}", 0, room, _coded(shape, bits))


def _coded(shape: Decode, bits: int) -> Callable[[Lab], Iterator[Row]]:
    def measure(lab: Lab) -> Iterator[Row]:
        x, op = CodedInputs(shape, lab, bits), f"{_op(shape)}, int{bits}"
        own = _entry(op, x, ours(x), {})
        shared = _entry(f"{op}, shared schedule", x, ours(x, schedule=plan(x)), {})
        yield from lab.rows("coded", own, shared)

    return measure


def profile(device: str, calls: int = 4) -> None:
    """Runs the headline call with a shared schedule a few times and times nothing, for a profiler."""
    lab = Lab(torch.device(device), torch.bfloat16)
    sizes = Sizes() if lab.cuda else TINY
    B, T, ratio, G = sizes.batches[1], sizes.contexts[1], sizes.ratios[1], sizes.kv_heads
    x = DecodeInputs(Decode((T,) * B, ratio * G, G, sizes.head_dim, 2, sizes.pages[0]), lab)
    run = ours(x, schedule=plan(x))
    for i in range(calls):
        run[i % len(run)]()
    if lab.cuda:
        torch.cuda.synchronize()


def latency_tasks(sizes: Sizes) -> Iterator[Task]:
    """One sequence, 20 query heads and 4 KV heads: what a user waits for."""
    for T, page, m in itertools.product(sizes.latency_contexts, sizes.pages[:2], (2, 1)):
        shape = Decode((T,), 5 * sizes.latency_kv_heads, sizes.latency_kv_heads, sizes.head_dim, m, page)
        yield _cell("latency", shape, 1 if T == sizes.latency_contexts[0] and page else 2)


def head_dim_tasks(sizes: Sizes) -> Iterator[Task]:
    """The headline with other head dims."""
    B, T, ratio, G = sizes.batches[1], sizes.contexts[1], sizes.ratios[1], sizes.kv_heads
    for D, m in itertools.product(sizes.head_dims, (2, 1)):
        yield _cell("head_dim", Decode((T,) * B, ratio * G, G, D, m, sizes.pages[0]), 1)


def layout_tasks(sizes: Sizes) -> Iterator[Task]:
    """Pages whose tokens are neighbors per head (HND, a permuted view) against the usual ones (NHD)."""
    T, ratio, G = sizes.contexts[1], sizes.ratios[1], sizes.kv_heads
    for B, m in itertools.product(sizes.batches[:2], (2, 1)):
        shape = Decode((T,) * B, ratio * G, G, sizes.head_dim, m, sizes.pages[0])
        room = int(1.1 * shape.allocated_bytes()) + (1 << 30)
        yield Task("layout", f"{_op(shape)} {shape}", 1 if m == 2 else 2, room, _layouts(shape))


def _layouts(shape: Decode) -> Callable[[Lab], Iterator[Row]]:
    def measure(lab: Lab) -> Iterator[Row]:
        x = DecodeInputs(shape, lab)
        usual = _entry(f"{_op(shape)}, NHD pages", x, ours(x), {})
        heads_first = _entry(f"{_op(shape)}, HND pages", x, ours(x, x.heads_first), {}, "heads first")
        yield from lab.rows("layout", usual, heads_first)

    return measure


def ragged_tasks(sizes: Sizes) -> Iterator[Task]:
    """A batch of very different lengths.

    16 query heads on 2 KV heads, few heads and large groups, so that the split decides; and 32 on 8. 4 query
    tokens as in speculative decoding.
    """
    for (H, G), S, page, m in itertools.product(
        ((16, 2), (32, 8)), (1, 4), (sizes.pages[0], sizes.pages[-1]), (2, 1)
    ):
        shape = Decode(sizes.ragged, H, G, sizes.head_dim, m, page, S)
        first = (H, G) == (16, 2) and page == sizes.pages[0]
        yield _cell("ragged", shape, 1 if first and S == 1 else 2 if first else 3)


def schedule_tasks(sizes: Sizes) -> Iterator[Task]:
    """The call that plans for itself against a shared schedule, batch invariance, and the planner alone."""
    G, D, page = sizes.kv_heads, sizes.head_dim, sizes.pages[0]
    batches = [(sizes.contexts[1],) * B for B in sizes.batches]
    for i, lengths in enumerate([*batches, sizes.ragged]):
        shape = Decode(lengths, 4 * G, G, D, 2, page)
        room = 2 * shape.allocated_bytes() + (1 << 30)
        yield Task("schedule", f"schedules {shape}", 1 if i == 1 else 2, room, _schedules(shape))


def _schedules(shape: Decode) -> Callable[[Lab], Iterator[Row]]:
    def measure(lab: Lab) -> Iterator[Row]:
        x = DecodeInputs(shape, lab)
        default = {"planned in the call": ours(x)}
        shared = _entry("decode, shared schedule", x, ours(x, schedule=plan(x)), default)
        invariant = _entry("decode, batch-invariant", x, ours(x, batch_invariant=True), default)
        alone = partial(plan, x)
        planner = Entry("decode_schedule alone", "plan", shape.params, lab.dtype, alone, lambda result: None)
        for entry in (shared, invariant, planner):
            yield lab.row("schedule", entry)

    return measure
