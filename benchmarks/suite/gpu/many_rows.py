"""Families of cached attention with many query rows: crossover, chunked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from suite.gpu.decode import ours
from suite.gpu.inputs import Decode, DecodeInputs
from suite.gpu.lab import Lab
from suite.gpu.peers import fusing_first
from suite.gpu.tasks import Sizes, Task
from suite.measure import Entry, Row


def crossover_tasks(sizes: Sizes) -> Iterator[Task]:
    """Where folding stops being faster than fusing once: R query rows per KV head on one sequence."""
    G, D, ratio = sizes.kv_heads, sizes.head_dim, sizes.ratios[1]
    for T in sizes.crossover_contexts:
        for R in sizes.crossover_rows:
            shape = Decode((T,), ratio * G, G, D, 2, sizes.pages[0], R // ratio)
            yield _task("crossover", "folding", shape, 1, "read")


def chunked_tasks(sizes: Sizes) -> Iterator[Task]:
    """A chunk of a prompt against the tokens before it and itself, over pages, as serving engines do it."""
    G, D, H = sizes.kv_heads, sizes.head_dim, sizes.ratios[1] * sizes.kv_heads
    T = sizes.contexts[1]
    for S in sizes.chunks:
        for lengths in ((T,), (T, T // 2 + S, T // 4 + S, S)):
            shape = Decode(lengths, H, G, D, 2, sizes.pages[0], S)
            first = S in (sizes.chunks[0], sizes.chunks[-1]) and len(lengths) == 1
            # The path depends on lengths that the host reads, so a graph would take another one.
            yield _task("chunked", "chunk of a prompt", shape, 1 if first else 2, "matmul", captured=False)


def _task(family: str, op: str, shape: Decode, priority: int, roof: str, captured: bool = True) -> Task:
    # Beside the rotating caches: gathered and fused keys and values, and exact scores in float64.
    room = int(3 * shape.allocated_bytes()) + (4 << 30)
    measure = _measure(family, op, shape, roof, captured)
    return Task(family, f"{op} {shape}", priority, room, measure)


def _measure(
    family: str, op: str, shape: Decode, roof: str, captured: bool
) -> Callable[[Lab], Iterator[Row]]:
    def measure(lab: Lab) -> Iterator[Row]:
        x = DecodeInputs(shape, lab)
        check = partial(x.check, "fusedkv_ext", "paged", ours=True)
        size = shape.cache_bytes(x.q.element_size())
        params = shape.params | {"rows": shape.steps * shape.heads // shape.kv_heads}
        rivals = {"fuse_kv + SDPA": fusing_first(x)}
        entry = Entry(op, op, params, x.q.dtype, ours(x), check, size, roof, rivals)
        entry.flops, entry.captured = shape.flops, captured
        yield lab.row(family, entry)

    return measure
