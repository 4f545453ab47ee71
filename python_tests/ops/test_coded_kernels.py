"""The CUDA kernel of caches of codes: every shape class, splits, unaligned memory, what must not leak.

test_coded_attention.py has the operation itself, on the CPU and in the executor.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from coded_cases import BF16, CODES, E4M3, F32, FP16, I4, I8, NAN_CODE, Inputs
from conftest import Simt
from torch import Tensor

from fusedkv_ext import decode_schedule, explain
from fusedkv_ext.ops import native
from fusedkv_ext.testing import assert_near, assert_same_bits

ROWS = {1: (1, 2, 2), 4: (2, 4, 2), 5: (5, 2, 2), 9: (3, 3, 1)}  # per KV head: S, H and G
DIMS = [(64, 64), (128, 128), (192, 192), (256, 256), (72, 72), (80, 80), (40, 128), (136, 24)]
RAGGED = (150, 0, 67)


def shape_of(index: int, rows: int, sources: int) -> dict[str, object]:
    """Sizes that change with the index, so that all of them meet all codes, rows and numbers of sources."""
    (S, H, G), (D, Dv) = ROWS[rows], DIMS[index % len(DIMS)]
    sizes = {"S": S, "H": H, "G": G, "D": D, "Dv": Dv, "m": sources}
    return sizes | {"lengths": RAGGED, "page_size": (None, 16, 7)[index % 3]}


MATRIX = [
    pytest.param(i, code, sources, rows, id=f"{str(code)[6:]}-{sources}-sources-{rows}-rows")
    for i, (sources, code, rows) in enumerate(itertools.product((1, 2, 3), CODES, ROWS))
]


@pytest.mark.parametrize(("index", "code", "sources", "rows"), MATRIX)
def test_every_shape_matches_oracle(
    index: int,
    code: torch.dtype,
    sources: int,
    rows: int,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    """One side has these codes; the other side, the options and the GPU's size change from case to case."""
    dtype, other = (F32, BF16, FP16)[index % 3], (code, *CODES, code)[index % 5]
    key, value = (code, other) if index % 2 else (other, code)
    x = Inputs(key, value, dtype, **shape_of(index, rows, sources))
    if index % 4 == 1:
        x.options |= {"key_token_scales": x.token_scales(), "value_token_scales": x.token_scales()}
    if index % 4 == 2 and sources > 1:
        x.q = [torch.randn_like(x.q) for _ in range(sources)]
    if index % 4 == 3:
        x.options["value_bias"] = torch.randn(x.b.shape[1:])
    if index % 3 == 0 and I4 in (key, value):
        x.options["codebook"] = torch.randn(16).sort().values * 4.6
    if index % 5 == 0:
        x.options["window_size"] = (40, 1)
    if index % 5 == 3:
        x.options |= {"sinks": torch.randn(x.a.shape[1] * ROWS[rows][1] // ROWS[rows][2])}
    backend: str = request.getfixturevalue("backend")
    if backend.startswith("simt"):
        sm_count = (3, 1, 16, 132)[index % 4]
        request.getfixturevalue("simt").configure(seed=int(backend[4:]), sm_count=sm_count)
    x.to(device)
    x.check()


@pytest.mark.parametrize("code", CODES, ids=str)
def test_packed_queries_of_any_number_match_oracle(code: torch.dtype, device: torch.device) -> None:
    for options in ({}, {"batch_invariant": True}):
        x = Inputs(code, code, BF16, lengths=(70, 33, 9, 40), page_size=16, H=6)
        x.q = torch.randn(13, 6, 64).to(BF16)
        x.options |= {"cu_seqlens_q": torch.tensor([0, 1, 1, 6, 13], dtype=torch.int32), "max_seqlen_q": 7}
        x.to(device)
        x.check(**options)


# ---- the executor alone ----------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2, 3], ids=["simt1", "simt2", "simt3"])
def executor(request: pytest.FixtureRequest, simt: Simt, monkeypatch: pytest.MonkeyPatch) -> Simt:
    """The CUDA kernels on CPU tensors, with this seed."""
    simt.configure(seed=request.param)
    monkeypatch.setattr(native, "_ops", torch.ops.fusedkv_simt)
    return simt


def with_factors(dtype: torch.dtype = F32, **sizes: object) -> Inputs:
    x = Inputs(I8, I4, dtype, **sizes)
    x.options |= {"key_token_scales": x.token_scales(), "value_token_scales": x.token_scales()}
    return x


@pytest.mark.parametrize("sm_count", [1, 5, 132])
def test_result_does_not_depend_on_how_many_blocks_share_the_work(executor: Simt, sm_count: int) -> None:
    for x in (Inputs(I8, I8, BF16, lengths=(300, 0, 170)), with_factors(lengths=(300, 0, 170), D=128)):
        executor.configure(sm_count=1)
        whole, lse = x.call()
        executor.configure(sm_count=sm_count)
        got, got_lse = x.call()
        assert_near(got, whole, 4)
        assert_near(got_lse[got_lse.isfinite()], lse[lse.isfinite()], 4)


def test_layers_share_a_schedule_and_batch_invariant_rows_have_the_same_bits(executor: Simt) -> None:
    lengths = (1100, 40, 700)
    x = Inputs(I8, I4, BF16, lengths=lengths, S=1, H=4, G=2)
    sizes = {"query_length": 1, "num_heads": 4, "num_kv_heads": 2, "capacity": 1100}
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    for invariant in (False, True):
        options = {"batch_invariant": invariant}
        expected = x.call(**options)
        schedule = decode_schedule(seqlens, **sizes, **options)
        for _ in range(2):
            assert_same_bits(x.call(schedule=schedule, **options), expected)
    alone = Inputs(I8, I4, BF16, lengths=(1,), S=1, H=4, G=2)
    alone.lengths, alone.q, alone.a, alone.b = (700,), x.q[2:], x.a, x.b
    alone.keys, alone.values = [y[2:] for y in x.keys], [y[2:] for y in x.values]
    got = alone.call(batch_invariant=True)
    assert_same_bits(got, (expected[0][2:], expected[1][2:]))


def test_lengths_and_pages_out_of_range_give_nan_and_touch_no_other_sequence(executor: Simt) -> None:
    for bad in (-1, 400, 2**31 - 1):
        x = with_factors(lengths=(150, 0, 67))
        expected = x.call()
        state = x.state()
        state["cache_seqlens"][0] = bad
        out, lse = x.call(cache_seqlens=state["cache_seqlens"])
        assert out[0].isnan().all() and lse[0].isnan().all()
        assert_near(out[1:], expected[0][1:], 4)
        paged = with_factors(lengths=(150, 0, 67), page_size=16)
        expected = paged.call()
        assert paged.table is not None
        paged.table[0, 4] = bad
        out, lse = paged.call()
        assert out[0].isnan().all() and lse[0].isnan().all()
        assert_same_bits((out[1:], lse[1:]), (expected[0][1:], expected[1][1:]))


@pytest.mark.parametrize("page_size", [None, 7])
def test_what_a_row_does_not_see_may_be_anything(executor: Simt, page_size: int | None) -> None:
    """The last token of the batch is seen by the last row alone, tokens before the window by none."""
    sizes = {"lengths": (90, 41), "S": 3, "H": 4, "G": 2, "page_size": page_size}
    for code in (E4M3, BF16):
        x = Inputs(code, code, BF16, **sizes)
        x.options |= {"key_token_scales": x.token_scales(), "value_token_scales": x.token_scales()}
        x.options["window_size"] = (20, 0)
        clean, clean_lse = x.call()
        caches = [*x.keys, *x.values]
        for b, length in enumerate(sizes["lengths"]):
            for token in (length - 1, length - 24, 0):
                row, slot = (b, token)
                if page_size is not None:
                    row, slot = int(x.table[b, token // page_size]), token % page_size
                for cache in caches:
                    bits = cache.view(torch.uint8) if code == E4M3 else cache
                    bits[row, slot] = NAN_CODE if code == E4M3 else math.nan
                for factor in (*x.options["key_token_scales"], *x.options["value_token_scales"]):
                    factor[row, slot] = (math.inf, math.nan)[b]
        out, lse = x.call()
        assert_same_bits(out[:, :2], clean[:, :2])
        assert_same_bits(lse[:, :, :2], clean_lse[:, :, :2])
        assert out[:, 2].isnan().all() and clean.isfinite().all()


def test_infinite_factors_are_those_of_the_cpu(executor: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor belongs to a whole product: the parts of its lanes may be zero or of another sign."""
    x = with_factors(lengths=(70, 70), S=1, D=128, H=8)
    x.keys[0][:, 5, :, :8] = 0  # a part of the product is zero
    x.options["key_token_scales"][0][0, 5] = math.inf
    x.values[1][1, 9, :, :8] = 0x88  # codes of zero
    x.options["value_token_scales"][1][1, 9] = math.inf
    out, lse = x.call()
    monkeypatch.setattr(native, "_ops", torch.ops.fusedkv)
    expected, expected_lse = x.call()
    for got, wanted in ((out, expected), (lse, expected_lse)):
        assert wanted.isnan().any() and not wanted.isnan().all()
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
        number = wanted.isfinite()
        assert_near(got[number], wanted[number], 16)


def shifted(x: Tensor, offset: int) -> Tensor:
    """The same tensor, beginning so many bytes into its memory."""
    memory = torch.zeros(x.nbytes + offset, dtype=torch.uint8)
    return memory[offset:].view(x.dtype).view(x.shape).copy_(x)


def padded(x: Tensor, more: int) -> Tensor:
    """The same tensor, with memory between its rows."""
    wide = torch.zeros((*x.shape[:-1], x.shape[-1] + more), dtype=torch.uint8 if x.itemsize == 1 else x.dtype)
    rows = wide.view(x.dtype)[..., : x.shape[-1]]
    return rows.copy_(x)


@pytest.mark.parametrize("D", [64, 72])
@pytest.mark.parametrize("code", [*CODES, BF16], ids=str)
def test_memory_at_any_address_gives_the_same_bits(executor: Simt, code: torch.dtype, D: int) -> None:
    x = Inputs(code, code, BF16, D=D)
    x.options["value_bias"] = torch.randn(2, D)
    q, keys, values, a, b = x.q, x.keys, x.values, x.a, x.b
    expected = x.call()
    sizes = (2, 4, 8) if code == BF16 else (1, 2, 4, 8)
    for size in sizes:
        x.keys, x.values = ([shifted(y, size) for y in side] for side in (keys, values))
        assert_same_bits(x.call(), expected)
        more = size // keys[0].itemsize
        x.keys, x.values = [keys[0], padded(keys[1], more)], [padded(values[0], more), values[1]]
        assert_same_bits(x.call(), expected)
    x.keys, x.values, x.q = keys, values, shifted(q, 2)
    x.a, x.b = shifted(a, 4), shifted(b, 4)
    x.options["value_bias"] = shifted(x.options["value_bias"], 4)
    assert_same_bits(x.call(), expected)


def test_sources_beyond_the_shared_memory_take_turns(executor: Simt) -> None:
    """32 folded queries of 256 channels and 4 rows take 128 KiB. GPUs with less hold one at a time."""
    x = Inputs(I8, I4, F32, lengths=(40, 9), S=2, D=256, G=2, m=32)
    x.a /= 6
    for options in ({}, {"batch_invariant": True}):
        executor.configure(shared_per_block=227 * 1024)
        expected = x.call(**options)
        executor.configure(shared_per_block=99 * 1024)
        assert_same_bits(x.call(**options), expected)
    x.check()


def test_strides_of_factors_that_a_kernel_cannot_hold_are_refused(executor: Simt) -> None:
    x = with_factors(lengths=(70, 33))
    far = torch.empty((1 << 31) + 140, dtype=FP16)  # of which no page is touched
    scales = x.options["key_token_scales"]
    scales[1] = far.as_strided((2, 70, 2), (1 << 31, 2, 1))
    with pytest.raises(ValueError, match=r"key_token_scales\[1\] must have strides below 2\^31 elements"):
        x.call()
    x = with_factors(lengths=(70,))
    expected = x.call()
    scales = x.options["value_token_scales"]
    scales[0] = scales[0].as_strided(scales[0].shape, (1 << 31, *scales[0].stride()[1:]))
    assert_same_bits(x.call(), expected)  # the stride of one sequence does not matter


def test_order_of_warps_does_not_change_a_bit(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ops", torch.ops.fusedkv_simt)
    x = with_factors(BF16, lengths=(300, 70))
    simt.configure(seed=1, sm_count=7)
    expected = x.call()
    for seed in (2, 3, 4):
        simt.configure(seed=seed, sm_count=7)
        assert_same_bits(x.call(), expected)


def test_explain_names_the_kernel() -> None:
    meta = torch.device("meta")
    q = torch.empty(2, 1, 8, 128, dtype=BF16, device=meta)
    for dtype, width in ((I8, 128), (I4, 64)):
        caches = [torch.empty(2, 300, 2, width, dtype=dtype, device=meta) for _ in range(2)]
        lengths = torch.tensor([300, 20], dtype=torch.int32)
        step = explain(q, caches, caches, cache_seqlens=lengths, device="cuda", sm_count=132)
        assert step.kernel == "attn_decode/coded.cu, 4 rows"
        assert step.bytes < 2 * 320 * 2 * 2 * width + 40000
