"""fuse_kvcache: the weighted sum of the last tokens of m caches, gathered from where they lie."""

from __future__ import annotations

import pytest
import torch
from cases import NO_SUCH_PAGE, Case, as_cache, block_table, named, random_tensor, to_device
from torch import Tensor

from fusedkv_ext import fuse_kv
from fusedkv_ext.ops import reference
from fusedkv_ext.ops.native import run_op
from fusedkv_ext.testing import assert_close, assert_same_bits

# ``S`` is the number of tokens asked for, ``m_k`` that of caches.
CASES = [
    Case("contiguous", S=11, T=19, lengths=(19, 11)),
    Case("contiguous_left_padded", S=11, T=19, lengths=(4, 13), dtype=torch.bfloat16),
    Case("transposed", S=7, T=9, lengths=(9, 8), layout="transposed", m_k=3),
    Case("unaligned", S=7, T=9, lengths=(9, 2), layout="sliced", dtype=torch.float16),
    Case("one_source", S=5, T=9, lengths=(9, 5), m_k=1, D=128, G=1, dtype=torch.bfloat16),
    Case("five_sources", S=5, T=9, lengths=(9, 3), m_k=5, D=24),
    Case("pages_of_1", S=6, T=9, lengths=(9, 3), page_size=1, D=8, G=1),
    Case("pages_of_7", B=3, S=9, T=20, lengths=(20, 8, 14), page_size=7, dtype=torch.bfloat16),
    Case("pages_of_7_three_sources", S=9, T=20, lengths=(3, 17), page_size=7, m_k=3, D=40),
    Case("pages_of_16", B=4, S=40, T=50, lengths=(50, 16, 17, 33), page_size=16, dtype=torch.float16),
    Case("empty_sequence", B=3, S=5, T=20, lengths=(7, 0, 20), page_size=16),
    Case("more_tokens_than_the_cache_holds", S=30, T=20, lengths=(20, 7), page_size=7),
    Case("one_token", B=1, S=1, T=33, lengths=(33,), page_size=16, D=256, dtype=torch.bfloat16),
    Case("no_tokens", S=0, T=9, lengths=(9, 3), page_size=7),
    Case("empty_batch", B=0, S=3, T=9, lengths=()),
]


def inputs(
    case: Case, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor | None]:
    """Caches, the (B, T, G, D) tokens in them, weights, cache_seqlens and block_table."""
    shape = (case.B, case.T, case.G, case.D)
    tokens = [random_tensor(shape, case.dtype, case.layout) for _ in range(case.m_k)]
    lengths = case.lengths or ()
    table = block_table(lengths, case.T, case.page_size) if case.page_size else None
    copies = [x.clone() for x in tokens]
    caches = [as_cache(x, lengths, case.page_size, table) for x in tokens]
    weights = torch.randn(case.m_k, case.G, case.D)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return to_device((caches, copies, weights, seqlens, table), device)


def fuse_kvcache(
    caches: list[Tensor], weights: Tensor, seqlens: Tensor, table: Tensor | None, tokens: int
) -> Tensor:
    return run_op("fuse_kvcache", caches, weights, seqlens, table, tokens)


def oracle(
    tokens: list[Tensor], weights: Tensor, lengths: tuple[int, ...], count: int, dtype: torch.dtype
) -> Tensor:
    fused = reference.fuse_kv(tokens, weights, dtype=dtype)
    out = fused.new_zeros(fused.shape[0], count, *fused.shape[2:])
    for b, length in enumerate(lengths):
        new = min(count, length)
        out[b, count - new :] = fused[b, length - new : length]
    return out


@pytest.mark.parametrize(**named(CASES))
def test_matches_oracle(case: Case, device: torch.device) -> None:
    caches, tokens, weights, seqlens, table = inputs(case, device)
    got = fuse_kvcache(caches, weights, seqlens, table, case.S)
    lengths = case.lengths or ()
    exact = oracle(tokens, weights, lengths, case.S, torch.float64)
    assert_close(got, exact, oracle(tokens, weights, lengths, case.S, case.dtype))


@pytest.mark.parametrize("page_size", [None, 7])
def test_has_the_bits_of_fuse_kv_on_the_same_tokens(page_size: int | None, device: torch.device) -> None:
    case = Case("bits", S=13, T=13, lengths=(13, 13), page_size=page_size, dtype=torch.bfloat16)
    caches, tokens, weights, seqlens, table = inputs(case, device)
    assert_same_bits(fuse_kvcache(caches, weights, seqlens, table, 13), fuse_kv(tokens, weights))


@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("length", [-1, 22, 2**31 - 1, -(2**31)])
def test_a_length_out_of_range_is_refused_or_gives_nan(
    length: int, page_size: int | None, backend: str, device: torch.device
) -> None:
    case = Case("length", B=3, S=4, T=21, lengths=(21, 9, 2), page_size=page_size)
    caches, _, weights, seqlens, table = inputs(case, device)
    expected = fuse_kvcache(caches, weights, seqlens, table, 4)
    seqlens[1] = length
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"cache_seqlens\[1\] must be from 0 to .*, got "):
            fuse_kvcache(caches, weights, seqlens, table, 4)
        return
    got = fuse_kvcache(caches, weights, seqlens, table, 4)
    assert bool(got[1].isnan().all())
    assert_same_bits(got[::2], expected[::2])


@pytest.mark.parametrize("page", [-1, NO_SUCH_PAGE, 7])
def test_tokens_of_a_page_out_of_range_are_refused_or_give_nan(
    page: int, backend: str, device: torch.device
) -> None:
    case = Case("page", B=2, S=12, T=20, lengths=(20, 9), page_size=7)
    caches, _, weights, seqlens, table = inputs(case, device)
    assert caches[0].shape[0] == 7
    expected = fuse_kvcache(caches, weights, seqlens, table, 12)
    table[0, 0] = page
    assert_same_bits(
        fuse_kvcache(caches, weights, seqlens, table, 12), expected
    )  # No token of it is asked for.
    table[0, 1] = page
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"block_table\[0, 1\] must be a page from 0 to .*, got "):
            fuse_kvcache(caches, weights, seqlens, table, 12)
        return
    got = fuse_kvcache(caches, weights, seqlens, table, 12)
    # Positions 8 .. 19 were asked for; those up to 13 lie in the bad page.
    assert bool(got[0, :6].isnan().all())
    assert_same_bits(got[0, 6:], expected[0, 6:])
    assert_same_bits(got[1], expected[1])


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    caches, _, weights, seqlens, table = inputs(Case("bad", S=4, T=20, lengths=(20, 9), page_size=7), device)
    with pytest.raises(ValueError, match="tokens must be at least 0 .*, got -1"):
        fuse_kvcache(caches, weights, seqlens, table, -1)
    with pytest.raises(ValueError, match="block_table must have . rows, the batch size, got 1"):
        fuse_kvcache(caches, weights, seqlens, table[:1], 4)
    with pytest.raises(ValueError, match="pass block_table"):
        fuse_kvcache(caches, weights, seqlens, None, 4)
    with pytest.raises(TypeError, match="int32"):
        fuse_kvcache(caches, weights, seqlens.long(), table, 4)
    with pytest.raises(TypeError, match="float64"):
        fuse_kvcache([x.double() for x in caches], weights.double(), seqlens, table, 4)
