"""Packed sequences: several documents in one row, separated by ``document_ids``.

document_ids (B, T) int32 or int64 give the document of every token. Attention compares them for equality
(``fused_kv_attn_func``), so the documents of a row need different ids. Positions and labels depend only on
where they change from one token to the next.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkv_ext.ops.sizes import host_reads

__all__ = [
    "IGNORED",
    "Documents",
    "check_packing",
    "document_ids_of",
    "document_positions",
    "next_tokens",
    "read_documents",
]

IGNORED = -100  # a label that is no target token, as in torch and HF


class Documents(NamedTuple):
    """``document_ids`` (B, T) that a model reads once, for all of its layers.

    ``lengths`` are those of the documents of every sequence, in order. They are None if the host cannot read
    the ids, or if an id returns after another one: such a document is no run of tokens.
    """

    ids: Tensor
    lengths: tuple[tuple[int, ...], ...] | None

    def tokens(self, begin: int, end: int) -> Documents:
        """The documents of the tokens begin..end - 1."""
        ids, lengths = self.ids[:, begin:end], self.lengths
        if lengths is None:
            return Documents(ids, None)
        return Documents(ids, tuple(_cut(row, begin, end) for row in lengths))


def _cut(lengths: tuple[int, ...], begin: int, end: int) -> tuple[int, ...]:
    """The lengths of what lies in begin..end - 1."""
    found, first = [], 0
    for length in lengths:
        inside = min(first + length, end) - max(first, begin)
        if inside > 0:
            found.append(inside)
        first += length
    return tuple(found)


def read_documents(document_ids: Tensor) -> Documents:
    """Finds the documents of ids (B, T) on the host, after waiting for the device that has them."""
    if not host_reads(document_ids):
        return Documents(document_ids, None)
    B, T = document_ids.shape
    if B == 0 or T == 0:
        return Documents(document_ids, ((),) * B)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    rows, columns = begins.nonzero(as_tuple=True)
    runs = torch.stack((rows, columns, document_ids[rows, columns].long())).tolist()  # one copy to the host
    found: list[list[int]] = [[] for _ in range(B)]
    seen: set[tuple[int, int]] = set()
    for row, column, name in zip(*runs, strict=True):
        if (row, name) in seen:
            return Documents(document_ids, None)
        seen.add((row, name))
        found[row].append(column)
    lengths = tuple(tuple(end - begin for begin, end in pairwise([*row, T])) for row in found)
    return Documents(document_ids, lengths)


def document_ids_of(ids: Tensor, separator: int) -> Tensor:
    """The documents of token ids (B, T): int64 (B, T), the number of separators before each token.

    A separator is the last token of its document.
    """
    ends = ids == separator
    return ends.cumsum(dim=1) - ends.long()


def document_positions(document_ids: Tensor | Documents) -> Tensor:
    """Positions (B, T) int64 of packed tokens; they restart at 0 where ``document_ids`` (B, T) changes."""
    if isinstance(document_ids, Documents):
        document_ids = document_ids.ids
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    continues = F.pad(document_ids[:, 1:] == document_ids[:, :-1], (1, 0))
    return index - index.masked_fill(continues, 0).cummax(dim=1).values


def next_tokens(labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """The target of each position, (B, S): the next label.

    It is IGNORED at the end of the sequence and, with ``document_ids`` (B, S), if the next label belongs to
    another document.
    """
    targets = labels[:, 1:]
    if document_ids is not None:
        targets = targets.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], IGNORED)
    return F.pad(targets, (0, 1), value=IGNORED)


def check_packing(ids: Tensor, document_ids: Tensor) -> None:
    """Checks that ``document_ids`` are integers of the shape and on the device of token ids (B, S).

    Raises:
        ValueError: They are not.
    """
    if document_ids.shape != ids.shape or document_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"document_ids must be int32 or int64 of the shape of ids, {tuple(ids.shape)}; got "
            f"{document_ids.dtype} {tuple(document_ids.shape)}"
        )
    if document_ids.device != ids.device:
        raise ValueError(
            f"document_ids must be on {ids.device} as ids, got a tensor on {document_ids.device}"
        )
