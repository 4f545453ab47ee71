"""A rival in Triton that fuses keys and values inside the attention loop, as the FusedKV paper's kernel does.

The paper's own kernel (arXiv 2512.03870) is not public: this is our re-implementation of its description.
One program per (sequence, KV head, split): it loads a tile of every source, K = sum_j a_j (.) K_j in float32,
rounds K to the cache's dtype for the tensor cores, and the same for V; online softmax; a second kernel merges
the splits. Query rows of a KV head are padded to 16. Paged or contiguous, one query token, 1 or 2 sources.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


class Config(NamedTuple):
    """tokens: of a tile. waves: programs per multiprocessor that the split count aims at."""

    tokens: int = 64
    warps: int = 4
    stages: int = 2
    waves: int = 4


CONFIGS = (
    Config(),
    Config(32, 4, 3, 4),
    Config(64, 4, 3, 2),
    Config(64, 8, 2, 2),
    Config(128, 8, 2, 2),
    Config(16, 2, 4, 8),
)
MIN_ROWS = 16
MAX_SPLITS = 128


def usable(device: torch.device) -> str | None:
    """None, or why not."""
    if triton is None:
        return "no Triton here"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU, or TRITON_INTERPRET=1"
    return None


if triton is not None:

    @triton.jit
    def _rows_of(seq, tokens, valid, table, table_stride, capacity, PAGE: tl.constexpr):
        """Row of each token in a cache seen as (pages * page size or B * capacity, G, D), int64."""
        if PAGE > 0:
            pages = tl.load(table + seq * table_stride + tokens // PAGE, mask=valid, other=0)
            found = pages.to(tl.int64) * PAGE + tokens % PAGE
        else:
            found = seq.to(tl.int64) * capacity + tokens
        return found

    @triton.jit
    def _fused_tile(first, second, where, mask, w1, w2, SOURCES: tl.constexpr):
        """sum_j w_j (.) tile_j, rounded to the caches' dtype."""
        tile = tl.load(first + where, mask=mask, other=0.0)
        if SOURCES == 2:
            other = tl.load(second + where, mask=mask, other=0.0)
            dtype = tile.dtype
            tile = (w1[None, :] * tile.to(tl.float32) + w2[None, :] * other.to(tl.float32)).to(dtype)
        return tile

    @triton.jit
    def _weights(weights, head, dims, G, DIM: tl.constexpr, SOURCES: tl.constexpr):
        if SOURCES == 2:
            first = tl.load(weights + head * DIM + dims)
            second = tl.load(weights + (G + head) * DIM + dims)
        else:
            first = tl.zeros([DIM], tl.float32)
            second = first
        return first, second

    @triton.jit
    def _split_kernel(
        q,
        k1,
        k2,
        v1,
        v2,
        key_weights,
        value_weights,
        lengths,
        table,
        partial,
        maxima,
        sums,
        scale,
        table_stride,
        capacity,
        splits,
        rows,
        G,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        SOURCES: tl.constexpr,
        PAGE: tl.constexpr,
    ):
        pair, split = tl.program_id(0), tl.program_id(1)
        seq, head = pair // G, pair % G
        length = tl.load(lengths + seq)
        tiles = tl.cdiv(length, TOKENS)
        per_split = tl.cdiv(tiles, splits)
        begin = split * per_split * TOKENS
        end = tl.minimum(begin + per_split * TOKENS, length)
        dims, row = tl.arange(0, DIM), tl.arange(0, ROWS)
        a1, a2 = _weights(key_weights, head, dims, G, DIM, SOURCES)
        b1, b2 = _weights(value_weights, head, dims, G, DIM, SOURCES)
        # q is (B, G * rows, DIM): the query rows of one KV head lie together.
        query = tl.load(
            q + (pair * rows + row)[:, None] * DIM + dims[None, :], mask=(row < rows)[:, None], other=0.0
        )
        biggest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for start in range(begin, end, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            valid = tokens < end
            at = _rows_of(seq, tokens, valid, table, table_stride, capacity, PAGE)
            where = (at * G + head)[:, None] * DIM + dims[None, :]
            k = _fused_tile(k1, k2, where, valid[:, None], a1, a2, SOURCES)
            scores = tl.dot(query, tl.trans(k)) * scale
            scores = tl.where(valid[None, :], scores, float("-inf"))
            bigger = tl.maximum(biggest, tl.max(scores, 1))
            p = tl.exp2(scores - bigger[:, None])
            shrink = tl.exp2(biggest - bigger)
            total = total * shrink + tl.sum(p, 1)
            v = _fused_tile(v1, v2, where, valid[:, None], b1, b2, SOURCES)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
            biggest = bigger
        place = (pair * splits + split) * rows + row
        tl.store(maxima + place, biggest, mask=row < rows)
        tl.store(sums + place, total, mask=row < rows)
        tl.store(partial + place[:, None] * DIM + dims[None, :], acc, mask=(row < rows)[:, None])

    @triton.jit
    def _merge_kernel(partial, maxima, sums, out, splits, rows, DIM: tl.constexpr, SPLITS: tl.constexpr):
        query_row = tl.program_id(0)
        pair, row = query_row // rows, query_row % rows
        s, dims = tl.arange(0, SPLITS), tl.arange(0, DIM)
        place = (pair * splits + s) * rows + row
        m = tl.load(maxima + place, mask=s < splits, other=float("-inf"))
        factor = tl.exp2(m - tl.max(m, 0))
        total = tl.sum(factor * tl.load(sums + place, mask=s < splits, other=0.0), 0)
        parts = tl.load(partial + place[:, None] * DIM + dims[None, :], mask=(s < splits)[:, None], other=0.0)
        merged = tl.sum(parts * factor[:, None], 0) / total
        tl.store(out + query_row * DIM + dims, merged.to(out.dtype.element_ty))

    @triton.jit
    def _read_kernel(x, out, size, steps, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        acc = tl.zeros([BLOCK], tl.float32)
        for _ in range(steps):
            acc += tl.load(x + at, mask=at < size, other=0.0)
            at += stride
        tl.store(out + tl.program_id(0), tl.sum(acc, 0))


def read_all(x: Tensor, sm_count: int) -> Tensor:
    """A sum per program over all of x (float32): reads it once."""
    block, programs = 4096, 16 * sm_count
    out = x.new_empty(programs)
    steps = triton.cdiv(x.numel(), programs * block)
    _read_kernel[(programs,)](x, out, x.numel(), steps, BLOCK=block, num_warps=8)
    return out


def decode(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    lengths: Tensor,
    table: Tensor | None,
    sm_count: int,
    config: Config = CONFIGS[0],
) -> Tensor:
    """q (B, 1, H, D), caches (B, capacity, G, D) or (P, page size, G, D), contiguous -> (B, 1, H, D).

    Every sequence holds at least one token.
    """
    (B, _, H, D), (slots, G) = q.shape, keys[0].shape[1:3]
    sources, rows = len(keys), H // G
    longest = slots if table is None else slots * table.shape[1]
    splits = min(
        triton.cdiv(config.waves * sm_count, B * G), triton.cdiv(longest, 2 * config.tokens), MAX_SPLITS
    )
    partial = q.new_empty((B * G * splits * rows, D), dtype=torch.float32)
    maxima, sums = (q.new_empty(B * G * splits * rows, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(q)
    # Unused arguments still are pointers of the right kind.
    a, b = (maxima if w is None else w for w in (key_weights, value_weights))
    _split_kernel[(B * G, splits)](
        q,
        keys[0],
        keys[-1],
        values[0],
        values[-1],
        a,
        b,
        lengths,
        lengths if table is None else table,
        partial,
        maxima,
        sums,
        D**-0.5 * 1.4426950408889634,
        0 if table is None else table.stride(0),
        slots,
        splits,
        rows,
        G,
        DIM=D,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(rows)),
        TOKENS=config.tokens,
        SOURCES=sources,
        PAGE=0 if table is None else slots,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    _merge_kernel[(B * H,)](
        partial, maxima, sums, out, splits, rows, DIM=D, SPLITS=triton.next_power_of_2(splits), num_warps=4
    )
    return out


_tuned: dict[tuple[object, ...], Config] = {}


def tuned(key: tuple[object, ...], run: Callable[[Config], Tensor]) -> Config:
    """The fastest configuration for this kind of problem; found once per key, by running all of them."""
    if key in _tuned or not run(CONFIGS[0]).is_cuda:
        return _tuned.setdefault(key, CONFIGS[0])
    times = {}
    for config in CONFIGS:
        try:
            for _ in range(2):
                run(config)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)
            start.record()
            for _ in range(10):
                run(config)
            stop.record()
            stop.synchronize()
        except (RuntimeError, triton.runtime.errors.OutOfResources):
            torch.cuda.synchronize()
            continue
        times[config] = start.elapsed_time(stop)
    return _tuned.setdefault(key, min(times, key=times.__getitem__))
