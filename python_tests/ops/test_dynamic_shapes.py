"""torch.compile and torch.export with lengths that change: few graphs for all, and the eager results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import tiny_decoder
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import fusedkv_ext as fkv
from fusedkv_ext.layers import moe as moe_module
from fusedkv_ext.layers.moe import MoE
from fusedkv_ext.testing import assert_near

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

LENGTHS = (40, 65, 700)
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (7, -1)},
    "wide_window": {"window_size": (600, 3)},
    "lse": {"causal": True, "return_lse": True},
    "recompute": {"causal": True, "recompute_fusion": True},
}
Tensors = list[Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(function: Callable, **options: object) -> tuple[Callable, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def attention_inputs(S: int, T: int, D: int = 16) -> Tensors:
    """q, two keys, one value, and their weights."""
    q, *sources = (torch.randn(2, n, heads, D) for n, heads in ((S, 4), (T, 2), (T, 2), (T, 2)))
    return [q, *sources, torch.rand(2, 2, D), torch.rand(1, 2, D)]


class Attend(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k0: Tensor, k1: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = fkv.fused_kv_attn_func(q, [k0, k1], v, a, b, **self.options)
        if isinstance(out, tuple):
            return torch.cat([x.flatten(1) for x in out], dim=1)
        return out


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert_near(got.detach(), expected.detach(), rounding_steps=64)


def assert_same_gradients(function: Callable, other: Callable, inputs: Tensors) -> None:
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    leaves = [x for x in inputs if x.requires_grad]
    grads = []
    for call in (function, other):
        out = call(*inputs)
        grads.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, expected in zip(*grads, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_of_any_length_trains_with_two_graphs(options: dict[str, object]) -> None:
    """One for the first length, one for all others."""
    function = Attend(**options)
    graph, counter = compiled(function)
    for n in LENGTHS:
        assert_same_gradients(graph, function, attention_inputs(n, n))
    assert counter.frame_count == 2


@pytest.mark.parametrize("D", [12])
def test_attention_of_any_length_has_two_graphs(D: int) -> None:
    function = Attend(causal=True)
    graph, counter = compiled(function)
    for n in LENGTHS:
        inputs = attention_inputs(n, n, D)
        assert_same(graph(*inputs), function(*inputs))
    assert counter.frame_count == 2


@pytest.mark.parametrize("options", [OPTIONS["causal"], OPTIONS["window"]], ids=["causal", "window"])
def test_a_marked_length_has_one_graph(options: dict[str, object]) -> None:
    function = Attend(**options)
    graph, counter = compiled(function)
    for n in LENGTHS:
        inputs = attention_inputs(n, n)
        for x in inputs[:4]:
            torch._dynamo.mark_dynamic(x, 1)
        assert_same_gradients(graph, function, inputs)
    assert counter.frame_count == 1


def test_documents_of_any_length_have_two_graphs() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        return fkv.fused_kv_attn_func(q, k, v, causal=True, document_ids=documents)

    graph, counter = compiled(attend)
    for n in LENGTHS:
        q, k, _, v, *_ = attention_inputs(n, n)
        documents = (torch.arange(n) // 9).expand(2, n).contiguous()
        assert_same_gradients(graph, attend, [q, k, v, documents])
    assert counter.frame_count == 2


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("options", [OPTIONS["causal"], OPTIONS["window"]], ids=["causal", "window"])
def test_new_rows_behind_any_prefix_have_two_graphs(steps: int, options: dict[str, object]) -> None:
    function = Attend(**options)
    graph, counter = compiled(function)
    with torch.no_grad():
        for n in LENGTHS:
            inputs = attention_inputs(steps, n)
            assert_same(graph(*inputs), function(*inputs))
    assert counter.frame_count == 2


def test_any_batch_size_has_two_graphs() -> None:
    function = Attend(causal=True)
    graph, counter = compiled(function)
    for batch in (2, 3, 7, 5):
        inputs = [x.repeat(batch, 1, 1, 1) if x.dim() == 4 else x for x in attention_inputs(9, 9)]
        assert_same_gradients(graph, function, inputs)
    assert counter.frame_count == 2


@pytest.mark.parametrize("D", [12])
def test_fusion_and_its_gradients_have_two_graphs(D: int) -> None:
    def fuse(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return fkv.fuse_kv([x, y], weights)

    def backward(grad: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        grads, of_weights = fkv.fuse_kv_backward(grad, [x, grad], weights)
        return torch.cat([*(x.flatten() for x in grads), of_weights.flatten()])

    for function in (fuse, backward):
        graph, counter = compiled(function)
        for n in LENGTHS:
            inputs = [torch.randn(2, n, 3, D), torch.randn(2, n, 3, D), torch.randn(2, 3, D)]
            if function is fuse:
                assert_same_gradients(graph, fuse, inputs)
            else:
                assert_same(graph(*inputs), backward(*inputs))
        assert counter.frame_count == 2


def decoder(**sizes: object) -> fkv.Decoder:
    """Of two layers: few graphs to compile."""
    plan = fkv.CachePlan.named("fusedkv", 2)
    return tiny_decoder(plan, num_hidden_layers=2, max_position_embeddings=4096, **sizes)


LATENT_MODEL = LATENT | {"head_dim": None}
MODELS = {"heads": {}, "latent_experts": LATENT_MODEL | EXPERTS}


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_a_decoder_trains_on_any_length_with_one_graph(sizes: dict[str, int]) -> None:
    model = decoder(**sizes)
    graph, counter = compiled(model)
    parameters = list(model.parameters())
    for n in (40, 65):
        ids = torch.randint(61, (2, n))
        torch._dynamo.mark_dynamic(ids, 1)
        results = []
        for call in (graph, model):
            loss = call(ids, labels=ids)[1]
            results.append((loss, *torch.autograd.grad(loss, parameters)))
        for got, expected in zip(*results, strict=True):
            assert_same(got, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("sizes", "page_size"), [({}, 4), (LATENT_MODEL, None)], ids=["paged", "latent"])
def test_decode_steps_of_any_length_have_two_graphs(sizes: dict[str, int], page_size: int | None) -> None:
    model = decoder(**sizes).eval()
    graph, counter = compiled(model)
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        full, cache = model(ids), model.make_cache(2, 24, page_size=page_size)
        model(ids[:, :8], cache=cache)
        for t in range(8, 20):
            cache.advance(1)
            step = graph(ids[:, t : t + 1], cache=cache, advance=False)
            torch.testing.assert_close(step[:, 0], full[:, t], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out = self.module(x)
        return out[0] if isinstance(out, tuple) else out


def modules() -> dict[str, nn.Module]:
    plan, rope = fkv.CachePlan.named("fusedkv", 4), fkv.RotaryEmbedding(8)
    return {
        "attention": fkv.FusedKVAttention(plan, 0, 32, 4, 2, 8, rope=rope),
        "windows": fkv.FusedKVAttention(plan, 0, 32, 4, 2, 8, rope=rope, sliding_window=9),
        "latent": fkv.LatentAttention(plan, 0, 32, 4, rope=rope, **LATENT),
        "experts": MoE(32, 16, 4, 2).eval(),
        "bfloat16_experts": MoE(32, 16, 4, 2).eval().bfloat16(),
    }


@pytest.mark.parametrize("name", ["windows", "latent", "experts", "bfloat16_experts"])
def test_modules_of_any_length_have_one_graph(name: str) -> None:
    module = First(modules()[name])
    graph, counter = compiled(module)
    for n in (40, 65):
        x = torch.randn(2, n, 32, dtype=next(module.parameters()).dtype)
        torch._dynamo.mark_dynamic(x, 1)
        assert_same_gradients(graph, module, [x, *module.parameters()][:1])
    assert counter.frame_count == 1


def test_the_products_of_experts_in_a_graph_are_differentiable_twice() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return moe_module._grouped_linear(rows, weight, ends)

    assert torch.autograd.gradcheck(product, (rows, weight))
    assert torch.autograd.gradgradcheck(product, (rows, weight))
    for op, args in (
        (moe_module._grouped_linear, (rows, weight, ends)),
        (moe_module._grouped_outer, (torch.randn(6, 2), torch.randn(6, 3), ends)),
    ):
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


# ---- export --------------------------------------------------------------------------------------------

T = Dim("T", min=4, max=4096)


def assert_exports(module: nn.Module, inputs: Callable[[int], Tensors], shapes: tuple, strict: bool) -> None:
    """An export at one length gives eager results at others."""
    program = export(module, tuple(inputs(24)), dynamic_shapes=shapes, strict=strict).module()
    for n in (9, 700):
        args = inputs(n)
        assert_same(program(*args), module(*args))


@pytest.mark.parametrize(
    ("options", "strict"),
    [
        (OPTIONS["causal"], False),
        (OPTIONS["causal"], True),
        (OPTIONS["window"], False),
        (OPTIONS["lse"], False),
    ],
    ids=["causal", "strict", "window", "lse"],
)
def test_attention_exports(options: dict[str, object], strict: bool) -> None:
    shapes = (*({1: T},) * 4, {}, {})
    assert_exports(Attend(**options), lambda n: attention_inputs(n, n), shapes, strict)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "recording"])
def test_new_rows_behind_a_prefix_export(grad: bool) -> None:
    shapes = ({}, *({1: T},) * 3, {}, {})
    with torch.set_grad_enabled(grad):
        for steps in (1, 3):
            assert_exports(Attend(causal=True), lambda n: attention_inputs(steps, n), shapes, False)  # noqa: B023


class Cached(nn.Module):
    """A decode step: append, then attend."""

    def forward(self, q: Tensor, new: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        fkv.append_kvcache(new, new, keys, values, cache_seqlens=lengths)
        return fkv.fused_kv_attn_with_kvcache(q, keys, values, cache_seqlens=lengths)


@pytest.mark.parametrize("D", [16, 12])
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_decode_steps_export(strict: bool, D: int) -> None:
    def inputs(n: int) -> Tensors:
        torch.manual_seed(n)
        caches = [torch.randn(2, n, 2, D) for _ in range(2)]
        lengths = torch.tensor([n, 3], dtype=torch.int32)
        return [torch.randn(2, 1, 4, D), torch.randn(2, 1, 2, D), *caches, lengths]

    with torch.no_grad():
        program = export(
            Cached(), tuple(inputs(24)), dynamic_shapes=({}, {}, {1: T}, {1: T}, {}), strict=strict
        )
        for n in (9, 40):
            assert_same(program.module()(*inputs(n)), Cached()(*inputs(n)))


@pytest.mark.parametrize("name", ["attention", "windows", "latent", "experts"])
def test_modules_export(name: str) -> None:
    assert_exports(First(modules()[name]), lambda n: [torch.randn(2, n, 32)], ({1: T},), False)


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_decoders_export(sizes: dict[str, int]) -> None:
    model = First(decoder(**sizes).eval())
    assert_exports(model, lambda n: [torch.randint(61, (2, n))], ({1: T},), False)


# ---- inductor ------------------------------------------------------------------------------------------


def test_inductor_trains_attention_of_any_length() -> None:
    function = Attend(causal=True)
    graph = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (40, 65):
        assert_same_gradients(graph, function, attention_inputs(n, n))
