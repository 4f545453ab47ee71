"""The log-sum-exp of dense attention has a gradient, and keeps no scores for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, dense_inputs, named
from test_attn_mask import mask_of
from test_scores import all_three, sinks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedkv_ext import fused_kv_attn_func, merge_state
from fusedkv_ext.ops import reference, scores, sdpa
from fusedkv_ext.testing import assert_close, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16, FP64 = torch.bfloat16, torch.float64

CASES = [
    Case("self_attention", S=40, T=40),
    Case("not_causal", S=40, T=40, causal=False),
    Case("rows_at_the_end_bfloat16", S=40, T=70, H=8, G=2, dtype=BF16),
    Case("window", S=40, T=53, window=(7, 2), causal=False),
    Case("more_rows_than_keys", S=40, T=9, H=3, G=3),
    Case("odd_head_dim", S=9, T=12, D=13),
    Case("few_rows", S=2, T=50),
    Case("no_keys", S=3, T=0),
    Case("negative_scale", S=9, T=9, scale=-0.3),
]


def documents(case: Case) -> dict[str, Any]:
    return {"document_ids": torch.arange(case.T).expand(case.B, case.T) // 7}


def boolean_mask(case: Case) -> dict[str, Any]:
    return {"attn_mask": mask_of(case, "HST", False, CPU)}


def additive_mask(case: Case) -> dict[str, Any]:
    return {"attn_mask": mask_of(case, "HST", True, CPU)}


def masked_scores(case: Case) -> dict[str, Any]:
    return {**all_three(case), **additive_mask(case)}


KINDS = [lambda case: {}, documents, boolean_mask, additive_mask, sinks, all_three, masked_scores]
IDS = ["plain", *(kind.__name__ for kind in KINDS[1:])]


def results(
    function: Callable[..., Any], case: Case, options: dict[str, Any], dtype: torch.dtype, **more: Any
):
    """out, lse, and all inputs that have a gradient, in ``dtype``; parameters in float32 or float64."""
    q, keys, values, a, b = dense_inputs(case, CPU)
    sums = FP64 if dtype == FP64 else torch.float32
    tensors = [x.to(dtype).detach().requires_grad_() for x in (q, *keys, *values)]
    named = {"key_weights": a, "value_weights": b, **options}
    floating = {k: x for k, x in named.items() if isinstance(x, Tensor) and x.is_floating_point()}
    for name, x in floating.items():
        own = dtype if name == "attn_mask" else sums
        named[name] = floating[name] = x.to(own).detach().requires_grad_()
    sides = tensors[1 : 1 + case.m_k], tensors[1 + case.m_k :]
    out, lse = function(tensors[0], *sides, **{**case.options, "return_lse": True}, **named, **more)
    return out, lse, [*tensors, *floating.values()]


def gradients(
    function: Callable[..., Any], case: Case, options: dict[str, Any], dtype: torch.dtype, **more: Any
) -> list[Tensor]:
    """Gradients of a loss that reads out and lse."""
    torch.manual_seed(3)
    out, lse, leaves = results(function, case, options, dtype, **more)
    torch.manual_seed(4)
    both = [(x, torch.randn(x.shape).to(x.dtype)) for x in (out, lse)]
    both = [(x, grad) for x, grad in both if x.requires_grad]  # the oracle's lse of no keys is a constant
    outputs, grads = zip(*both, strict=True)
    grads = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize(**named(CASES))
def test_gradients_match_oracle(case: Case, kind: Callable[[Case], dict[str, Any]]) -> None:
    if kind is documents and case.S > case.T:
        pytest.skip("documents have a token for every row")
    options = kind(case)
    exact = gradients(partial(reference.fused_kv_attn_func, dtype=FP64), case, options, FP64)
    same_maths = gradients(reference.fused_kv_attn_func, case, options, case.dtype)
    got = gradients(fused_kv_attn_func, case, options, case.dtype)
    assert_close(got, exact, same_maths, "gradient", terms=case.terms * max(case.S, 1) * case.H // case.G)


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "again"])
def test_known_values_and_computed_ones_have_one_gradient(
    flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[0]
    expected = gradients(fused_kv_attn_func, case, {}, torch.float32)
    monkeypatch.setattr(sdpa, "_takes_flash", lambda *args: flash)
    for x, y in zip(gradients(fused_kv_attn_func, case, {}, torch.float32), expected, strict=True):
        assert_near(x, y, 32)


def test_a_loss_without_lse_has_the_gradients_of_a_call_without_it() -> None:
    case = Case("unused", S=40, T=40, dtype=FP64)
    out, _, leaves = results(fused_kv_attn_func, case, {}, FP64)
    got = torch.autograd.grad(out.square().sum(), leaves)
    q, *rest = leaves
    alone = fused_kv_attn_func(q, rest[:2], rest[2:4], *rest[4:], causal=True)
    for x, y in zip(got, torch.autograd.grad(alone.square().sum(), leaves), strict=True):
        assert_near(x, y, 32)


def test_autograd_keeps_no_scores() -> None:
    case = Case("memory", B=1, S=300, T=300, H=2, G=1, D=8)
    saved: list[int] = []
    with saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        results(fused_kv_attn_func, case, {}, torch.float32)
    assert saved and max(saved) < case.S * case.T


def test_rows_in_chunks_have_the_gradients_of_all_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("chunks", S=70, T=90, window=(40, 3), causal=False, D=16)
    options = masked_scores(case)
    expected = gradients(fused_kv_attn_func, case, options, FP64)
    monkeypatch.setattr(scores, "_MOST_SCORES", 1)
    for x, y in zip(gradients(fused_kv_attn_func, case, options, FP64), expected, strict=True):
        assert_near(x, y, 32)


def test_recomputed_fusion_changes_no_bit() -> None:
    case = Case("recompute", S=40, T=40, dtype=BF16)
    once, again = (gradients(fused_kv_attn_func, case, {}, BF16, recompute_fusion=x) for x in (False, True))
    assert_same_bits(once, again)


def test_merged_states_have_the_gradients_of_attention_over_all_keys() -> None:
    """What training over a shared prefix needs: the merge reads lse, so lse must have a gradient."""
    case = Case("merged", S=12, T=40, causal=False, dtype=FP64, m_k=1, m_v=1, weights="none")
    q, (k,), (v,), *_ = dense_inputs(case, CPU)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    whole = fused_kv_attn_func(q, k, v)
    parts = [fused_kv_attn_func(q, k[:, i:j], v[:, i:j], return_lse=True) for i, j in ((0, 25), (25, 40))]
    merged, _ = merge_state(*parts[0], *parts[1])
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, leaves, grad)
    for x, y in zip(torch.autograd.grad(merged, leaves, grad), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # lse is float32


@pytest.mark.parametrize("kind", [KINDS[0], documents, additive_mask, all_three], ids=lambda x: x.__name__)
def test_one_graph_of_torch_compile_has_the_gradients(kind: Callable[[Case], dict[str, Any]]) -> None:
    case = Case("compiled", S=20, T=20, D=16)
    torch._dynamo.reset()
    options = kind(case)
    compiled = torch.compile(fused_kv_attn_func, fullgraph=True, backend="aot_eager")
    expected = gradients(fused_kv_attn_func, case, options, torch.float32)
    for x, y in zip(gradients(compiled, case, options, torch.float32), expected, strict=True):
        assert_near(x, y, 64)
