"""fuse_kv: the weighted sum of m sources, of keys and values at once, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import random_tensor, to_device
from torch import Tensor

from fusedkv_ext import fuse_kv, fuse_kv_backward
from fusedkv_ext.ops import native, reference
from fusedkv_ext.ops.fuse import fuse_pair
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_same_bits

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One fuse_kv call; ``weights``: shape of the weights, None for the full (m, G, D)."""

    name: str
    m: int = 2
    B: int = 2
    T: int = 19
    G: int = 2
    D: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    weights: tuple[int, ...] | None = None
    weight_dtype: torch.dtype = torch.float32
    magnitude: float = 1.0

    def inputs(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        shape = (self.B, self.T, self.G, self.D)
        sources = [self.magnitude * random_tensor(shape, self.dtype, self.layout) for _ in range(self.m)]
        weights = torch.randn((self.m, self.G, self.D) if self.weights is None else self.weights)
        return to_device((sources, weights.to(self.weight_dtype)), device)


CASES = [
    Case("one_source", m=1),
    Case("two_sources"),
    Case("three_sources", m=3),
    Case("four_sources", m=4, dtype=torch.bfloat16),
    Case("five_sources", m=5, dtype=torch.bfloat16),
    Case("eight_sources", m=8, T=7),
    Case("thirty_two_sources", m=32, T=5, D=32),
    Case("one_token", B=1, T=1),
    Case("one_head", G=1, D=128),
    Case("many_heads", G=16, D=24, T=3),
    Case("D8", D=8, G=1),
    Case("D16", D=16),
    Case("D24", D=24),
    Case("D40_bfloat16", D=40, dtype=torch.bfloat16),
    Case("D72_float16", D=72, dtype=torch.float16),
    Case("D128_bfloat16_three_sources", m=3, D=128, dtype=torch.bfloat16),
    Case("D200", D=200, T=5),
    Case("D256_float16", D=256, T=5, dtype=torch.float16),
    Case("float64", dtype=torch.float64, weight_dtype=torch.float64, m=3),
    Case("bfloat16_weights", dtype=torch.bfloat16, weight_dtype=torch.bfloat16),
    Case("float64_weights_of_float32_sources", weight_dtype=torch.float64),
    Case("float16_weights_of_float32_sources", weight_dtype=torch.float16),
    Case("transposed_sources", layout="transposed", dtype=torch.bfloat16),
    Case("unaligned_sources", layout="sliced", D=72, m=3),
    Case("unaligned_bfloat16_sources", layout="sliced", dtype=torch.bfloat16),
    Case("every_other_token", layout="every_other", dtype=torch.float16),
    Case("sources_of_batch_stride_zero", layout="one_batch", B=3),
    Case("weight_without_dims", weights=()),
    Case("weight_per_source", weights=(2, 1, 1)),
    Case("weight_per_head", weights=(2, 2, 1)),
    Case("weight_per_channel_shared_by_heads", weights=(2, 1, 64)),
    Case("weight_per_channel_shared_by_sources", weights=(64,)),
    Case("weight_per_head_shared_by_sources", weights=(2, 1), m=3),
    Case("large_values", magnitude=1e4, m=3),
    Case("float16_overflow_is_infinite", magnitude=6e4, dtype=torch.float16, m=2, T=3),
    Case("bfloat16_tiny_values", magnitude=1e-30, dtype=torch.bfloat16),
    Case("long", B=1, T=4097, G=1, D=16, m=2),
    Case("empty_batch", B=0),
    Case("no_tokens", T=0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_oracle(case: Case, device: torch.device) -> None:
    assert_matches_oracle(fuse_kv, reference.fuse_kv, *case.inputs(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accumulates_in_float32_and_rounds_once(dtype: torch.dtype, device: torch.device) -> None:
    sources, weights = Case("many", m=32, T=5, dtype=dtype).inputs(device)
    exact = reference.fuse_kv(sources, weights, dtype=torch.float64)
    error = (fuse_kv(sources, weights).double() - exact).abs()
    half_a_step = torch.finfo(dtype).eps / 2 * exact.abs()
    accumulation = 32 * torch.finfo(torch.float32).eps * sum(s.double().abs().max() for s in sources) * 4
    assert bool((error <= half_a_step + accumulation).all())


@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_one_hot_weight_returns_that_source_exactly(m: int, device: torch.device) -> None:
    sources, _ = Case("one_hot", m=m, dtype=torch.bfloat16, layout="transposed").inputs(device)
    for chosen in range(m):
        weights = torch.zeros(m, 1, 1, device=device)
        weights[chosen] = 1
        assert torch.equal(fuse_kv(sources, weights), sources[chosen])


def test_doubling_the_weights_doubles_the_result_exactly(device: torch.device) -> None:
    sources, weights = Case("linear", m=3).inputs(device)
    assert_same_bits(fuse_kv(sources, 2 * weights), 2 * fuse_kv(sources, weights))


def test_broadcast_and_expanded_weights_give_the_same_bits(device: torch.device) -> None:
    for shape in [(), (64,), (2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 64)]:
        sources, weights = Case("broadcast", m=3, weights=shape).inputs(device)
        assert_same_bits(fuse_kv(sources, weights), fuse_kv(sources, weights.expand(3, 2, 64).contiguous()))


def test_nan_and_infinity_pass_through_where_they_are(device: torch.device) -> None:
    sources, weights = Case("specials", m=2, T=4).inputs(device)
    weights = weights.abs() + 0.1
    sources[0][0, 1, 0, 3], sources[1][1, 2, 1, 5] = float("nan"), float("inf")
    out = fuse_kv(sources, weights)
    assert bool(out[0, 1, 0, 3].isnan()) and bool(out[1, 2, 1, 5].isposinf())
    assert int((~torch.isfinite(out)).sum()) == 2
    weights[1, 1, 7] = float("nan")
    assert bool(fuse_kv(sources, weights)[:, :, 1, 7].isnan().all())


def test_inputs_stay_untouched_and_output_is_fresh(device: torch.device) -> None:
    sources, _ = Case("fresh", m=1).inputs(device)
    before = sources[0].clone()
    out = fuse_kv(sources, torch.ones(1, 1, 1, device=device))
    out.zero_()
    assert torch.equal(sources[0], before)


def test_the_same_tensor_may_be_several_sources(device: torch.device) -> None:
    (source, _), weights = Case("alias").inputs(device)
    assert_matches_oracle(fuse_kv, reference.fuse_kv, [source, source], weights)


GRAD_CASES = [
    Case("one_source", m=1, B=1, T=3, G=1, D=8),
    Case("three_sources_per_channel", m=3, B=2, T=2, G=2, D=8),
    Case("weight_per_head", B=2, T=3, G=2, D=8, weights=(2, 2, 1)),
    Case("weight_per_source", B=2, T=3, G=2, D=8, weights=(2, 1, 1)),
    Case("weight_without_dims", B=1, T=3, G=2, D=8, weights=()),
    Case("shared_channel", B=1, T=3, G=2, D=8, weights=(8,)),
]


@pytest.mark.parametrize("case", GRAD_CASES, ids=lambda case: case.name)
def test_gradcheck_in_float64(case: Case) -> None:
    sources, weights = case.inputs(CPU)
    inputs = [x.double().requires_grad_() for x in (*sources, weights)]
    assert torch.autograd.gradcheck(lambda *x: fuse_kv(x[:-1], x[-1]), inputs)


@pytest.mark.parametrize("wanted", ["all", "sources", "weights"])
def test_gradgradcheck_in_float64(wanted: str, device: torch.device) -> None:
    """Gradients of gradients, as penalties on gradients need them."""
    sources = [torch.randn(1, 3, 2, 8, dtype=torch.float64, device=device) for _ in range(2)]
    weights = torch.randn(2, 2, 8, dtype=torch.float64, device=device)
    for x in sources if wanted != "weights" else []:
        x.requires_grad_()
    weights.requires_grad_(wanted != "sources")
    assert torch.autograd.gradgradcheck(lambda *x: fuse_kv(x[:-1], x[-1]), (*sources, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_gradients_match_oracle(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    case = Case("grad", m=3, B=2, T=65, G=2, D=40, dtype=dtype, layout=layout)
    sources, weights = case.inputs(device)
    out_grad = torch.randn(case.B, case.T, case.G, case.D, device=device).to(dtype)

    def gradients(
        function: Callable[..., Tensor], dtype: torch.dtype, **kwargs: object
    ) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in sources]
        weight = (
            weights.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        )
        out = function(inputs, weight, **kwargs)
        return torch.autograd.grad(out, [*inputs, weight], out_grad.to(out.dtype))

    got = gradients(fuse_kv, dtype)
    assert [x.dtype for x in got] == [dtype] * 3 + [torch.float32]
    exact, same_maths = gradients(reference.fuse_kv, torch.float64), gradients(reference.fuse_kv, dtype)
    assert_close(got, exact, same_maths, "gradient", terms=case.B * case.T)


BACKWARD_CASES = [
    Case("one_source", m=1, D=8, G=1),
    Case("one_bfloat16_source", m=1, D=64, G=1, dtype=torch.bfloat16),
    Case("two_sources", m=2, D=64),
    Case("two_bfloat16_sources", m=2, D=128, G=1, dtype=torch.bfloat16),
    Case("three_float16_sources", m=3, D=24, dtype=torch.float16),
    Case("four_bfloat16_sources", m=4, D=72, G=3, T=5, dtype=torch.bfloat16),
    Case("five_sources", m=5, D=200, T=5),
    Case("nine_bfloat16_sources", m=9, D=256, G=1, T=3, dtype=torch.bfloat16),
    Case("transposed_float16", layout="transposed", m=3, dtype=torch.float16),
    Case("unaligned", layout="sliced", m=2, D=40, dtype=torch.bfloat16),
    Case("batch_stride_zero", layout="one_batch", B=3, D=16),
    Case("one_token", B=1, T=1, dtype=torch.bfloat16),
    Case("one_token_of_many_sequences", B=70, T=1, D=8),
    Case("a_chunk_and_a_token", B=1, T=257, G=1, D=16),
    Case("sequences_across_chunks", B=7, T=111, G=1, D=8, dtype=torch.float16),
    Case("ten_chunks", B=1, T=2305, G=1, D=8, m=1),
    Case("float64", dtype=torch.float64, weight_dtype=torch.float64, m=3, D=24),
    Case("weight_per_head", weights=(2, 2, 1)),
    Case("bfloat16_weights", weight_dtype=torch.bfloat16, dtype=torch.bfloat16),
    Case("empty_batch", B=0),
    Case("no_tokens", T=0),
]


def backward_inputs(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    sources, weights = case.inputs(device)
    return torch.randn(sources[0].shape).to(device, case.dtype), sources, weights


def reference_gradients(
    grad: Tensor, sources: list[Tensor], weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    inputs = [x.to(dtype).requires_grad_() for x in sources]
    weight = weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return torch.autograd.grad(reference.fuse_kv(inputs, weight), [*inputs, weight], grad.to(dtype))


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_backward_matches_oracle(case: Case, device: torch.device) -> None:
    grad, sources, weights = backward_inputs(case, device)
    grad_sources, grad_weights = fuse_kv_backward(grad, sources, weights)
    got = (*grad_sources, grad_weights)
    assert [x.dtype for x in got] == [case.dtype] * case.m + [weights.dtype]
    exact = reference_gradients(grad, sources, weights, torch.float64)
    same_maths = reference_gradients(grad, sources, weights, case.dtype)
    assert_close(got, exact, same_maths, "gradient", terms=case.B * case.T)


@pytest.mark.parametrize("buffers", ["float32", "own dtype"])
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_backward_adds_to_buffers(case: Case, buffers: str, device: torch.device) -> None:
    grad, sources, weights = backward_inputs(case, device)
    dtype = torch.float32 if buffers == "float32" and case.dtype != torch.float64 else case.dtype
    before = [torch.randn(grad.shape).to(device, dtype) for _ in range(case.m)]
    sums = [x.clone() for x in before]
    returned, grad_weights = fuse_kv_backward(grad, sources, weights, grad_sources=sums)
    assert all(x is y for x, y in zip(returned, sums, strict=True))
    exact = reference_gradients(grad, sources, weights, torch.float64)[:-1]
    exact = tuple(x.double() + y for x, y in zip(before, exact, strict=True))
    same_maths = reference_gradients(grad.to(dtype), sources, weights, dtype)[:-1]
    same_maths = tuple(x + y for x, y in zip(before, same_maths, strict=True))
    assert_close(tuple(sums), exact, same_maths, "sum of gradients")
    assert_same_bits(grad_weights, fuse_kv_backward(grad, sources, weights)[1])


def test_backward_of_several_layers_adds_up(device: torch.device) -> None:
    case = Case("layers", m=2, T=5, dtype=torch.bfloat16)
    sums = [torch.zeros(2, 5, 2, 64, device=device) for _ in range(2)]
    expected = [torch.zeros(2, 5, 2, 64, dtype=torch.float64) for _ in range(2)]
    for _ in range(3):
        grad, sources, weights = backward_inputs(case, device)
        _, nothing = fuse_kv_backward(grad, sources, weights, grad_sources=sums, needs_weights=False)
        assert nothing is None
        for total, weight in zip(expected, weights, strict=True):
            total += (weight * grad.float()).double().cpu()
    for total, exact in zip(sums, expected, strict=True):
        torch.testing.assert_close(total.double().cpu(), exact, rtol=0, atol=1e-5)


def test_backward_refuses_bad_buffers(device: torch.device) -> None:
    grad, sources, weights = backward_inputs(Case("bad", T=3, D=16, dtype=torch.bfloat16), device)
    good = [torch.zeros(grad.shape, device=device) for _ in range(2)]
    bad = {
        "must not share memory with": (ValueError, [good[0], good[0]]),
        "must hold 2 tensors, one per source, got 1": (ValueError, good[:1]),
        "must have shape .* as sources": (ValueError, [x[:, :2].contiguous() for x in good]),
        "must be contiguous": (ValueError, [x.transpose(0, 2).contiguous().transpose(0, 2) for x in good]),
        "must be float32 or have the dtype of sources.*got float16": (TypeError, [x.half() for x in good]),
        "must be float32 as grad_sources.*got bfloat16": (TypeError, [good[0], good[1].bfloat16()]),
        "must not require grad": (ValueError, [good[0], good[1].clone().requires_grad_()]),
    }
    for message, (kind, buffers) in bad.items():
        with pytest.raises(kind, match=message):
            fuse_kv_backward(grad, sources, weights, grad_sources=buffers)
    with pytest.raises(ValueError, match="grad must have shape"):
        fuse_kv_backward(grad[:, :2], sources, weights)
    with pytest.raises(TypeError, match="grad must be bfloat16 as sources.*got float32"):
        fuse_kv_backward(grad.float(), sources, weights)


def test_two_backward_runs_have_the_same_bits(device: torch.device) -> None:
    case = Case("runs", m=3, B=2, T=300, G=1, D=72, dtype=torch.bfloat16)
    inputs = backward_inputs(case, device)
    first, second = (fuse_kv_backward(*inputs) for _ in range(2))
    assert_same_bits((*first[0], first[1]), (*second[0], second[1]))


def test_bits_do_not_depend_on_the_number_of_multiprocessors(simt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ops", torch.ops.fusedkv_simt)
    grad, sources, weights = backward_inputs(Case("gpus", m=3, B=2, T=300, G=1, D=40), CPU)
    results = []
    for sm_count in (1, 2, 5, 132):
        simt.configure(seed=sm_count, sm_count=sm_count)
        gradients, grad_weights = fuse_kv_backward(grad, sources, weights)
        results.append((fuse_kv(sources, weights), *gradients, grad_weights))
    for other in results[1:]:
        assert_same_bits(results[0], other)


PAIRS = {
    "alike": (Case("keys"), Case("values")),
    "one_and_three_sources": (Case("keys", m=1, D=128), Case("values", m=3, D=24)),
    "two_and_one_bfloat16": (
        Case("keys", m=2, D=64, dtype=torch.bfloat16, layout="transposed"),
        Case("values", m=1, D=256, dtype=torch.bfloat16, layout="sliced"),
    ),
    "nine_and_four_float16": (
        Case("keys", m=9, T=5, D=8, dtype=torch.float16),
        Case("values", m=4, T=5, D=72, dtype=torch.float16),
    ),
    "float64": (Case("keys", m=2, dtype=torch.float64), Case("values", m=1, D=8, dtype=torch.float64)),
    "no_tokens": (Case("keys", T=0), Case("values", T=0, D=16)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_has_the_bits_of_two_calls(name: str, device: torch.device) -> None:
    sides = [case.inputs(device) for case in PAIRS[name]]
    inputs = [x.requires_grad_() for sources, weights in sides for x in (*sources, weights)]
    pair = fuse_pair(*sides)
    single = tuple(fuse_kv(*side) for side in sides)
    assert_same_bits(pair, single)
    grads = [torch.randn_like(x) for x in single]
    assert_same_bits(torch.autograd.grad(pair, inputs, grads), torch.autograd.grad(single, inputs, grads))


def test_a_pair_of_which_one_is_used_has_its_gradients_alone(device: torch.device) -> None:
    sides = [case.inputs(device) for case in PAIRS["one_and_three_sources"]]
    inputs = [x.requires_grad_() for sources, weights in sides for x in (*sources, weights)]
    keys, _ = fuse_pair(*sides)
    got = torch.autograd.grad(keys, inputs, torch.ones_like(keys), allow_unused=True)
    expected = torch.autograd.grad(fuse_kv(*sides[0]), inputs[:2], torch.ones_like(keys))
    assert_same_bits(got[:2], expected)
    assert all(x is None or not x.any() for x in got[2:])


def test_gradient_is_computed_only_where_it_is_asked_for() -> None:
    sources, weights = Case("partial").inputs(CPU)
    sources[0].requires_grad_()
    fuse_kv(sources, weights).sum().backward()
    assert sources[0].grad is not None and sources[1].grad is None and weights.grad is None
    weights.requires_grad_()
    fuse_kv([s.detach() for s in sources], weights).sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([s.detach().sum((0, 1)) for s in sources]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_has_the_same_bits_for_every_number_of_threads(
    dtype: torch.dtype, with_threads: Callable[[int], None]
) -> None:
    sources, weights = Case("threads", m=3, B=2, T=257, G=2, D=64, dtype=dtype).inputs(CPU)
    inputs = [x.requires_grad_() for x in (*sources, weights)]
    out_grad = torch.randn(sources[0].shape).to(dtype)
    results = []
    for threads in (1, 2, 3, 2):
        with_threads(threads)
        results.append(torch.autograd.grad(fuse_kv(sources, weights), inputs, out_grad))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_backward_saves_nothing_but_its_inputs() -> None:
    sources, weights = Case("saved", m=3).inputs(CPU)
    inputs = [x.requires_grad_() for x in (*sources, weights)]
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fuse_kv(sources, weights)
    storages = {x.untyped_storage().data_ptr() for x in inputs}
    assert 0 < len(saved) <= len(inputs)
    assert all(x.untyped_storage().data_ptr() in storages for x in saved), (
        "a tensor that is no input was saved"
    )


def test_backward_saves_no_source_for_weights_that_need_no_gradient() -> None:
    sources, weights = Case("frozen").inputs(CPU)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = fuse_kv([x.requires_grad_() for x in sources], weights)
    assert [x.data_ptr() for x in saved] == [weights.data_ptr()]
    out.sum().backward()
    assert_same_bits(sources[1].grad, weights[1].expand(out.shape))


def test_no_graph_is_built_without_a_gradient_to_compute() -> None:
    sources, weights = Case("plain").inputs(CPU)
    assert not fuse_kv(sources, weights).requires_grad
    with torch.no_grad():
        assert not fuse_kv([x.requires_grad_() for x in sources], weights).requires_grad


def test_two_runs_have_the_same_bits_for_every_number_of_threads(with_threads: Callable[[int], None]) -> None:
    sources, weights = Case("repeat", m=3, T=129, dtype=torch.bfloat16).inputs(CPU)
    results = []
    for threads in (1, 2, 2):
        with_threads(threads)
        results.append(fuse_kv(sources, weights))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[1], results[2])


def test_autocast_leaves_the_dtype_of_the_sources(device: torch.device) -> None:
    sources, weights = Case("autocast", dtype=torch.bfloat16).inputs(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = fuse_kv(sources, weights)
    assert_same_bits(out, fuse_kv(sources, weights))


@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2), (2, 0, 1)], ids=str)
def test_some_sources_alone_get_the_gradients_of_all(
    wanted: tuple[int, ...], needs_weights: bool, device: torch.device
) -> None:
    sources, weights = Case("some", m=3, dtype=torch.bfloat16).inputs(device)
    everything = [x.clone().requires_grad_() for x in (*sources, weights)]
    grad = torch.randn_like(sources[0])
    expected = torch.autograd.grad(fuse_kv(everything[:3], everything[3]), everything, grad)
    chosen = [*wanted, *([3] if needs_weights else [])]
    inputs = [x.clone().requires_grad_(i in chosen) for i, x in enumerate((*sources, weights))]
    got = torch.autograd.grad(fuse_kv(inputs[:3], inputs[3]), [inputs[i] for i in chosen], grad)
    assert_same_bits(got, tuple(expected[i] for i in chosen))


def test_source_without_a_gradient_gets_no_memory_for_one() -> None:
    sources, weights = Case("some", m=3).inputs(CPU)
    inputs = [sources[0].requires_grad_(), *sources[1:]]
    (grad,) = torch.autograd.grad(fuse_kv(inputs, weights).sum(), [sources[0]])
    assert grad.untyped_storage().nbytes() == sources[0].nbytes


def test_gradients_of_gradients_of_some_sources() -> None:
    sources = [torch.randn(1, 3, 2, 8, dtype=torch.float64) for _ in range(3)]
    weights = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    inputs = [sources[1].requires_grad_(), weights]

    def function(x: Tensor, w: Tensor) -> Tensor:
        return fuse_kv([sources[0], x, sources[2]], w)

    assert torch.autograd.gradgradcheck(function, inputs)
