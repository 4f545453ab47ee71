"""Which tokens a query row sees: the one place where ``window_size`` and ``causal`` become token numbers.

Bounds are those of ``checks.check_window``: the row at position p sees tokens p - left to p + right, and -1
is unbounded. Causal attention has right = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkv_ext.ops.sizes import always

__all__ = ["fully_masked_rows", "seen_tokens", "visible", "visible_range"]


def visible_range(
    positions: Tensor, tokens: int | Tensor, left: int, right: int
) -> tuple[Tensor, Tensor | int]:
    """The tokens that rows see.

    Args:
        positions: Integer positions of the rows, any shape.
        tokens: How many tokens there are: one number, or one per row.
        left: Tokens before the row's own that it sees; -1 is unbounded.
        right: Tokens after the row's own that it sees; -1 is unbounded.

    Returns:
        The first token that each row sees, and one past the last. A row that sees no token has an end that is
        not above its first token.
    """
    first = torch.zeros_like(positions) if left < 0 else (positions - left).clamp(min=0)
    return first, tokens if right < 0 else (positions + right + 1).clamp(max=tokens)


def visible(rows: int, tokens: int, position: int, left: int, right: int, device: torch.device) -> Tensor:
    """The mask of consecutive rows.

    Args:
        rows: How many rows there are.
        tokens: How many tokens there are.
        position: The position of row 0.
        left, right: As in :func:`visible_range`.
        device: Where to put the mask.

    Returns:
        Boolean (rows, tokens), True where a row sees a token.
    """
    positions = torch.arange(position, position + rows, device=device)[:, None]
    first, end = visible_range(positions, tokens, left, right)
    token = torch.arange(tokens, device=device)
    return (token >= first) & (token < end)


def seen_tokens(position: int, rows: int, tokens: int, left: int, right: int) -> tuple[int, int]:
    """The tokens [begin, end) that some of consecutive rows see; all that a graph cannot exclude.

    Args:
        position: The position of row 0.
        rows, tokens: How many rows and tokens there are.
        left, right: As in :func:`visible_range`.
    """
    begin = position - left if left >= 0 and always(position > left) else 0
    end = position + rows + right if right >= 0 and always(position + rows + right < tokens) else tokens
    return begin, end


def fully_masked_rows(rows: int, tokens: int, right: int) -> int:
    """How many of the last ``rows`` positions of ``tokens`` tokens see no token: a prefix of the rows.

    Row i has position i + tokens - rows, and sees nothing only where that plus ``right`` is negative.
    """
    if right < 0:
        return rows if tokens == 0 else 0
    return 0 if always(rows - tokens <= right) else min(max(rows - tokens - right, 0), rows)
