"""Calls of attention over caches of codes, whose unused slots are poisoned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from cases import block_table, to_device
from torch import Tensor

from fusedkv_ext import fused_kv_attn_with_kvcache
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_matches_oracle

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
I8, E4M3, I4 = torch.int8, torch.float8_e4m3fn, torch.uint8
CODES = (I8, E4M3, I4)
NAN_CODE = 0x7F


def make_codes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Codes (.., D), or (.., D / 2) for two per byte. Every code occurs if there is room, NaN does not."""
    if dtype == I8:
        return torch.randint(-127, 128, shape, dtype=I8)
    if dtype == I4:
        return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=I4)
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where((bits & NAN_CODE) == NAN_CODE, 0, bits).view(E4M3)


def size_of_codes(dtype: torch.dtype) -> float:
    """About the root mean square of ``make_codes``."""
    return {I8: 73.0, E4M3: 120.0, I4: 4.6}.get(dtype, 1.0)


def cache_of(tokens: Tensor, lengths: tuple[int, ...], page_size: int | None, table: Tensor | None) -> Tensor:
    """(B, T, ..) tokens as a cache whose unused slots are poisoned: NaN, or codes that would be seen."""
    poison = torch.full((), math.nan) if tokens.dtype in (F32, BF16, FP16) else torch.tensor(NAN_CODE)
    raw = tokens.view(torch.uint8) if tokens.dtype == E4M3 else tokens
    if page_size is None or table is None:
        cache = raw.clone()
        for b, length in enumerate(lengths):
            cache[b, length:] = poison.to(cache.dtype)
    else:
        pages = sum(math.ceil(length / page_size) for length in lengths) + 2
        cache = poison.to(raw.dtype).expand(pages, page_size, *raw.shape[2:]).clone()
        for b, length in enumerate(lengths):
            for start in range(0, length, page_size):
                count = min(page_size, length - start)
                cache[int(table[b, start // page_size]), :count] = raw[b, start : start + count]
    return cache.view(tokens.dtype)


class Inputs:
    """The arguments of a call over codes, with scales in the weights so that scores have size one."""

    def __init__(
        self,
        key: torch.dtype,
        value: torch.dtype,
        dtype: torch.dtype = F32,
        *,
        lengths: tuple[int, ...] = (70, 33),
        S: int = 2,
        H: int = 4,
        G: int = 2,
        D: int = 64,
        Dv: int | None = None,
        m: int = 2,
        page_size: int | None = None,
    ) -> None:
        B, T, Dv = len(lengths), max(lengths), D if Dv is None else Dv
        self.shape = (B, T, G, D, Dv, m)
        self.q: Any = torch.randn(B, S, H, D).to(dtype)
        self.table = block_table(lengths, T, page_size) if page_size else None
        self.lengths, self.page_size = lengths, page_size
        self.keys = [self.cache(self.tokens((B, T, G, D), key, dtype)) for _ in range(m)]
        self.values = [self.cache(self.tokens((B, T, G, Dv), value, dtype)) for _ in range(m)]
        self.a = torch.randn(m, G, D) / size_of_codes(key)
        self.b = torch.randn(m, G, Dv) / size_of_codes(value)
        self.options: dict[str, Any] = {"return_lse": True}

    def tokens(self, shape: tuple[int, ...], code: torch.dtype, dtype: torch.dtype) -> Tensor:
        return make_codes(shape, code) if code in CODES else torch.randn(shape).to(dtype)

    def cache(self, tokens: Tensor) -> Tensor:
        return cache_of(tokens, self.lengths, self.page_size, self.table)

    def token_scales(self) -> list[Tensor]:
        """One factor per token and KV head for each source, some of them negative."""
        B, T, G, *_, m = self.shape
        return [self.cache(torch.randn(B, T, G).to(FP16)) for _ in range(m)]

    def state(self) -> dict[str, Any]:
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.keys[0].device)
        return {"cache_seqlens": lengths, "block_table": self.table, **self.options}

    def call(self, op: Callable[..., Any] = fused_kv_attn_with_kvcache, **more: Any) -> Any:
        return op(self.q, self.keys, self.values, self.a, self.b, **{**self.state(), **more})

    def to(self, device: torch.device) -> None:
        """Moves all tensors."""
        names = ("q", "keys", "values", "a", "b", "table", "options")
        for name in names:
            setattr(self, name, to_device(getattr(self, name), device))

    def check(self, terms: float = 4.0, **more: Any) -> Any:
        """Holds the call to the criterion. Codes make scores of several units: errors grow with them.

        Args:
            terms: As in ``assert_close``.
            more: Options of the kernel, which the oracle does not have.
        """
        return assert_matches_oracle(
            lambda *args, **options: fused_kv_attn_with_kvcache(*args, **options, **more),
            reference.fused_kv_attn_with_kvcache,
            *(self.q, self.keys, self.values, self.a, self.b),
            **self.state(),
            terms=terms,
        )
