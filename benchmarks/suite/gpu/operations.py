"""Families of the pointwise operations: fuse (forward, backward, both) and append."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import fusedkv_ext as fkv
from suite.gpu.lab import Lab
from suite.gpu.peers import compiled
from suite.gpu.tasks import Sizes, Task
from suite.measure import Call, Check, Contestant, Entry, Peer, Row, require_same_function
from suite.pointwise import AppendProblem, FuseProblem, eager_fuse

CHECKED_TOKENS = 512


# ---- fuse ----------------------------------------------------------------------------------------------


def _formula(weights: Tensor, sources: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The backward as one writes it in torch."""
    grads = [w.to(grad.dtype) * grad for w in weights]
    return [*grads, torch.stack([(x * grad).sum((0, 1), dtype=torch.float32) for x in sources])]


def fuse_tasks(sizes: Sizes) -> Iterator[Task]:
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


def _append_problem(lab: Lab, B: int, S: int, H: int, G: int, D: int, page: int) -> AppendProblem:
    """Paged caches with room for just the new tokens, which follow a short prefix that ends inside a page."""
    length = S + page // 2 + 1
    pages = -(-length // page)
    sets = range(lab.sets_for(2 * B * S * (H + 2 * G) * D * lab.dtype.itemsize))
    angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, D, 2) / D)).to(lab.device)
    pool = (B * pages, page, G, D)
    options = {
        "cache_seqlens": torch.full((B,), length, dtype=torch.int32, device=lab.device),
        "block_table": torch.randperm(B * pages, device=lab.device).to(torch.int32).view(B, pages),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
    }
    keys, values = ([lab.random(B, S, G, D) for _ in sets] for _ in range(2))
    caches = [[torch.empty(pool, dtype=lab.dtype, device=lab.device) for _ in range(2)] for _ in sets]
    return AppendProblem(keys, values, caches, options, [lab.random(B, S, H, D) for _ in sets])


def torch_append(
    seqlens: Tensor,
    table: Tensor,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *caches: Tensor,
) -> list[Tensor]:
    """Rotation and scatter as separate operations; positions and slots from the lengths on the device."""
    page = caches[0].shape[1]
    positions = seqlens.long()[:, None] + torch.arange(-key.shape[1], 0, device=seqlens.device)
    slots = table.gather(1, positions // page).long() * page + positions % page
    cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)

    for cache, new in zip(caches, (rotated(key), value), strict=True):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots.flatten(), new.flatten(0, 1))
    return [*caches, rotated(query)]


def append_tasks(sizes: Sizes) -> Iterator[Task]:
    G, D = sizes.kv_heads, sizes.head_dim
    for i, (B, S) in enumerate(sizes.appends):

        def measure(lab: Lab, B: int = B, S: int = S) -> Iterator[Row]:
            params = {"B": B, "S": S, "H": 4 * G, "G": G, "D": D, "page": sizes.pages[0]}
            x = _append_problem(lab, **params)
            own = list(zip(x.queries, x.keys, x.values, *zip(*x.caches, strict=True), strict=True))
            fast, peers = compiled(lab, torch_append), {}
            for name, call in {"separate torch ops": torch_append, "torch.compile of them": fast}.items():
                peers[name] = call
                if not isinstance(call, str):
                    calls = [partial(call, *x.options.values(), *each) for each in own]
                    peers[name] = Contestant(calls, x.check_peer)
            op = "append_kvcache with rotary, q too"
            yield lab.row(
                "append", Entry(op, op, params, lab.dtype, x.ours(), x.check, x.nbytes, "copy", peers)
            )

        yield Task("append", f"append_kvcache B={B} S={S}", min(i + 1, 2), 8 << 30, measure)
