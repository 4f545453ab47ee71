"""GPU kernels of cached attention: every kernel and shape class, the schedule, out-of-bounds accesses.

The number of query rows (S * H / G) selects the kernel. Up to 8 rows use mma_warp. Up to 64 rows use
mma_block with tiles of 16, 32 or 64 rows, and more rows are split into groups. The fallback kernel covers
float32, more than two sources, and unaligned memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import Case, cache_inputs, named
from conftest import Simt
from torch import Tensor

from fusedkv_ext import debug_checks, decode_schedule, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
# The executor's three blocks cut an item of these lengths with one KV head and with two.
RAGGED = {"B": 3, "T": 300, "lengths": (300, 0, 170)}

CASES = [
    Case("1_1_D64", S=1, H=4, G=2, D=64, m_k=1, m_v=1, dtype=BF16, **RAGGED),
    Case("1_1_D128_float16", S=1, H=8, G=1, D=128, m_k=1, m_v=1, dtype=FP16, **RAGGED),
    Case("1_2_D64", S=2, H=4, G=1, D=64, m_k=1, m_v=2, dtype=BF16, page_size=16, **RAGGED),
    Case("2_1_D128", S=1, H=5, G=1, D=128, m_k=2, m_v=1, dtype=BF16, page_size=7, **RAGGED),
    Case("2_2_D128", S=1, H=6, G=2, D=128, dtype=BF16, page_size=16, **RAGGED),
    Case("2_2_D128_float16_contiguous", S=1, H=8, G=1, D=128, dtype=FP16, **RAGGED),
    Case("2_2_D64_page_64", S=1, H=2, G=2, D=64, dtype=BF16, page_size=64, **RAGGED),
    Case("1_1_D256", S=1, H=4, G=2, D=256, m_k=1, m_v=1, dtype=BF16, page_size=16, **RAGGED),
    Case("padded_D_72_Dv_24", S=2, H=4, G=2, D=72, Dv=24, dtype=BF16, page_size=16, **RAGGED),
    Case("page_size_8", S=1, H=4, G=2, D=64, dtype=BF16, page_size=8, **RAGGED),
    Case("padded_D_40_Dv_128", S=1, H=4, G=2, D=40, Dv=128, dtype=FP16, **RAGGED),
    Case("rows_9", S=3, H=3, G=1, D=64, dtype=BF16, page_size=16, **RAGGED),
    Case("rows_16", S=4, H=4, G=1, D=128, dtype=BF16, page_size=7, **RAGGED),
    Case("rows_16_1_1", S=1, H=16, G=1, D=128, m_k=1, m_v=1, dtype=FP16, page_size=16, **RAGGED),
    Case("rows_16_D256", S=1, H=16, G=1, D=256, m_k=1, m_v=1, dtype=BF16, **RAGGED),
    Case("rows_24_1_2", S=3, H=8, G=1, D=64, m_k=1, m_v=2, dtype=BF16, **RAGGED),
    Case("rows_32", S=8, H=8, G=2, D=128, dtype=BF16, page_size=16, **RAGGED),
    Case("rows_33_2_1", S=11, H=3, G=1, D=64, m_k=2, m_v=1, dtype=BF16, page_size=16, **RAGGED),
    Case("rows_64", S=16, H=4, G=1, D=128, dtype=BF16, page_size=16, **RAGGED),
    Case("rows_64_D64", S=16, H=4, G=1, D=64, dtype=FP16, **RAGGED),
    Case("rows_64_D256", S=8, H=8, G=1, D=256, m_k=1, m_v=1, dtype=BF16, page_size=7, **RAGGED),
    Case("rows_padded_D_72_Dv_24", S=8, H=4, G=2, D=72, Dv=24, dtype=BF16, page_size=16, **RAGGED),
    Case("rows_100_in_two_groups", S=50, H=4, G=2, D=64, dtype=BF16, page_size=16, **RAGGED),
    Case("window", S=1, H=4, G=2, D=64, dtype=BF16, window=(100, -1), page_size=16, **RAGGED),
    Case("window_rows", S=5, H=4, G=1, D=64, dtype=BF16, window=(33, -1), page_size=16, **RAGGED),
    Case("window_past_a_split", B=1, T=1300, S=1, D=64, dtype=BF16, window=(99, 0), lengths=(1300,)),
    Case("not_causal", S=5, H=4, G=1, D=64, dtype=BF16, causal=False, window=(40, 2), **RAGGED),
    Case("large_scores", S=2, H=4, G=2, D=64, dtype=BF16, magnitude=30.0, **RAGGED),
    Case("no_weights", S=1, H=4, G=2, D=64, dtype=BF16, weights="none", **RAGGED),
    Case("transposed", S=2, H=4, G=2, D=64, dtype=BF16, layout="transposed", **RAGGED),
    Case("generic_three_keys", S=2, H=6, G=2, D=64, m_k=3, m_v=1, dtype=BF16, page_size=16, **RAGGED),
    Case("2_2_D256", S=1, H=4, G=2, D=256, dtype=BF16, page_size=16, **RAGGED),
    Case("2_1_D192_rows_20", S=5, H=4, G=1, D=192, m_v=1, dtype=BF16, **RAGGED),
    Case("1_2_D256_rows_40", S=5, H=8, G=1, D=256, m_k=1, dtype=FP16, page_size=7, **RAGGED),
    Case("generic_unaligned", S=1, H=4, G=2, D=64, dtype=BF16, layout="sliced", **RAGGED),
    Case("generic_float32_D128", S=3, H=4, G=2, D=128, page_size=16, **RAGGED),
    Case("forty_sequences", B=40, S=1, T=33, H=2, G=1, D=64, dtype=BF16, lengths=(*range(34), *[33] * 6)),
]


def attend(case: Case, args: tuple, state: dict, **options: object) -> tuple[Tensor, Tensor]:
    return fused_kv_attn_with_kvcache(*args, **state, **case.options, **options)


def make_schedule(case: Case, state: dict, capacity: int, **options: object) -> Tensor:
    return decode_schedule(
        state["cache_seqlens"],
        query_length=case.S,
        num_heads=case.H,
        num_kv_heads=case.G,
        capacity=capacity,
        window_size=case.window,
        **options,
    )


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fitted", "batch_invariant"])
@pytest.mark.parametrize(**named(CASES))
def test_matches_oracle(case: Case, batch_invariant: bool, device: torch.device) -> None:
    args, state = cache_inputs(case, device)

    def op(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return fused_kv_attn_with_kvcache(*args, **kwargs, batch_invariant=batch_invariant)

    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **state, **case.options, terms=case.terms)


SPLIT_CASES = [
    Case("warp", S=1, H=4, G=2, D=64, dtype=BF16, page_size=16, **RAGGED),
    Case("rows", S=4, H=8, G=2, D=64, dtype=BF16, page_size=16, **RAGGED),
    Case("generic", S=1, H=4, G=2, D=64, page_size=16, **RAGGED),
]


# Rows before the first token, in items that are split like all others, and a last group of 12 rows.
BLIND_ROWS = Case("blind_rows", B=3, S=140, T=130, H=1, G=1, D=64, dtype=BF16, lengths=(130, 0, 100))


@pytest.mark.parametrize(**named([*SPLIT_CASES, BLIND_ROWS]))
@pytest.mark.parametrize("sm_count", [1, 2, 5, 16, 132])
def test_result_does_not_depend_on_how_many_blocks_share_the_work(
    case: Case, sm_count: int, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    args, state = cache_inputs(case, CPU)
    simt.configure(sm_count=1)
    whole, lse = attend(case, args, state)
    simt.configure(sm_count=sm_count, seed=sm_count)
    got, got_lse = attend(case, args, state)
    assert_near(got, whole, 4)
    assert_near(got_lse[got_lse.isfinite()], lse[lse.isfinite()])


# How warps divide a merge: several per row, one per row, several rows per warp; channels over several rounds.
MERGE_CASES = [
    Case("one_row", H=1, D=128, Dv=256, m_k=1, m_v=1, dtype=BF16),
    Case("three_rows", H=3, D=64, Dv=24, dtype=BF16),
    Case("eight_rows", H=8, D=128, dtype=BF16, m_v=1),
    Case("rows_of_a_block", H=33, D=64, dtype=BF16),
    Case("fallback", H=2, D=64, Dv=136, m_k=1),
]


@pytest.mark.parametrize("tokens", [193, 800, 1700, 3300])
@pytest.mark.parametrize(**named(MERGE_CASES))
def test_any_number_of_splits_is_merged(
    case: Case, tokens: int, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 to 35 splits of 96 tokens, so that rounds of 8 are full, end early or begin just so."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    simt.configure(sm_count=132)
    case = Case(**{**vars(case), "B": 1, "S": 1, "G": 1, "T": tokens, "lengths": (tokens,)})
    args, state = cache_inputs(case, CPU)
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **state, **case.options)


@pytest.mark.parametrize("batch", [1, 33, 200, 1024, 1025, 1100])
def test_calls_without_a_schedule_sum_the_costs_themselves(
    batch: int, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 1024 sequences in every block, beyond that in a launch of its own: the same bits."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    lengths = tuple(torch.randint(0, 40, (batch,)).tolist())
    case = Case("batch", B=batch, S=1, T=40, H=1, G=1, D=8, m_k=1, m_v=1, dtype=BF16, lengths=lengths)
    args, state = cache_inputs(case, CPU)
    for sm_count in (3, 50):
        simt.configure(sm_count=sm_count)
        own = attend(case, args, state)
        assert_same_bits(own, attend(case, args, state, schedule=make_schedule(case, state, 40)))
    invariant = {"batch_invariant": True}
    shared = make_schedule(case, state, 40, **invariant)
    assert_same_bits(
        attend(case, args, state, **invariant), attend(case, args, state, schedule=shared, **invariant)
    )
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **state, **case.options)


@pytest.mark.parametrize("which", ["q", "keys"])
def test_the_stride_of_a_dim_of_size_1_does_not_matter(
    which: str, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch leaves it arbitrary. An odd one must not lead to the fallback kernel, which rounds otherwise."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    case = Case("odd", B=1, S=1, T=70, H=4, G=1, D=64, dtype=BF16)
    (q, keys, *rest), state = cache_inputs(case, CPU)
    expected = attend(case, (q, keys, *rest), state)

    def odd(x: Tensor) -> Tensor:
        return x.as_strided(
            x.shape, [n if size > 1 else 3 for n, size in zip(x.stride(), x.shape, strict=True)]
        )

    got = (odd(q), keys) if which == "q" else (q, [odd(x) for x in keys])
    assert_same_bits(attend(case, (*got, *rest), state), expected)


def test_more_splits_than_lanes_are_merged(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """55 splits of 96 tokens: the lanes that find the maximum go round twice."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    simt.configure(sm_count=132)
    case = Case("many", B=1, S=1, T=5200, H=3, G=1, D=64, m_k=1, m_v=1, dtype=BF16, lengths=(5200,))
    args, state = cache_inputs(case, CPU)
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **state, **case.options)
    # The maximum is in the second round, too far above the others for any other reference.
    args[0].fill_(1)
    args[1][0][0, 5199] = 40
    args[3].fill_(1)
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **state, **case.options)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fitted", "batch_invariant"])
def test_what_is_no_schedule_stays_inside_all_buffers(
    batch_invariant: bool, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    case = SPLIT_CASES[0]
    args, state = cache_inputs(case, CPU)
    options = {"batch_invariant": batch_invariant}
    schedule = make_schedule(case, state, 304, **options)
    sums = case.B + 1
    nonsense = (
        [5, 3, 1, 9],
        [0, 0, 0, 0],
        [-4, -3, -2, -1],
        [0, 7, 2, 30],
        [0, 500, 501, 502],
        [9, 9, 9, 3],
        [5, 9, 9, 9],
        [9, 2, 2, 9],  # a sequence without cost
        [-(2**31), 3, 40, 3],
        [0, -7, 10, 10],
    )
    for garbage in nonsense:
        schedule[:sums] = torch.tensor(garbage, dtype=torch.int32)
        schedule[sums:] = 0
        attend(case, args, state, schedule=schedule, **options)  # an access out of bounds would raise
        assert schedule[:sums].tolist() == garbage  # no counter lies before the counters


@pytest.mark.parametrize(**named(SPLIT_CASES))
def test_order_of_blocks_and_warps_does_not_change_a_bit(
    case: Case, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    args, state = cache_inputs(case, CPU)
    simt.configure(seed=1, sm_count=7)
    first = attend(case, args, state)
    for seed in (2, 3, 4):
        simt.configure(seed=seed, sm_count=7)
        assert_same_bits(attend(case, args, state), first)


@pytest.mark.parametrize("kib", [99, 163])
@pytest.mark.parametrize(**named(CASES))
def test_gpus_with_less_shared_memory_get_the_same_result(
    case: Case, kib: int, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sm_86 and sm_89 permit 99 KiB, sm_80 163: fewer warps or rows, or another kernel."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    args, state = cache_inputs(case, CPU)
    simt.configure(shared_per_block=kib * 1024)
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(
        fused_kv_attn_with_kvcache, oracle, *args, **state, **case.options, terms=case.terms
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_kernel_makes_do_with_less_shared_memory(
    rows: int, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows of two sources take 102 KiB; a GPU that has 99 takes them 32 at a time."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    case = Case("rows", B=1, S=16, T=70, H=4 * rows, G=rows, D=128, dtype=BF16)
    args, state = cache_inputs(case, CPU)
    expected = attend(case, args, state)
    simt.configure(shared_per_block=99 * 1024)
    assert_near(attend(case, args, state)[0], expected[0], 2)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fitted", "batch_invariant"])
@pytest.mark.parametrize(**named(SPLIT_CASES))
def test_layers_share_a_schedule(case: Case, batch_invariant: bool, device: torch.device) -> None:
    # Long enough that the executor's three blocks and the fixed splits of 1024 tokens both cut an item.
    case = Case(**{**vars(case), "T": 1100, "lengths": (1100, 0, 60)})
    args, state = cache_inputs(case, device)
    page_size = case.page_size or 1
    capacity = page_size * math.ceil(case.T / page_size)
    schedule = make_schedule(case, state, capacity, batch_invariant=batch_invariant)
    before = schedule.clone()
    options = {"batch_invariant": batch_invariant}
    expected = attend(case, args, state, **options)
    for _ in range(3):
        assert_same_bits(attend(case, args, state, schedule=schedule, **options), expected)
        # Counters are back at zero: nothing has to be cleared between layers.
        assert torch.equal(schedule, before)


def test_schedule_is_the_running_sum_of_costs(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of 32 tokens and one more per item; splits of 1024 tokens if batch_invariant; windows cut. What
    is longer than the caches costs as much as what is empty."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    given = torch.randint(0, 5000, (2500,), dtype=torch.int32)
    given[7], given[1500] = 5001, 2**31 - 1
    lengths = torch.where(given > 5000, 0, given)

    def sums(costs: Tensor) -> Tensor:
        return torch.cat((torch.zeros(1, dtype=torch.int64), costs.cumsum(0))).int()

    def schedule(**options: object) -> Tensor:
        sizes = {"query_length": 1, "num_heads": 4, "num_kv_heads": 2, "capacity": 5000}
        return decode_schedule(given, **sizes, **options)[:2501]

    cells = (lengths.long() + 31) // 32
    assert torch.equal(schedule(), sums(cells.clamp(min=1) + 1))
    assert torch.equal(schedule(batch_invariant=True), sums(((lengths.long() + 1023) // 1024).clamp(min=1)))
    first = (lengths.long() - 1 - 700).clamp(min=0) // 32
    assert torch.equal(schedule(window_size=(700, 0)), sums((cells - first).clamp(min=1) + 1))
    splits = (cells.clamp(min=1) + 31) // 32 - first // 32
    assert torch.equal(schedule(window_size=(700, 0), batch_invariant=True), sums(splits))


@pytest.mark.parametrize(**named(SPLIT_CASES))
def test_batch_invariant_rows_have_the_same_bits_in_any_batch(case: Case, device: torch.device) -> None:
    long = Case(**{**vars(case), "B": 4, "T": 2100, "lengths": (2100, 40, 1024, 1500), "page_size": None})
    (q, keys, values, *weights), state = cache_inputs(long, device)
    together = attend(long, (q, keys, values, *weights), state, batch_invariant=True)
    for rows in ([0], [3], [2, 0], [1, 3, 2]):
        part = (q[rows], [x[rows] for x in keys], [x[rows] for x in values], *weights)
        lengths = {"cache_seqlens": state["cache_seqlens"][rows], "block_table": None}
        alone = attend(long, part, lengths, batch_invariant=True)
        assert_same_bits(alone, (together[0][rows], together[1][rows]))


@pytest.mark.parametrize(**named(SPLIT_CASES))
def test_length_out_of_range_gives_nan_and_touches_no_other_sequence(
    case: Case, backend: str, device: torch.device
) -> None:
    if backend == "cpu":
        pytest.skip("the CPU checks lengths: see test_bad_calls.py")
    args, state = cache_inputs(case, device)
    expected = attend(case, args, state)
    for bad in (-1, -(2**31), 400, 2**31 - 1):
        state["cache_seqlens"][0] = bad  # its first tokens are there all the same
        out, lse = attend(case, args, state)
        assert out[0].isnan().all() and lse[0].isnan().all()
        rest = [1, 2]
        assert_near(out[rest], expected[0][rest], 4)


PAGE_CASES = [*SPLIT_CASES, Case("warp_8_rows", S=2, H=4, G=1, D=64, dtype=BF16, page_size=7, **RAGGED)]


@pytest.mark.parametrize(**named(PAGE_CASES))
def test_page_out_of_range_gives_nan_and_touches_no_other_sequence(
    case: Case, backend: str, device: torch.device
) -> None:
    if backend == "cpu":
        pytest.skip("the CPU checks pages: see test_bad_calls.py")
    args, state = cache_inputs(case, device)
    expected = attend(case, args, state)
    for bad in (-1, args[1][0].shape[0], 2**31 - 1, -(2**31)):
        state["block_table"][0, 11] = bad
        out, lse = attend(case, args, state)
        assert out[0].isnan().all() and lse[0].isnan().all()
        assert_same_bits((out[1:], lse[1:]), (expected[0][1:], expected[1][1:]))


def nonfinite(value: float, token: int, which: int) -> Callable[[tuple], None]:
    """Sets one element of a source: ``which`` 1 of the keys, 2 of the values."""
    return lambda args: args[which][0][0, token, 0, :].__setitem__(3, value)


# In place changes of (q, keys, values, key_weights, value_weights). Only the last row sees token 299.
SPECIAL = {
    "equal_scores": lambda args: args[0].zero_(),
    "one_huge_score": lambda args: args[1][0][0, 50].mul_(1000),
    "key_nan": nonfinite(math.nan, 50, 1),
    "last_key_nan": nonfinite(math.nan, 299, 1),
    "value_nan": nonfinite(math.nan, 50, 2),
    "value_infinite": nonfinite(math.inf, 50, 2),
    "no_key_weight": lambda args: args[3].zero_(),
    "no_value_weight": lambda args: args[4].zero_(),
    "key_weights_1e30": lambda args: args[3].mul_(1e30),
    "key_weights_1e-30": lambda args: args[3].mul_(1e-30),
    "value_weights_1e30": lambda args: args[4].mul_(1e30),
}
SPECIAL_CASES = [
    Case("warp", S=2, H=4, G=2, D=64, dtype=BF16, **RAGGED),
    Case("rows", S=5, H=4, G=2, D=64, dtype=BF16, **RAGGED),
    Case("generic", S=2, H=4, G=2, D=64, **RAGGED),
]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(**named(SPECIAL_CASES))
def test_special_values_match_oracle(case: Case, special: str, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    SPECIAL[special](args)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **state, **case.options, terms=case.terms)


@pytest.mark.parametrize(**named(SPECIAL_CASES))
def test_weights_may_start_anywhere(case: Case, device: torch.device) -> None:
    """Views into a flat buffer of parameters: aligned to 4 bytes, no more."""
    (*caches, a, b), state = cache_inputs(case, device)
    views = []
    for weights in (a, b):
        flat = torch.zeros(weights.numel() + 1, device=device)
        flat[1:] = weights.flatten()
        views.append(flat[1:].view(weights.shape))
    assert_same_bits(attend(case, (*caches, *views), state), attend(case, (*caches, a, b), state))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "keys", "values"])
def test_one_tensor_whose_rows_are_not_aligned(which: int, device: torch.device) -> None:
    """It starts at an aligned address, and its next row does not."""

    def wide(x: Tensor) -> Tensor:
        return torch.cat((x, x[..., :1]), dim=-1)[..., :-1]

    args, state = cache_inputs(SPECIAL_CASES[0], device)
    expected = attend(SPECIAL_CASES[0], args, state)
    views = [*args]
    views[which] = wide(views[which]) if which == 0 else [*views[which][:1], wide(views[which][1])]
    out, _ = attend(SPECIAL_CASES[0], tuple(views), state)
    assert_near(out, expected[0], 4)


WINDOW_CASES = [
    Case("warp", S=2, H=4, G=2, D=64, dtype=BF16, window=(100, -1), page_size=16, **RAGGED),
    Case("warp_page_size_7", S=2, H=4, G=2, D=64, dtype=BF16, window=(100, -1), page_size=7, **RAGGED),
    Case("rows", S=5, H=4, G=2, D=64, dtype=BF16, window=(80, -1), page_size=16, **RAGGED),
    Case("rows_page_size_7", S=5, H=4, G=2, D=64, dtype=BF16, window=(80, -1), page_size=7, **RAGGED),
    Case("generic", S=2, H=4, G=2, D=64, window=(100, -1), page_size=7, **RAGGED),
]


@pytest.mark.parametrize(**named(WINDOW_CASES))
def test_pages_left_of_the_window_are_not_looked_at(case: Case, backend: str, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    expected = attend(case, args, state)
    first = 300 - case.S - case.window[0]  # that the first row sees
    # (The CPU checks the pages of whole splits.)
    state["block_table"][0, : first // case.page_size] = 0 if backend == "cpu" else 2**31 - 1
    assert_same_bits(attend(case, args, state), expected)


@pytest.mark.parametrize(
    "break_it", [lambda s: s[:-1], lambda s: s.long(), lambda s: s[None]], ids=["short", "int64", "2-D"]
)
def test_schedule_of_another_kind_is_refused(
    break_it: Callable[[Tensor], Tensor], backend: str, device: torch.device
) -> None:
    if backend == "cpu":
        pytest.skip("the CPU needs no schedule")
    case = SPLIT_CASES[2]
    args, state = cache_inputs(case, device)
    schedule = make_schedule(case, state, 304)
    with pytest.raises((ValueError, TypeError), match="schedule"):
        attend(case, args, state, schedule=break_it(schedule))


@pytest.mark.parametrize("made_for", [True, False], ids=["batch_invariant", "fitted"])
def test_schedule_of_the_other_mode_is_refused(made_for: bool, backend: str, device: torch.device) -> None:
    """Also where one counter per block and one per item are equally many."""
    if backend == "cpu":
        pytest.skip("the CPU needs no schedule")
    case = Case("equal", B=64, S=1, T=9, H=32, G=32, D=8)
    args, state = cache_inputs(case, device)
    schedule = make_schedule(case, state, case.T, batch_invariant=made_for)
    with pytest.raises(ValueError, match="schedule"):
        attend(case, args, state, schedule=schedule, batch_invariant=not made_for)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fitted", "batch_invariant"])
@pytest.mark.parametrize(**named(SPLIT_CASES))
def test_schedule_of_other_lengths_stays_inside_all_buffers(
    case: Case, batch_invariant: bool, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are then wrong, but no kernel reads or writes where it must not: the executor checks."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    case = Case(**{**vars(case), "T": 1100, "lengths": (1100, 0, 77)})  # items of two fixed splits
    args, state = cache_inputs(case, CPU)
    for lengths in ((0, 0, 0), (1, 300, 5), (90000, 2000, 90000), (2**31 - 1, 2**30, -5)):
        other = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
        schedule = make_schedule(case, other, 100000, batch_invariant=batch_invariant)
        attend(case, args, state, schedule=schedule, batch_invariant=batch_invariant)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_is_replayed_with_other_lengths() -> None:
    """Planner and attention in one graph; lengths and pages change between replays, the graph does not."""
    device = torch.device("cuda")
    case = Case("graph", B=4, S=1, T=3000, H=8, G=2, D=128, dtype=BF16, page_size=16)
    case = Case(**{**vars(case), "lengths": (3000,) * 4})
    args, state = cache_inputs(case, device)
    attend(case, args, state)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = attend(case, args, state)
    for lengths in ((3000, 1, 77, 0), (5, 2999, 1024, 16), (0, 0, 0, 0), (3000, 3000, 3000, 3000)):
        state["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert_same_bits((out, lse), attend(case, args, state))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_debug_checks_find_a_stale_schedule() -> None:
    case = SPLIT_CASES[0]
    args, state = cache_inputs(case, torch.device("cuda"))
    schedule = make_schedule(case, state, 304)
    state["cache_seqlens"][0] = 20
    with debug_checks(), pytest.raises(ValueError, match="schedule"):
        attend(case, args, state, schedule=schedule)
