"""The family "fuse": mixing tensors, forward and backward, and storing new keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import fusedkv_ext as fkv
from suite.cpu.peers import rotate_and_store
from suite.cpu.settings import DTYPES, Settings
from suite.measure import Call, Cell, Entry, Peer
from suite.pointwise import AppendProblem, FuseProblem, eager_fuse

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
    *sources, grad = (torch.randn(1, T, s.G, s.D).to(dtype) for _ in range(m + 1))
    problem = FuseProblem([sources], [grad], torch.randn(m, s.G, s.D))
    forward_bytes, backward_bytes = problem.bytes_of(m + 1), problem.bytes_of(2 * m + 1)
    eager_backward = {"eager autograd": problem.by_autograd(eager_fuse)}

    def row(op: str, run: Sequence[Call], peers: dict[str, Peer], num_bytes: int) -> Entry:
        check = problem.check_forward if op == FORWARD else problem.check_backward
        return Entry(op, op, {"m": m, "T": T}, dtype, run, check, num_bytes, "copy", peers)

    both = {"eager autograd": problem.both(eager_fuse)}
    return Cell(
        FAMILY,
        [
            row(FORWARD, problem.forward(fkv.fuse_kv), {"eager": problem.forward(eager_fuse)}, forward_bytes),
            row(BACKWARD, problem.backward(), eager_backward, backward_bytes),
            row(AUTOGRAD, problem.by_autograd(fkv.fuse_kv), eager_backward, backward_bytes),
            row(BOTH, problem.both(fkv.fuse_kv), both, forward_bytes + backward_bytes),
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
    problem = AppendProblem([key], [value], [caches], options)

    def peer() -> list[Tensor]:
        rotate_and_store(key, value, others, cos, sin)
        return others

    op, peers, moved = "append_kvcache with rotary", {"torch rotary + copy_": peer}, problem.nbytes
    row = Entry(op, "append", {"S": S}, dtype, problem.ours(), problem.check, moved, "copy", peers)
    return Cell(FAMILY, [row])


def cells(s: Settings) -> Iterator[Callable[[Settings], Cell]]:
    for name in s.dtypes:
        yield partial(fuse_cell, name)
    for name in s.dtypes:
        yield partial(append_cell, name)
