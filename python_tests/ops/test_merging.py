"""merge_state: attention over two parts of the keys is attention over all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkv_ext import fused_kv_attn_func, fused_kv_attn_varlen_func, merge_state
from fusedkv_ext.ops import merging, reference
from fusedkv_ext.ops.native import run_op
from fusedkv_ext.testing import assert_close, assert_near, assert_same_bits

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


def state(
    rows: int = 5, tokens: int = 11, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], list[Tensor], dict[str, Any]]:
    q = torch.randn(2, rows, 4, 32).to(dtype)
    keys, values = ([torch.randn(2, tokens, 2, 32).to(dtype) for _ in range(2)] for _ in range(2))
    weights = {"key_weights": torch.randn(2, 2, 32), "value_weights": torch.randn(2, 2, 32)}
    return q, keys, values, weights


@pytest.mark.parametrize("cut", [0, 1, 6, 11])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16, FP64])
def test_merged_parts_match_the_oracle_over_all_keys(cut: int, dtype: torch.dtype) -> None:
    """Any cut: a part without keys has lse = -inf."""
    q, keys, values, weights = state(dtype=dtype)

    def merged(attention: Any, **options: Any) -> tuple[Tensor, Tensor]:
        parts = []
        for part in (slice(0, cut), slice(cut, None)):
            sides = [[x[:, part] for x in side] for side in (keys, values)]
            parts += attention(q, *sides, **weights, return_lse=True, **options)
        return merge_state(*(parts[0], parts[1].float(), parts[2], parts[3].float()))

    exact = reference.fused_kv_attn_func(q, keys, values, **weights, return_lse=True, dtype=FP64)
    # The same in torch: the oracle's parts in the working dtype, merged.
    same_maths = merged(reference.fused_kv_attn_func)
    if dtype == FP64:  # lse is float32
        same_maths = same_maths[0].float(), same_maths[1]
        got = merged(fused_kv_attn_func)
        assert got[0].dtype == FP64 and got[1].dtype == torch.float32
        assert_close((got[0].float(), got[1]), exact, same_maths, terms=4)
        return
    assert_close(merged(fused_kv_attn_func), exact, same_maths, terms=4)


def test_a_shared_prefix_is_attended_once_for_all_sequences() -> None:
    """A cascade: all rows as one sequence over the prefix, each over the tokens of its own, merged."""
    q, keys, values, weights = state(rows=7, tokens=7)
    prefix = [[x[:1, :5] * 0.5 for x in side] for side in (keys, values)]
    shared = fused_kv_attn_func(q.flatten(0, 1)[None], *prefix, **weights, return_lse=True)
    out, lse = shared[0].unflatten(1, (2, 7))[0], shared[1].unflatten(2, (2, 7))[0].transpose(0, 1)
    own = fused_kv_attn_func(q, keys, values, **weights, causal=True, return_lse=True)
    got = merge_state(out, lse, *own)
    whole = [
        [torch.cat((part.expand(2, -1, -1, -1), x), dim=1) for part, x in zip(*sides, strict=True)]
        for sides in zip(prefix, (keys, values), strict=True)
    ]
    expected = fused_kv_attn_func(q, *whole, **weights, causal=True, return_lse=True)
    for x, y in zip(got, expected, strict=True):
        assert_near(x, y, rounding_steps=32)


def test_packed_states_merge_as_padded_ones() -> None:
    q, keys, values, weights = state()
    parts = [fused_kv_attn_func(q, keys, [x * k for x in values], **weights, return_lse=True) for k in (1, 2)]
    out, lse = merge_state(*parts[0], *parts[1])
    bounds = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 11, 22], dtype=torch.int32)
    pack = {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1], "max_seqlen_q": 5, "max_seqlen_k": 11}
    flat = [
        fused_kv_attn_varlen_func(
            q.flatten(0, 1),
            [x.flatten(0, 1) for x in keys],
            [x.flatten(0, 1) * k for x in values],
            **weights,
            **pack,
            return_lse=True,
        )
        for k in (1, 2)
    ]
    packed_out, packed_lse = merge_state(*flat[0], *flat[1])
    assert_near(packed_out.unflatten(0, (2, 5)), out, rounding_steps=32)
    assert_near(packed_lse.unflatten(1, (2, 5)).transpose(0, 1), lse, rounding_steps=32)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize(("states", "shape"), [(1, (2, 3, 4, 8)), (2, (1, 5, 6, 72)), (5, (3, 1, 7, 256))])
def test_the_native_operation_matches_torchs(
    states: int, shape: tuple[int, ...], dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of states, rows that are views, a state without keys, a row without any."""
    B, S, H, D = shape
    outs = [torch.randn(B, H, S, D + 3).to(dtype).transpose(1, 2)[..., :D] for _ in range(states)]
    lses = [3 * torch.randn(B, S, H).transpose(1, 2) for _ in range(states)]
    lses[0][0, 0], outs[0][0, :, 0] = -math.inf, math.nan
    for out, lse in zip(outs, lses, strict=True):
        lse[-1, -1, -1], out[-1, -1, -1] = -math.inf, math.nan
    got = run_op("merge_states", outs, lses)
    assert got[0].is_contiguous() and got[1].is_contiguous() and not got[0][-1, -1, -1].any()
    monkeypatch.setattr(merging, "_is_native", lambda *_: False)
    exact = merging.merge_states([x.double() for x in outs], lses)
    same_maths = merging.merge_states(outs, lses)
    held = exact[1].isfinite()
    assert bool((got[1][~held] == -math.inf).all())
    assert_close((got[0], got[1][held]), (exact[0], exact[1][held]), (same_maths[0], same_maths[1][held]))


def test_a_state_that_is_not_a_number_stays_one(kernels: str) -> None:
    states = random_states()
    states[1][1, 2, 0] = math.nan
    out, lse = merge_state(*states)
    assert bool(out[1, 0, 2].isnan().all()) and bool(lse[1, 2, 0].isnan())
    assert int(out.isnan().sum()) == 8 and int(lse.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([(2, 3, 4, 8)], [], ValueError, "lses must hold 1 tensors as outs, got 0"),
        ([(3, 4, 8)], [(4, 3)], ValueError, r"outs\[0\] must have 4 dims \(B, S, H, D\), got \(3, 4, 8\)"),
        ([(2, 3, 4, 9)], [(2, 4, 3)], ValueError, r"outs\[0\] must have a head dim that is a multiple of 8"),
        ([(2, 3, 4, 8), (2, 3, 4, 16)], [(2, 4, 3)] * 2, ValueError, r"outs\[1\] must have shape"),
        ([(2, 3, 4, 8)], [(2, 3, 4)], ValueError, r"lses\[0\] must have shape \(2, 4, 3\) as outs\[0\] says"),
    ],
)
def test_the_native_operation_names_what_is_wrong(
    outs: list[tuple[int, ...]],
    lses: list[tuple[int, ...]],
    error: type[Exception],
    message: str,
    backend: str,
) -> None:
    if backend == "cuda":
        pytest.skip("its tensors are on the CPU")
    with pytest.raises(error, match=message):
        run_op("merge_states", [torch.zeros(x) for x in outs], [torch.zeros(x) for x in lses])


def test_threads_change_no_bit(with_threads: Any) -> None:
    states = [
        torch.randn(2, 300, 8, 64),
        torch.randn(2, 8, 300),
        torch.randn(2, 300, 8, 64),
        torch.randn(2, 8, 300),
    ]
    with_threads(1)
    alone = merge_state(*states)
    with_threads(2)
    assert_same_bits(merge_state(*states), alone)


def random_states(*empty: tuple[int, int, int]) -> list[Tensor]:
    states = [torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3), torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3)]
    for b, h, s in empty:
        states[3][b, h, s] = -math.inf
        states[2][b, s, h] = math.nan
    return states


def test_an_empty_state_has_weight_zero_whatever_it_holds() -> None:
    states = random_states((1, 2, 0))
    for order in (states, [*states[2:], *states[:2]]):
        out, lse = merge_state(*order)
        assert torch.equal(out[1, 0, 2], states[0][1, 0, 2]) and lse[1, 2, 0] == states[1][1, 2, 0]
        assert bool(torch.isfinite(out).all())
    states[1][1, 2, 0] = -math.inf
    out, lse = merge_state(*states)
    assert not out[1, 0, 2].any() and lse[1, 2, 0] == -math.inf and int(lse.isinf().sum()) == 1


def test_the_order_of_the_states_changes_no_bit() -> None:
    states = random_states()
    assert_same_bits(merge_state(*states), merge_state(*states[2:], *states[:2]))


def test_large_scores_do_not_overflow() -> None:
    out_a, lse_a, out_b, lse_b = random_states()
    out, lse = merge_state(out_a, lse_a + 1e4, out_b, lse_b - 1e4)
    assert_same_bits(out, out_a)
    assert_same_bits(lse, lse_a + 1e4)


def test_gradcheck_through_both_states() -> None:
    """With a state that is empty and a row where both are: no gradient is NaN."""
    torch.manual_seed(2)
    states = random_states((1, 2, 0), (0, 0, 0))
    states[1][0, 0, 0] = -math.inf
    leaves = [x.double().nan_to_num(0.5, neginf=-math.inf) for x in (states[0], states[2])]
    lses = [states[1].requires_grad_(), states[3].requires_grad_()]

    def merge(out_a: Tensor, out_b: Tensor) -> Tensor:
        return merge_state(out_a, lses[0], out_b, lses[1])[0]

    assert torch.autograd.gradcheck(merge, [x.requires_grad_() for x in leaves])
    out, lse = merge_state(leaves[0], lses[0], leaves[1], lses[1])
    grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -math.inf, 0).sum(), lses)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads) and grads[0].abs().max() > 0.1
    # The derivative of lse is the weight; with out left out, both weights sum to 1 where a state has keys.
    _, lse = merge_state(leaves[0], lses[0], leaves[1], lses[1])
    grads = torch.autograd.grad(lse.masked_fill(lse == -math.inf, 0).sum(), lses)
    expected = torch.ones_like(lse)
    expected[0, 0, 0] = 0
    torch.testing.assert_close(grads[0] + grads[1], expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    states = random_states()
    compiled = torch.compile(merge_state, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*states), merge_state(*states), strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out_a": torch.zeros(2, 3)}, ValueError, r"out_a must be \(B, S, H, Dv\) or .* got \(2, 3\)"),
        ({"out_a": torch.zeros(2, 3, 4, 8).int()}, TypeError, "out_a must be float32, .* got torch.int32"),
        ({"out_b": torch.zeros(2, 3, 4, 9)}, ValueError, r"out_b must have shape \(2, 3, 4, 8\) as out_a"),
        ({"out_b": torch.zeros(2, 3, 4, 8).half()}, TypeError, "out_b must be torch.float32 as out_a"),
        ({"lse_a": torch.zeros(2, 3, 4)}, ValueError, r"lse_a must have shape \(2, 4, 3\) as out_a says"),
        ({"lse_b": torch.zeros(2, 4, 3).double()}, TypeError, "lse_b must be float32, got torch.float64"),
        ({"lse_b": None}, TypeError, "lse_b must be a torch.Tensor, got NoneType"),
        ({"lse_b": torch.zeros(2, 4, 3, device="meta")}, ValueError, "lse_b must be on cpu as out_a"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    states = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), random_states(), strict=True))
    with pytest.raises(error, match=message):
        merge_state(**{**states, **change})


def test_out_is_filled_and_may_be_the_first_state(device: torch.device) -> None:
    states = [(torch.randn(2, 3, 4, 8).to(device), torch.randn(2, 4, 3).to(device)) for _ in range(2)]
    (out_a, lse_a), second = states
    expected = merge_state(out_a, lse_a, *second)
    for out in (torch.full_like(out_a, math.nan), out_a):
        got, lse = merge_state(out_a, lse_a, *second, out=out)
        assert got is out and torch.equal(got, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 7), ValueError, r"out must have shape \(2, 3, 4, 8\)"),
        (torch.zeros(2, 3, 4, 8).double(), TypeError, "out must be float32"),
        (torch.zeros(2, 3, 4, 8, requires_grad=True), ValueError, "out must not require grad"),
        ([0], TypeError, "out must be a torch.Tensor"),
    ],
)
def test_a_bad_out_is_refused(out: object, error: type[Exception], message: str) -> None:
    state = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3)
    with pytest.raises(error, match=f"^{message}"):
        merge_state(*state, *state, out=out)


def test_out_is_refused_where_a_gradient_is_needed() -> None:
    state = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"lse_a must not require grad, .* leave out away"):
        merge_state(*state, *state, out=torch.zeros(2, 3, 4, 8))
    with torch.no_grad():
        merge_state(*state, *state, out=torch.zeros(2, 3, 4, 8))
