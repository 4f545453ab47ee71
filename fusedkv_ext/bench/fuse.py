"""The family "fuse": mixing tensors, forward and backward, and storing new keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.bench.criterion import require_right
from fusedkv_ext.bench.measure import Cell, Entry
from fusedkv_ext.bench.peers import eager_fuse, rotate_and_store
from fusedkv_ext.bench.settings import DTYPES, Settings
from fusedkv_ext.ops import reference

FAMILY = "fuse"
SOURCES = 2
FORWARD, BACKWARD, AUTOGRAD, BOTH = (
    "fuse_kv",
    "fuse_kv_backward",
    "fuse_kv, backward by autograd",
    "fuse_kv, forward + backward",
)


def fuse_cell(name: str, s: Settings) -> Cell:
    """Forward; backward alone, called and by autograd; both. Beside eager and its autograd."""
    dtype, m = DTYPES[name], SOURCES
    T = s.fuse_bytes // (s.G * s.D * dtype.itemsize)
    shape = (1, T, s.G, s.D)
    sources = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(m)]
    weights = torch.randn(m, s.G, s.D, requires_grad=True)
    gradient = torch.randn(shape).to(dtype)
    inputs = [*sources, weights]

    def forward(fuse: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return fuse(sources, weights)

    def both(fuse: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(fuse(sources, weights), inputs, gradient)

    def oracle_gradients(wide: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(wide).requires_grad_() for x in inputs]
        return torch.autograd.grad(reference.fuse_kv(leaves[:-1], leaves[-1]), leaves, gradient.to(wide))

    def graph(fuse: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        out = fuse(sources, weights)
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    def called() -> tuple[Tensor, ...]:
        grads, grad_weights = fkv.fuse_kv_backward(gradient, sources, weights)
        return (*grads, grad_weights)

    def check_forward() -> None:
        exact, same = (forward(partial(reference.fuse_kv, dtype=d)) for d in (torch.float64, None))
        require_right(f"fuse_kv {dtype}", forward(fkv.fuse_kv), exact, same)

    def check_gradients(call: Callable[[], tuple[Tensor, ...]], what: str) -> None:
        triples = [call(), oracle_gradients(torch.float64), oracle_gradients(dtype)]
        require_right(f"{what} {dtype}", *(x[:-1] for x in triples))
        require_right(f"{what} {dtype}, weights", *(x[-1] for x in triples), terms=T)

    params = {"m": m, "T": T}
    by_autograd, eager_by_autograd = graph(fkv.fuse_kv), graph(eager_fuse)
    forward_bytes, backward_bytes = (m + 1) * gradient.nbytes, (2 * m + 1) * gradient.nbytes

    def row(op: str, run: Callable, peer: Callable, num_bytes: int, check: Callable[[], None]) -> Entry:
        peer_name = "eager" if op == FORWARD else "eager autograd"
        return Entry(op, op, params, dtype, run, check, num_bytes, "copy", {peer_name: peer})

    return Cell(
        FAMILY,
        [
            row(
                FORWARD,
                partial(forward, fkv.fuse_kv),
                partial(forward, eager_fuse),
                forward_bytes,
                check_forward,
            ),
            row(
                BACKWARD,
                called,
                eager_by_autograd,
                backward_bytes,
                partial(check_gradients, called, BACKWARD),
            ),
            row(
                AUTOGRAD,
                by_autograd,
                eager_by_autograd,
                backward_bytes,
                partial(check_gradients, by_autograd, AUTOGRAD),
            ),
            row(
                BOTH,
                partial(both, fkv.fuse_kv),
                partial(both, eager_fuse),
                forward_bytes + backward_bytes,
                partial(check_gradients, partial(both, fkv.fuse_kv), BOTH),
            ),
        ],
    )


def append_cell(name: str, s: Settings) -> Cell:
    """A prompt's keys and values, rotated and stored."""
    dtype, S, G, D = DTYPES[name], s.append_tokens, s.G, s.D
    key, value = (torch.randn(1, S, G, D).to(dtype) for _ in range(2))
    angles = torch.outer(torch.arange(S), 10000.0 ** -(torch.arange(0, D, 2) / D))
    cos, sin = angles.cos(), angles.sin()
    cache = fkv.KVCache(fkv.CachePlan.named("vanilla", 1), 1, S, G, D, dtype=dtype)
    caches = [cache.keys(0), cache.values(0)]
    others = [torch.empty_like(x) for x in caches]
    options = {"cache_seqlens": torch.tensor([S], dtype=torch.int32), "rotary_cos": cos, "rotary_sin": sin}

    def run() -> tuple[Tensor, ...]:
        fkv.append_kvcache(key, value, *caches, **options)
        return tuple(caches)

    def peer() -> tuple[Tensor, ...]:
        rotate_and_store(key, value, others, cos, sin)
        return tuple(others)

    def check() -> None:
        oracle = []
        for wide in (torch.float64, dtype):
            copies = [torch.zeros(x.shape, dtype=wide) for x in caches]
            reference.append_kvcache(key, value, *copies, **options, dtype=wide)
            oracle.append(copies)
        require_right(f"append_kvcache {dtype}", run(), *oracle)

    # Keys and values are read and written.
    row = Entry(
        "append_kvcache with rotary",
        "append",
        {"S": S},
        dtype,
        run,
        check,
        4 * key.nbytes,
        "copy",
        {"torch rotary + copy_": peer},
    )
    return Cell(FAMILY, [row])


def cells(s: Settings) -> Iterator[Callable[[Settings], Cell]]:
    for name in s.dtypes:
        yield partial(fuse_cell, name)
    for name in s.dtypes:
        yield partial(append_cell, name)
