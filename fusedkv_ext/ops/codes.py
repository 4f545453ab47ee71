"""Caches of codes: elements of 8 or 4 bits that attention reads as numbers, without decoding them.

A code n of int8 stands for n, one of float8_e4m3fn for itself. A uint8 element holds two codes of 4 bits. The
low half is that of channel d, the high half that of channel d + D / 2. They stand for n - 8, or for the
numbers of a codebook.

A static code c + s (.) u per channel folds into the call of attention. s goes into the weights of its source,
the weighted sum of the values' c into ``value_bias``. The keys' c drops out of the softmax, as it adds one
number to all scores of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

__all__ = ["CODE_DTYPES", "CodeOptions", "EncodeOptions", "channels", "is_coded", "split_queries"]

CODE_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.uint8)


class EncodeOptions(TypedDict, total=False):
    """Arguments of ``append_kvcache`` that encode tokens: the codes are those of u = (x - center) / scale.

    u is computed in float32 after the rotation, rounded to nearest even and saturated: int8 at 127, 4
    bits at -8 and 7, float8_e4m3fn at 448. NaN becomes the code of 0, or NaN in float8_e4m3fn. A
    tensor of the cache's dtype has codes already: it is copied.

    Args:
        key_scale, value_scale: (G, D) and (Gv, Dv) float32, for a cache of codes.
        key_center, value_center: The same; None: 0.
    """

    key_scale: Tensor | None
    key_center: Tensor | None
    value_scale: Tensor | None
    value_center: Tensor | None


class CodeOptions(TypedDict, total=False):
    """Arguments of ``fused_kv_attn_with_kvcache`` that belong to caches of codes.

    Args:
        codebook: (16,) float32, the finite numbers of the 4-bit codes. None: code n stands for n - 8.
        key_token_scales: m_k float16 tensors (B, capacity, G), or (P, page_size, G): factors of the products
            of a source's tokens, before they are summed over the sources.
        value_token_scales: m_v such tensors: factors of the tokens' probabilities for a source.
        value_bias: (G, Dv) float32, added to every fused value. A row that sees no token stays zero.
    """

    codebook: Tensor | None
    key_token_scales: Tensor | Sequence[Tensor] | None
    value_token_scales: Tensor | Sequence[Tensor] | None
    value_bias: Tensor | None


def is_coded(cache: Tensor) -> bool:
    """Whether a cache holds codes."""
    return cache.dtype in CODE_DTYPES


def channels(cache: Tensor) -> int:
    """The head dim of a cache (.., D), or of one with two codes per byte (.., D / 2)."""
    return cache.shape[-1] * 2 if cache.dtype == torch.uint8 else cache.shape[-1]


def split_queries(q: Any) -> tuple[Any, Tensor | None]:
    """A query for all key sources, or a sequence of one for each: the first, and all of them in one tensor.

    Args:
        q: A tensor, a sequence of m tensors of one shape and dtype, or anything that later checks refuse.

    Returns:
        The first query, and (m, *shape) if there are several.

    Raises:
        ValueError: The sequence is empty, or shapes or devices differ.
        TypeError: An element is no tensor, or dtypes differ.
    """
    if not isinstance(q, (list, tuple)):
        return q, None
    if not q:
        raise ValueError("q must hold one tensor per key cache, got 0")
    for j, x in enumerate(q):
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"q[{j}] must be a dense torch.Tensor, got {type(x).__name__}")
        if x.shape != q[0].shape:
            raise ValueError(f"q[{j}] must have shape {tuple(q[0].shape)} as q[0], got {tuple(x.shape)}")
        if x.dtype != q[0].dtype:
            expected, got = (str(y.dtype).removeprefix("torch.") for y in (q[0], x))
            raise TypeError(f"q[{j}] must be {expected} as q[0], got {got}")
        if x.device != q[0].device:
            raise ValueError(f"q[{j}] must be on {q[0].device} as q[0], got a tensor on {x.device}")
    if len(q) == 1:
        return q[0], None
    queries = torch.stack(list(q))
    return queries[0], queries
