"""fused_kv_attn_func: dense attention over fused keys and values, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import Case, dense_inputs, named
from torch import Tensor

from fusedkv_ext import fuse_kv, fused_kv_attn_func
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64

CASES = [
    Case("self_attention_causal", S=33, T=33),
    Case("self_attention", S=33, T=33, causal=False),
    Case("one_row", S=1, T=65),
    Case("one_row_of_one_key", S=1, T=1),
    Case("few_rows_at_the_end", S=5, T=70),
    Case("many_rows_at_the_end", S=40, T=70),
    Case("one_kv_head", S=17, T=17, H=8, G=1),
    Case("kv_heads_equal_query_heads", S=17, T=17, H=3, G=3),
    Case("three_queries_per_kv_head", S=17, T=17, H=6, G=2),
    Case("no_weights_one_source", S=17, T=17, m_k=1, m_v=1, weights="none"),
    Case("no_weights_two_sources", S=17, T=17, weights="none"),
    Case("more_keys_than_values", S=17, T=17, m_k=3, m_v=1),
    Case("more_values_than_keys", S=17, T=17, m_k=1, m_v=3),
    Case("eight_sources", S=9, T=9, m_k=8, m_v=8),
    Case("thirty_two_key_sources", S=9, T=9, m_k=32, m_v=2, D=16),
    Case("head_weights", S=17, T=17, weights="head"),
    Case("scalar_weights", S=17, T=17, weights="scalar"),
    Case("shared_channel_weights", S=17, T=17, weights="shared_channel"),
    Case("D16", S=9, T=9, D=16),
    Case("D24_bfloat16", S=9, T=9, D=24, dtype=BF16),
    Case("D40", S=9, T=9, D=40, causal=False),
    Case("D72_float16", S=9, T=9, D=72, dtype=FP16),
    Case("D128_bfloat16", S=65, T=65, D=128, dtype=BF16, m_k=3),
    Case("D200", S=9, T=9, D=200),
    Case("D256_bfloat16", S=9, T=9, D=256, dtype=BF16),
    Case("values_narrower_than_keys", S=17, T=17, D=64, Dv=24),
    Case("values_wider_than_keys_bfloat16", S=17, T=17, D=40, Dv=128, dtype=BF16),
    Case("float64", S=9, T=12, D=24, dtype=FP64),
    Case("bfloat16_self_attention", S=70, T=70, dtype=BF16),
    Case("float16_one_row", S=1, T=130, dtype=FP16),
    Case("window_left", S=20, T=33, window=(5, -1)),
    Case("window_left_of_nothing_but_itself", S=20, T=33, window=(0, -1)),
    Case("window_right", S=20, T=33, window=(-1, 3), causal=False),
    Case("window_both", S=20, T=33, window=(7, 2), causal=False),
    Case("window_both_one_row", S=1, T=33, window=(7, 0), causal=False),
    Case("window_left_bfloat16", S=65, T=130, window=(16, -1), dtype=BF16),
    Case("causal_overrides_window_right", S=9, T=12, window=(4, 5)),
    Case("window_wider_than_everything", S=9, T=12, window=(10**6, 10**6), causal=False),
    Case("more_rows_than_keys_causal", S=12, T=5),
    Case("more_rows_than_keys_not_causal", S=12, T=5, causal=False),
    Case("more_rows_than_keys_window", S=12, T=5, window=(2, 1), causal=False),
    Case("no_keys", S=3, T=0),
    Case("no_rows", S=0, T=3),
    Case("empty_batch", B=0),
    Case("scale", S=9, T=9, scale=0.7),
    Case("negative_scale", S=9, T=9, scale=-0.3),
    Case("zero_scale", S=9, T=9, scale=0.0),
    Case("negative_scale_many_rows", S=40, T=40, scale=-0.3),
    Case("zero_scale_many_rows", S=40, T=40, scale=0.0),
    Case("negative_scale_many_rows_at_the_end", S=40, T=70, scale=-0.3, dtype=BF16),
    Case("large_scores", S=9, T=33, magnitude=100.0),
    Case("large_scores_float16", S=9, T=33, magnitude=30.0, dtype=FP16),
    Case("transposed", S=17, T=17, layout="transposed"),
    Case("transposed_bfloat16", S=1, T=33, layout="transposed", dtype=BF16),
    Case("unaligned", S=17, T=17, layout="sliced", D=40),
    Case("unaligned_bfloat16", S=17, T=17, layout="sliced", dtype=BF16),
    Case("every_other_token", S=9, T=17, layout="every_other"),
    Case("batch_stride_zero", S=9, T=17, B=3, layout="one_batch"),
    Case("long", B=1, S=2, T=4099, H=2, G=1, D=32),
]


@pytest.mark.parametrize(**named(CASES))
def test_matches_oracle(case: Case, device: torch.device) -> None:
    args = dense_inputs(case, device)
    out, lse = assert_matches_oracle(
        fused_kv_attn_func, reference.fused_kv_attn_func, *args, **case.options, terms=case.terms
    )
    assert out.dtype == case.dtype and lse.dtype == torch.float32


def test_lse_is_left_out_unless_asked_for(device: torch.device) -> None:
    args = dense_inputs(Case("lse", S=9, T=9), device)
    out, _ = fused_kv_attn_func(*args, causal=True, return_lse=True)
    alone = fused_kv_attn_func(*args, causal=True)
    assert isinstance(alone, Tensor)
    assert_near(alone, out)


def test_lone_tensor_is_a_list_of_one(device: torch.device) -> None:
    q, (key,), (value,), _, _ = dense_inputs(Case("lone", m_k=1, m_v=1, weights="none"), device)
    assert_same_bits(fused_kv_attn_func(q, key, value), fused_kv_attn_func(q, [key], [value]))


def test_tuples_are_taken_like_lists(device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(Case("tuples"), device)
    expected = fused_kv_attn_func(q, keys, values, a, b)
    assert_same_bits(fused_kv_attn_func(q, tuple(keys), tuple(values), a, b), expected)


def test_weights_on_one_side_only(device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(Case("sides", S=9, T=9), device)
    for weights in ((a, None), (None, b)):
        assert_matches_oracle(fused_kv_attn_func, reference.fused_kv_attn_func, q, keys, values, *weights)


def test_one_hot_value_weight_at_a_single_key_returns_that_value_exactly(device: torch.device) -> None:
    q, keys, values, a, _ = dense_inputs(Case("one_hot", S=1, T=1, H=2, G=2, m_v=3, dtype=BF16), device)
    for chosen in range(3):
        weights = torch.zeros(3, 1, 1, device=device)
        weights[chosen] = 1
        assert torch.equal(fused_kv_attn_func(q, keys, values, a, weights), values[chosen])


def test_equals_attention_over_the_fused_tensors(device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(Case("fused", S=33, T=33, m_v=3), device)
    fused = fused_kv_attn_func(q, fuse_kv(keys, a), fuse_kv(values, b), causal=True)
    assert_near(fused_kv_attn_func(q, keys, values, a, b, causal=True), fused, rounding_steps=32)


@pytest.mark.parametrize("S", [1, 33], ids=["one_row", "many_rows"])
def test_doubling_value_weights_doubles_the_output_exactly(S: int, device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(Case("linear", S=S, T=40, m_v=3), device)
    once, twice = (fused_kv_attn_func(q, keys, values, a, factor * b, causal=True) for factor in (1, 2))
    assert_same_bits(twice, 2 * once)


@pytest.mark.parametrize("S", [1, 33], ids=["one_row", "many_rows"])
def test_scaling_key_weights_is_scaling_the_softmax(S: int, device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(Case("linear", S=S, T=40), device)
    by_weights = fused_kv_attn_func(q, keys, values, 0.5 * a, b, softmax_scale=0.25)
    assert_near(by_weights, fused_kv_attn_func(q, keys, values, a, b, softmax_scale=0.125))


def test_two_runs_have_the_same_bits(device: torch.device) -> None:
    args = dense_inputs(Case("repeat", S=70, T=70, dtype=BF16), device)
    first, second = (fused_kv_attn_func(*args, causal=True, return_lse=True) for _ in range(2))
    assert_same_bits(first, second)


def test_inputs_stay_untouched(device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(Case("untouched"), device)
    before = [x.clone() for x in (q, *keys, *values, a, b)]
    fused_kv_attn_func(q, keys, values, a, b, causal=True)
    assert all(torch.equal(x, y) for x, y in zip((q, *keys, *values, a, b), before, strict=True))


GRAD_CASES = [
    Case("causal", B=1, S=4, T=4, H=2, G=1, D=8),
    Case("not_causal_without_weights", B=2, S=3, T=5, H=2, G=2, D=8, causal=False, weights="none"),
    Case("unequal_counts_and_dims", B=1, S=3, T=4, H=2, G=1, D=8, Dv=16, m_k=3, m_v=1),
    Case("head_weights", B=1, S=3, T=4, H=2, G=2, D=8, weights="head", m_k=1, m_v=2),
    Case("window", B=1, S=4, T=6, H=2, G=1, D=8, window=(2, 1), causal=False),
    Case("one_row", B=1, S=1, T=6, H=2, G=1, D=8),
    Case("more_rows_than_keys", B=1, S=5, T=3, H=1, G=1, D=8),
]


@pytest.mark.parametrize(**named(GRAD_CASES))
def test_gradcheck_in_float64_for_every_input(case: Case) -> None:
    q, keys, values, a, b = dense_inputs(case, CPU)
    options = {**case.options, "return_lse": False}
    weights = [] if a is None else [a, b]
    inputs = [x.double().requires_grad_() for x in (q, *keys, *values, *weights)]

    def attention(q: Tensor, *rest: Tensor) -> Tensor:
        keys, rest = rest[: case.m_k], rest[case.m_k :]
        return fused_kv_attn_func(q, keys, rest[: case.m_v], *rest[case.m_v :], **options)

    # Fast mode checks the Jacobian along random directions instead of column by column.
    assert torch.autograd.gradcheck(attention, inputs, fast_mode=case.name != "causal")


GRAD_MATCH_CASES = [
    Case("float32", S=33, T=33, m_k=2, m_v=3),
    Case("bfloat16", S=33, T=33, dtype=BF16),
    Case("float16_grouped", S=20, T=33, H=8, G=2, dtype=FP16),
    Case("bfloat16_transposed_window", S=33, T=33, layout="transposed", window=(9, -1), dtype=BF16),
    Case("rows_without_keys", S=9, T=5, D=24),
    Case("values_narrower", S=17, T=17, D=40, Dv=24, causal=False),
]


@pytest.mark.parametrize(**named(GRAD_MATCH_CASES))
def test_gradients_match_oracle(case: Case, device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(case, device)
    options = {**case.options, "return_lse": False}
    out_grad = torch.randn(case.B, case.S, case.H, case.value_dim, device=device)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        weight_dtype = FP64 if dtype == FP64 else torch.float32
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, *keys, *values)]
        weights = [x.detach().to(weight_dtype).requires_grad_() for x in (a, b)]
        key_end = 1 + case.m_k
        out = function(tensors[0], tensors[1:key_end], tensors[key_end:], *weights, **options)
        return torch.autograd.grad(out, [*tensors, *weights], out_grad.to(dtype))

    exact = gradients(reference.fused_kv_attn_func, FP64)
    same_maths = gradients(reference.fused_kv_attn_func, case.dtype)
    got = gradients(fused_kv_attn_func, case.dtype)
    # Each gradient sums over the rows of a KV head's queries or, that of a weight, over all tokens.
    assert_close(got, exact, same_maths, "gradient", terms=case.terms * case.S * case.H // case.G)


def test_gradient_flows_to_a_single_input() -> None:
    q, keys, values, a, b = dense_inputs(Case("partial", S=9, T=9), CPU)
    for chosen in (q, keys[1], values[0], a, b):
        x = chosen.detach().requires_grad_()
        swapped = [x if y is chosen else y for y in (q, *keys, *values, a, b)]
        fused_kv_attn_func(swapped[0], swapped[1:3], swapped[3:5], *swapped[5:], causal=True).sum().backward()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_no_fused_tensor_outlives_the_forward_without_gradients() -> None:
    args = dense_inputs(Case("graph_free", S=9, T=9), CPU)
    assert not fused_kv_attn_func(*args, causal=True).requires_grad


def test_autocast_runs_in_the_lower_dtype(device: torch.device) -> None:
    q, keys, values, a, b = dense_inputs(Case("autocast", S=33, T=33), device)
    with torch.autocast(device.type, dtype=BF16):
        out = fused_kv_attn_func(q, keys, values, a, b, causal=True)
    lower = [[x.to(BF16) for x in group] for group in ([q], keys, values)]
    assert out.dtype == BF16
    assert_near(out, fused_kv_attn_func(lower[0][0], lower[1], lower[2], a, b, causal=True))


def test_fully_masked_rows_are_zero_with_lse_minus_infinity(device: torch.device) -> None:
    args = dense_inputs(Case("masked", S=8, T=5), device)
    out, lse = fused_kv_attn_func(*args, causal=True, return_lse=True)
    assert bool((out[:, :3] == 0).all()) and bool((lse[:, :, :3] == -math.inf).all())
    assert bool(torch.isfinite(lse[:, :, 3:]).all())
