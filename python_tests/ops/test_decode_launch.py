"""The launch of cached attention on a GPU: which kernel, and that a block fits the shared memory."""

from __future__ import annotations

import itertools

import pytest

from fusedkv_ext import _C

SHAPES = [
    dict(rows=rows, head_dim=dim, value_dim=value_dim, num_keys=keys, num_values=values, element_size=size)
    for rows, dim, value_dim, keys, values, size in itertools.product(
        (1, 8, 9, 16, 17, 32, 33, 64, 1000), (8, 64, 72, 192, 256), (64, 128, 256), (1, 2, 3), (1, 2), (2, 4)
    )
]


def launch(
    shape: dict[str, int],
    kib: int,
    batch: int = 1,
    batch_invariant: bool = False,
    coded: bool = False,
) -> dict[str, object]:
    sequences = dict(batch=batch, num_kv_heads=2, cost=1000, capacity=5000, batch_invariant=batch_invariant)
    return _C.decode_launch(**sequences, sm_count=132, shared_per_block=kib * 1024, coded=coded, **shape)


@pytest.mark.parametrize("batch", [1, 1024, 1025, 100_000])
@pytest.mark.parametrize("kib", [99, 163, 227])
def test_a_block_fits_the_shared_memory_of_its_gpu(kib: int, batch: int) -> None:
    """sm_86 and sm_89 permit 99 KiB, sm_80 163, sm_90 and sm_100 227. At most 12 warps."""
    for shape in SHAPES:
        got = launch(shape, kib, batch)
        assert 0 < got["shared_bytes"] <= kib * 1024, (shape, got)
        assert got["threads"] % 32 == 0 and 32 <= got["threads"] <= 384, (shape, got)
        assert got["blocks"] >= 132


@pytest.mark.parametrize(
    ("shape", "warps", "kib"),
    [
        ((128, 2, 2), 6, 227),
        ((128, 1, 1), 11, 227),
        ((64, 2, 2), 12, 227),
        ((128, 2, 2), 4, 163),
        ((128, 2, 2), 2, 99),
    ],
)
def test_few_rows_run_in_one_block_per_sm(shape: tuple[int, int, int], warps: int, kib: int) -> None:
    """With as many warps as its rings leave room for: most of the shared memory is a ring."""
    dim, keys, values = shape
    got = launch(
        dict(rows=4, head_dim=dim, value_dim=dim, num_keys=keys, num_values=values, element_size=2), kib
    )
    assert got["kernel"] == "attn_decode/mma_warp.cu"
    assert (got["threads"], got["blocks"]) == (32 * warps, 132)


def test_the_workspace_has_two_slots_a_block_or_one_a_fixed_split() -> None:
    shape = dict(rows=4, head_dim=128, value_dim=64, num_keys=2, num_values=2, element_size=2)
    assert launch(shape, 227, batch=7)["workspace_floats"] == 2 * 132 * 4 * (64 + 1)
    assert launch(shape, 227, 7, batch_invariant=True)["workspace_floats"] == 7 * 2 * 5 * 4 * (64 + 1)


def test_two_sources_of_256_channels_run_on_tensor_cores_where_they_fit() -> None:
    shape = dict(rows=1, head_dim=256, value_dim=256, num_keys=2, num_values=2, element_size=2)
    kernels = [launch(shape, kib)["kernel"] for kib in (227, 163, 99)]
    assert kernels == ["attn_decode/mma_block.cu", "attn_decode/mma_block.cu", "attn_decode/fallback.cu"]


@pytest.mark.parametrize("kib", [99, 163, 227])
def test_codes_have_a_kernel_of_their_own_that_fits_with_any_number_of_sources(kib: int) -> None:
    for shape in [*SHAPES, *({**shape, "num_keys": 32, "num_values": 32} for shape in SHAPES[::7])]:
        got = launch(shape, kib, batch=1024, coded=True)
        assert (got["kernel"], got["rows"], got["threads"]) == ("attn_decode/coded.cu", 4, 128)
        assert 0 < got["shared_bytes"] <= kib * 1024, (shape, got)
    shape = dict(rows=4, head_dim=256, value_dim=256, num_values=1, element_size=2)
    few, many = (launch({**shape, "num_keys": n}, kib, coded=True)["shared_bytes"] for n in (1, 32))
    assert (many - few == 31 * 4 * 256 * 4) == (kib > 99), (
        "where they fit, the queries of all sources are held"
    )
