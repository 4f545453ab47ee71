"""fuse_kv: the weighted sum of m sources and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import random_tensor, to_device
from compare import assert_close, assert_matches_oracle, assert_same_bits
from torch import Tensor

from fusedkv_ext import fuse_kv, reference

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
    Case("eight_sources", m=8, T=7),
    Case("thirty_two_sources", m=32, T=5, D=32),
    Case("one_token", B=1, T=1),
    Case("one_head", G=1, D=128),
    Case("many_heads", G=16, D=24, T=3),
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
    assert len(saved) <= len(inputs)
    assert all(x.untyped_storage().data_ptr() in storages for x in saved), (
        "a tensor that is no input was saved"
    )


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
