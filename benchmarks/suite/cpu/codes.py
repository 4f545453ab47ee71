"""The family "coded": decoding over caches of codes beside the same call over bfloat16, and encoding.

Static scales are part of the weights, so codes are read as they are. Their numbers are exact in bfloat16, so
the check is that of `decode` on decoded caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import codes
from suite.cpu import decode, peers
from suite.cpu.settings import DTYPES, Settings
from suite.measure import Cell, Entry

FAMILY = "coded"
KINDS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "int4": torch.uint8}
FUSED, APPEND = "decode, int8 in FusedKV", "append_kvcache, encoding"


def numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes (..., D) stand for."""
    if x.dtype != torch.uint8:
        return x.to(dtype)
    return torch.cat((x & 15, x >> 4), dim=-1).to(dtype) - 8


class Coded(decode.Problem):
    """The same problem over codes: ``keys`` and ``values`` are codes."""

    @property
    def num_bytes(self) -> int:
        tokens, (_, _, G, _) = int(self.lengths.sum()), self.keys[0].shape
        return tokens * G * sum(x.shape[3] * x.element_size() for x in (*self.keys, *self.values))

    def check(self, result: Tensor) -> None:
        sides = ([numbers(x, self.q.dtype) for x in side] for side in (self.keys, self.values))
        decode.Problem(self.q, *sides, self.a, self.b, self.lengths, self.table).check(result)


def coded(plain: decode.Problem, kind: str) -> Coded:
    """Random codes in the layout of the problem's caches, with scales that make numbers of size 1."""
    dtype, m = KINDS[kind], len(plain.keys)
    B, T, G, D = plain.keys[0].shape
    width = D // 2 if dtype == torch.uint8 else D

    def make() -> Tensor:
        x = torch.empty(B, T, G, width, dtype=dtype)
        few = torch.randint(-127, 128, (min((1 << 22) + 1, x.numel()),)).to(torch.int8)
        if dtype == torch.float8_e4m3fn:
            few = (few / 32).to(dtype)
        repeated = few.view(torch.uint8).repeat(-(-x.numel() // few.numel()))[: x.numel()]
        x.view(torch.uint8).copy_(repeated.view(x.shape))
        return x

    size = {"int8": 74.0, "e4m3": 2.3, "int4": 4.6}[kind]  # of the codes, root mean square
    weights = [(torch.ones(m, G, D) if w is None else w) / size for w in (plain.a, plain.b)]
    sources = [[make() for _ in range(m)] for _ in range(2)]
    return Coded(plain.q, *sources, *weights, plain.lengths)


def decode_then_attend(p: Coded) -> Tensor:
    """What torch needs: the numbers of all codes first."""
    sides = zip((p.keys, p.values), (p.a, p.b), strict=True)
    k, v = ((numbers(x[0], p.q.dtype) * w[0].to(p.q.dtype)).transpose(1, 2) for x, w in sides)
    return peers.packed_sdpa(p.q, k, v)


def code_cell(R: int, m: int, s: Settings) -> Cell:
    """Codes of every kind beside bfloat16, of m sources."""
    T = decode.tokens_of(s.cache_bytes, m, torch.bfloat16, s)
    plain = decode.make([T], R, m, torch.bfloat16, s)
    entries = [decode.limited("decode, bfloat16", "bfloat16", plain, {"T": T})]
    for kind in KINDS:
        problem = coded(plain, kind)
        others = {"decode, then SDPA": partial(decode_then_attend, problem)} if m == 1 else {}
        entries.append(decode.limited(f"decode, {kind}", kind, problem, {"T": T}, peers=others))
    return Cell(FAMILY, entries, base="bfloat16")


def fused_cell(R: int, s: Settings) -> Cell:
    """The layers of FusedKV over int8 beside a plain cache in bfloat16 of the same length.

    A storing layer reads one source, the others two.
    """
    T = decode.tokens_of(s.cache_bytes, 1, torch.bfloat16, s)
    one, two = (decode.make([T], R, m, torch.bfloat16, s) for m in (1, 2))
    entries = [
        decode.entry("decode, bfloat16 of 1 source", "plain", one, {"T": T}),
        decode.entry(FUSED, "storing", coded(one, "int8"), {"T": T}),
        decode.entry(FUSED, "fused", coded(two, "int8"), {"T": T}),
    ]
    return Cell(FAMILY, entries, base="plain")


class Append:
    """One new token of B sequences into a cache of 128 tokens each; with codes it is encoded."""

    def __init__(self, dtype: torch.dtype | None, s: Settings) -> None:
        B, G, D = 64, s.G, s.D
        self.key, self.value = (torch.randn(B, 1, G, D).to(DTYPES[s.dtype]) for _ in range(2))
        width = D // 2 if dtype == torch.uint8 else D
        self.caches = [torch.zeros(B, 128, G, width, dtype=dtype or DTYPES[s.dtype]) for _ in range(2)]
        self.lengths = torch.full((B,), 100, dtype=torch.int32)
        self.options = {}
        if dtype is not None:
            self.options = {f"{side}_scale": torch.full((G, D), 1 / 16) for side in ("key", "value")}

    def run(self) -> list[Tensor]:
        fkv.append_kvcache(self.key, self.value, *self.caches, cache_seqlens=self.lengths, **self.options)
        return [x[:, 99] for x in self.caches]

    def check(self, result: list[Tensor]) -> None:
        for new, stored in zip((self.key, self.value), result, strict=True):
            if not codes.is_coded(stored):
                assert torch.equal(stored, new[:, 0])
                continue
            apart = numbers(stored, torch.float32) / 16 - new[:, 0].float()
            inside = new[:, 0].float().abs() < (7 if stored.dtype == torch.uint8 else 127) / 16
            assert apart[inside].abs().max() <= (1 / 16 if stored.dtype != torch.float8_e4m3fn else 1 / 4)


def append_cell(s: Settings) -> Cell:
    entries = []
    for name, dtype in ((s.dtype, None), *KINDS.items()):
        problem = Append(dtype, s)
        op = "append_kvcache, plain" if dtype is None else APPEND
        params = {"B": 64, "code": name}
        entries.append(Entry(op, name, params, DTYPES[s.dtype], problem.run, problem.check, calls=20))
    return Cell(FAMILY, entries, cold=False, base=s.dtype)


def cells(s: Settings) -> Iterator[Callable[[Settings], Cell]]:
    for R in s.groups:
        for m in (1, 2):
            yield partial(code_cell, R, m)
    for R in s.groups:
        yield partial(fused_cell, R)
    yield append_cell
