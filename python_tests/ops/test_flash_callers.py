"""With one source, our functions are called as flash-attn's, keyword for keyword.

The oracle is attention as flash-attn's docstrings define it, in float64 and independent of ``reference``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.testing import assert_close

BF16, FP16 = torch.bfloat16, torch.float16
# Bounds as a caller of flash-attn passes them: (-1, -1) is no window, causal aligns at the bottom right.
BOUNDS = [
    {"causal": False},
    {"causal": True},
    {"causal": True, "window_size": (5, 0)},
    {"causal": False, "window_size": (4, 2), "softmax_scale": 0.3},
]


def attention(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
    """One sequence: q (S, H, D), k and v (T, G, D)."""
    causal, (left, right) = options.get("causal", False), options.get("window_size", (-1, -1))
    S, T, group = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    scores = torch.einsum("shd,thd->hst", q, k) * options.get("softmax_scale", q.shape[2] ** -0.5)
    distance = torch.arange(S)[:, None] + T - S - torch.arange(T)
    hidden = torch.zeros(S, T, dtype=torch.bool)
    if causal:
        right = 0
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hst,thd->shd", weights, v)


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype, pairs: bool
) -> Tensor:
    """x (S, H, D) with channels rotated as complex numbers; ``pairs``: neighbors, else halves."""
    half = cos.shape[1]
    c, s = (table[positions].to(dtype)[:, None] for table in (cos, sin))
    head = x[..., : 2 * half].to(dtype)
    a, b = (head[..., 0::2], head[..., 1::2]) if pairs else head.chunk(2, -1)
    turned = (a * c - b * s, b * c + a * s)
    head = torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)
    return torch.cat((head, x[..., 2 * half :].to(dtype)), -1)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("S", "T", "D"), [(1, 9, 64), (9, 9, 64), (7, 20, 59), (12, 5, 64)])
def test_as_flash_attn_func(S: int, T: int, D: int, bounds: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, S, 4, D), torch.randn(2, T, 2, D), torch.randn(2, T, 2, D)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    got = fkv.fused_kv_attn_func(q, k, v, **bounds)
    exact, same_maths = (
        torch.stack([attention(q[b], k[b], v[b], to, **bounds) for b in range(2)])
        for to in (torch.float64, dtype)
    )
    assert_close(got, exact, same_maths)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_as_flash_attn_varlen_func(bounds: dict[str, Any], dtype: torch.dtype) -> None:
    cu_seqlens_q = torch.tensor([0, 3, 3, 12, 13], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 8, 10, 19, 20], dtype=torch.int32)
    q, k, v = (torch.randn(n, h, 64).to(dtype) for n, h in ((13, 4), (20, 2), (20, 2)))
    got = fkv.fused_kv_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=9,
        max_seqlen_k=9,
        **bounds,
    )
    sequences = list(zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True))
    exact, same_maths = (
        torch.cat([attention(q[a:b], k[c:d], v[c:d], to, **bounds) for (a, b), (c, d) in sequences])
        for to in (torch.float64, dtype)
    )
    assert_close(got, exact, same_maths)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
def test_as_flash_attn_with_kvcache(
    paged: bool, bounds: dict[str, Any], interleaved: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """New tokens, rotary tables, lengths before the append, and rows or pages of the caches, in one call."""
    lengths, steps, rotary_dim = [21, 4], 3, 32
    sequences = [[torch.randn(n, 2, 64).to(dtype) for _ in range(2)] for n in lengths]
    shape, first = ((6, 16), [[4, 1], [0, 5]]) if paged else ((5, 32), [[3], [1]])
    k_cache, v_cache = (torch.full((*shape, 2, 64), math.nan, dtype=dtype) for _ in range(2))
    for pages, tokens in zip(first, sequences, strict=True):
        for cache, own in zip((k_cache, v_cache), tokens, strict=True):
            for t, token in enumerate(own):
                cache[pages[t // shape[1]], t % shape[1]] = token
    q, k, v = (torch.randn(2, steps, h, 64).to(dtype) for h in (4, 2, 2))
    angles = torch.randn(32, rotary_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    where = {"block_table": torch.tensor(first)} if paged else {"cache_batch_idx": torch.tensor([3, 1])}
    arguments = {
        "k": k,
        "v": v,
        "rotary_cos": cos,
        "rotary_sin": sin,
        "cache_seqlens": torch.tensor(lengths),
        **where,
    }
    on_device = {name: x.to(device) for name, x in arguments.items()}
    got = fkv.fused_kv_attn_with_kvcache(
        q.to(device),
        k_cache.to(device),
        v_cache.to(device),
        **on_device,
        rotary_interleaved=interleaved,
        **bounds,
    )

    def oracle(to: torch.dtype) -> Tensor:
        outs = []
        for b, (keys, values) in enumerate(sequences):
            new = torch.arange(lengths[b], lengths[b] + steps)
            # Without causality and window flash-attn rotates all queries at the first position.
            in_order = bounds["causal"] or "window_size" in bounds
            k_new = rotated(k[b], cos, sin, new, to, interleaved).to(dtype)  # as it is stored
            q_new = rotated(q[b], cos, sin, new if in_order else new[:1].expand(steps), to, interleaved)
            outs.append(attention(q_new, torch.cat((keys, k_new)), torch.cat((values, v[b])), to, **bounds))
        return torch.stack(outs)

    assert_close(got.cpu(), oracle(torch.float64), oracle(dtype))


def test_cache_leftpad_and_an_int_length_as_in_flash_attn(device: torch.device) -> None:
    q, k_cache, v_cache = torch.randn(2, 1, 4, 64), torch.randn(2, 24, 2, 64), torch.randn(2, 24, 2, 64)
    leftpad = torch.tensor([5, 0], dtype=torch.int32)
    arguments = [x.to(device) for x in (q, k_cache, v_cache)]
    got = fkv.fused_kv_attn_with_kvcache(
        *arguments, cache_seqlens=20, cache_leftpad=leftpad.to(device), causal=True
    ).cpu()
    exact, same_maths = (
        torch.stack([attention(q[b], k_cache[b, n:20], v_cache[b, n:20], to) for b, n in enumerate((5, 0))])
        for to in (torch.float64, torch.float32)
    )
    assert_close(got, exact, same_maths)
