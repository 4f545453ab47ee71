"""Cached attention of packed queries: sequences with different numbers of new tokens in one call."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import Case, cache_inputs, named
from conftest import Simt
from torch import Tensor

from fusedkv_ext import decode_schedule, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import cached, reference
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.testing import assert_matches_oracle, assert_near, assert_same_bits

BF16 = torch.bfloat16
CPU = torch.device("cpu")
LENGTHS = (300, 0, 170, 1, 40, 600)
# Rows of each sequence: decoding, none, a prompt, more rows than tokens, speculation, a long prompt.
COUNTS = (1, 3, 0, 5, 2, 40)
RAGGED = {"B": 6, "T": 600, "lengths": LENGTHS}

CASES = [
    Case("warp", H=4, G=2, D=64, dtype=BF16, page_size=16, **RAGGED),
    Case("warp_D128_m1", H=2, G=1, D=128, m_k=1, m_v=1, dtype=torch.float16, **RAGGED),
    Case("block", H=8, G=1, D=64, dtype=BF16, page_size=7, **RAGGED),
    Case("float32", H=4, G=2, D=72, Dv=24, page_size=16, **RAGGED),
    Case("three_sources", H=2, G=2, D=64, m_k=3, m_v=2, dtype=BF16, **RAGGED),
    Case("window", H=4, G=2, D=64, dtype=BF16, window=(33, 0), page_size=16, **RAGGED),
    Case("not_causal", H=2, G=1, D=64, dtype=BF16, causal=False, window=(40, 2), **RAGGED),
    Case("other_head_dim", H=2, G=1, D=20, Dv=12, **RAGGED),
]


def packed_inputs(
    case: Case, device: torch.device, counts: tuple[int, ...] = COUNTS
) -> tuple[tuple, dict[str, object]]:
    """The arguments of a call of packed queries with so many rows per sequence."""
    wide = Case(**{**vars(case), "S": max(counts)})
    (q, *rest), state = cache_inputs(wide, device)
    packed = torch.cat([rows[len(rows) - n :] for rows, n in zip(q, counts, strict=True)])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    options = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max(counts), **case.options}
    return (packed, *rest), {**state, **options}


def alone(args: tuple, options: dict, b: int, **changed: object) -> tuple[Tensor, Tensor]:
    """The same call for sequence b only, with its rows as a batch of one."""
    q, keys, values, *weights = args
    bounds = options["cu_seqlens_q"].tolist()
    cut = slice(b, b + 1)
    if options["block_table"] is None:
        keys, values = [x[cut] for x in keys], [x[cut] for x in values]
    own = {name: x for name, x in options.items() if name not in ("cu_seqlens_q", "max_seqlen_q")}
    own["cache_seqlens"] = options["cache_seqlens"][cut]
    own["block_table"] = None if options["block_table"] is None else options["block_table"][cut]
    rows = q[bounds[b] : bounds[b + 1]]
    return fused_kv_attn_with_kvcache(rows[None], keys, values, *weights, **own, **changed)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["fitted", "batch_invariant"])
@pytest.mark.parametrize(**named(CASES))
def test_packed_queries_match_oracle(case: Case, batch_invariant: bool, device: torch.device) -> None:
    args, options = packed_inputs(case, device)

    def op(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return fused_kv_attn_with_kvcache(*args, **kwargs, batch_invariant=batch_invariant)

    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **options, terms=case.terms)


@pytest.mark.parametrize(**named(CASES))
def test_packed_queries_equal_one_call_per_sequence(case: Case, device: torch.device) -> None:
    args, options = packed_inputs(case, device)
    out, lse = fused_kv_attn_with_kvcache(*args, **options)
    bounds = options["cu_seqlens_q"].tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own_out, own_lse = alone(args, options, b)
        assert_near(out[begin:end], own_out[0], 4)
        visible = own_lse[0].isfinite()
        assert torch.equal(lse[:, begin:end].isfinite(), visible)
        assert_near(lse[:, begin:end][visible], own_lse[0][visible])


@pytest.mark.parametrize(**named(CASES[:4]))
def test_a_sequence_has_the_same_bits_whatever_is_packed_with_it(case: Case, device: torch.device) -> None:
    """In batch-invariant mode; its own number of rows decides which kernel of the CPU runs."""
    args, options = packed_inputs(case, device)
    together = fused_kv_attn_with_kvcache(*args, **options, batch_invariant=True)
    q, keys, values, *weights = args
    rows = q.split(list(COUNTS))
    for order in ([5], [0, 2, 4], [3, 5, 0]):
        counts = [COUNTS[b] for b in order]
        part = dict(options, cache_seqlens=options["cache_seqlens"][order])
        caches = keys, values
        if options["block_table"] is None:
            caches = [x[order] for x in keys], [x[order] for x in values]
        else:
            part["block_table"] = options["block_table"][order].contiguous()
        part["cu_seqlens_q"] = options["cu_seqlens_q"].new_tensor([0, *itertools.accumulate(counts)])
        packed = torch.cat([rows[b] for b in order])
        got = fused_kv_attn_with_kvcache(packed, *caches, *weights, **part, batch_invariant=True)
        bounds = part["cu_seqlens_q"].tolist()
        for b, begin, end in zip(order, bounds, bounds[1:], strict=False):
            first = sum(COUNTS[:b])
            expected = (together[0][first : first + COUNTS[b]], together[1][:, first : first + COUNTS[b]])
            assert_same_bits((got[0][begin:end], got[1][:, begin:end]), expected)


@pytest.mark.parametrize("sm_count", [1, 2, 5, 50])
@pytest.mark.parametrize(**named(CASES[:4]))
def test_any_number_of_blocks_does_packed_work(
    case: Case, sm_count: int, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    args, options = packed_inputs(case, CPU)
    simt.configure(sm_count=sm_count, seed=sm_count)
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=case.terms)


def test_more_sequences_than_blocks_copy(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """1100 sequences of 0 to 3 rows: the costs are summed in a launch of their own."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    lengths = tuple(torch.randint(0, 40, (1100,)).tolist())
    counts = tuple(torch.randint(0, 4, (1100,)).tolist())
    case = Case("many", B=1100, T=40, H=3, G=1, D=8, m_k=1, m_v=1, dtype=BF16, lengths=lengths)
    args, options = packed_inputs(case, CPU, counts)
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options)


def test_rows_out_of_range_touch_no_other_sequence(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU does not check cu_seqlens_q, but every access stays inside the tensors."""
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    args, options = packed_inputs(CASES[0], CPU)
    expected = fused_kv_attn_with_kvcache(*args, **options)[0]
    good = options["cu_seqlens_q"].tolist()
    for bad in ([0, -5], [0, 2**31 - 1], [3, 1], [0, 52]):
        # The last two sequences have wrong bounds; the first four keep theirs.
        cu_seqlens = torch.tensor([*good[:5], *bad], dtype=torch.int32)
        out = fused_kv_attn_with_kvcache(*args, **{**options, "cu_seqlens_q": cu_seqlens})[0]
        assert_near(out[: good[3]], expected[: good[3]], 4)


def test_many_rows_take_the_prefill_path_and_few_rows_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU more than 32 rows per KV head fuse once; the others stay one call of the kernel."""
    args, options = packed_inputs(Case("mixed", H=4, G=2, D=64, page_size=16, **RAGGED), CPU)
    options["return_lse"] = False
    shapes, sdpa = [], cached.sdpa_attention

    def recorded(call: AttentionCall) -> Tensor:
        shapes.append(tuple(call.q.shape))
        return sdpa(call)

    monkeypatch.setattr(cached, "sdpa_attention", recorded)
    assert_matches_oracle(fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache, *args, **options)
    assert shapes == [(1, 40, 4, 64)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seqlen_q": None}, "max_seqlen_q must be the most"),
        ({"max_seqlen_q": 39}, r"from 0 to max_seqlen_q = 39"),
        ({"cu_seqlens_q": None}, "max_seqlen_q must be None"),
        (
            {"cu_seqlens_q": torch.tensor([1, 1, 4, 4, 9, 11, 51], dtype=torch.int32)},
            r"cu_seqlens_q\[0\] must be 0",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 1, 4, 4, 9, 11, 50], dtype=torch.int32)}, "must end with 51"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 4, 3, 9, 11, 51], dtype=torch.int32)}, "got -1"),
        ({"cu_seqlens_q": torch.tensor([0, 11, 51], dtype=torch.int32)}, "batch size"),
    ],
)
def test_wrong_packed_queries_are_refused(change: dict, message: str) -> None:
    args, options = packed_inputs(Case("bad", H=2, G=1, D=64, **RAGGED), CPU)
    with pytest.raises(ValueError, match=message):
        fused_kv_attn_with_kvcache(*args, **{**options, **change})


def test_packed_queries_must_have_three_dims_and_int32_bounds() -> None:
    args, options = packed_inputs(Case("bad", H=2, G=1, D=64, **RAGGED), CPU)
    with pytest.raises(ValueError, match="q must have 3 dims"):
        fused_kv_attn_with_kvcache(args[0][None], *args[1:], **options)
    wide = {**options, "cu_seqlens_q": options["cu_seqlens_q"].long()}
    with pytest.raises(TypeError, match="cu_seqlens_q must be int32"):
        fused_kv_attn_with_kvcache(*args, **wide)


def test_no_schedule_is_taken_with_packed_queries(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    args, options = packed_inputs(CASES[0], CPU)
    sizes = {"query_length": 40, "num_heads": 4, "num_kv_heads": 2, "capacity": 608}
    schedule = decode_schedule(options["cache_seqlens"], **sizes)
    with pytest.raises(ValueError, match="schedule must be None with cu_seqlens_q"):
        fused_kv_attn_with_kvcache(*args, **options, schedule=schedule)


def test_no_rows_at_all() -> None:
    args, options = packed_inputs(Case("none", H=2, G=1, D=64, **RAGGED), CPU)
    options.update(cu_seqlens_q=torch.zeros(7, dtype=torch.int32), max_seqlen_q=0)
    out, lse = fused_kv_attn_with_kvcache(args[0][:0], *args[1:], **options)
    assert out.shape == (0, 2, 64) and lse.shape == (2, 0)
    assert not math.isnan(float(out.sum()))
