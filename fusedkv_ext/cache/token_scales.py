"""Scales of single tokens beside a cache of codes, as codecs with scale "token" write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext.cache.page_table import slots_of

__all__ = ["TokenScales"]


class TokenScales:
    """A float16 scale for every token and KV head.

    Args:
        slots: (B, capacity), or (P, page_size) of a paged cache.
        heads: The key heads and the value heads of each layer that have such scales.
        device: Where they are.

    Attributes:
        keys: (*slots, g) per layer; None where a layer has none.
        values: The same of values.
    """

    def __init__(
        self, slots: tuple[int, int], heads: Sequence[tuple[int, int]], device: torch.device | str | None
    ) -> None:
        def make(g: int) -> Tensor | None:
            # One more token: rows of padding go there.
            count = slots[0] * slots[1]
            flat = torch.zeros(count + 1, g, dtype=torch.float16, device=device) if g else None
            return None if flat is None else flat[:count].view(*slots, g)

        self.slots = slots
        self.keys = [make(k) for k, _ in heads]
        self.values = [make(v) for _, v in heads]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [x for x in (*self.keys, *self.values) if x is not None]

    def slots_of_step(self, steps: int, lengths: Tensor, block_table: Tensor | None) -> Tensor:
        """Where the scales of a step go, (B * S,) int64; the same for all layers.

        Args:
            steps: S. Rows before the first token of a sequence are padding.
            lengths: (B,) int32 tokens of each sequence in the slots, with the rows of the step.
            block_table: (B, max_pages) int32 of a paged cache.
        """
        first, size = self.slots
        token = lengths.long()[:, None] + torch.arange(-steps, 0, device=lengths.device)  # (B, S)
        slot = slots_of(token.clamp_min(0), size, block_table)
        return torch.where(token >= 0, slot, first * size).flatten()

    def store(self, stored: Tensor, new: Tensor, slots: Tensor) -> None:
        """Writes the scales (B, S, g) of a step into one of ``tensors``, at ``slots_of_step``."""
        first, size = self.slots
        flat = stored.as_strided((first * size + 1, stored.shape[2]), (stored.shape[2], 1))
        flat.index_copy_(0, slots, new.flatten(0, 1))
