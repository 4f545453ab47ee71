"""Dense attention with a soft cap, sinks or ALiBi: results, gradients, and what autograd keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import Case, dense_inputs, named
from test_scores import LARGE, SCORES, Scores, all_three, sinks, slopes, slopes_per_sequence, softcap
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fusedkv_ext import fused_kv_attn_func
from fusedkv_ext.ops import reference, scores
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16, FP64 = torch.bfloat16, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

CASES = [
    Case("one_row", S=1, T=65),
    Case("few_rows_bfloat16", S=5, T=70, dtype=BF16),
    Case("self_attention", S=40, T=40),
    Case("self_attention_not_causal", S=40, T=40, causal=False),
    Case("many_rows_at_the_end_bfloat16", S=40, T=70, H=8, G=2, dtype=BF16),
    Case("window", S=40, T=53, window=(7, 2), causal=False),
    Case("window_in_chunks", B=1, S=1100, T=1300, H=2, G=1, D=16, window=(70, -1)),
    Case("more_rows_than_keys", S=40, T=9, H=3, G=3),
    Case("more_rows_than_keys_not_causal", S=40, T=9, causal=False, window=(-1, 3)),
    Case("float64", S=9, T=12, D=24, Dv=8, dtype=FP64),
    Case("no_keys", S=3, T=0),
    Case("no_rows", S=0, T=3),
    Case("empty_batch", B=0),
    Case("other_head_dims", S=9, T=12, D=20, Dv=12),
    Case("negative_scale", S=40, T=40, scale=-0.3),
    Case("zero_scale", S=40, T=40, scale=0.0),
    *(Case(**{**vars(case), "name": f"large_{case.name}", "S": 40, "lengths": None}) for case in LARGE),
]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(**named(CASES))
def test_matches_oracle(case: Case, score: Scores) -> None:
    args = dense_inputs(case, CPU)
    oracle = reference.fused_kv_attn_func
    options = {**case.options, **score(case)}
    out, lse = assert_matches_oracle(fused_kv_attn_func, oracle, *args, **options, terms=case.terms)
    assert out.dtype == case.dtype and lse.dtype == torch.float32


@pytest.mark.parametrize("sink", [-300.0, -30.0, 30.0, 300.0])
def test_sinks_far_from_all_scores(sink: float) -> None:
    for case in (CASES[2], CASES[4], CASES[7]):
        values = torch.full((case.H,), sink)
        options = {**case.options, "sinks": values}
        terms = case.terms + sink**2 / 4  # e^(s - sink) has the rounding of s - sink
        args, oracle = dense_inputs(case, CPU), reference.fused_kv_attn_func
        out, lse = assert_matches_oracle(fused_kv_attn_func, oracle, *args, **options, terms=terms)
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


def test_fully_masked_rows_give_zeros_and_their_sink() -> None:
    args, values = dense_inputs(Case("masked", S=40, T=9), CPU), torch.randn(4)
    out, lse = fused_kv_attn_func(*args, causal=True, return_lse=True, sinks=values)
    assert bool((out[:, :31] == 0).all())
    assert torch.equal(lse[:, :, :31], values[:, None].expand(2, 4, 31))


def arguments(case: Case, options: dict[str, object]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """All differentiable inputs of a call, and the call as a function of them, of any implementation."""
    q, keys, values, a, b = dense_inputs(case, CPU)
    extra = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    rest = {**case.options, "return_lse": False, **{k: x for k, x in options.items() if k not in extra}}

    def attention(function: Callable[..., Tensor], q: Tensor, *others: Tensor, **more: object) -> Tensor:
        keys, others = others[: case.m_k], others[case.m_k :]
        values, others = others[: case.m_v], others[case.m_v :]
        named = dict(zip(extra, others[2:], strict=True))
        return function(q, keys, values, *others[:2], **rest, **named, **more)

    return [q, *keys, *values, a, b, *extra.values()], attention


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    **named(
        [
            Case("causal", B=2, S=4, T=4, H=2, G=1, D=8),
            Case("window", B=2, S=4, T=6, H=2, G=2, D=8, window=(2, 1), causal=False),
            Case("more_rows_than_keys", B=1, S=5, T=3, H=2, G=1, D=8),
        ]
    )
)
def test_gradcheck_in_float64_for_every_input(case: Case, score: Scores) -> None:
    inputs, attention = arguments(case, score(case))
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        partial(attention, fused_kv_attn_func), leaves, check_forward_ad=True, fast_mode=True
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("case", [CASES[i] for i in (2, 4, 5, 7, 13)], ids=str)
def test_gradients_match_oracle(case: Case, score: Scores) -> None:
    inputs, attention = arguments(case, score(case))
    out_grad = torch.randn(case.B, case.S, case.H, case.value_dim)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        parameter = FP64 if dtype == FP64 else torch.float32  # of weights, sinks and slopes
        tensors = 1 + case.m_k + case.m_v
        leaves = [x.to(dtype) if i < tensors else x.to(parameter) for i, x in enumerate(inputs)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        return torch.autograd.grad(attention(function, *leaves), leaves, out_grad.to(dtype))

    exact = gradients(reference.fused_kv_attn_func, FP64)
    same_maths = gradients(reference.fused_kv_attn_func, case.dtype)
    got = gradients(fused_kv_attn_func, case.dtype)
    assert_close(got, exact, same_maths, "gradient", terms=case.terms * case.S * case.H // case.G)


def test_rows_in_chunks_have_the_gradients_of_all_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("chunks", S=70, T=90, window=(40, 3), causal=False, D=16)
    inputs, attention = arguments(case, all_three(case))
    leaves = [x.double().requires_grad_() for x in inputs]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(fused_kv_attn_func, *leaves).square().sum(), leaves)

    expected = gradients()
    monkeypatch.setattr(scores, "_MOST_SCORES", 1)  # 16 rows at a time
    for got, together in zip(gradients(), expected, strict=True):
        assert_near(got, together, 32)


def test_autograd_saves_no_scores() -> None:
    """Nothing with an element per row and token: S x T is far more than any input has."""
    case = Case("memory", B=1, S=300, T=300, H=2, G=1, D=8)
    inputs, attention = arguments(case, all_three(case))
    leaves = [x.requires_grad_() for x in inputs]
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        attention(fused_kv_attn_func, *leaves)
    assert saved and max(saved) <= case.S * case.H * case.D < case.S * case.T


@pytest.mark.parametrize("score", [softcap, all_three])
def test_recompute_fusion_keeps_nothing_fused_and_changes_no_bit(
    score: Scores, fused: list[StorageWeakRef]
) -> None:
    case = Case("recompute", S=40, T=40, dtype=BF16)
    inputs, attention = arguments(case, score(case))
    leaves = [x.requires_grad_() for x in inputs]

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        fused.clear()
        out = attention(fused_kv_attn_func, *leaves, recompute_fusion=recompute)
        assert sum(not x.expired() for x in fused) == (0 if recompute else 2)
        return torch.autograd.grad(out.float().square().sum(), leaves)

    assert_same_bits(gradients(True), gradients(False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    case = Case("checkpoint", S=40, T=40)
    inputs, attention = arguments(case, all_three(case))
    leaves = [x.requires_grad_() for x in inputs]
    function = partial(attention, fused_kv_attn_func)
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    out.square().sum().backward()
    assert_same_bits([x.grad for x in leaves], expected)


@pytest.mark.parametrize("score", SCORES)
def test_forward_mode_equals_reverse_mode(score: Scores) -> None:
    case = Case("jvp", S=9, T=9, D=8, dtype=FP64)
    inputs, attention = arguments(case, score(case))
    inputs = [x.double() for x in inputs]
    tangents = [torch.randn_like(x) for x in inputs]
    function = partial(attention, fused_kv_attn_func)
    out, tangent = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    grad = torch.randn_like(out)
    _, pullback = torch.func.vjp(function, *inputs)
    together = sum((x * y).sum() for x, y in zip(pullback(grad), tangents, strict=True))
    torch.testing.assert_close((tangent * grad).sum(), together)


def test_a_second_derivative_is_refused() -> None:
    case = Case("twice", S=9, T=9, D=8)
    inputs, attention = arguments(case, softcap(case))
    leaves = [x.requires_grad_() for x in inputs]
    (first,) = torch.autograd.grad(
        attention(fused_kv_attn_func, *leaves).square().sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("score", [softcap, sinks, slopes, slopes_per_sequence, all_three])
@pytest.mark.parametrize("runs", [True, False])
def test_packed_documents_are_those_of_separate_calls(score: Scores, runs: bool) -> None:
    """Runs of tokens are computed one by one; with ids that return the documents are masked."""
    case = Case("documents", B=2, S=12, T=12)
    q, keys, values, a, b = dense_inputs(case, CPU)
    options = score(case)
    ids = torch.tensor([0] * 5 + [1] * 7 if runs else [0, 1] * 6).expand(2, 12)
    out = fused_kv_attn_func(q, keys, values, a, b, causal=True, document_ids=ids, **options)
    if not runs:  # the distances between tokens of a document count the tokens between
        if "alibi_slopes" in options:
            options["alibi_slopes"] = 2 * options["alibi_slopes"]
    for document in (0, 1):
        at = (ids[0] == document).nonzero()[:, 0]
        parts = [[x[:, at] for x in side] for side in ([q], keys, values)]
        alone = fused_kv_attn_func(parts[0][0], *parts[1:], a, b, causal=True, **options)
        assert_near(out[:, at], alone, 32)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("S", [3, 40], ids=["few_rows", "many_rows"])
def test_compiles_into_one_graph(S: int, score: Scores) -> None:
    torch._dynamo.reset()
    case = Case("compile", S=S, T=48, D=16)
    args, options = dense_inputs(case, CPU), {**case.options, **score(case)}
    compiled = torch.compile(fused_kv_attn_func, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*args, **options), fused_kv_attn_func(*args, **options), strict=True):
        assert_near(got, expected, 4)


def test_one_graph_serves_every_length_and_has_the_gradients() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return fused_kv_attn_func(q, k, v, causal=True, sinks=sink, softcap=3.0).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for T in (40, 48, 130):
        q, (k,), (v,), *_ = dense_inputs(Case("length", S=T, T=T, D=16, m_k=1, m_v=1), CPU)
        leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4))]
        got = torch.autograd.grad(compiled(*leaves), leaves)
        for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert_near(x, y, 32)
    assert counter.frame_count == 1


def test_autocast_computes_scores_in_float32() -> None:
    case = Case("autocast", S=40, T=40)
    q, keys, values, a, b = dense_inputs(case, CPU)
    options = {"causal": True, "return_lse": True, **all_three(case)}
    with torch.autocast("cpu", dtype=BF16):
        out, lse = fused_kv_attn_func(q, keys, values, a, b, **options)
    lower = [[x.to(BF16) for x in side] for side in ([q], keys, values)]
    expected = fused_kv_attn_func(lower[0][0], *lower[1:], a, b, **options)
    assert out.dtype == BF16
    assert_same_bits((out, lse), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sink_of_no_weight_has_no_gradient_where_a_row_sees_nothing(compiled: bool) -> None:
    args = dense_inputs(Case("blind", S=3, T=5), CPU)
    sinks = torch.tensor([-math.inf, 0.5, -math.inf, 1.0], requires_grad=True)
    mask = torch.rand(3, 5) < 0.7
    mask[1] = False
    torch._dynamo.reset()
    attend = torch.compile(fused_kv_attn_func, backend="aot_eager") if compiled else fused_kv_attn_func
    out, lse = attend(*args, attn_mask=mask, sinks=sinks, return_lse=True)
    assert not out[:, 1].any() and torch.equal(lse[0, :, 1], sinks)
    (grad,) = torch.autograd.grad(out.square().sum(), sinks)
    assert bool(grad.isfinite().all()) and not grad[[0, 2]].any() and bool(grad[[1, 3]].all())


def test_a_backward_under_autocast_has_the_gradients_of_one_outside() -> None:
    case = Case("autocast", S=64, T=64)
    inputs, _ = arguments(case, {})
    q, *rest = [x.requires_grad_() for x in inputs[:5]]
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=BF16):
            out, lse = fused_kv_attn_func(
                q, rest[:2], rest[2:], causal=True, sinks=torch.zeros(4), softmax_scale=4.0, return_lse=True
            )
            plain = fused_kv_attn_func(q, rest[:2], rest[2:], softmax_scale=4.0, return_lse=True)[1]
            loss = out.float().square().sum() + lse.sum() + plain.sum()
        with torch.autocast("cpu", dtype=BF16, enabled=inside):
            grads.append(torch.autograd.grad(loss, [q, *rest]))
    assert_same_bits(*grads)


def test_parameters_of_other_dtypes_get_gradients_of_their_own() -> None:
    q, keys, values, a, b = dense_inputs(Case("dtypes", S=40, T=40, dtype=BF16), CPU)
    sink = torch.randn(4, dtype=BF16, requires_grad=True)
    fused_kv_attn_func(q, keys, values, a, b, causal=True, sinks=sink).sum().backward()
    assert sink.grad is not None and sink.grad.dtype == BF16 and float(sink.grad.abs().max()) > 0


def test_a_return_of_lse_refuses_a_tangent_of_sinks() -> None:
    args = dense_inputs(Case("tangent", S=9, T=9), CPU)

    def lse(sink: Tensor) -> Tensor:
        return fused_kv_attn_func(*args, return_lse=True, sinks=sink)[1]

    with pytest.raises(ValueError, match="sinks must not have a forward-mode tangent"):
        torch.func.jvp(lse, (torch.zeros(4),), (torch.ones(4),))


def test_alibi_is_the_distance_to_the_diagonal_at_the_bottom_right() -> None:
    """Equal products: what is left of the scores is the bias alone."""
    q, k = torch.zeros(1, 40, 1, 8), torch.zeros(1, 70, 1, 8)
    _, lse = fused_kv_attn_func(q, k, k, causal=True, return_lse=True, alibi_slopes=torch.tensor([0.5]))
    for row in (0, 17, 39):
        expected = math.log(sum(math.exp(-0.5 * distance) for distance in range(row + 31)))
        assert abs(float(lse[0, 0, row]) - expected) < 1e-5
