"""Families of the pointwise operations: fuse (forward, backward, both) and append."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_close, assert_same_bits
from suite.fuse_problem import FuseProblem, eager_fuse
from suite.gpu.cells import Sizes, Task
from suite.gpu.lab import Lab
from suite.gpu.peers import compiled
from suite.measure import Call, Check, Contestant, Entry, Peer, Row, require_same_function

CHECKED_TOKENS = 512


# ---- fuse ----------------------------------------------------------------------------------------------


def _formula(weights: Tensor, sources: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The backward as one writes it in torch."""
    grads = [w.to(grad.dtype) * grad for w in weights]
    return [*grads, torch.stack([(x * grad).sum((0, 1), dtype=torch.float32) for x in sources])]


def fuse_cells(sizes: Sizes) -> Iterator[Task]:
    for tokens in sizes.fuse_tokens:
        for m in sizes.fuse_sources:
            first = m == 2 and tokens == sizes.fuse_tokens[-1]
            name = f"fuse_kv m={m} T={tokens}"
            size = 40 * m * tokens * sizes.kv_heads * sizes.head_dim + (1 << 30)
            yield Task("fuse", name, 0 if first else 1 if m == 2 else 2, size, _fuse(tokens, m, sizes))


def _fuse(tokens: int, m: int, sizes: Sizes) -> Callable[[Lab], Iterator[Row]]:
    """Of the fused tensor and the sources' gradients the first and the last CHECKED_TOKENS are checked."""
    shape = (1, tokens, sizes.kv_heads, sizes.head_dim)

    def measure(lab: Lab) -> Iterator[Row]:
        sets = range(lab.sets_for((m + 1) * math.prod(shape) * lab.dtype.itemsize))
        sources = [[lab.random(*shape) for _ in range(m)] for _ in sets]
        parts = (slice(0, CHECKED_TOKENS), slice(-CHECKED_TOKENS, None))
        x = FuseProblem(sources, [lab.random(*shape) for _ in sets], lab.weights(m, *shape[2:]), parts)
        params = {"m": m, "T": tokens, "G": shape[2], "D": shape[3]}

        def row(op: str, run: Sequence[Call], check: Check, moved: int, peers: dict[str, Peer]) -> Row:
            entry = Entry(op, op, params, lab.dtype, run, check, x.bytes_of(moved), "copy", peers)
            return lab.row("fuse", entry)

        fast, quick = compiled(lab, eager_fuse), compiled(lab, _formula)
        peers: dict[str, Peer] = {"eager": x.forward(eager_fuse)}
        peers["torch.compile"] = fast if isinstance(fast, str) else x.forward(fast)
        yield row("fuse_kv", x.forward(fkv.fuse_kv), x.check_forward, m + 1, peers)
        peers = {"eager": x.on_sets(partial(_formula, x.weights))}
        peers["torch.compile"] = quick if isinstance(quick, str) else x.on_sets(partial(quick, x.weights))
        yield row("fuse_kv backward", x.backward(), x.check_backward, 2 * m + 1, peers)
        add, eager = _accumulating(x)
        name = "fuse_kv backward, accumulating"
        yield row(name, x.on_sets(add), x.check_weights, 3 * m + 1, {"eager": x.on_sets(eager)})
        peers = {"eager": x.both(eager_fuse)}
        yield row("fuse_kv forward + backward", x.both(fkv.fuse_kv), x.check_backward, 3 * m + 2, peers)

    return measure


def _accumulating(x: FuseProblem) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]:
    """Gradients added to buffers that already hold those of other layers: ours and eager.

    The buffers grow with every call: what ours adds is checked here, on empty ones.
    """
    buffers = [torch.zeros_like(source) for source in x.sources[0]]

    def add(sources: list[Tensor], grad: Tensor) -> list[Tensor]:
        return [fkv.fuse_kv_backward(grad, sources, x.weights, grad_sources=buffers)[1]]

    def eager(sources: list[Tensor], grad: Tensor) -> list[Tensor]:
        *grads, weight_grad = _formula(x.weights, sources, grad)
        torch._foreach_add_(buffers, grads)
        return [weight_grad]

    weight_grads = add(x.sources[0], x.grads[0])
    mine = [*(buffer.clone() for buffer in buffers), *weight_grads]
    x.check_backward(mine)
    for buffer in buffers:
        buffer.zero_()
    require_same_function("eager, accumulating", [*buffers, *eager(x.sources[0], x.grads[0])], mine)
    return add, eager


# ---- append --------------------------------------------------------------------------------------------


class AppendInputs:
    """New tokens of B sequences, their rotary tables, and paged caches with room for just these."""

    def __init__(self, lab: Lab, B: int, S: int, sizes: Sizes) -> None:
        G, D, page = sizes.kv_heads, sizes.head_dim, sizes.pages[0]
        H = 4 * G
        # The new tokens follow a short prefix that ends inside a page.
        self.length = S + page // 2 + 1
        self.page = page
        per_sequence = -(-self.length // page)
        self.params = {"B": B, "S": S, "H": H, "G": G, "D": D, "page": page}
        element = lab.dtype.itemsize
        # Queries, keys and values are read and written once.
        self.nbytes = 2 * B * S * (H + 2 * G) * D * element
        self.sets = lab.sets_for(self.nbytes)
        self.queries = [lab.random(B, S, H, D) for _ in range(self.sets)]
        self.keys, self.values = ([lab.random(B, S, G, D) for _ in range(self.sets)] for _ in range(2))
        pool = (B * per_sequence, page, G, D)
        self.key_caches, self.value_caches = (
            [torch.zeros(pool, dtype=lab.dtype, device=lab.device) for _ in range(self.sets)]
            for _ in range(2)
        )
        self.table = torch.randperm(B * per_sequence, device=lab.device).to(torch.int32).view(B, per_sequence)
        self.seqlens = torch.full((B,), self.length, dtype=torch.int32, device=lab.device)
        angles = torch.outer(torch.arange(self.length), 10000.0 ** -(torch.arange(0, D, 2) / D))
        self.cos, self.sin = angles.cos().to(lab.device), angles.sin().to(lab.device)
        self.steps = S

    def ours(self, i: int) -> list[Tensor]:
        query = fkv.append_kvcache(
            self.keys[i],
            self.values[i],
            self.key_caches[i],
            self.value_caches[i],
            cache_seqlens=self.seqlens,
            block_table=self.table,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            query=self.queries[i],
        )
        return [query, self.key_caches[i], self.value_caches[i]]

    def separately(self, call: Callable[..., list[Tensor]]) -> list[Call]:
        """``call``, which is ``torch_append`` or a compiled form of it, on each set."""
        own = zip(self.queries, self.keys, self.values, self.key_caches, self.value_caches, strict=True)
        return [partial(call, *each, self.seqlens, self.table, self.cos, self.sin) for each in own]

    def check(self, result: Sequence[Tensor], judge: Callable[..., None] = assert_close) -> None:
        """The last tokens of the first and the last sequence."""
        query, key_cache, value_cache = result
        last = min(self.steps, 4)
        for b in sorted({0, len(self.table) - 1}):
            pages, where = self.table[b].long(), f"append, sequence {b}"
            stored_key, stored_value = (
                x[pages].flatten(0, 1)[None, self.length - last : self.length]
                for x in (key_cache, value_cache)
            )
            judge(stored_key, *self._exact(self.keys[0], b, last), name=where)
            judge(query[b : b + 1, -last:], *self._exact(self.queries[0], b, last), name=f"{where}, query")
            assert_same_bits(stored_value, self.values[0][b : b + 1, -last:])

    def _exact(self, new: Tensor, b: int, last: int) -> list[Tensor]:
        """The last rotated tokens, in float64 and from the same maths in the working dtype."""
        found = []
        for dtype in (torch.float64, new.dtype):
            keys, values = (new.new_zeros(1, self.length, *new.shape[2:], dtype=dtype) for _ in range(2))
            part = new[b : b + 1, -last:]
            reference.append_kvcache(
                part,
                part,
                keys,
                values,
                cache_seqlens=self.seqlens[b : b + 1],
                rotary_cos=self.cos,
                rotary_sin=self.sin,
                dtype=dtype,
            )
            found.append(keys[:, -last:])
        return found

    def check_peer(self, result: Sequence[Tensor]) -> None:
        self.check(result, lambda got, exact, same, name: require_same_function(name, got, exact))


def torch_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens: Tensor,
    table: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> list[Tensor]:
    """Rotation and scatter as separate operations; positions and slots from the lengths on the device."""
    page = key_cache.shape[1]
    positions = seqlens.long()[:, None] + torch.arange(-key.shape[1], 0, device=seqlens.device)
    slots = table.gather(1, positions // page).long() * page + positions % page
    cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)

    for cache, new in ((key_cache, rotated(key)), (value_cache, value)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots.flatten(), new.flatten(0, 1))
    return [rotated(query), key_cache, value_cache]


def append_cells(sizes: Sizes) -> Iterator[Task]:
    for i, (B, S) in enumerate(sizes.appends):

        def measure(lab: Lab, B: int = B, S: int = S) -> Iterator[Row]:
            x = AppendInputs(lab, B, S, sizes)
            fast, peers = compiled(lab, torch_append), {}
            for name, call in {"separate torch ops": torch_append, "torch.compile of them": fast}.items():
                peers[name] = call if isinstance(call, str) else Contestant(x.separately(call), x.check_peer)
            op, mine = "append_kvcache with rotary, q too", [partial(x.ours, i) for i in range(x.sets)]
            yield lab.row(
                "append", Entry(op, op, x.params, lab.dtype, mine, x.check, x.nbytes, "copy", peers)
            )

        yield Task("append", f"append_kvcache B={B} S={S}", min(i + 1, 2), 8 << 30, measure)
