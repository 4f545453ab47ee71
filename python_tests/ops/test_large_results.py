"""Large results of fuse_kv on the CPU: written past the caches, into memory that is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import random_tensor
from torch import Tensor

from fusedkv_ext import fuse_kv, fuse_kv_backward
from fusedkv_ext.ops import native
from fusedkv_ext.testing import assert_same_bits

MIB = 1 << 20
LARGE = 16 * MIB  # from here on results are streamed into kept memory
KEPT = 512 * MIB
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    native.release_kept_memory()
    yield
    native.release_kept_memory()


def ones(tokens: int, heads: int = 8, dim: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1, tokens, heads, dim): 4 KiB per token as it comes."""
    return torch.ones(1, tokens, heads, dim, dtype=dtype)


def fused(source: Tensor) -> Tensor:
    return fuse_kv([source], torch.ones(1, 1, 1))


# Rows of whole cache lines, of part of a vector, of several vectors and a part, of sources at odd addresses.
@pytest.mark.parametrize(
    ("heads", "dim", "layout"),
    [
        (8, 128, "contiguous"),
        (3, 8, "contiguous"),
        (2, 72, "transposed"),
        (3, 64, "sliced"),
        (1, 200, "sliced"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_results_have_the_bits_of_small_ones(
    level: str, dtype: torch.dtype, heads: int, dim: int, layout: str
) -> None:
    tokens = LARGE // (heads * dim * dtype.itemsize) + 5
    sources = [random_tensor((1, tokens, heads, dim), dtype, layout) for _ in range(3)]
    weights = torch.randn(3, heads, dim)
    grad = torch.randn(1, tokens, heads, dim).to(dtype)
    out = fuse_kv(sources, weights)
    gradients, _ = fuse_kv_backward(grad, sources, weights, needs_weights=False)
    assert out.nbytes >= LARGE
    for piece in torch.arange(tokens).split(tokens // 3):  # below the size from which results are streamed
        part = slice(int(piece[0]), int(piece[-1]) + 1)
        pieces = [x[:, part] for x in sources]
        assert_same_bits(out[:, part], fuse_kv(pieces, weights))
        # m = 3 sources' gradients are one result: a part of it is small if it is a third of LARGE.
        for begin in range(part.start, part.stop, len(piece) // 3 + 1):
            small = slice(begin, min(begin + len(piece) // 3 + 1, part.stop))
            expected, _ = fuse_kv_backward(
                grad[:, small].contiguous(), [x[:, small] for x in sources], weights, needs_weights=False
            )
            assert_same_bits(tuple(x[:, small] for x in gradients), tuple(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_sums_go_to_buffers_at_any_offset(level: str, dtype: torch.dtype) -> None:
    """Buffers start where they like: at each offset within a cache line that a slice can have."""
    tokens = LARGE // (256 * dtype.itemsize)
    sources, weights = [random_tensor((1, tokens, 2, 64), dtype)], torch.randn(1, 2, 64)
    grad = torch.randn(1, tokens, 2, 64).to(dtype)
    (expected,), _ = fuse_kv_backward(grad, sources, weights, needs_weights=False)
    for offset in (0, 1, 3, 8, 13):
        memory = torch.zeros(grad.numel() + 64, dtype=dtype)
        total = memory[offset : offset + grad.numel()].view(grad.shape)
        fuse_kv_backward(grad, sources, weights, grad_sources=[total], needs_weights=False)
        assert_same_bits(total, expected + 0)  # 0 and not -0, as a sum that starts from 0
        assert not memory[:offset].any() and not memory[offset + grad.numel() :].any()


def test_large_backward_has_the_same_bits_for_every_number_of_threads(
    with_threads: Callable[[int], None],
) -> None:
    sources = [random_tensor((1, 16384, 4, 128), torch.bfloat16) for _ in range(2)]
    weights, grad = torch.randn(2, 4, 128), torch.randn(1, 16384, 4, 128).bfloat16()
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        gradients, of_weights = fuse_kv_backward(grad, sources, weights)
        results.append((fuse_kv(sources, weights), *gradients, of_weights))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_freed_memory_is_used_again() -> None:
    source = ones(LARGE // 4096)
    out = fused(source)
    address = out.data_ptr()
    assert address % (2 * MIB) == 0
    del out
    assert native.kept_memory_bytes() == LARGE
    out = fused(2 * source)
    assert out.data_ptr() == address and native.kept_memory_bytes() == 0
    assert bool((out == 2).all())


def test_memory_in_use_is_never_given_out_twice() -> None:
    source = ones(LARGE // 4096)
    results = [fused(i * source) for i in range(4)]
    assert len({x.data_ptr() for x in results}) == 4
    view = results[1][:, 5:6]
    del results[1]
    other = fused(7 * source)
    assert bool((view == 1).all()) and bool((other == 7).all())


def test_small_results_are_left_to_torch() -> None:
    fused(ones(LARGE // 4096 - 1))
    assert native.kept_memory_bytes() == 0


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    """Results of many sizes, one after the other, keep the memory of about one."""
    largest = 0
    for mib in (16, 24, 18, 30, 20, 22, 28, 16):
        fused(ones(mib * MIB // 4096))
        largest = max(largest, mib * MIB)
        assert native.kept_memory_bytes() <= largest


def test_what_is_kept_has_a_limit() -> None:
    source = ones(KEPT // 4096 // 5)
    results = [fused(source) for _ in range(7)]
    results.clear()
    assert KEPT // 2 < native.kept_memory_bytes() <= KEPT


def test_released_memory_is_gone() -> None:
    fused(ones(LARGE // 4096))
    assert native.kept_memory_bytes() > 0
    native.release_kept_memory()
    assert native.kept_memory_bytes() == 0


def test_large_results_take_part_in_autograd() -> None:
    source = ones(LARGE // 4096).requires_grad_()
    weights = torch.full((1, 8, 128), 3.0, requires_grad=True)
    fuse_kv([source], weights).sum().backward()
    assert bool((source.grad == 3).all()) and bool((weights.grad == source.shape[1]).all())


def test_huge_pages_are_advice() -> None:
    small = torch.zeros(1000)
    assert not native.advise_huge_pages(small)
    large = torch.empty(8 * MIB, dtype=torch.uint8)
    native.advise_huge_pages(large)  # whether the system follows is its own affair
    large.fill_(3)
    assert int(large.sum()) == 3 * 8 * MIB
