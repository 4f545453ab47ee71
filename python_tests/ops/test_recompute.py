"""The backward that fuses again instead of keeping the fused keys and values."""

from __future__ import annotations

import pytest
import torch
from cases import Case, dense_inputs, named
from tiny import tiny_config
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fusedkv_ext import Decoder, FusedKVAttention, fused_kv_attn_func
from fusedkv_ext.testing import assert_same_bits

CPU = torch.device("cpu")
BF16 = torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

CASES = [
    Case("float32", S=40, T=40),
    Case("bfloat16_grouped", S=40, T=40, H=8, G=2, dtype=BF16),
    Case("float64", S=9, T=9, dtype=torch.float64),
    Case("no_groups", S=40, T=40, H=2, G=2),
    Case("rows_at_the_end", S=9, T=40),
    Case("more_rows_than_keys", S=40, T=9),
    Case("unequal_counts_and_dims", S=17, T=17, m_k=3, m_v=2, D=24, Dv=40),
    Case("values_not_fused", S=17, T=17, m_v=1, weights="none"),
    Case("nothing_fused", S=17, T=17, m_k=1, m_v=1, weights="none"),
    Case("window_in_chunks", B=1, S=1100, T=1300, H=2, G=1, D=16, window=(70, -1)),
]


def leaves(case: Case) -> tuple[list[Tensor], Tensor]:
    """The inputs of a call as leaves, and a gradient of its output."""
    q, keys, values, a, b = dense_inputs(case, CPU)
    inputs = [x.detach().requires_grad_() for x in (q, *keys, *values, a, b) if x is not None]
    return inputs, torch.randn(case.B, case.S, case.H, case.value_dim).to(case.dtype)


def attend(case: Case, inputs: list[Tensor], **options: object) -> Tensor:
    q, *rest = inputs
    keys, values, weights = rest[: case.m_k], rest[case.m_k :][: case.m_v], rest[case.m_k + case.m_v :]
    options = {**case.options, "return_lse": False, **options}
    return fused_kv_attn_func(q, keys, values, *weights, **options)


def alive(storages: list[StorageWeakRef]) -> int:
    return sum(not storage.expired() for storage in storages)


@pytest.mark.parametrize(**named(CASES))
def test_gradients_have_the_same_bits(case: Case) -> None:
    inputs, grad = leaves(case)
    expected = torch.autograd.grad(attend(case, inputs), inputs, grad)
    got = torch.autograd.grad(attend(case, inputs, recompute_fusion=True), inputs, grad)
    assert_same_bits(got, expected)


def test_outputs_and_lse_have_the_same_bits() -> None:
    inputs, _ = leaves(CASES[0])
    both = [attend(CASES[0], inputs, return_lse=True, recompute_fusion=x) for x in (False, True)]
    assert_same_bits(*both)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_nothing_fused_is_kept_and_every_backward_fuses_once(case: Case, fused: list[StorageWeakRef]) -> None:
    inputs, grad = leaves(case)
    out = attend(case, inputs)
    assert len(fused) == alive(fused) == 2
    expected = torch.autograd.grad(out, inputs, grad)
    del out
    out = attend(case, inputs, recompute_fusion=True)
    assert alive(fused) == 0
    fused.clear()
    for times in (1, 2, 3):
        assert_same_bits(torch.autograd.grad(out, inputs, grad, retain_graph=times < 3), expected)
        assert len(fused) == 2 * times and alive(fused) == 0


def test_a_side_that_is_not_fused_is_saved_as_ever(fused: list[StorageWeakRef]) -> None:
    case = Case("one_side", S=17, T=17, m_v=1, weights="none")
    inputs, grad = leaves(case)
    out = attend(case, inputs, recompute_fusion=True)
    keys, values = fused
    assert keys.expired() and not values.expired()
    out.backward(grad)
    assert len(fused) == 4


def test_two_calls_of_the_same_sources_do_not_mix(fused: list[StorageWeakRef]) -> None:
    first, second = Case("first", S=17, T=17), Case("second", S=33, T=17, causal=False)
    inputs, grad = leaves(first)
    others, other_grad = leaves(second)
    others[1:-2] = inputs[1:-2]

    def gradients(recompute_fusion: bool) -> tuple[Tensor, ...]:
        outs = [
            attend(case, xs, recompute_fusion=recompute_fusion)
            for case, xs in ((first, inputs), (second, others))
        ]
        return torch.autograd.grad(outs, [*inputs, others[0], *others[-2:]], [grad, other_grad])

    assert_same_bits(gradients(True), gradients(False))


def test_gradients_of_gradients(fused: list[StorageWeakRef]) -> None:
    """Of q, with the kernel of SDPA that has them."""
    case = Case("twice", B=1, S=6, T=6, H=2, G=2, D=8, dtype=torch.float64)
    inputs, grad = leaves(case)

    def second_gradients(recompute_fusion: bool) -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):
            out = attend(case, inputs, recompute_fusion=recompute_fusion)
        assert bool(alive(fused)) != recompute_fusion
        (first,) = torch.autograd.grad(out, inputs[:1], grad, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs[:1])

    assert_same_bits(second_gradients(True), second_gradients(False))


@pytest.mark.parametrize("changed", [1, -1], ids=["source", "weight"])
def test_inputs_modified_before_the_backward_raise(changed: int) -> None:
    inputs, grad = leaves(CASES[0])
    inputs = [inputs[0], *(x.detach() for x in inputs[1:])]  # only q: fuse_kv has no backward that notices
    out = attend(CASES[0], inputs, recompute_fusion=True)
    inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool, fused: list[StorageWeakRef]) -> None:
    inputs, grad = leaves(CASES[0])
    expected = torch.autograd.grad(attend(CASES[0], inputs), inputs, grad)

    def block(*inputs: Tensor) -> Tensor:
        return attend(CASES[0], list(inputs), recompute_fusion=True)

    fused.clear()
    checkpoint(block, *inputs, use_reentrant=reentrant).backward(grad)
    assert alive(fused) == 0
    assert_same_bits(tuple(x.grad for x in inputs), expected)


def test_under_autocast() -> None:
    inputs, grad = leaves(CASES[0])

    def gradients(recompute_fusion: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=BF16):
            out = attend(CASES[0], inputs, recompute_fusion=recompute_fusion)
        return torch.autograd.grad(out, inputs, grad.to(BF16))

    assert_same_bits(gradients(True), gradients(False))


def test_compiles_into_one_graph() -> None:
    inputs, grad = leaves(CASES[0])
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager"}
    both = [
        torch.compile(lambda *xs, r=r: attend(CASES[0], list(xs), recompute_fusion=r), **options)(*inputs)
        for r in (False, True)
    ]
    assert_same_bits(*(torch.autograd.grad(out, inputs, grad) for out in both))


def test_decoder_trains_alike_and_keeps_less(fused: list[StorageWeakRef]) -> None:
    ids = torch.randint(0, 50, (2, 24))
    gradients = []
    for recompute_fusion in (False, True):
        torch.manual_seed(0)
        model = Decoder(tiny_config("fusedkv", recompute_fusion=recompute_fusion))
        fused.clear()
        _, loss = model(ids, labels=ids)
        reads = sum(map(model.plan.reads_only, range(model.plan.num_layers)))
        assert len(fused) - alive(fused) == (2 * reads if recompute_fusion else 0)
        loss.backward()
        gradients.append(tuple(p.grad for p in model.parameters()))
    assert_same_bits(*gradients)
    assert all(
        layer.self_attn.recompute_fusion
        for layer in model.model.layers
        if isinstance(layer.self_attn, FusedKVAttention)
    )


def test_flag_must_be_a_flag() -> None:
    inputs, _ = leaves(CASES[0])
    with pytest.raises(TypeError, match="recompute_fusion must be a bool, got str"):
        attend(CASES[0], inputs, recompute_fusion="yes")
