"""Dense attention: what it asks of torch's SDPA on a GPU gives the same results, here on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, dense_inputs, named
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from fusedkv_ext import fused_kv_attn_func
from fusedkv_ext.ops import reference
from fusedkv_ext.ops import sdpa as dense
from fusedkv_ext.testing import assert_matches_oracle, assert_near

CPU = torch.device("cpu")
BF16 = torch.bfloat16

CASES = [
    Case("last_rows", S=40, T=70),
    Case("last_rows_bfloat16", S=40, T=70, dtype=BF16),
    Case("all_rows", S=40, T=40),
    Case("more_rows_than_keys", S=40, T=30),
    Case("window", S=40, T=70, window=(9, -1)),
    Case("not_causal", S=40, T=70, causal=False),
    Case("no_groups", S=40, T=70, H=2, G=2),
    Case("values_narrower", S=40, T=70, Dv=24),
]


@pytest.fixture
def sdpa(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The keyword arguments of SDPA's calls from dense.py, with "key" added."""
    calls: list[dict] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        calls.append({**options, "key": k})
        return F.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(dense, "F", type("F", (), {"scaled_dot_product_attention": staticmethod(recorded)}))
    return calls


# torch says there why none of its fused kernels takes CPU tensors, and materialises the mask.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(**named(CASES))
def test_lower_right_masks_without_a_tensor(
    case: Case, sdpa: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_masks_lower_right", lambda *tensors: True)
    args = dense_inputs(case, CPU)
    options = {**case.options, "return_lse": False}
    assert_matches_oracle(
        fused_kv_attn_func, reference.fused_kv_attn_func, *args, **options, terms=case.terms
    )
    masks = {type(call["attn_mask"]) for call in sdpa}
    expected = type(None)
    if case.window != (-1, -1):
        expected = Tensor
    elif case.causal and case.S < case.T:
        expected = CausalBias
    assert masks == {expected}


@pytest.mark.parametrize(**named(CASES))
def test_expanded_heads_change_nothing(case: Case, sdpa: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    args = dense_inputs(case, CPU)
    options = {**case.options, "return_lse": False}
    grouped = fused_kv_attn_func(*args, **options)
    assert sdpa[0]["enable_gqa"] == (case.H != case.G) and sdpa[0]["key"].shape[1] == case.G
    monkeypatch.setattr(dense, "_reads_groups", lambda *tensors: False)
    sdpa.clear()
    assert_near(fused_kv_attn_func(*args, **options), grouped)
    assert not sdpa[0]["enable_gqa"] and sdpa[0]["key"].shape[1] == case.H


def test_groups_are_read_where_a_kernel_does() -> None:
    """On CUDA: FlashAttention and cuDNN, in 16 bits and without a mask tensor."""

    class Shaped:  # what the rule looks at
        def __init__(self, device: str, dtype: torch.dtype, dim: int) -> None:
            self.device, self.dtype, self.shape = torch.device(device), dtype, (2, 4, 9, dim)

    for device, dtype, value_dim, masked, reads in (
        ("cpu", torch.float32, 24, True, True),
        ("cuda", BF16, 64, False, True),
        ("cuda", torch.float16, 64, False, True),
        ("cuda", BF16, 64, True, False),
        ("cuda", BF16, 24, False, False),
        ("cuda", torch.float32, 64, False, False),
    ):
        q, v = Shaped(device, dtype, 64), Shaped(device, dtype, value_dim)
        assert dense._reads_groups(q, v, masked) == reads


# The log-sum-exp

LSE_CASES = [
    *CASES,
    Case("bfloat16_window", S=40, T=70, window=(9, 3), causal=False, dtype=BF16),
    Case("float16", S=40, T=70, dtype=torch.float16),
    Case("float64", S=40, T=40, dtype=torch.float64),
    Case("negative_scale", S=40, T=40, scale=-0.3),
    Case("zero_scale", S=40, T=70, scale=0.0),
    Case("chunks_window", B=1, S=600, T=1100, H=2, G=1, D=16, window=(70, -1)),
    Case("odd_head_dim", S=40, T=70, D=13),
    Case("large_scores", S=40, T=70, magnitude=100.0),
    Case("transposed", S=40, T=70, layout="transposed"),
    Case("no_keys", S=40, T=0),
    Case("no_rows", S=0, T=40),
]


@pytest.fixture(params=["flash", "again"])
def lse_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How lse was computed, call by call: the flash kernel's own, or by computing the scores again."""
    ways: list[str] = []
    lse = dense.log_sum_exp

    def log_sum_exp(call: dense.AttentionCall, known: Tensor | None = None) -> Tensor:
        ways.append("again" if known is None else "flash")
        return lse(call, known)

    monkeypatch.setattr(dense, "log_sum_exp", log_sum_exp)
    if request.param == "again":
        monkeypatch.setattr(dense, "_takes_flash", lambda *args: False)
    return ways


@pytest.mark.parametrize(**named(LSE_CASES))
def test_lse_matches_oracle_either_way(case: Case, lse_way: list[str]) -> None:
    args = [
        x.requires_grad_() if isinstance(x, Tensor) else x for x in dense_inputs(case, CPU)
    ]  # with a gradient no call folds
    out, lse = assert_matches_oracle(
        fused_kv_attn_func, reference.fused_kv_attn_func, *args, **case.options, terms=case.terms
    )
    assert out.requires_grad and lse.requires_grad and lse.dtype == torch.float32 and lse.is_contiguous()
    assert len(set(lse_way)) == 1


def test_the_flash_kernel_gives_lse_without_a_second_attention(lse_way: list[str]) -> None:
    forced = dense._takes_flash.__name__ == "<lambda>"
    for case in (CASES[0], CASES[1], CASES[2], CASES[4], CASES[6]):
        dense.sdpa_attention_lse(_call(case))
    assert set(lse_way) == {"again" if forced else "flash"}
    lse_way.clear()
    dense.sdpa_attention_lse(_call(Case("values_narrower", S=40, T=40, Dv=24)))  # the kernel has one head dim
    assert lse_way == ["again"]


def _call(case: Case) -> dense.AttentionCall:
    q, keys, values, *_ = dense_inputs(case, CPU)
    left, right = case.window[0], 0 if case.causal else case.window[1]
    options = (None, None, None, None, case.D**-0.5, left, right)
    return dense.AttentionCall(q, keys[:1], values[:1], *options, return_lse=True)


def test_gradients_with_lse_are_those_without() -> None:
    q, keys, values, a, b = dense_inputs(Case("grad", S=40, T=70, dtype=torch.float64), CPU)
    leaves = [x.requires_grad_() for x in (q, *keys, *values)]
    outs = [fused_kv_attn_func(q, keys, values, a, b, causal=True, return_lse=x) for x in (False, True)]
    grad = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, leaves, grad) for out in (outs[0], outs[1][0])]
    for x, y in zip(*grads, strict=True):
        assert_near(x, y, rounding_steps=32)


@pytest.mark.parametrize("causal", [True, False])
def test_the_flash_kernel_of_cuda_takes_our_arguments(causal: bool) -> None:
    """By its kernel for meta tensors."""
    q, k, v = (torch.empty(2, heads, 40, 64, dtype=BF16, device="meta") for heads in (4, 2, 2))
    out, lse = dense._flash(q, k, v, None, causal, 0.125)
    assert out.shape == q.shape and lse.shape == (2, 4, 40) and lse.dtype == torch.float32
