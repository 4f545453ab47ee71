"""The operations as torch sees them: schemas, fakes, autograd registration, torch.compile in one graph."""

from __future__ import annotations

from collections.abc import Callable

import fuzz
import pytest
import torch
from cases import Case, cache_inputs, dense_inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fusedkv_ext import (
    append_kvcache,
    fuse_kv,
    fused_kv_attn_func,
    fused_kv_attn_with_kvcache,
    rope_append_kvcache,
)
from fusedkv_ext.testing import assert_near, assert_same_bits

CPU = torch.device("cpu")
# Raised inside torch while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def recorded_calls() -> dict[str, list[tuple[torch._ops.OpOverload, tuple, dict]]]:
    """Native calls that valid calls of the operations lead to, by name."""
    found: dict[str, list] = {}
    for seed in range(4):
        for call in fuzz.native_calls(seed):
            found.setdefault(call[0].name(), []).append(call)
    return found


def test_opcheck_of_every_registered_operation() -> None:
    calls = recorded_calls()
    assert set(calls) == fuzz.native_op_names(), (
        "an operation is registered that no call reaches, or the reverse"
    )
    for name, examples in calls.items():
        for op, args, kwargs in examples[:3]:
            detached = [_detached(x) for x in args]
            results = torch.library.opcheck(op, tuple(detached), kwargs)
            assert set(results.values()) == {"SUCCESS"}, (name, results)


def _detached(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return [_detached(x) for x in value]
    return value


def test_opcheck_of_fuse_kv_with_gradients() -> None:
    sources = [torch.randn(2, 5, 2, 16, requires_grad=True) for _ in range(3)]
    weights = torch.randn(3, 2, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.fusedkv.fuse_kv.default, (sources, weights))
    values = [torch.randn(2, 5, 2, 24, requires_grad=True)]
    value_weights = torch.randn(1, 2, 24, requires_grad=True)
    pair = (sources, weights, values, value_weights)
    torch.library.opcheck(torch.ops.fusedkv.fuse_kv_pair.default, pair)
    frozen = (sources, weights.detach(), [x.detach() for x in values], value_weights)
    torch.library.opcheck(torch.ops.fusedkv.fuse_kv_pair.default, frozen)


def inputs_of(name: str, T: int) -> tuple[Callable[..., object], tuple, dict[str, object]]:
    """An operation with arguments whose token dim is T."""
    case = Case(name, B=2, S=3, T=T, D=16, m_v=3)
    if name == "fuse_kv":
        _, keys, _, a, _ = dense_inputs(case, CPU)
        return fuse_kv, (keys, a), {}
    if name == "fused_kv_attn_func":
        return fused_kv_attn_func, dense_inputs(case, CPU), {"causal": True, "return_lse": True}
    args, state = cache_inputs(
        Case(**{**vars(case), "lengths": (T, 2), "page_size": 4 if T % 2 else None}), CPU
    )
    if name == "fused_kv_attn_with_kvcache":
        return fused_kv_attn_with_kvcache, args, {**state, "return_lse": True}
    angles = torch.randn(T, 4)
    new = torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    query = torch.randn(2, 4, 3, 16).transpose(1, 2)
    options = {**state, "rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    return rope_append_kvcache, (query, *new, args[1][0], args[2][0]), options


@pytest.mark.parametrize("T", [8, 9], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", fuzz.OPS)
def test_compiles_into_one_graph_with_the_same_bits(name: str, T: int) -> None:
    function, args, options = inputs_of(name, T)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if name == "append_kvcache":
        copies = args[3].clone(), args[4].clone()
        rotated = function(*args, **options)
        assert_same_bits(compiled(*args[:3], *copies, **options), rotated)
        assert_same_bits(tuple(x.nan_to_num() for x in copies), tuple(x.nan_to_num() for x in args[3:]))
        return
    assert_same_bits(compiled(*args, **options), function(*args, **options))


@pytest.mark.parametrize("name", fuzz.OPS)
def test_one_graph_serves_every_length(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function, *_ = inputs_of(name, 8)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for T in (8, 10, 24, 130):
        _, args, options = inputs_of(name, T)
        compiled(*args, **options)
    assert counter.frame_count == 1


def test_backward_compiles_into_one_graph() -> None:
    q, keys, values, a, b = dense_inputs(Case("backward", S=9, T=9, D=16), CPU)
    inputs = [x.requires_grad_() for x in (q, *keys, *values, a, b)]

    def loss(q: Tensor, k0: Tensor, k1: Tensor, v0: Tensor, v1: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fused_kv_attn_func(q, [k0, k1], [v0, v1], a, b, causal=True).square().sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for got, expected in zip(compiled, eager, strict=True):
        assert_near(got, expected, rounding_steps=32)


def test_inductor_runs_a_decode_step_of_append_and_attention() -> None:
    """Inductor must keep the write before the read. Nothing pointwise is here: no C++ has to be compiled."""
    case = Case("step", B=2, S=1, T=9, D=16, lengths=(9, 4))
    (q, keys, values, a, b), state = cache_inputs(case, CPU)
    new = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)

    def step(q: Tensor, key: Tensor, value: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        append_kvcache(key, value, keys[0], values[0], **state)
        return fused_kv_attn_with_kvcache(q, keys, values, a, b, **state).transpose(1, 2)

    copies = [x.clone() for x in keys], [x.clone() for x in values]
    before = fused_kv_attn_with_kvcache(q, keys, values, a, b, **state).transpose(1, 2)
    expected = step(q, *new, keys, values)
    got = torch.compile(step, fullgraph=True)(q, *new, *copies)
    assert not torch.equal(expected, before)
    assert_same_bits(got, expected)
    assert_same_bits(copies[0][0].nan_to_num(), keys[0].nan_to_num())


def test_fakes_give_the_shapes_dtypes_and_strides_of_the_operations() -> None:
    for name in fuzz.OPS[:3]:
        function, args, options = inputs_of(name, 9)
        real = function(*args, **options)
        fake = function(*_meta(args), **_meta(options))
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for x, y in pairs:
            assert (x.shape, x.dtype, x.stride()) == (
                y.shape,
                y.dtype,
                y.stride(),
            ) and y.device.type == "meta"


def _meta(value: object) -> object:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_meta(x) for x in value)
    if isinstance(value, dict):
        return {key: _meta(x) for key, x in value.items()}
    return value
