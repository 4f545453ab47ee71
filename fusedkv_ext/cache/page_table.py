"""The page table of a paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext.errors import CacheFullError

__all__ = ["PageTable", "brief", "slots_of"]


class PageTable:
    """Host-side page table: the pages of every sequence, with reference counts.

    After a reorder several sequences may share a page. A sequence that writes into a page must be its only
    owner, so ``extend`` copies a shared last page on write.
    """

    def __init__(self, batch_size: int, page_size: int, max_pages: int, num_pages: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.rows = torch.full((batch_size, max_pages), -1, dtype=torch.int32)
        self.pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def extend(self, old: list[int], new: list[int]) -> tuple[list[tuple[int, int]], bool]:
        """Allocates pages for the lengths ``new``.

        Args:
            old: Current length of each sequence.
            new: New length of each sequence.

        Returns:
            Page copies to execute, as (source page, target page), and whether the table changed.

        Raises:
            CacheFullError: The pool has too few free pages. The table is unchanged.
        """
        held = [len(pages) for pages in self.pages]
        growth = [-(-length // self.page_size) - count for count, length in zip(held, new, strict=True)]
        tails = self._shared_tails(old, new)
        # If all owners of a page write, the last one keeps it.
        spare = sum(writers == self._owners[page] for page, writers in Counter(tails.values()).items())
        needed = sum(growth) + len(tails) - spare
        if needed > len(self._free):
            raise CacheFullError(
                f"the page pool is full: lengths {brief(new)} need {needed} more pages of {self.page_size} "
                f"tokens, got {len(self._free)} free of {self.num_pages}; free(b) finished sequences, "
                "crop, or make a cache with more num_pages"
            )
        copies = []
        for b, page in tails.items():
            if self._owners[page] > 1:
                self._owners[page] -= 1
                own = self._take()
                copies.append((page, own))
                self._set(b, len(self.pages[b]) - 1, own)
        for b, count in enumerate(growth):
            for _ in range(count):
                self.pages[b].append(-1)
                self._set(b, len(self.pages[b]) - 1, self._take())
        return copies, bool(copies) or any(growth)

    def truncate(self, b: int, length: int) -> bool:
        """Frees the pages of sequence b beyond ``length`` tokens; returns whether there were any."""
        keep = -(-length // self.page_size)
        dropped = self.pages[b][keep:]
        del self.pages[b][keep:]
        for page in dropped:
            self._release(page)
        if dropped:
            self.rows[b, keep:] = -1
        return bool(dropped)

    def reorder(self, index: list[int]) -> None:
        """Replaces sequence b by the former sequence index[b]. Duplicates share pages."""
        chosen = [list(self.pages[i]) for i in index]
        for page in (page for pages in chosen for page in pages):
            self._owners[page] += 1
        for page in (page for pages in self.pages for page in pages):
            self._release(page)
        self.pages = chosen
        self.rows.copy_(self.rows[index])

    def _shared_tails(self, old: list[int], new: list[int]) -> dict[int, int]:
        """Sequences that will write into a shared last page, with that page."""
        return {
            b: pages[-1]
            for b, pages in enumerate(self.pages)
            if new[b] > old[b] and old[b] % self.page_size and self._owners[pages[-1]] > 1
        }

    def _set(self, b: int, column: int, page: int) -> None:
        self.pages[b][column] = page
        self.rows[b, column] = page

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free.append(page)


def brief(numbers: Sequence[int]) -> str:
    """Formats the first few numbers for messages."""
    return "[" + ", ".join(map(str, numbers[:8])) + (", ...]" if len(numbers) > 8 else "]")


def slots_of(token: Tensor, size: int, block_table: Tensor | None) -> Tensor:
    """Where tokens are in a cache tensor whose first two dims are flattened.

    Args:
        token: (B, N) from 0, int64.
        size: The second dim: capacity or page size.
        block_table: (B, max_pages) int32 of a paged cache.
    """
    if block_table is None:
        return token + size * torch.arange(len(token), device=token.device)[:, None]
    return block_table.long().gather(1, token // size) * size + token % size
