"""The oracle itself, held against torch's own attention and against formulas written a second way."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, cache_inputs, dense_inputs
from torch.nn.functional import scaled_dot_product_attention

from fusedkv_ext.ops import reference

CPU = torch.device("cpu")


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """torch's attention in (B, S, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def test_fuse_kv_is_the_weighted_sum_of_its_sources() -> None:
    sources = [torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(3)]
    weights = torch.randn(3, 4, 8, dtype=torch.float64)
    expected = torch.einsum("jgd,jbtgd->btgd", weights, torch.stack(sources))
    torch.testing.assert_close(reference.fuse_kv(sources, weights), expected)


@pytest.mark.parametrize("shape", [(), (1,), (16,), (4, 1), (3, 1, 1), (3, 4, 1), (3, 1, 16), (1, 4, 16)])
def test_fuse_kv_broadcasts_weights_to_m_g_d(shape: tuple[int, ...]) -> None:
    sources = [torch.randn(2, 5, 4, 16) for _ in range(3)]
    weights = torch.randn(shape)
    full = weights.expand(3, 4, 16)
    assert torch.equal(reference.fuse_kv(sources, weights), reference.fuse_kv(sources, full))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch_sdpa_over_explicitly_fused_tensors(causal: bool) -> None:
    q, keys, values, a, b = dense_inputs(Case("sdpa", S=9, T=9, m_k=2, m_v=3, Dv=32), CPU)
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if causal else None
    expected = sdpa(
        q,
        (a[:, None, None] * torch.stack(keys)).sum(0),
        (b[:, None, None] * torch.stack(values)).sum(0),
        mask,
    )
    torch.testing.assert_close(reference.fused_kv_attn_func(q, keys, values, a, b, causal=causal), expected)


def test_window_is_half_open_and_aligned_at_the_bottom_right() -> None:
    q, k, v = torch.randn(1, 3, 1, 16), torch.randn(1, 7, 1, 16), torch.randn(1, 7, 1, 16)
    # Rows stand at positions 4, 5, 6; (left, right) = (2, 1) shows them keys 2-5, 3-6 and 4-6.
    mask = torch.tensor(
        [[0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool
    )
    out = reference.fused_kv_attn_func(q, k, v, window_size=(2, 1))
    torch.testing.assert_close(out, sdpa(q, k, v, mask))
    causal_out = reference.fused_kv_attn_func(q, k, v, window_size=(2, 1), causal=True)
    torch.testing.assert_close(causal_out, sdpa(q, k, v, mask.tril(4)))


def test_lse_is_the_natural_logarithm_of_the_softmax_denominator() -> None:
    q, k, v = torch.randn(1, 2, 2, 16), torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 16)
    _, lse = reference.fused_kv_attn_func(q, k, v, softmax_scale=0.5, return_lse=True)
    expected = torch.einsum("bshd,bthd->bhst", q, k).mul(0.5).exp().sum(-1).log()
    assert lse.shape == (1, 2, 2)
    torch.testing.assert_close(lse, expected)


def test_rows_that_see_nothing_are_zero_with_lse_minus_infinity_and_have_finite_gradients() -> None:
    q = torch.randn(1, 4, 2, 16, requires_grad=True)
    k, v = torch.randn(1, 2, 2, 16, requires_grad=True), torch.randn(1, 2, 2, 16, requires_grad=True)
    out, lse = reference.fused_kv_attn_func(q, k, v, causal=True, return_lse=True)
    assert torch.equal(out[:, :2], torch.zeros(1, 2, 2, 16))
    assert torch.equal(lse[:, :, :2], torch.full((1, 2, 2), -math.inf))
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("page_size", [None, 4])
def test_cached_attention_is_dense_attention_of_each_sequence(page_size: int | None) -> None:
    case = Case("ragged", B=3, S=3, T=11, lengths=(11, 2, 0), page_size=page_size)
    args, state = cache_inputs(case, CPU)
    out, lse = reference.fused_kv_attn_with_kvcache(*args, **state, return_lse=True)
    q, key_caches, value_caches, a, b = args
    for row, length in ((0, 11), (1, 2)):
        pages = (
            slice(row, row + 1) if page_size is None else state["block_table"][row, : -(-length // 4)].long()
        )
        keys, values = (
            [c[pages].flatten(0, 1)[None, :length] for c in caches] for caches in (key_caches, value_caches)
        )
        dense = reference.fused_kv_attn_func(
            q[row : row + 1], keys, values, a, b, causal=True, return_lse=True
        )
        torch.testing.assert_close((out[row : row + 1], lse[row : row + 1]), dense)
    assert torch.equal(out[2], torch.zeros_like(out[2])) and torch.equal(
        lse[2], torch.full_like(lse[2], -math.inf)
    )
    assert torch.equal(out[1, :1], torch.zeros_like(out[1, :1]))


def test_padding_rows_are_zero_without_causality_too() -> None:
    args, state = cache_inputs(Case("short", B=1, S=3, T=4, lengths=(2,)), CPU)
    out, lse = reference.fused_kv_attn_with_kvcache(*args, **state, causal=False, return_lse=True)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0])) and bool((lse[:, :, 0] == -math.inf).all())
    assert torch.isfinite(lse[:, :, 1:]).all()


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_append_rotates_each_pair_as_a_complex_number(interleaved: bool) -> None:
    key, value = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16)
    angles = torch.randn(8, 4)
    key_cache, value_cache = torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16)
    reference.append_kvcache(
        key,
        value,
        key_cache,
        value_cache,
        cache_seqlens=torch.tensor([5]),
        rotary_cos=angles.cos(),
        rotary_sin=angles.sin(),
        rotary_interleaved=interleaved,
    )
    pairs = (
        key[..., :8].unflatten(-1, (4, 2))
        if interleaved
        else key[..., :8].unflatten(-1, (2, 4)).transpose(-1, -2)
    )
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles[2:5, None]))
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(key_cache[:, 2:5, :, :8], turned)
    assert torch.equal(key_cache[:, 2:5, :, 8:], key[..., 8:]) and torch.equal(value_cache[:, 2:5], value)
    assert not key_cache[:, :2].any() and not key_cache[:, 5:].any() and not value_cache[:, 5:].any()


def test_append_skips_the_padding_of_short_sequences_and_follows_the_block_table() -> None:
    key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8)
    key_pages, value_pages = torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8)
    table = torch.tensor([[3, 1, 0], [2, 9, 9]], dtype=torch.int32)
    reference.append_kvcache(
        key, value, key_pages, value_pages, cache_seqlens=torch.tensor([5, 2]), block_table=table
    )
    assert torch.equal(torch.cat([key_pages[3, 1:], key_pages[1], key_pages[0, :1]]), key[0])
    assert torch.equal(value_pages[2], value[1, 2:])
    assert not key_pages[3, 0].any() and not key_pages[0, 1].any()


def test_reference_is_differentiable_in_every_input() -> None:
    case = Case("gradcheck", B=1, S=3, T=4, H=2, G=1, D=8, dtype=torch.float64, causal=True)
    q, keys, values, a, b = dense_inputs(case, CPU)
    inputs = [x.double().requires_grad_() for x in (q, *keys, *values, a, b)]

    def attention(q: torch.Tensor, k0, k1, v0, v1, a, b) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.fused_kv_attn_func(q, [k0, k1], [v0, v1], a, b, causal=True, return_lse=True)

    assert torch.autograd.gradcheck(attention, inputs)
