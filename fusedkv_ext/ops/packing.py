"""Packed sequences: several documents in one row, separated by ``document_ids``.

document_ids (B, T) int32 or int64 give the document of every token. Attention compares them for equality
(``fused_kv_attn_func``), so the documents of a row need different ids. Positions and labels depend only on
where they change from one token to the next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "check_packing", "document_ids_of", "document_positions", "next_tokens"]

IGNORED = -100  # a label that is no target token, as in torch and HF


def document_ids_of(ids: Tensor, separator: int) -> Tensor:
    """The documents of token ids (B, T): int64 (B, T), the number of separators before each token.

    A separator is the last token of its document.
    """
    ends = ids == separator
    return ends.cumsum(dim=1) - ends.long()


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions (B, T) int64 of packed tokens; they restart at 0 where ``document_ids`` (B, T) changes."""
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
