"""fused_kv_attn_func under a boolean or additive mask of the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import Case, dense_inputs, named
from test_scores import SCORES, Scores, on
from torch import Tensor

from fusedkv_ext import fused_kv_attn_func
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_near

CPU = torch.device("cpu")
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
SHAPES = ["B1ST", "BHST", "11ST", "HST", "ST", "T", "1", "BH1T", "BHS1", "S1"]

CASES = [
    Case("full", S=9, T=20, causal=False),
    Case("one_row", S=1, T=20, causal=False),
    Case("causal", S=9, T=20),
    Case("square_causal", S=20, T=20),
    Case("window", S=9, T=20, window=(4, 1), causal=False),
    Case("more_rows_than_keys", S=9, T=5),
    Case("more_rows_than_keys_not_causal", S=9, T=5, causal=False),
    Case("bfloat16", S=9, T=20, dtype=BF16),
    Case("float16_values_wider", S=9, T=20, D=24, Dv=40, dtype=FP16),
    Case("head_dim_of_no_kernel", S=9, T=20, D=12),
    Case("scale_negative", S=9, T=20, scale=-0.3),
    Case("scale_zero", S=9, T=20, scale=0.0),
    Case("several_chunks", B=1, S=1100, T=1200, H=2, G=1, D=16),
    Case("transposed", S=9, T=20, layout="transposed"),
    Case("one_source_eight_query_heads", S=9, T=20, H=8, G=1, m_k=1, m_v=1, weights="none"),
]


def mask_of(case: Case, shape: str, additive: bool, device: torch.device) -> Tensor:
    """A random mask that hides a third of the keys, the whole of row 0 among them."""
    sizes = {"B": case.B, "H": case.H, "S": case.S, "T": case.T, "1": 1}
    size = [sizes[letter] for letter in shape]
    seen = torch.rand(size) < 0.67
    if "S" in shape and case.S > 1:
        seen.select(shape.index("S"), 0).fill_(False)
    if not additive:
        return seen.to(device)
    return torch.randn(size).mul_(3).masked_fill_(~seen, -math.inf).to(device, case.dtype)


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize(**named(CASES))
def test_matches_oracle(case: Case, additive: bool, device: torch.device) -> None:
    args = dense_inputs(case, device)
    mask = mask_of(case, "BHST", additive, device)
    out, lse = assert_matches_oracle(
        fused_kv_attn_func,
        reference.fused_kv_attn_func,
        *args,
        **case.options,
        attn_mask=mask,
        terms=case.terms,
    )
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    if case.S > 1:
        assert not out[:, 0].any() and bool((lse[:, :, 0] == -math.inf).all())


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_broadcasts_to_the_scores(shape: str, additive: bool, device: torch.device) -> None:
    case = Case("shapes", S=9, T=20)
    args = dense_inputs(case, device)
    mask = mask_of(case, shape, additive, device)
    op, oracle = fused_kv_attn_func, reference.fused_kv_attn_func
    assert_matches_oracle(op, oracle, *args, **case.options, attn_mask=mask)


def test_a_mask_is_combined_with_documents(device: torch.device) -> None:
    case = Case("documents", S=13, T=20)
    ids = torch.tensor([[0] * 7 + [1] * 8 + [0] * 5, [2] * 15 + [3] * 5]).to(device)
    for additive in (False, True):
        args, mask = dense_inputs(case, device), mask_of(case, "BHST", additive, device)
        op, oracle = fused_kv_attn_func, reference.fused_kv_attn_func
        assert_matches_oracle(op, oracle, *args, **case.options, document_ids=ids, attn_mask=mask)


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(**named([x for x in CASES if x.name not in ("full", "square_causal")]))
def test_a_mask_comes_after_soft_cap_and_slopes_and_before_sinks(
    case: Case, score: Scores, additive: bool, device: torch.device
) -> None:
    args = dense_inputs(case, device)
    options = {**case.options, **on(device, score(case)), "attn_mask": mask_of(case, "HST", additive, device)}
    op, oracle = fused_kv_attn_func, reference.fused_kv_attn_func
    out, lse = assert_matches_oracle(op, oracle, *args, **options, terms=case.terms)
    if case.S > 1:
        assert not out[:, 0].any() and bool((lse[:, :, 0] == -math.inf).all()) == ("sinks" not in options)


def test_a_causal_mask_is_causal_attention(device: torch.device) -> None:
    args = dense_inputs(Case("causal", S=20, T=20), device)
    mask = torch.ones(20, 20, dtype=torch.bool, device=device).tril()
    assert_near(fused_kv_attn_func(*args, attn_mask=mask), fused_kv_attn_func(*args, causal=True), 16)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(20).int(), TypeError, "attn_mask must be bool or .* got int32"),
        ([[True]], TypeError, "attn_mask must be a torch.Tensor, got list"),
        (
            torch.ones(1, 1, 1, 1, 1),
            ValueError,
            r"attn_mask must be .* to \(2, 4, 9, 20\) = \(B, H, S, T\), got",
        ),
        (torch.ones(2, 2, 1, 20), ValueError, r"attn_mask must be broadcastable .* got \(2, 2, 1, 20\)"),
        (torch.ones(9, 19), ValueError, r"attn_mask must be broadcastable .* got \(9, 19\)"),
        (torch.ones(20, device="meta"), ValueError, "attn_mask must be on cpu"),
    ],
)
def test_a_bad_mask_is_named(mask: object, error: type[Exception], message: str) -> None:
    args = dense_inputs(Case("bad", S=9, T=20), CPU)
    with pytest.raises(error, match=f"^{message}"):
        fused_kv_attn_func(*args, attn_mask=mask)


def test_no_keys_give_zeros(device: torch.device) -> None:
    q, keys = torch.randn(2, 3, 4, 16).to(device), torch.randn(2, 0, 2, 16).to(device)
    mask = torch.ones(3, 0, dtype=torch.bool, device=device)
    out, lse = fused_kv_attn_func(q.requires_grad_(), keys, keys, attn_mask=mask, return_lse=True)
    assert out.shape == q.shape and not out.any() and bool((lse == -math.inf).all())
    out.sum().backward()
    assert not q.grad.any()


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_gradients_match_oracle_with_rows_that_see_nothing(
    dtype: torch.dtype, additive: bool, device: torch.device
) -> None:
    case = Case("gradients", S=9, T=20, dtype=dtype)
    q, keys, values, a, b = dense_inputs(case, device)
    mask, grad = mask_of(case, "HST", additive, device), torch.randn(2, 9, 4, 64).to(device)

    def gradients(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, *keys, *values)]
        weights = [x.detach().to(FP64 if dtype == FP64 else torch.float32).requires_grad_() for x in (a, b)]
        own = mask.detach().to(dtype).requires_grad_() if additive else mask
        out = function(tensors[0], tensors[1:3], tensors[3:], *weights, causal=True, attn_mask=own)
        wanted = [*tensors, *weights, own] if additive else [*tensors, *weights]
        return torch.autograd.grad(out, wanted, grad.to(dtype))

    exact = gradients(partial(reference.fused_kv_attn_func, dtype=FP64), FP64)
    same_maths = gradients(reference.fused_kv_attn_func, dtype)
    # A gradient of a key sums over the rows, and that of a weight over the tokens too.
    assert_close(gradients(fused_kv_attn_func, dtype), exact, same_maths, terms=case.B * case.S)


def test_gradcheck_of_an_additive_mask() -> None:
    q, k = torch.randn(1, 3, 2, 4, dtype=FP64), torch.randn(1, 5, 1, 4, dtype=FP64)
    mask = torch.randn(2, 3, 5, dtype=FP64).masked_fill(torch.rand(2, 3, 5) < 0.2, -math.inf)
    finite = mask.isfinite()

    def attend(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.where(finite, bias, mask)
        return fused_kv_attn_func(q, k, k, attn_mask=own)

    bias = mask.masked_fill(~finite, 0)
    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, bias)])


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_one_graph_of_torch_compile_takes_a_mask(additive: bool) -> None:
    case = Case("compiled", S=9, T=20)
    args, mask = dense_inputs(case, CPU), mask_of(case, "HST", additive, CPU)
    expected = fused_kv_attn_func(*args, **case.options, attn_mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(fused_kv_attn_func, fullgraph=True, backend="aot_eager")
    for got, own in zip(compiled(*args, **case.options, attn_mask=mask), expected, strict=True):
        torch.testing.assert_close(got, own)


def test_recomputed_fusion_gives_the_same_gradients_under_a_mask() -> None:
    case = Case("recomputed", S=9, T=20)
    args, mask = dense_inputs(case, CPU), mask_of(case, "ST", True, CPU)
    grads = []
    for recompute in (False, True):
        q, keys, *rest = args
        keys = [x.detach().requires_grad_() for x in keys]
        out = fused_kv_attn_func(q, keys, *rest, attn_mask=mask, recompute_fusion=recompute)
        grads.append(torch.autograd.grad(out.sum(), keys))
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
