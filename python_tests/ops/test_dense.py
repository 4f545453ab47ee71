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
