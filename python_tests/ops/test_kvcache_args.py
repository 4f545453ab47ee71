"""The arguments of fused_kv_attn_with_kvcache that callers of flash_attn_with_kvcache know."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, cache_inputs, named, random_tensor, to_device
from test_scores import Scores, on, sinks, softcap
from torch import Tensor

from fusedkv_ext import (
    append_kvcache,
    decode_schedule,
    explain,
    fused_kv_attn_func,
    fused_kv_attn_with_kvcache,
)
from fusedkv_ext.ops import native, reference
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.testing import assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LONE = {"m_k": 1, "m_v": 1, "weights": "none"}


def check(case: Case, args: tuple, **options: Any) -> tuple[Tensor, Tensor]:
    """The call against its oracle. Each gets caches of its own, and they are compared too."""

    def on_copies(function: Callable) -> Callable:
        def call(
            q: Tensor, keys: list[Tensor], values: list[Tensor], *weights: Tensor, **options: Any
        ) -> list:
            keys, values = ([x.clone() for x in side] for side in (keys, values))
            out = function(q, keys, values, *weights, **options)
            return [*out, *(x.nan_to_num(7.0) for x in (*keys, *values))]

        return call

    op, oracle = (on_copies(x.fused_kv_attn_with_kvcache) for x in (__import__("fusedkv_ext"), reference))
    out, lse, *_ = assert_matches_oracle(op, oracle, *args, **{**case.options, **options}, terms=case.terms)
    return out, lse


@pytest.mark.parametrize("S", [1, 33])
def test_lengths_as_int_as_int64_and_absent_are_the_same_lengths(S: int, device: torch.device) -> None:
    args, state = cache_inputs(Case("full", S=S, T=40), device)
    expected = fused_kv_attn_with_kvcache(*args, **state)
    for cache_seqlens in (40, state["cache_seqlens"].long(), None):
        assert_same_bits(fused_kv_attn_with_kvcache(*args, cache_seqlens=cache_seqlens), expected)
    assert_same_bits(fused_kv_attn_with_kvcache(*args), expected)


def test_an_int_is_the_length_of_every_packed_sequence(device: torch.device) -> None:
    args, state = cache_inputs(Case("packed", B=3, S=1, T=40, lengths=(20, 20, 20)), device)
    expected = fused_kv_attn_with_kvcache(*args, **state).flatten(0, 1)
    bounds = torch.arange(4, dtype=torch.int32, device=device)
    packed = {"cu_seqlens_q": bounds, "max_seqlen_q": 1}
    got = fused_kv_attn_with_kvcache(args[0].flatten(0, 1), *args[1:], cache_seqlens=20, **packed)
    assert_near(got, expected, 4)


def test_int64_pages_are_the_same_pages(device: torch.device) -> None:
    args, state = cache_inputs(Case("pages", B=3, S=2, T=40, lengths=(40, 1, 14), page_size=7), device)
    expected = fused_kv_attn_with_kvcache(*args, **state)
    state = {name: x.long() for name, x in state.items()}
    assert int(state["block_table"].max()) == 2**31 - 1, "unused entries stay out of range"
    assert_same_bits(fused_kv_attn_with_kvcache(*args, **state), expected)


ROWS = [
    Case("one_row", B=3, S=1, T=40, lengths=(40, 1, 14)),
    Case("two_rows_bfloat16", B=3, S=2, T=40, lengths=(40, 3, 14), dtype=BF16),
    Case("thirty_three_rows", B=3, S=33, T=70, lengths=(70, 5, 40)),
    Case("head_dim_of_no_kernel", B=3, S=3, T=20, D=12, lengths=(20, 2, 11)),
    Case("window", B=3, S=3, T=40, lengths=(40, 4, 33), window=(9, -1)),
    Case("not_causal_values_wider", B=3, S=3, T=40, D=24, Dv=40, lengths=(40, 2, 9), causal=False),
    Case("transposed", B=3, S=2, T=40, lengths=(40, 3, 14), layout="transposed"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(**named(ROWS))
def test_cache_batch_idx_selects_rows_of_a_contiguous_cache(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows in another order, of a cache with more rows than sequences. No sequence reads the others."""
    (q, keys, values, *weights), state = cache_inputs(case, CPU)
    order = torch.tensor([3, 1, 4])
    spread = []
    for side in (keys, values):
        spread.append([x.new_full((5, *x.shape[1:]), math.nan).index_copy(0, order, x) for x in side])
    args = to_device((q, *spread, *weights), device)
    index = order.to(device, dtype)
    out, lse = check(case, args, cache_seqlens=state["cache_seqlens"].to(device), cache_batch_idx=index)
    again = to_device((q, keys, values, *weights), device)
    options = {**case.options, "cache_seqlens": state["cache_seqlens"].to(device)}
    expected = fused_kv_attn_with_kvcache(*again, **options)
    for got, own in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(got, own, rtol=0, atol=0.05 if case.dtype == BF16 else 1e-5)


def test_sequences_may_share_a_row(device: torch.device) -> None:
    case = Case("shared", B=3, S=2, T=40, lengths=(40, 40, 40))
    (q, keys, values, *weights), state = cache_inputs(case, device)
    index = torch.tensor([1, 1, 0], dtype=torch.int32, device=device)
    args = (q, [x[:2] for x in keys], [x[:2] for x in values], *weights)
    check(case, args, cache_seqlens=torch.tensor([40, 7, 13], device=device), cache_batch_idx=index)


PADDED = [
    *[case for case in ROWS if case.layout == "contiguous"],
    Case("paged", B=3, S=2, T=40, lengths=(40, 1, 14), page_size=7),
    Case("paged_bfloat16", B=3, S=1, T=70, lengths=(70, 16, 17), page_size=16, dtype=BF16),
    Case("paged_many_rows", B=3, S=33, T=70, lengths=(70, 5, 40), page_size=16),
    Case("paged_head_dim_of_no_kernel", B=3, S=3, T=20, D=12, lengths=(20, 2, 11), page_size=3),
    Case("one_sequence", B=1, S=2, T=20, lengths=(17,)),
    Case("pages_of_one_token", B=2, S=2, T=20, lengths=(17, 20), page_size=1),
]


def padded_inputs(case: Case, device: torch.device) -> tuple[tuple, dict[str, Tensor]]:
    """Arguments of a call whose first slots hold NaN."""
    args, state = cache_inputs(case, CPU)
    lengths = state["cache_seqlens"]
    leftpad = torch.tensor([min(5 * b, int(n)) for b, n in enumerate(lengths.tolist(), 1)], dtype=torch.int32)
    for cache in (*args[1], *args[2]):
        for b, padding in enumerate(leftpad.tolist()):
            for t in range(padding):
                if case.page_size is None:
                    cache[b, t] = math.nan
                else:
                    cache[state["block_table"][b, t // case.page_size], t % case.page_size] = math.nan
    return to_device(args, device), to_device({**state, "cache_leftpad": leftpad}, device)


@pytest.mark.parametrize(**named(PADDED))
def test_slots_before_cache_leftpad_are_no_tokens(case: Case, device: torch.device) -> None:
    args, state = padded_inputs(case, device)
    out, _ = check(case, args, **state)
    assert not out.isnan().any()
    state["cache_leftpad"] = state["cache_leftpad"].long()
    assert_near(fused_kv_attn_with_kvcache(*args, **state, **case.options)[0], out, 4)
    without_lse = {**case.options, "return_lse": False}
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **state, **without_lse, terms=case.terms)


def test_left_padding_of_zero_changes_no_bits(device: torch.device) -> None:
    for page_size in (None, 7):
        case = Case("zero", B=3, S=2, T=40, lengths=(40, 1, 14), page_size=page_size)
        args, state = cache_inputs(case, device)
        none = torch.zeros(3, dtype=torch.int32, device=device)
        got = fused_kv_attn_with_kvcache(*args, **state, cache_leftpad=none, return_lse=True)
        assert_near(got[0], fused_kv_attn_with_kvcache(*args, **state), 4)


@pytest.mark.parametrize("backend", ["simt1", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_left_padding_out_of_range_gives_nan_on_a_gpu(device: torch.device, monkeypatch) -> None:
    """Nobody reads it on the host, and the other sequences do not notice."""
    from fusedkv_ext.ops import kvcache_args

    monkeypatch.setattr(kvcache_args, "host_reads", lambda x: False)
    case = Case("wrong", B=4, S=1, T=20, lengths=(20, 10, 10, 20))
    args, state = padded_inputs(case, device)
    expected = fused_kv_attn_with_kvcache(*args, **state)
    state["cache_leftpad"][1], state["cache_leftpad"][2] = -1, 11
    state["cache_seqlens"][3] = 24
    out = fused_kv_attn_with_kvcache(*args, **state)
    assert_same_bits(out[0], expected[0])
    assert bool(out[1:].isnan().all())


def new_tokens(case: Case, count: int, device: torch.device) -> dict[str, Tensor]:
    """k and v of ``count`` tokens."""
    k = random_tensor((case.B, count, case.G, case.D), case.dtype, case.layout)
    v = random_tensor((case.B, count, case.G, case.value_dim), case.dtype, case.layout)
    return to_device({"k": k, "v": v}, device)


def rotary_tables(rows: int, rotary_dim: int, device: torch.device) -> dict[str, Tensor]:
    angles = torch.randn(rows, rotary_dim // 2)
    return {"rotary_cos": angles.cos().to(device), "rotary_sin": angles.sin().to(device)}


APPENDED = [
    Case("one_token", B=3, S=1, T=40, lengths=(39, 0, 14), **LONE),
    Case("weighted", B=3, S=1, T=40, lengths=(39, 0, 14), m_k=1, m_v=1),
    Case("two_tokens_bfloat16", B=3, S=2, T=40, lengths=(38, 0, 14), dtype=BF16, **LONE),
    Case("paged", B=3, S=2, T=40, lengths=(38, 5, 14), page_size=16, **LONE),
    Case("pages_filled_to_the_end", B=2, S=2, T=16, lengths=(14, 6), page_size=8, **LONE),
    Case("many_tokens", B=2, S=33, T=70, lengths=(37, 0), page_size=16, **LONE),
    Case("window", B=2, S=3, T=40, lengths=(30, 2), window=(9, -1), **LONE),
    Case("not_causal", B=2, S=3, T=40, lengths=(30, 2), causal=False, **LONE),
    Case("not_causal_one_token", B=2, S=1, T=40, lengths=(30, 0), causal=False, **LONE),
    Case("not_causal_window", B=2, S=3, T=40, lengths=(30, 2), causal=False, window=(4, 1), **LONE),
    Case(
        "transposed_values_wider", B=2, S=2, T=40, D=24, Dv=40, lengths=(30, 2), layout="transposed", **LONE
    ),
    Case("head_dim_of_no_kernel", B=2, S=3, T=20, D=12, lengths=(17, 2), **LONE),
]


def roomy(case: Case, device: torch.device) -> tuple[tuple, dict[str, Tensor]]:
    """Arguments with pages for all T tokens of each sequence."""
    if case.page_size is None:
        return cache_inputs(case, device)
    args, state = cache_inputs(Case(**{**vars(case), "lengths": (case.T,) * case.B}), CPU)
    state["cache_seqlens"] = torch.tensor(case.lengths, dtype=torch.int32)
    return to_device(args, device), to_device(state, device)


@pytest.mark.parametrize("rotary", [None, False, True], ids=["plain", "half_split", "interleaved"])
@pytest.mark.parametrize(**named(APPENDED))
def test_new_tokens_are_written_rotated_and_seen(
    case: Case, rotary: bool | None, device: torch.device
) -> None:
    args, state = roomy(case, device)
    options: dict[str, Any] = new_tokens(case, case.S, device)
    if rotary is not None:
        tables = rotary_tables(case.T, 2 * (case.D // 4), device)  # the other channels are copied
        options |= {**tables, "rotary_interleaved": rotary}
    check(case, args, **state, **options)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_rows_may_be_fewer_or_more_than_the_new_tokens(count: int, device: torch.device) -> None:
    case = Case("counts", B=2, S=4, T=40, lengths=(20, 6), page_size=16, **LONE)
    args, state = roomy(case, device)
    check(case, args, **state, **new_tokens(case, count, device), **rotary_tables(40, 16, device))


def test_new_tokens_go_to_the_selected_rows_behind_their_padding(device: torch.device) -> None:
    """cache_batch_idx, cache_leftpad, an int64 length and out in one call."""
    case = Case("all", B=2, S=2, T=40, lengths=(20, 6), **LONE)
    (q, keys, values, *_), _ = cache_inputs(case, CPU)
    keys, values = ([torch.cat((x, x.new_full((1, *x.shape[1:]), math.nan)))] for x in (keys[0], values[0]))
    for cache in (*keys, *values):
        cache[0, 6:], cache[2] = math.nan, cache[1].clone()
        cache[2, 20:], cache[2, :11], cache[1] = math.nan, math.nan, math.nan
        cache[2, 11:20] = torch.randn_like(cache[2, 11:20])
    options = {
        "cache_seqlens": torch.tensor([20, 6]),
        "cache_batch_idx": torch.tensor([2, 0]),
        "cache_leftpad": torch.tensor([11, 0]),
        **new_tokens(case, 2, CPU),
        **rotary_tables(40, 16, CPU),
    }
    check(case, to_device((q, keys, values), device), **to_device(options, device))


def test_new_tokens_do_what_append_kvcache_does_before_the_call(device: torch.device) -> None:
    """flash-attn's lengths are those before the tokens, append_kvcache's those after."""
    case = Case("two_calls", B=2, S=2, T=40, lengths=(20, 6), page_size=16, **LONE)
    (q, keys, values, *_), state = roomy(case, device)
    new = new_tokens(case, 2, device)
    k_cache, v_cache = keys[0].clone(), values[0].clone()
    together = fused_kv_attn_with_kvcache(q, k_cache, v_cache, **state, **new)
    after = {**state, "cache_seqlens": state["cache_seqlens"] + 2}
    append_kvcache(new["k"], new["v"], keys[0], values[0], **after)
    assert_same_bits(together, fused_kv_attn_with_kvcache(q, keys, values, **after))
    assert_same_bits((k_cache, v_cache), (keys[0], values[0]))
    host = {"host_seqlens": [20, 6]}
    assert_same_bits(fused_kv_attn_with_kvcache(q, k_cache, v_cache, **state, **new, **host), together)


SHORT = [
    Case("one_token", B=3, S=5, T=20, lengths=(1, 20, 0)),
    Case("bfloat16_paged", B=3, S=6, T=20, lengths=(4, 20, 2), page_size=7, dtype=BF16),
    Case("eight_query_heads_a_kv_head", B=2, S=3, T=20, H=8, G=1, lengths=(2, 19)),
    Case("many_rows", B=4, S=33, T=40, lengths=(5, 40, 0, 20)),
    Case("many_rows_of_equal_lengths", B=2, S=33, T=40, lengths=(7, 7), page_size=3),
    Case("head_dim_of_no_kernel", B=3, S=5, T=20, D=12, lengths=(2, 20, 0)),
    Case("values_wider", B=2, S=4, T=20, D=24, Dv=40, lengths=(3, 17), m_v=3),
]


@pytest.mark.parametrize("causal", [False, True], ids=["not_causal", "causal"])
@pytest.mark.parametrize(**named(SHORT))
def test_rows_before_the_first_token_see_all_keys_without_left_padding(
    case: Case, causal: bool, device: torch.device
) -> None:
    args, state = cache_inputs(case, device)
    options = {"causal": causal, "left_padding": False}
    out, _ = check(case, args, **state, **options)
    assert bool((out[0, 0] != 0).all()) == (not causal)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **state, **options, terms=case.terms)


@pytest.mark.parametrize("score", [softcap, sinks], ids=lambda x: x.__name__)
@pytest.mark.parametrize(**named(SHORT))
def test_rows_before_the_first_token_have_soft_caps_and_sinks(
    case: Case, score: Scores, device: torch.device
) -> None:
    args, state = cache_inputs(case, device)
    options = {**state, **on(device, score(case)), "causal": False, "left_padding": False}
    check(case, args, **options)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **options, terms=case.terms)


def test_packed_rows_see_all_keys_without_left_padding(device: torch.device) -> None:
    case = Case("packed", B=4, T=40, lengths=(3, 40, 0, 5))
    for counts, page_size in (((5, 1, 2, 0), None), ((5, 1, 2, 40), 16)):
        inputs = Case(**{**vars(case), "page_size": page_size})
        (_, *rest), state = cache_inputs(inputs, device)
        q = torch.randn(sum(counts), 4, 64).to(device)
        bounds = torch.tensor([0, *counts], device=device).cumsum(0).int()
        packed = {"cu_seqlens_q": bounds, "max_seqlen_q": max(counts)}
        check(case, (q, *rest), **state, **packed, causal=False, left_padding=False)
        options = {**packed, "causal": False, "left_padding": False}
        op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
        assert_matches_oracle(op, oracle, q, *rest, **state, **options, terms=case.terms)


def test_cross_attention_over_pages_is_dense_attention(device: torch.device) -> None:
    """More queries than keys, as in a decoder over a short encoder output."""
    case = Case("cross", B=2, S=9, T=6, page_size=4, lengths=(6, 6), causal=False)
    (q, keys, values, a, b), state = cache_inputs(case, device)
    rows = [[x[state["block_table"].long()].flatten(1, 2)[:, :6] for x in side] for side in (keys, values)]
    dense = fused_kv_attn_func(q, *rows, a, b)
    paged = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state, causal=False, left_padding=False)
    assert_near(paged, dense, 32)


def test_a_shared_schedule_serves_calls_without_left_padding(device: torch.device) -> None:
    case = Case("schedule", B=2, S=3, T=40, H=4, G=2, lengths=(2, 33))
    args, state = cache_inputs(case, device)
    schedule = decode_schedule(
        state["cache_seqlens"], query_length=3, num_heads=4, num_kv_heads=2, capacity=40
    )
    options = {"causal": False, "left_padding": False}
    got = fused_kv_attn_with_kvcache(*args, **state, **options, schedule=schedule)
    assert_same_bits(got, fused_kv_attn_with_kvcache(*args, **state, **options))


OPTIONS = [{}, {"batch_invariant": True}, {"return_lse": True, "softcap": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "_".join(x) or "plain")
@pytest.mark.parametrize(
    **named(
        [
            Case("warp", B=3, S=1, T=1300, lengths=(1300, 0, 700), dtype=BF16, page_size=16),
            Case("block", B=2, S=9, T=1300, lengths=(1300, 3), dtype=BF16),
            Case("fallback", B=2, S=2, T=1300, lengths=(700, 1300), Dv=24),
        ]
    )
)
def test_the_kernel_writes_out_and_the_callers_workspace(
    case: Case, options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No result is copied, and what explain() says suffices."""
    args, state = cache_inputs(case, device)
    expected = fused_kv_attn_with_kvcache(*args, **state, **options)
    out = torch.full((*args[0].shape[:3], case.value_dim), math.nan, dtype=case.dtype, device=device)
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    got = fused_kv_attn_with_kvcache(*args, **state, **options, out=out)
    assert (got[0] if "return_lse" in options else got) is out
    assert_same_bits(got, expected)
    said = {k: x for k, x in options.items() if k != "softcap"}
    on_gpu = device.type == "cuda" or native._ops is not torch.ops.fusedkv
    size = (
        0
        if not on_gpu
        else explain(*args, **state, **said, device="cuda", sm_count=sm_count(device)).workspace
    )
    room = torch.full((size + 8,), math.nan, device=device)
    for x in (room[:size], room):
        out.fill_(math.nan)
        got = fused_kv_attn_with_kvcache(*args, **state, **options, out=out, workspace=x)
        assert_same_bits(got, expected)
        assert_same_bits(fused_kv_attn_with_kvcache(*args, **state, **options, workspace=x), expected)
    if on_gpu:
        with pytest.raises(ValueError, match=r"workspace must be contiguous .* got \(1\)") as error:
            fused_kv_attn_with_kvcache(*args, **state, **options, workspace=room[:1])
        needed = int(re.search(r"N >= (\d+)", str(error.value))[1])
        assert size / 8 <= needed <= size  # explain() does not know how many registers a block takes
        fused_kv_attn_with_kvcache(*args, **state, **options, workspace=room[:needed])
        with pytest.raises(ValueError, match=f"N >= {needed}"):
            fused_kv_attn_with_kvcache(*args, **state, **options, workspace=room[: needed - 1])


def sm_count(device: torch.device) -> int:
    """Of the GPU that runs the kernels; the executor has three."""
    return torch.cuda.get_device_properties().multi_processor_count if device.type == "cuda" else 3


def test_memory_may_begin_anywhere(device: torch.device) -> None:
    """Kernels store 16 bytes at a time: an out in between is copied to, a workspace in between refused."""
    args, state = cache_inputs(Case("slices", B=1, S=1, T=40, H=2, G=2, dtype=BF16), device)
    expected = fused_kv_attn_with_kvcache(*args, **state)
    room = torch.zeros(150, dtype=BF16, device=device)
    for first in (0, 1, 8):
        out = room[first : first + 128].view(1, 1, 2, 64)
        assert_same_bits(fused_kv_attn_with_kvcache(*args, **state, out=out), expected)
        assert_same_bits(out, expected)
    with pytest.raises(ValueError, match="workspace must begin at a multiple of 16 bytes"):
        fused_kv_attn_with_kvcache(*args, **state, workspace=torch.zeros(100_001, device=device)[1:])


def test_left_padding_of_packed_queries(device: torch.device) -> None:
    (q, *rest), state = cache_inputs(Case("packed", B=3, S=1, T=40, lengths=(20, 3, 40)), device)
    bounds = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=device)
    leftpad = torch.tensor([4, 0, 39], dtype=torch.int32, device=device)
    options = {**state, "cu_seqlens_q": bounds, "max_seqlen_q": 2, "cache_leftpad": leftpad}
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    slopes = torch.rand(3, 4).to(device)
    assert_matches_oracle(op, oracle, q[:, 0], *rest, **options, return_lse=True, alibi_slopes=slopes)


@pytest.mark.parametrize("S", [0, 1, 3])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_calls_without_left_padding_of_any_size(S: int, heads: tuple[int, int], device: torch.device) -> None:
    case = Case("sizes", B=2, S=S, T=20, H=heads[0], G=heads[1], causal=False, lengths=(2, 20))
    args, state = cache_inputs(case, device)
    options = {**state, "causal": False, "left_padding": False, "return_lse": True}
    options["sinks"] = torch.randn(case.H).to(device)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    out, _ = assert_matches_oracle(op, oracle, *args, **options)
    assert out.shape == (2, S, case.H, 64)
    bounds = torch.tensor([0, S, S], dtype=torch.int32, device=device)
    packed = {**options, "cu_seqlens_q": bounds, "max_seqlen_q": S}
    assert_matches_oracle(op, oracle, args[0][0], *args[1:], **packed)


def test_packed_queries_and_strided_results_have_an_out(device: torch.device) -> None:
    (q, *rest), state = cache_inputs(Case("packed", B=3, S=1, T=40, lengths=(20, 3, 40), dtype=BF16), device)
    bounds = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=device)
    options = {**state, "cu_seqlens_q": bounds, "max_seqlen_q": 2}
    expected = fused_kv_attn_with_kvcache(q[:, 0], *rest, **options)
    for out in (torch.empty_like(expected), torch.empty_like(expected).mT.contiguous().mT):
        assert_same_bits(fused_kv_attn_with_kvcache(q[:, 0], *rest, **options, out=out), expected)
        assert_same_bits(out, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: {"workspace": x["q"]}, TypeError, "workspace must be float32, got bfloat16"),
        (lambda x: {"workspace": torch.zeros(2, 3)}, ValueError, "workspace must be contiguous of shape"),
        (lambda x: {"workspace": torch.zeros(9)[::2]}, ValueError, "workspace must be contiguous of shape"),
        (lambda x: {"workspace": 5}, TypeError, "workspace must be a torch.Tensor, got int"),
        (lambda x: {"workspace": torch.zeros(9, device="meta")}, ValueError, "workspace must be on"),
        (lambda x: {"out": x["q"]}, ValueError, "q must not share memory with out, which is written"),
        (lambda x: {"out": x["key"][:, :1]}, ValueError, r"key_caches\[0\] must not share memory with out"),
    ],
)
def test_memory_of_the_callers_is_checked(
    change: Callable, error: type[Exception], message: str, device: torch.device
) -> None:
    (q, keys, *rest), state = cache_inputs(
        Case("memory", B=1, S=1, T=1, H=2, G=2, dtype=BF16, lengths=(1,)), device
    )
    options = {
        k: x.to(device) if isinstance(x, Tensor) and not x.is_meta else x
        for k, x in change({"q": q, "key": keys[0]}).items()
    }
    with pytest.raises(error, match=message):
        fused_kv_attn_with_kvcache(q, keys, *rest, **state, **options)


def test_writes_are_counted_and_known_to_torch() -> None:
    """Autograd and graphs of torch.compile see that out and workspace are written."""
    args, state = cache_inputs(Case("known", B=2, S=3, T=9, D=16, lengths=(9, 2), page_size=4), CPU)
    out, workspace = torch.empty(2, 3, 4, 16), torch.empty(100)
    versions = out._version, workspace._version
    expected = fused_kv_attn_with_kvcache(*args, **state, out=out, workspace=workspace).clone()
    assert out._version > versions[0] and workspace._version > versions[1]
    call = AttentionCall(*args, *state.values(), 0.25, -1, 0)
    op = torch.ops.fusedkv.attn_with_kvcache_out.default
    assert set(torch.library.opcheck(op, (*call[:17], out, workspace)).values()) == {"SUCCESS"}
    torch._dynamo.reset()
    compiled = torch.compile(fused_kv_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    out.fill_(math.nan)
    assert_same_bits(compiled(*args, **state, out=out, workspace=workspace), expected)
    assert_same_bits(out, expected)


def test_out_is_filled_and_returned(device: torch.device) -> None:
    for S, options in ((1, {}), (33, {}), (3, {"return_lse": True})):
        args, state = cache_inputs(Case("out", S=S, T=40, Dv=24, dtype=BF16), device)
        expected = fused_kv_attn_with_kvcache(*args, **state, **options)
        room = torch.full((2, 2, S, 4, 24), math.nan, dtype=BF16, device=device)
        got = fused_kv_attn_with_kvcache(*args, **state, **options, out=room[1])
        first = got[0] if options else got
        assert first.data_ptr() == room[1].data_ptr() and bool(room[0].isnan().all())
        assert_same_bits(got, expected)


def test_one_graph_of_torch_compile_takes_all_arguments() -> None:
    case = Case("compiled", B=2, S=2, T=40, lengths=(20, 6), **LONE)
    (q, keys, values, *_), state = cache_inputs(case, CPU)
    options = {
        "cache_seqlens": state["cache_seqlens"].long(),
        "cache_batch_idx": torch.tensor([1, 0]),
        "cache_leftpad": torch.tensor([3, 0]),
        **new_tokens(case, 2, CPU),
        **rotary_tables(40, 16, CPU),
    }
    caches = [x.flip(0) for x in (keys[0], values[0])]
    expected = fused_kv_attn_with_kvcache(q, *(x.clone() for x in caches), **options)
    torch._dynamo.reset()
    compiled = torch.compile(fused_kv_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    assert_near(compiled(q, *caches, **options), expected, 8)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"cache_batch_idx": torch.tensor([0, 2])},
        ValueError,
        r"cache_batch_idx\[1\] must be a row .*0 to 1, got 2",
    ),
    ({"cache_batch_idx": torch.tensor([-1, 0])}, ValueError, r"cache_batch_idx\[0\] must be a row .*got -1"),
    (
        {"cache_batch_idx": torch.tensor([0])},
        ValueError,
        r"cache_batch_idx must have shape \(B,\) = \(2,\), got \(1,\)",
    ),
    ({"cache_batch_idx": torch.tensor([[0, 1]])}, ValueError, r"cache_batch_idx must have shape \(B,\)"),
    (
        {"cache_batch_idx": torch.tensor([0.0, 1.0])},
        TypeError,
        "cache_batch_idx must be int32 or int64, got float32",
    ),
    ({"cache_batch_idx": [0, 1]}, TypeError, "cache_batch_idx must be a torch.Tensor, got list"),
    (
        {"cache_leftpad": torch.tensor([0, 8])},
        ValueError,
        r"cache_leftpad\[1\] must be from 0 to .* = 7, got 8",
    ),
    ({"cache_leftpad": torch.tensor([-1, 0])}, ValueError, r"cache_leftpad\[0\] must be from 0 .* got -1"),
    ({"cache_leftpad": torch.tensor([0])}, ValueError, r"cache_leftpad must have shape \(B,\) = \(2,\)"),
    ({"cache_leftpad": 3}, TypeError, "cache_leftpad must be a torch.Tensor, got int"),
    ({"k": torch.zeros(2, 1, 2, 64)}, TypeError, "v must be a torch.Tensor, got NoneType"),
    ({"v": torch.zeros(2, 1, 2, 64)}, TypeError, "k must be a torch.Tensor, got NoneType"),
    (
        {"k": torch.zeros(2, 2, 64), "v": torch.zeros(2, 2, 64)},
        ValueError,
        r"k must have 4 dims .* got \(2, 2, 64\)",
    ),
    (
        {"rotary_cos": torch.zeros(9, 8), "rotary_sin": torch.zeros(9, 8)},
        ValueError,
        "rotary_cos .* must be None",
    ),
    ({"left_padding": None}, TypeError, "left_padding must be a bool, got NoneType"),
    (
        {"left_padding": False, "causal": False, "alibi_slopes": torch.zeros(4)},
        ValueError,
        "alibi_slopes must be None with left_padding=False and causal=False",
    ),
    (
        {"left_padding": False, "causal": False, "window_size": (3, -1)},
        ValueError,
        "left_padding must be True with",
    ),
    (
        {"out": torch.zeros(2, 1, 4, 63)},
        ValueError,
        r"out must have shape \(2, 1, 4, 64\) .* got \(2, 1, 4, 63\)",
    ),
    ({"out": torch.zeros(2, 1, 4, 64).double()}, TypeError, "out must be float32 as the result, got float64"),
    (
        {"out": torch.zeros(2, 1, 4, 64).to("meta")},
        ValueError,
        "out must be on cpu as the result, got .* on meta",
    ),
    ({"out": torch.zeros(2, 1, 4, 64, requires_grad=True)}, ValueError, "out must not require grad"),
    ({"num_splits": 2}, TypeError, r"fused_kv_attn_with_kvcache\(\) got an unexpected .* 'num_splits'"),
    ({"out": "tensor"}, TypeError, "out must be a torch.Tensor, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case("bad", S=1, T=12, lengths=(12, 7), **LONE)
    args, state = cache_inputs(case, CPU)
    caches = [x.nan_to_num() for x in (*args[1], *args[2])]
    before = [x.clone() for x in caches]
    with pytest.raises(error, match=f"^{message}"):
        fused_kv_attn_with_kvcache(args[0], *caches, **{**state, **change})
    assert_same_bits(caches, before)


def test_new_tokens_that_do_not_fit_are_refused_before_they_are_written() -> None:
    case = Case("full", S=2, T=12, lengths=(11, 7), **LONE)
    args, state = cache_inputs(case, CPU)
    k, v = new_tokens(case, 2, CPU).values()
    before = [x.clone() for x in (*args[1], *args[2])]
    for change, message in (
        ({}, r"cache_seqlens\[0\] must be from 0 to 10, room for the 2 tokens of k, got 11"),
        ({"cache_seqlens": 11}, "cache_seqlens must be from 0 to 10, room for the 2 tokens of k, got 11"),
        ({"cache_seqlens": torch.tensor([-1, 7])}, r"cache_seqlens\[0\] must be from 0 to 10, .* got -1"),
        ({"cache_seqlens": 5, **rotary_tables(6, 16, CPU)}, "rotary_cos"),
        (
            {"cache_seqlens": 5, **rotary_tables(5, 16, CPU), "causal": False},
            "rotary_cos must have a row for",
        ),
        ({"cache_seqlens": 5, "cache_leftpad": torch.tensor([8, 0])}, r"cache_leftpad\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_kv_attn_with_kvcache(*args, **{**state, "k": k, "v": v, **change})
        assert_same_bits((*args[1], *args[2]), before)
    lists = ([args[1][0], args[1][0].clone()], args[2])
    with pytest.raises(
        ValueError, match=r"key_caches must hold one tensor with k and v, got 2; call append_kv"
    ):
        fused_kv_attn_with_kvcache(args[0], *lists, **state, k=k, v=v)
    with pytest.raises(ValueError, match="cu_seqlens_q must be None with k and v"):
        packed = {"cu_seqlens_q": torch.tensor([0, 2, 4], dtype=torch.int32), "max_seqlen_q": 2}
        fused_kv_attn_with_kvcache(args[0].flatten(0, 1), *args[1:], **state, **packed, k=k, v=v)


def test_arguments_that_exclude_each_other_are_refused() -> None:
    args, state = cache_inputs(Case("both", S=1, T=12, page_size=4), CPU)
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="cache_batch_idx must be None with a block_table"):
        fused_kv_attn_with_kvcache(*args, **state, cache_batch_idx=index)
    schedule = decode_schedule(
        state["cache_seqlens"], query_length=1, num_heads=4, num_kv_heads=2, capacity=12
    )
    with pytest.raises(ValueError, match="schedule must be None with cache_leftpad"):
        fused_kv_attn_with_kvcache(*args, **state, cache_leftpad=index * 0, schedule=schedule)
    strided, lengths = cache_inputs(Case("strided", S=1, T=12, layout="transposed"), CPU)
    with pytest.raises(ValueError, match=r"key_caches\[0\] must have stride \d+ in dim 0 with cache_leftpad"):
        fused_kv_attn_with_kvcache(*strided, **lengths, cache_leftpad=index * 0)


LENGTHS = torch.tensor([8, 3], dtype=torch.int32)
NEW = torch.zeros(2, 1, 2, 16)
ANGLES = torch.zeros(9, 4)
WRONG_NEW_TOKENS = [
    ({"k": NEW[..., :8]}, ValueError, r"k must have the heads and head dim of key_caches\[0\]"),
    ({"k": NEW.double()}, TypeError, r"key_caches\[0\] must be float64 as k, got float32"),
    ({"v": NEW.half()}, TypeError, "v must be float32 as k, got float16"),
    ({"v": NEW[:1]}, ValueError, r"v must have B and S of k"),
    ({"k": NEW.clone().requires_grad_()}, ValueError, "k must not require grad"),
    (
        {"cache_seqlens": LENGTHS},
        ValueError,
        r"cache_seqlens\[0\] must be from 0 to 7, room for the 1 tokens of k, got 8",
    ),
    ({"cache_seqlens": None}, ValueError, "cache_seqlens must be given with k and v, got None"),
    (
        {"cache_seqlens": 3, "host_seqlens": [7, 7]},
        ValueError,
        r"host_seqlens must be \[3, 3\] as cache_seqlens",
    ),
    ({"rotary_cos": ANGLES, "rotary_sin": ANGLES[:4]}, ValueError, "rotary_cos and rotary_sin must both be"),
    (
        {"rotary_cos": ANGLES[0], "rotary_sin": ANGLES[0]},
        ValueError,
        "rotary_cos and rotary_sin must both be",
    ),
    (
        {"rotary_cos": torch.zeros(9, 9), "rotary_sin": torch.zeros(9, 9)},
        ValueError,
        "rotary_dim at most D = 16",
    ),
    ({"rotary_interleaved": "x"}, TypeError, "rotary_interleaved must be a bool, got str"),
    ({"out": torch.zeros(1, 1, 4, 16).expand(2, 1, 4, 16)}, ValueError, "out must have memory of its own"),
    (
        {"out": torch.zeros(99).as_strided((2, 1, 4, 16), (8, 8, 8, 1))},
        ValueError,
        "out must have memory of its",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_NEW_TOKENS)
def test_errors_of_new_tokens_have_the_names_of_the_call(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    q, caches = torch.zeros(2, 1, 4, 16), torch.zeros(2, 2, 8, 2, 16)
    options = {"cache_seqlens": torch.tensor([3, 3], dtype=torch.int32), "k": NEW, "v": NEW, **change}
    with pytest.raises(error, match=message):
        fused_kv_attn_with_kvcache(q, caches[0], caches[1], **options)
