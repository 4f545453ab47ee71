"""fused_kv_attn_with_kvcache: attention of the last S tokens over contiguous and paged caches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import Case, cache_inputs, named
from torch import Tensor

from fusedkv_ext import append_kvcache, fused_kv_attn_func, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16

CASES = [
    Case("one_row", S=1, T=65),
    Case("one_token", B=1, S=1, T=1),
    Case("one_row_of_one_kv_head", S=1, T=65, H=8, G=1),
    Case("one_row_equal_heads", S=1, T=65, H=3, G=3),
    Case("one_row_seven_queries_per_kv_head", S=1, T=40, H=14, G=2),
    Case("one_row_sixteen_queries_per_kv_head", S=1, T=40, H=16, G=1, dtype=BF16),
    Case("two_rows_ragged", B=4, S=2, T=70, lengths=(70, 1, 33, 2)),
    Case("rows_of_several_tokens", S=5, T=70, lengths=(70, 64)),
    Case("eight_rows_bfloat16", S=8, T=70, lengths=(70, 9), dtype=BF16),
    Case("thirty_three_rows", S=33, T=70, lengths=(70, 40)),
    Case("thirty_three_rows_shorter_than_S", B=3, S=33, T=70, lengths=(70, 7, 0)),
    Case("thirty_three_rows_not_causal", B=3, S=33, T=70, lengths=(70, 7, 0), causal=False),
    Case("all_rows", S=37, T=37),
    Case("empty_sequence", B=3, S=1, T=20, lengths=(20, 0, 3)),
    Case("all_sequences_empty", B=2, S=1, T=20, lengths=(0, 0)),
    Case("sequence_shorter_than_S", B=3, S=4, T=20, lengths=(20, 2, 0)),
    Case("not_causal", S=5, T=40, lengths=(40, 17), causal=False),
    Case("not_causal_shorter_than_S", S=5, T=40, lengths=(40, 3), causal=False),
    Case("no_weights_one_source", S=1, T=65, m_k=1, m_v=1, weights="none"),
    Case("no_weights_two_sources", S=1, T=65, weights="none"),
    Case("more_keys_than_values", S=1, T=40, m_k=3, m_v=1),
    Case("more_values_than_keys", S=2, T=40, m_k=1, m_v=3),
    Case("eight_sources", S=1, T=40, m_k=8, m_v=8, dtype=BF16),
    Case("thirty_two_sources", S=1, T=20, m_k=32, m_v=32, D=32),
    Case("head_weights", S=1, T=40, weights="head"),
    Case("scalar_weights_bfloat16", S=1, T=40, weights="scalar", dtype=BF16),
    Case("shared_channel_weights", S=3, T=40, weights="shared_channel"),
    Case("D16", S=1, T=40, D=16),
    Case("D24_bfloat16", S=1, T=40, D=24, dtype=BF16),
    Case("D40_float16", S=2, T=40, D=40, dtype=FP16),
    Case("D72", S=1, T=40, D=72),
    Case("D72_bfloat16_paged", S=3, T=40, D=72, dtype=BF16, page_size=16),
    Case("D128_bfloat16", S=1, T=130, D=128, dtype=BF16),
    Case("D200_bfloat16", S=1, T=40, D=200, dtype=BF16),
    Case("D256", S=1, T=40, D=256),
    Case("D256_float16_paged", S=2, T=40, D=256, dtype=FP16, page_size=7),
    Case("values_narrower_than_keys", S=1, T=40, D=64, Dv=24),
    Case("values_wider_than_keys_bfloat16", S=2, T=40, D=40, Dv=128, dtype=BF16),
    Case("page_size_1", B=3, S=1, T=20, lengths=(20, 0, 7), page_size=1),
    Case("page_size_7", B=3, S=2, T=40, lengths=(40, 1, 14), page_size=7),
    Case("page_size_16_bfloat16", B=3, S=1, T=70, lengths=(70, 16, 17), page_size=16, dtype=BF16),
    Case("page_size_64", B=2, S=5, T=130, lengths=(130, 64), page_size=64),
    Case("page_size_16_thirty_three_rows", B=3, S=33, T=70, lengths=(70, 5, 40), page_size=16),
    Case("page_size_7_shorter_than_S", B=3, S=4, T=30, lengths=(30, 2, 0), page_size=7),
    Case("window_left", S=1, T=70, window=(9, -1), lengths=(70, 5)),
    Case("window_left_paged", B=3, S=3, T=70, window=(20, -1), lengths=(70, 5, 33), page_size=7),
    Case("window_left_thirty_three_rows", S=33, T=70, window=(12, -1), lengths=(70, 35)),
    Case("window_of_the_row_itself", S=3, T=40, window=(0, 0)),
    Case("window_both_not_causal", S=5, T=40, window=(6, 2), causal=False, lengths=(40, 13)),
    Case("window_right_not_causal", S=5, T=40, window=(-1, 1), causal=False),
    Case("causal_overrides_window_right", S=3, T=40, window=(6, 4)),
    Case("scale", S=1, T=40, scale=0.7),
    Case("large_scores", S=1, T=70, magnitude=100.0),
    Case("large_scores_bfloat16", S=2, T=70, magnitude=30.0, dtype=BF16),
    Case("transposed", S=2, T=40, layout="transposed", lengths=(40, 11)),
    Case("transposed_bfloat16", S=1, T=40, layout="transposed", dtype=BF16),
    Case("unaligned", S=2, T=40, layout="sliced", lengths=(40, 11)),
    Case("unaligned_bfloat16", S=1, T=40, layout="sliced", D=72, dtype=BF16),
    Case("every_other_token", S=2, T=40, layout="every_other", lengths=(40, 11)),
    Case("long_splits", B=1, S=1, T=4099, H=2, G=1, D=64),
    Case("long_splits_bfloat16_ragged", B=2, S=1, T=5000, H=4, G=1, lengths=(5000, 77), D=32, dtype=BF16),
    Case("long_splits_paged", B=2, S=2, T=4200, H=2, G=1, lengths=(4200, 2049), D=32, page_size=64),
    Case("long_window", B=1, S=1, T=4099, H=2, G=1, D=32, window=(1500, -1)),
    Case("many_sequences", B=17, S=1, T=9, D=16, lengths=tuple(range(1, 10)) + tuple(range(8))),
    Case("empty_batch", B=0, S=1, lengths=()),
]


@pytest.mark.parametrize(**named(CASES))
def test_matches_oracle(case: Case, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    out, lse = assert_matches_oracle(
        fused_kv_attn_with_kvcache,
        reference.fused_kv_attn_with_kvcache,
        *args,
        **state,
        **case.options,
        terms=case.terms,
    )
    assert out.dtype == case.dtype and lse.dtype == torch.float32


@pytest.mark.parametrize(**named([case for case in CASES if case.S >= 33]))
def test_many_rows_match_oracle_without_lse(case: Case, device: torch.device) -> None:
    """Without lse many rows go another way: they are fused once and given to dense attention."""
    args, state = cache_inputs(case, device)
    options = {**case.options, "return_lse": False}
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **state, **options, terms=case.terms)


def test_lse_is_left_out_unless_asked_for(device: torch.device) -> None:
    args, state = cache_inputs(Case("lse", S=1), device)
    out, _ = fused_kv_attn_with_kvcache(*args, **state, return_lse=True)
    assert_same_bits(fused_kv_attn_with_kvcache(*args, **state), out)


def test_causal_is_the_default(device: torch.device) -> None:
    args, state = cache_inputs(Case("default", S=5), device)
    expected = fused_kv_attn_with_kvcache(*args, **state, causal=True)
    assert_same_bits(fused_kv_attn_with_kvcache(*args, **state), expected)


def test_lone_tensor_is_a_list_of_one(device: torch.device) -> None:
    (q, keys, values, *_), state = cache_inputs(Case("lone", S=1, m_k=1, m_v=1, weights="none"), device)
    expected = fused_kv_attn_with_kvcache(q, keys, values, **state)
    assert_same_bits(fused_kv_attn_with_kvcache(q, keys[0], values[0], **state), expected)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_decode_row_equals_prefill_row(dtype: torch.dtype, device: torch.device) -> None:
    case = Case("prefill", S=37, T=37, m_v=3, dtype=dtype)
    (q, keys, values, a, b), _ = cache_inputs(case, device)
    prefill, prefill_lse = fused_kv_attn_func(q, keys, values, a, b, causal=True, return_lse=True)
    for position in (0, 1, 17, 36):
        lengths = torch.full((case.B,), position + 1, dtype=torch.int32, device=device)
        row = q[:, position : position + 1]
        out, lse = fused_kv_attn_with_kvcache(row, keys, values, a, b, cache_seqlens=lengths, return_lse=True)
        assert_near(out, prefill[:, position : position + 1], rounding_steps=16)
        # Scores of both paths carry a rounding of the working dtype, of q or of the fused key.
        atol = 16 * torch.finfo(dtype).eps * float(prefill_lse.abs().max())
        torch.testing.assert_close(lse, prefill_lse[:, :, position : position + 1], rtol=0, atol=atol)


def test_every_split_of_the_rows_gives_the_same_rows(device: torch.device) -> None:
    case = Case("rows", S=33, T=70, lengths=(70, 40))
    (q, *rest), state = cache_inputs(case, device)
    together = fused_kv_attn_with_kvcache(q, *rest, **state)
    for count in (1, 2, 7, 16):
        assert_near(fused_kv_attn_with_kvcache(q[:, -count:], *rest, **state), together[:, -count:], 32)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_paged_equals_contiguous(page_size: int, device: torch.device) -> None:
    case = Case("contiguous", B=3, S=2, T=70, lengths=(70, 16, 33), dtype=BF16)
    (q, keys, values, a, b), state = cache_inputs(case, CPU)
    pages = 3 * math.ceil(case.T / page_size)
    table = torch.randperm(pages).view(3, -1).int()

    def paged(cache: Tensor) -> Tensor:
        out = torch.full((pages, page_size, case.G, case.D), math.nan, dtype=case.dtype)
        for b in range(case.B):
            for t in range(case.T):
                out[table[b, t // page_size], t % page_size] = cache[b, t]
        return out.to(device)

    expected = fused_kv_attn_with_kvcache(
        q.to(device),
        [x.to(device) for x in keys],
        [x.to(device) for x in values],
        a.to(device),
        b.to(device),
        cache_seqlens=state["cache_seqlens"].to(device),
    )
    got = fused_kv_attn_with_kvcache(
        q.to(device),
        [paged(x) for x in keys],
        [paged(x) for x in values],
        a.to(device),
        b.to(device),
        cache_seqlens=state["cache_seqlens"].to(device),
        block_table=table.to(device),
    )
    assert_near(got, expected)


def test_sequences_may_share_pages(device: torch.device) -> None:
    """A common prefix is stored once: several rows of the block table name its pages."""
    q = torch.randn(3, 2, 4, 64, device=device)
    keys, values = ([torch.randn(6, 4, 2, 64, device=device) for _ in range(2)] for _ in range(2))
    table = torch.tensor([[5, 0, 1], [5, 0, 2], [5, 5, 3]], dtype=torch.int32, device=device)
    lengths = torch.tensor([11, 12, 9], dtype=torch.int32, device=device)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, q, keys, values, cache_seqlens=lengths, block_table=table)


def test_caches_may_have_more_than_2_to_31_elements() -> None:
    """Offsets need 64 bits. The cache is address space; only the pages that are touched take memory."""
    page_size, dim = 16, 64
    pages = 2**31 // (page_size * dim) + 2
    try:
        cache = torch.empty(pages, page_size, 1, dim, dtype=BF16)
    except RuntimeError:
        pytest.skip("the system does not lend 4 GiB of address space")
    used = torch.randn(2, page_size, 1, dim).to(BF16)
    cache[0], cache[-1] = used[0], used[1]
    table = torch.tensor([[0, pages - 1]], dtype=torch.int32)
    key, q = torch.randn(1, 1, 1, dim).to(BF16), torch.randn(1, 1, 4, dim).to(BF16)
    lengths = torch.tensor([20], dtype=torch.int32)
    no_values, no_cache = key[:, :, :0], cache[:, :, :0]  # one cache may not be written twice
    append_kvcache(key, no_values, cache, no_cache, cache_seqlens=lengths, block_table=table)
    used[1, 3] = key[0, 0]
    assert torch.equal(cache[-1], used[1])
    got = fused_kv_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, block_table=table)
    small = torch.tensor([[0, 1]], dtype=torch.int32)
    assert_same_bits(got, fused_kv_attn_with_kvcache(q, used, used, cache_seqlens=lengths, block_table=small))


def test_one_hot_value_weight_over_a_single_token_returns_that_value_exactly(device: torch.device) -> None:
    case = Case("one_hot", S=1, T=4, H=2, G=2, m_v=3, dtype=BF16, lengths=(1, 1))
    (q, keys, values, a, _), state = cache_inputs(case, device)
    for chosen in range(3):
        weights = torch.zeros(3, 1, 1, device=device)
        weights[chosen] = 1
        out = fused_kv_attn_with_kvcache(q, keys, values, a, weights, **state)
        assert torch.equal(out, values[chosen][:, :1])


def test_one_hot_weights_equal_the_chosen_sources_alone(device: torch.device) -> None:
    case = Case("one_hot", S=1, T=40, m_k=3, m_v=2, weights="scalar")
    (q, keys, values, a, b), state = cache_inputs(case, device)
    a.zero_()[2], b.zero_()[0] = 1, 1
    alone = fused_kv_attn_with_kvcache(q, keys[2], values[0], **state)
    assert_near(fused_kv_attn_with_kvcache(q, keys, values, a, b, **state), alone)


def test_doubling_value_weights_doubles_the_output_exactly(device: torch.device) -> None:
    (q, keys, values, a, b), state = cache_inputs(Case("linear", S=1, T=70, dtype=BF16), device)
    once = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)
    assert_same_bits(fused_kv_attn_with_kvcache(q, keys, values, a, 2 * b, **state), 2 * once)


@pytest.mark.parametrize(
    "case",
    [
        Case("one_row", B=3, S=1, T=2100, H=4, G=2, D=32, lengths=(2100, 5, 700), dtype=BF16),
        Case("few_rows_paged", B=3, S=4, T=300, H=4, G=2, lengths=(300, 2, 150), page_size=16),
        Case("many_rows", B=3, S=33, T=70, lengths=(70, 40, 0)),
    ],
    ids=str,
)
def test_bits_depend_neither_on_threads_nor_on_the_rest_of_the_batch(
    case: Case, with_threads: Callable[[int], None]
) -> None:
    (q, keys, values, a, b), state = cache_inputs(case, CPU)
    together = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state, return_lse=True)
    for threads in (1, 2, 3):
        with_threads(threads)
        again = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state, return_lse=True)
        assert_same_bits(again, together)
    table = state["block_table"]
    for row in range(case.B):
        one = slice(row, row + 1)
        caches = (
            [x if table is not None else x[one] for x in keys],
            [x if table is not None else x[one] for x in values],
        )
        alone = fused_kv_attn_with_kvcache(
            q[one],
            *caches,
            a,
            b,
            cache_seqlens=state["cache_seqlens"][one],
            block_table=None if table is None else table[one],
            return_lse=True,
        )
        assert_same_bits(alone, tuple(x[one] for x in together))


def test_capacity_of_the_cache_changes_no_bit(device: torch.device) -> None:
    case = Case("capacity", S=1, T=300, lengths=(200, 33), D=32)
    (q, keys, values, a, b), state = cache_inputs(case, device)
    expected = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)
    smaller = [[x[:, :200] for x in caches] for caches in (keys, values)]
    assert_same_bits(fused_kv_attn_with_kvcache(q, *smaller, a, b, **state), expected)


def test_inputs_stay_untouched(device: torch.device) -> None:
    (q, keys, values, a, b), state = cache_inputs(Case("untouched", S=3, lengths=(37, 37)), device)
    inputs = (q, *keys, *values, a, b, state["cache_seqlens"])
    before = [x.clone() for x in inputs]
    fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("S", [1, 33], ids=["one_row", "many_rows"])
def test_nan_in_a_valid_slot_reaches_only_the_rows_that_read_it(S: int, device: torch.device) -> None:
    (q, keys, values, a, b), state = cache_inputs(Case("poison", S=S, T=40), device)
    keys[0][0, 3, 0, 5] = math.nan
    out = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)
    group = slice(0, 2)
    assert bool(out[0, -1, group].isnan().all())
    assert bool(torch.isfinite(out[1]).all()) and bool(torch.isfinite(out[0, -1, 2:]).all())


@pytest.mark.parametrize("which", ["q", "keys", "values", "key_weights", "value_weights"])
def test_input_that_requires_grad_raises_only_in_grad_mode(which: str) -> None:
    (q, keys, values, a, b), state = cache_inputs(Case("grad", S=1), CPU)
    chosen = {"q": q, "keys": keys[0], "values": values[1], "key_weights": a, "value_weights": b}[which]
    chosen.requires_grad_()
    with pytest.raises(ValueError, match="grad"):
        fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)
    with torch.no_grad():
        fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)
    with torch.inference_mode():
        fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)


def test_autocast_takes_the_dtype_of_the_caches(device: torch.device) -> None:
    (q, keys, values, a, b), state = cache_inputs(Case("autocast", S=1, dtype=BF16), device)
    expected = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state)
    with torch.autocast(device.type, dtype=BF16):
        assert_same_bits(fused_kv_attn_with_kvcache(q, keys, values, a, b, **state), expected)
        out = fused_kv_attn_with_kvcache(q.float(), keys, values, a, b, **state)
    assert out.dtype == BF16
    assert_same_bits(out, expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_lse_merges_attention_over_two_parts_of_the_keys(page_size: int | None, device: torch.device) -> None:
    """out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i), parts i of the keys (cascade
    attention)."""
    case = Case("parts", B=3, S=1, T=64, lengths=(64, 48, 32), page_size=page_size, causal=False)
    (q, keys, values, a, b), state = cache_inputs(case, device)
    lengths, table, split = state["cache_seqlens"], state["block_table"], 32

    def attend(part: slice, lengths: Tensor) -> tuple[Tensor, Tensor]:
        caches = (
            [c if table is not None else c[:, part] for c in keys],
            [c if table is not None else c[:, part] for c in values],
        )
        pages = None if table is None else table[:, slice(*(x and x // 16 for x in (part.start, part.stop)))]
        return fused_kv_attn_with_kvcache(
            q, *caches, a, b, cache_seqlens=lengths, block_table=pages, causal=False, return_lse=True
        )

    whole, whole_lse = attend(slice(None), lengths)
    parts = [
        attend(slice(0, split), lengths.clamp(max=split)),
        attend(slice(split, None), (lengths - split).clamp(min=0)),
    ]
    merged_lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    merged = sum((lse - merged_lse).exp().transpose(1, 2)[..., None] * out for out, lse in parts)
    assert_near(merged, whole, rounding_steps=32)
    torch.testing.assert_close(merged_lse, whole_lse)
