"""The first tokens of every sequence, raw, beside a cache of codes for the others.

First tokens are attention sinks (StreamingLLM, arXiv:2309.17453). Their keys have ten times the norm of
others and get most of the attention. So an error that is small in other tokens moves every output.
Attention over them and attention over the codes are two states, which are merged (``merge_states``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.ops import cached
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.fuse import fuse_side

__all__ = ["FirstTokens", "attend_to_first"]


class FirstTokens:
    """Keys and values of the first ``count`` tokens of every sequence.

    Args:
        count: n.
        heads: The key heads and the value heads that each layer stores.
        batch_size: B.
        head_dim: D.
        dtype: Of keys and values.
        device: Where they are.

    Attributes:
        keys: (B, n, g, D) per layer; None where a layer stores none.
        values: The same of values.
    """

    def __init__(
        self,
        count: int,
        heads: Sequence[tuple[int, int]],
        batch_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        def make(g: int) -> Tensor | None:
            return torch.zeros(batch_size, count, g, head_dim, dtype=dtype, device=device) if g else None

        self.count = count
        self.keys: list[Any] = [make(k) for k, _ in heads]
        self.values: list[Any] = [make(v) for _, v in heads]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [x for x in (*self.keys, *self.values) if x is not None]

    def store(self, layer: int, key: Tensor | None, value: Tensor | None, lengths: Tensor) -> None:
        """Takes first tokens out of the S rows of a step.

        Args:
            layer: The layer.
            key: (B, S, g, D) after RoPE, or None.
            value: (B, S, g, D), or None.
            lengths: (B,) int32, with the rows of the step.
        """
        for new, stored in ((key, self.keys[layer]), (value, self.values[layer])):
            if new is None or stored is None or not new.shape[1]:
                continue
            steps = new.shape[1]
            row = torch.arange(self.count, device=new.device) - (lengths.long()[:, None] - steps)  # (B, n)
            index = row.clamp(0, steps - 1)[..., None, None].expand(-1, -1, *new.shape[2:])
            mine = ((row >= 0) & (row < steps))[..., None, None]
            stored.copy_(torch.where(mine, new.gather(1, index).to(stored.dtype), stored))


def attend_to_first(call: AttentionCall, lengths: Tensor, held: Tensor) -> tuple[Tensor, Any]:
    """Attention over first tokens: out (B, S, H, D) and lse (B, H, S).

    Args:
        call: The call over all tokens, with the first tokens as its sources, (B, n, g, D) each.
        lengths: (B,) int32, of the whole sequences.
        held: (B,) int32, how many of the first tokens each sequence has.
    """
    q, steps = call.q, call.q.shape[1]
    if steps == 1 and call.left < 0:  # the row sees all that there are
        return cached.attend(call._replace(cache_seqlens=held, block_table=None, host_seqlens=None))
    k, v = fuse_side(call.keys, call.key_weights), fuse_side(call.values, call.value_weights)
    position = lengths.long()[:, None] + torch.arange(-steps, 0, device=q.device)  # (B, S)
    token = torch.arange(k.shape[1], device=q.device)
    seen = token <= position[..., None]  # (B, S, n)
    if call.left >= 0:
        seen &= token >= position[..., None] - call.left
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).unflatten(2, (k.shape[2], -1))  # (B, S, G, group, D)
    s = torch.einsum("bsghd,bngd->bghsn", rows, k.to(wide)) * call.scale
    s = s.masked_fill(~seen[:, None, None], -torch.inf)
    lse = s.logsumexp(-1)
    p = (s - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    out = torch.einsum("bghsn,bngd->bsghd", p, v.to(wide)).flatten(2, 3).to(q.dtype)
    return out, lse.flatten(1, 2).float()
