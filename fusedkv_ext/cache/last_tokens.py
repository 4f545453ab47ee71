"""The last tokens of every sequence, raw, beside a cache of codes.

Every token is encoded when it arrives, and its raw row is kept too until n others have followed. The row at
position p reads tokens p - n < t <= p raw and earlier ones as codes. So what it reads does not depend on the
steps in which the sequence came.

Raw rows are in a ring: a paged cache where the pages of a sequence take turns. Token t is in page
(t // page_size) mod R of the sequence's R pages. Append and attention see positions of the sequence, and a
window keeps attention to rows that the ring still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext.cache.page_table import slots_of
from fusedkv_ext.ops import cached
from fusedkv_ext.ops.call import AppendCall

__all__ = ["LastTokens"]

PAGE_SIZE = 16
SPARE = 16  # rows beyond n, so that a crop of as many tokens finds what it needs


class _Ring(NamedTuple):
    """Tensors (B * R, page_size, g, D) per layer, None where it stores none; (B, max_pages) int32."""

    keys: list[Tensor | None]
    values: list[Tensor | None]
    block_table: Tensor
    pages: int  # R

    @property
    def rows(self) -> int:
        """Of each sequence."""
        return self.pages * PAGE_SIZE

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.keys, *self.values) if x is not None]


class LastTokens:
    """Keys and values of the last ``count`` tokens of every sequence.

    A step of S rows needs room for count + S - 1 of them. From then to the next smaller step there is a
    second, larger ring. The first one stays where it is, because a CUDA graph knows its address.

    Args:
        count: n.
        heads: The key heads and the value heads that each layer stores.
        batch_size: B.
        capacity: The most tokens of a sequence.
        head_dim: D.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        count: int,
        heads: Sequence[tuple[int, int]],
        batch_size: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.count = count
        self._heads, self._capacity, self._head_dim, self._dtype = heads, capacity, head_dim, dtype
        self._held = [0] * batch_size  # the first token of each sequence whose row the ring holds
        self._small = self._ring = self._make(self._pages(SPARE), device)

    def _pages(self, more: int) -> int:
        return -(-min(self.count + more, self._capacity) // PAGE_SIZE)

    def _make(self, pages: int, device: torch.device | str | None) -> _Ring:
        batch = len(self._held)

        def make(g: int) -> Tensor | None:
            shape = (batch * pages, PAGE_SIZE, g, self._head_dim)
            return torch.zeros(shape, dtype=self._dtype, device=device) if g else None

        with torch.inference_mode(False):  # inference tensors could not be modified outside of it
            page = torch.arange(-(-self._capacity // PAGE_SIZE), dtype=torch.int32, device=device) % pages
            first = torch.arange(0, batch * pages, pages, dtype=torch.int32, device=device)
            keys, values = ([make(pair[side]) for pair in self._heads] for side in (0, 1))
            return _Ring(keys, values, page + first[:, None], pages)

    @property
    def keys(self) -> list[Any]:
        """(B * R, page_size, g, D) per layer; None where a layer stores none."""
        return self._ring.keys

    @property
    def values(self) -> list[Any]:
        """The same of values."""
        return self._ring.values

    @property
    def block_table(self) -> Tensor:
        """(B, max_pages) int32, where each sequence's pages repeat."""
        return self._ring.block_table

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        large = [] if self._ring is self._small else self._ring.tensors
        return self._small.tensors + large

    def advance(self, old: Sequence[int], new: Sequence[int], steps: int) -> None:
        """Makes room for the S = ``steps`` rows of a step.

        Args:
            old: Tokens of each sequence.
            new: The same after the step.
            steps: S.
        """
        pages = max(self._pages(steps - 1), self._small.pages)
        if pages > self._ring.pages or pages == self._small.pages != self._ring.pages:
            device = self.block_table.device
            into = self._small if pages == self._small.pages else self._make(pages, device)
            self._move(into, old)
        self._drop_before(new, self._ring.rows)

    def _drop_before(self, lengths: Sequence[int], rows: int) -> None:
        """Only the last ``rows`` rows are held now."""
        self._held = [max(x, length - rows) for x, length in zip(self._held, lengths, strict=True)]

    def _move(self, into: _Ring, lengths: Sequence[int]) -> None:
        """Copies what both rings have room for."""
        rows = min(self._ring.rows, into.rows)
        token = self._last(lengths, rows)
        old, new = (slots_of(token % ring.rows, PAGE_SIZE, ring.block_table) for ring in (self._ring, into))
        for x, y in zip(self._ring.tensors, into.tensors, strict=True):
            y.flatten(0, 1)[new] = x.flatten(0, 1)[old]
        self._ring = into
        self._drop_before(lengths, rows)

    def _last(self, lengths: Sequence[int], count: int) -> Tensor:
        """(B, count): the last tokens of each sequence, negative before its first."""
        device = self.block_table.device
        return torch.tensor(lengths, device=device)[:, None] + torch.arange(-count, 0, device=device)

    def store(self, layer: int, key: Tensor | None, value: Tensor | None, lengths: Tensor) -> None:
        """Takes the S rows of a step.

        Args:
            layer: The layer.
            key: (B, S, g, D) after RoPE, or None.
            value: (B, S, g, D), or None.
            lengths: (B,) int32, with the rows of the step.
        """
        sides = [(key, self.keys[layer]), (value, self.values[layer])]
        pairs = [(new, stored) for new, stored in sides if new is not None and stored is not None]
        if len(pairs) == 1:  # the operation needs two sides; the second has zero heads
            new, stored = pairs[0]
            pairs.append((new[:, :, :0], stored[:, :, :0]))
        if pairs:
            (k, k_cache), (v, v_cache) = pairs
            cached.append(AppendCall(k, v, k_cache, v_cache, lengths, self.block_table))

    def crop(self, lengths: Sequence[int], decode: Callable[[Tensor], list[Tensor]]) -> None:
        """Follows a crop. What became one of the last tokens and has no raw row any more is decoded.

        Args:
            lengths: Tokens of each sequence after the crop.
            decode: Gives the decoded rows (B, n, g, D) of tokens (B, n), in the order of ``tensors``.
        """
        first = [max(length - self.count, 0) for length in lengths]
        lacking = [min(x, length) for x, length in zip(self._held, lengths, strict=True)]
        if any(begin < end for begin, end in zip(first, lacking, strict=True)):
            device, ring = self.block_table.device, self._ring
            token = self._last(lengths, self.count)
            lacks = (token >= 0) & (token < torch.tensor(lacking, device=device)[:, None])
            slot = slots_of(token.clamp_min(0), PAGE_SIZE, ring.block_table)
            for x, rows in zip(ring.tensors, decode(token.clamp_min(0)), strict=True):
                x.flatten(0, 1)[slot[lacks]] = rows[lacks].to(x.dtype)
        self._held = [min(pair) for pair in zip(self._held, first, strict=True)]

    def reorder(self, order: Sequence[int], rows: Tensor) -> None:
        """Replaces sequence b by the former sequence ``order[b]``; ``rows`` is the same on the device."""
        for x in self._ring.tensors:
            own = x.unflatten(0, (len(order), -1))
            own.copy_(own.index_select(0, rows))
        self._held = [self._held[i] for i in order]
