"""What torch offers for the same results. Decoding: one query token, no mask, softmax scale 1 / sqrt(D).

Caches come as (B, G, T, D), contiguous (head-major) or a view of another layout; q as (B, 1, H, D). All
return (B, 1, H, D). ``R = H / G`` query heads share a KV head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.pointwise import eager_fuse

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query row per head; ``enable_gqa`` where heads share."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=q.shape[2] != k.shape[1])
    return out.transpose(1, 2)


def packed_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The query heads of a group as the query rows of one head, so that keys are read once per group."""
    out = F.scaled_dot_product_attention(_rows(q, k.shape[1]), k, v, scale=scale)
    return out.reshape(*q.shape[:3], v.shape[3])


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _rows(q, k.shape[1]) @ k.transpose(2, 3)
    return (_softmax(scores, q.shape[3], -1) @ v).view(q.shape)


def matmul_keys_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bmm over sequences and KV heads with the keys on the left, which some libraries do faster."""
    rows = _rows(q, k.shape[1])
    scores = torch.bmm(k.flatten(0, 1), rows.flatten(0, 1).transpose(1, 2))
    return torch.bmm(_softmax(scores, q.shape[3], 1).transpose(1, 2), v.flatten(0, 1)).view(q.shape)


def matmul_stored_transposed(q: Tensor, transposed: Tensor, v: Tensor) -> Tensor:
    """With keys that lie as (B, G, D, T)."""
    scores = _rows(q, v.shape[1]) @ transposed
    return (_softmax(scores, q.shape[3], -1) @ v).view(q.shape)


def flex_attention() -> Decode | str:
    """Compiled flex_attention on packed rows, or why there is none. Compiling takes seconds."""
    try:
        from torch.nn.attention.flex_attention import flex_attention as flex

        torch._dynamo.reset()  # what was compiled for other shapes counts towards a limit
        compiled = torch.compile(flex, dynamic=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return lambda q, k, v: compiled(_rows(q, k.shape[1]), k, v).reshape(q.shape)


def fuse_then_sdpa(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], a: Tensor, b: Tensor
) -> Tensor:
    """Makes the fused keys and values, then attends. a, b: (m, G, D)."""
    return packed_sdpa(q, eager_fuse(keys, a[:, :, None]), eager_fuse(values, b[:, :, None]))


def concatenated_sdpa(q: Tensor, keys: Tensor, values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """SDPA over sources that lie side by side: (B, G, T, m D). The weights go into q and the output."""
    (m, G, D), H = a.shape, q.shape[2]
    rows = _rows(q, G)
    weighted = torch.cat([rows * w[:, None].to(q.dtype) for w in a], dim=-1)
    out = F.scaled_dot_product_attention(weighted, keys, values, scale=1 / math.sqrt(D))
    out = out.unflatten(3, (m, D)).float() * b.transpose(0, 1)[:, None].float()
    return out.sum(3).to(q.dtype).reshape(q.shape[0], 1, H, D)


def folded(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    *,
    keys_left: bool = False,
) -> Tensor:
    """The weights go into q and the output; one matrix product per source and side, heads as one batch."""
    rows = _rows(q, keys[0].shape[1])
    D, dtype = q.shape[3], q.dtype
    scaled = [(rows * w[:, None].to(dtype)).flatten(0, 1) for w in a]
    if keys_left:
        pairs = zip(scaled, keys, strict=True)
        scores = sum(torch.bmm(k.flatten(0, 1), x.transpose(1, 2)) for x, k in pairs)
        p = _softmax(scores, D, 1).transpose(1, 2)
    else:
        pairs = zip(scaled, keys, strict=True)
        p = _softmax(sum(torch.bmm(x, k.flatten(0, 1).transpose(1, 2)) for x, k in pairs), D, -1)
    outs = (torch.bmm(p, v.flatten(0, 1)).view_as(rows) for v in values)
    return sum(out * w[:, None].to(dtype) for out, w in zip(outs, b, strict=True)).view(q.shape)


def rotate_and_store(key: Tensor, value: Tensor, caches: Sequence[Tensor], cos: Tensor, sin: Tensor) -> None:
    """``append_kvcache`` of a prompt into empty caches: rotary in float32, then two copies."""
    x, y = key.float().chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    caches[0].copy_(torch.cat((x * c - y * s, x * s + y * c), dim=-1))
    caches[1].copy_(value)


def _rows(q: Tensor, G: int) -> Tensor:
    """(B, 1, H, D) -> (B, G, R, D)."""
    return q.view(q.shape[0], G, -1, q.shape[3])


def _softmax(scores: Tensor, D: int, dim: int) -> Tensor:
    return torch.softmax(scores.float() / math.sqrt(D), dim).to(scores.dtype)
