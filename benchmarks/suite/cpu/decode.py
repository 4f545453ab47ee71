"""The family "decode": one query token per sequence over cached keys and values.

Caches are those of `KVCache`, so that rows show the layout that it has, unless a row names another one. Peers
get copies that are contiguous per head, the layout that torch is fastest with, and where it says so the very
tensors of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_close
from suite.cpu import onnx_peer, peers
from suite.cpu.settings import DTYPES, Settings
from suite.measure import Cell, Entry

FAMILY = "decode"
CONTEXT, BATCH, SHORT = "decode, by context", "decode, by batch", "decode, cache in L2"


@dataclass
class Problem:
    """q (B, 1, H, D); m caches each of keys and values, (B, T, G, D) or (P, page, G, D) with a table (B,
    pages); key and value weights (m, G, D), None for m = 1; lengths (B,) int32."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    a: Tensor | None
    b: Tensor | None
    lengths: Tensor
    table: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of the keys and values of all valid tokens, each read once."""
        _, _, G, D = self.keys[0].shape
        return 2 * len(self.keys) * int(self.lengths.sum()) * G * D * self.q.element_size()

    def run(self) -> Tensor:
        return fkv.fused_kv_attn_with_kvcache(
            self.q, self.keys, self.values, self.a, self.b, cache_seqlens=self.lengths, block_table=self.table
        )

    def resident(self) -> Problem:
        """The same problem on four tokens that repeat, so that all data stays in the first cache."""
        size = 4
        keys, values = ([x[:1, :size].clone() for x in side] for side in (self.keys, self.values))
        table = torch.zeros(len(self.lengths), -(-int(self.lengths.max()) // size), dtype=torch.int32)
        return replace(self, keys=keys, values=values, table=table)

    def check(self, result: Tensor) -> None:
        """Query heads that share a KV head go to the oracle as the rows of one head that all see everything:
        the same numbers, without a copy of the keys for each. One KV head at a time takes less memory."""
        G = self.keys[0].shape[2]
        got = result.unflatten(2, (G, -1))
        queries = self.q.unflatten(2, (G, -1))
        options = {"cache_seqlens": self.lengths, "block_table": self.table, "causal": False}
        results: dict[torch.dtype | None, list[Tensor]] = {torch.float64: [], None: []}
        for g in range(G):
            head = slice(g, g + 1)
            rows = queries[:, 0, g, :, None]  # (B, R, 1, D)
            sources = [[x[:, :, head] for x in side] for side in (self.keys, self.values)]
            weights = [None if w is None else w[:, head] for w in (self.a, self.b)]
            for dtype, found in results.items():
                out = reference.fused_kv_attn_with_kvcache(rows, *sources, *weights, **options, dtype=dtype)
                found.append(out[:, None, :, 0])
        exact, same = (torch.stack(found, dim=2) for found in results.values())
        assert_close(got, exact, same, f"decode, {len(self.keys)} sources, {self.q.dtype}")

    def head_major(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of keys and values as (B, G, T, D), contiguous."""
        return tuple([x.transpose(1, 2).contiguous() for x in side] for side in (self.keys, self.values))


def make(
    lengths: Sequence[int],
    R: int,
    m: int,
    dtype: torch.dtype,
    s: Settings,
    *,
    page_size: int | None = None,
    layout: str | None = None,
    G: int | None = None,
) -> Problem:
    """A random problem. layout: "token-major" or "head-major"; None: that of `KVCache`."""
    B, T, G, D = len(lengths), max(lengths), G or s.G, s.D
    if layout is None:
        plan = fkv.CachePlan.named("vanilla", m)
        cache = fkv.KVCache(plan, B, T, G, D, dtype=dtype, page_size=page_size)
        keys, values = [cache.keys(i) for i in range(m)], [cache.values(i) for i in range(m)]
    else:
        keys, values = ([_empty(B, T, G, D, dtype, layout) for _ in range(m)] for _ in range(2))
    for x in (*keys, *values):
        fill(x)
    table = None
    if page_size is not None:
        pages = len(keys[0])
        table = torch.randperm(pages, dtype=torch.int32).view(B, -1)
    q = torch.randn(B, 1, G * R, D).to(dtype)
    a, b = (torch.randn(m, G, D) if m > 1 else None for _ in range(2))
    return Problem(q, keys, values, a, b, torch.tensor(list(lengths), dtype=torch.int32), table)


def fill(x: Tensor) -> None:
    """Normal numbers, a few million of them over and over: drawing each one takes longer than the rest. Their
    odd count keeps tokens from being equal."""
    numbers = torch.randn(min((1 << 22) + 1, x.numel())).to(x.dtype)
    x.copy_(numbers.repeat(-(-x.numel() // len(numbers)))[: x.numel()].view(x.shape))


def _empty(B: int, T: int, G: int, D: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "head-major":
        return torch.empty(B, G, T, D, dtype=dtype).transpose(1, 2)
    return torch.empty(B, T, G, D, dtype=dtype)


def entry(op: str, label: str, problem: Problem, params: dict[str, object], **more: object) -> Entry:
    return Entry(
        op=op,
        label=label,
        params={"m": len(problem.keys), "R": problem.q.shape[2] // problem.keys[0].shape[2], **params},
        dtype=problem.q.dtype,
        run=problem.run,
        check=problem.check,
        num_bytes=problem.num_bytes,
        **{"roof": "read", **more},
    )


def limited(op: str, label: str, problem: Problem, params: dict[str, object], **more: object) -> Entry:
    """An entry whose row has a share of the two-sided limit."""
    return entry(op, label, problem, params, products=problem.resident().run, **more)


def tokens_of(cache_bytes: int, m: int, dtype: torch.dtype, s: Settings) -> int:
    """Context whose keys and values of m sources take that many bytes."""
    return cache_bytes // (2 * m * s.G * s.D * dtype.itemsize)


def peers_of_one(p: Problem, flex: Callable | str | None) -> dict[str, Callable[[], Tensor] | str]:
    """m = 1: torch and ONNX Runtime on head-major copies ("as cached": torch on our tensors as they lie)."""
    (k,), (v,) = p.head_major()
    cached_k, cached_v = p.keys[0].transpose(1, 2), p.values[0].transpose(1, 2)
    R = p.q.shape[2] // k.shape[1]
    name = "SDPA" if R == 1 else "SDPA enable_gqa"
    transposed = k.transpose(2, 3).contiguous()
    found: dict[str, Callable[[], Tensor] | str] = {
        name: partial(peers.sdpa, p.q, k, v),
        "matmul + softmax": partial(peers.matmul, p.q, k, v),
        "matmul + softmax, keys left": partial(peers.matmul_keys_left, p.q, k, v),
        "matmul + softmax, keys transposed": partial(peers.matmul_stored_transposed, p.q, transposed, v),
    }
    if not cached_k.is_contiguous():
        found[f"{name}, as cached"] = partial(peers.sdpa, p.q, cached_k, cached_v)
    if R > 1:
        found["SDPA on packed rows"] = partial(peers.packed_sdpa, p.q, k, v)
        if not cached_k.is_contiguous():
            found["SDPA on packed rows, as cached"] = partial(peers.packed_sdpa, p.q, cached_k, cached_v)
    if flex is not None:
        found["flex_attention, compiled"] = flex if isinstance(flex, str) else partial(flex, p.q, k, v)
    if onnx_peer.available(p.q.dtype):
        found[onnx_peer.NAME] = onnx_peer.group_query_attention(p.q, k, v)
    return found


def peers_of_many(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """m > 1: torch on head-major copies. Putting the sources side by side is not timed."""
    keys, values = p.head_major()
    side_by_side = torch.cat(keys, dim=-1), torch.cat(values, dim=-1)
    return {
        "eager fuse + SDPA": partial(peers.fuse_then_sdpa, p.q, keys, values, p.a, p.b),
        "SDPA on concatenated sources": partial(peers.concatenated_sdpa, p.q, *side_by_side, p.a, p.b),
        "folded matmuls": partial(peers.folded, p.q, keys, values, p.a, p.b),
        "folded matmuls, keys left": partial(peers.folded, p.q, keys, values, p.a, p.b, keys_left=True),
    }


def main_cell(R: int, name: str, s: Settings) -> Cell:
    """One source and two, at equal bytes, beside all peers."""
    dtype = DTYPES[name]
    flex = None
    if s.compile_peers and name == s.dtype:
        flex = peers.flex_attention()
    one, two = (make([tokens_of(s.cache_bytes, m, dtype, s)], R, m, dtype, s) for m in (1, 2))
    return Cell(
        FAMILY,
        [
            limited("decode", "m=1", one, {"T": int(one.lengths)}, peers=peers_of_one(one, flex)),
            limited("decode", "m=2", two, {"T": int(two.lengths)}, peers=peers_of_many(two)),
        ],
        base="m=1",
    )


def paged_cell(R: int, m: int, s: Settings) -> Cell:
    """Pages of 16 and of 64, scattered, beside a contiguous cache of the same length; and ragged batches."""
    T = tokens_of(s.cache_bytes, m, DTYPES[s.dtype], s)
    contiguous = make([T], R, m, DTYPES[s.dtype], s)
    entries = [entry("decode, contiguous", "contiguous", contiguous, {"T": T})]
    for size in (16, 64):
        paged = make([T], R, m, DTYPES[s.dtype], s, page_size=size)
        entries.append(entry("decode, paged", f"page {size}", paged, {"T": T, "page": size}))
    return Cell(FAMILY, entries, base="contiguous")


def ragged_cell(R: int, m: int, s: Settings) -> Cell:
    """Sequences of unequal lengths beside as many of equal length, at equal bytes."""
    T = tokens_of(s.cache_bytes, m, DTYPES[s.dtype], s)
    ragged = [T // 2 + T // 8, T // 4 - T // 16, T // 8 + T // 32]
    ragged.append(T - sum(ragged))
    entries = []
    for label, lengths in (("equal", [T // 4] * 4), ("ragged", ragged)):
        problem = make(lengths, R, m, DTYPES[s.dtype], s)
        entries.append(entry(f"decode, {label} lengths", label, problem, {"T": "+".join(map(str, lengths))}))
    return Cell(FAMILY, entries, base="equal")


def layout_cell(R: int, m: int, s: Settings) -> Cell:
    T = tokens_of(s.cache_bytes, m, DTYPES[s.dtype], s)
    entries = []
    for layout in ("token-major", "head-major"):
        problem = make([T], R, m, DTYPES[s.dtype], s, layout=layout)
        entries.append(entry(f"decode, {layout}", layout, problem, {"T": T}))
    return Cell(FAMILY, entries, base="token-major")


def short_cell(T: int, R: int, m: int, s: Settings) -> Cell:
    """Caches of two KV heads that stay in L2: no roof, many calls per sample."""
    problem = make([T], R, m, DTYPES[s.dtype], s, G=2)
    others = peers_of_one(problem, None) if m == 1 else peers_of_many(problem)
    calls = max(1, min(200, (1 << 18) // T)) if s.name != "tiny" else 2
    row = entry(SHORT, "m", problem, {"T": T, "G": 2}, peers=others, roof=None, calls=calls)
    return Cell(FAMILY, [row], cold=False)


def curve_cell(op: str, B: int, T: int, params: dict[str, object], s: Settings) -> Cell:
    """One source and two with 4 query heads per KV head, each beside torch's usual best."""
    T = min(T, s.longest)
    one, two = (make([T] * B, 4, m, DTYPES[s.dtype], s) for m in (1, 2))
    (k,), (v,) = one.head_major()
    keys, values = two.head_major()
    torch_one = {
        "SDPA on packed rows": partial(peers.packed_sdpa, one.q, k, v),
        "matmul + softmax": partial(peers.matmul, one.q, k, v),
    }
    torch_two = {
        "SDPA on concatenated sources": peers_of_many(two)["SDPA on concatenated sources"],
        "folded matmuls": partial(peers.folded, two.q, keys, values, two.a, two.b),
    }
    entries = [
        entry(op, "m=1", one, params, peers=torch_one),
        entry(op, "m=2", two, params, peers=torch_two),
    ]
    return Cell(FAMILY, entries, slow=B * T > 1 << 15)


def context_cell(T: int, s: Settings) -> Cell:
    return curve_cell(CONTEXT, 1, T, {"T": T}, s)


def batch_cell(B: int, s: Settings) -> Cell:
    return curve_cell(BATCH, B, s.batch_tokens, {"B": B, "T": s.batch_tokens}, s)


def cells(s: Settings) -> Iterator[Callable[[Settings], Cell]]:
    """Makers of the cells, so that the tensors of one are gone before the next."""
    for name in s.dtypes:
        for R in s.groups:
            yield partial(main_cell, R, name)
    for m in (1, 2):
        yield partial(paged_cell, 4, m)
    for m in (1, 2) if s.full else (1,):
        yield partial(ragged_cell, 4, m)
    for R, m in ((1, 1), (4, 1), (4, 2)) if s.full else ((4, 1),):
        yield partial(layout_cell, R, m)
    for T in s.short:
        for R, m in ((1, 1), (4, 1), (4, 2)) if s.full else ((4, 1),):
            yield partial(short_cell, T, R, m)
    for T in s.contexts:
        yield partial(context_cell, T)
    for B in s.batches:
        yield partial(batch_cell, B)
