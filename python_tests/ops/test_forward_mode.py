"""Forward-mode AD: right tangents of the fuse_kv family in any order of derivatives; other ops refuse it.
Zeros, as of an operation that autograd knows no forward mode of, come from nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusedkv_ext as fkv
from fusedkv_ext.ops import native, reference
from fusedkv_ext.testing import assert_close, assert_matches_oracle

F64 = torch.float64
SHAPE = (2, 3, 2, 8)


def inputs(m: int = 3, dtype: torch.dtype = F64, device: torch.device | str = "cpu") -> list[Tensor]:
    """m sources and their weights."""
    weights = torch.randn(m, *SHAPE[2:], dtype=F64 if dtype == F64 else torch.float32, device=device)
    return [*(torch.randn(SHAPE, dtype=dtype, device=device) for _ in range(m)), weights]


def like(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in tensors)


def fuse(*tensors: Tensor) -> Tensor:
    return fkv.fuse_kv(tensors[:-1], tensors[-1])


def plain(*tensors: Tensor) -> Tensor:
    return sum(x * w for x, w in zip(tensors[:-1], tensors[-1], strict=True))


def tangent_of(function: Callable[..., Tensor], at: list[Tensor], along: tuple[Tensor, ...]) -> Tensor:
    """By torch.func.jvp, and the same by ``dual_level``."""
    tangent = jvp(function, tuple(at), along)[1]
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(x, dx) for x, dx in zip(at, along, strict=True)))
        assert torch.equal(forward_ad.unpack_dual(out).tangent, tangent)
    return tangent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("moving", ["sources", "weights", "all", "one_source"])
def test_tangent_is_that_of_the_oracle(moving: str, dtype: torch.dtype, device: torch.device) -> None:
    at = inputs(dtype=dtype, device=device)
    chosen = {"sources": [0, 1, 2], "weights": [3], "all": [0, 1, 2, 3], "one_source": [1]}[moving]
    along = like([at[i] for i in chosen])

    def tangent(*, op: Callable[..., Tensor] = reference.fuse_kv, dtype: torch.dtype) -> Tensor:
        def of_chosen(*tensors: Tensor) -> Tensor:
            new = list(at)
            for i, x in zip(chosen, tensors, strict=True):
                new[i] = x
            return op(new[:-1], new[-1]) if op is fkv.fuse_kv else op(new[:-1], new[-1], dtype=dtype)

        return tangent_of(of_chosen, [at[i] for i in chosen], along)

    got = tangent(op=fkv.fuse_kv, dtype=dtype)
    assert got.dtype == dtype and float(got.abs().max()) > 0.1
    assert_close(got, tangent(dtype=F64), tangent(dtype=dtype))


def test_no_grad_does_not_stop_forward_mode() -> None:
    at = inputs()
    along = like(at)
    with torch.no_grad():
        tangent = tangent_of(fuse, at, along)
    torch.testing.assert_close(tangent, jvp(plain, tuple(at), along)[1])


def test_tangents_may_have_any_strides() -> None:
    at = inputs(1)
    along = torch.randn(SHAPE[::-1], dtype=F64).permute(3, 2, 1, 0), torch.ones((), dtype=F64).expand(1, 2, 8)
    torch.testing.assert_close(tangent_of(fuse, at, along), jvp(plain, tuple(at), along)[1])


def test_both_sums_of_a_pair_have_tangents_of_their_own(device: torch.device) -> None:
    keys, values = inputs(2, device=device), inputs(3, device=device)
    pair = native._ops.fuse_kv_pair.default
    along = like(keys)
    k, v = jvp(lambda *x: pair(list(x[:-1]), x[-1], values[:-1], values[-1]), tuple(keys), along)[1]
    torch.testing.assert_close(k, jvp(plain, tuple(keys), along)[1])
    assert not v.any()
    along = like(values)
    k, v = jvp(lambda *x: pair(keys[:-1], keys[-1], list(x[:-1]), x[-1]), tuple(values), along)[1]
    torch.testing.assert_close(v, jvp(plain, tuple(values), along)[1])
    assert not k.any()


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_have_tangents(needs: tuple[bool, bool], device: torch.device) -> None:
    """Those of the operation itself, whose arguments move one by one and together."""
    at = inputs(2, device=device)
    backward = native._ops.fuse_kv_backward.default

    def ours(dout: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        results = backward(dout, list(x[:-1]), x[-1], *needs)
        return tuple(result for result, needed in zip(results, needs, strict=True) if needed)

    def theirs(dout: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        results = x[-1][:, None, None] * dout, torch.stack([(dout * xj).sum((0, 1)) for xj in x[:-1]])
        return tuple(result for result, needed in zip(results, needs, strict=True) if needed)

    at = [torch.randn(SHAPE, dtype=F64, device=device), *at]
    along = like(at)
    torch.testing.assert_close(jvp(ours, tuple(at), along)[1], jvp(theirs, tuple(at), along)[1])
    for i in range(len(at)):
        one = [x * (i == j) for j, x in enumerate(along)]
        torch.testing.assert_close(jvp(ours, tuple(at), tuple(one))[1], jvp(theirs, tuple(at), tuple(one))[1])


ORDERS = {
    "hessian": (jacfwd, jacrev),
    "reverse_of_forward": (jacrev, jacfwd),
    "forward_of_forward": (jacfwd, jacfwd),
    "reverse_of_reverse": (jacrev, jacrev),
    "forward_of_forward_of_reverse": (jacfwd, jacfwd, jacrev),
    "reverse_of_forward_of_forward": (jacrev, jacfwd, jacfwd),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("argument", [0, 2], ids=["source", "weights"])
def test_derivatives_of_any_order_in_any_order(argument: int, order: tuple) -> None:
    at = [x[:1, :1, :1] if i < 2 else x[:, :1] for i, x in enumerate(inputs(2))]

    def derivative(fuse: Callable[..., Tensor]) -> Tensor:
        # Not linear in what is fused, nor in what comes out.
        function = lambda *x: (fuse(x[0] ** 3, x[1], x[2] ** 3) ** 3).sum()  # noqa: E731
        for transform in reversed(order):
            function = transform(function, argnums=argument)
        return function(*at)

    expected = derivative(plain)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(derivative(fuse), expected)


def test_gradcheck_of_both_modes_and_of_each_over_the_other() -> None:
    at = [x.requires_grad_() for x in inputs(2)]
    assert gradcheck(fuse, at, check_forward_ad=True)
    assert gradgradcheck(fuse, at, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_a_source_is_not_kept_for_forward_mode() -> None:
    weights = torch.rand(1, 2, 8)
    with forward_ad.dual_level():
        x = torch.randn(SHAPE, requires_grad=True)
        source = forward_ad.make_dual(2 * x, torch.ones(SHAPE))
        storage = torch.multiprocessing.reductions.StorageWeakRef(source.untyped_storage())
        out = fkv.fuse_kv([source], weights)
        del source
        assert out.requires_grad and storage.expired()


@pytest.mark.parametrize("name", ["jvp", "jvp_of_grad"])
def test_torch_compile_of_a_transform(name: str) -> None:
    at = inputs(2)
    along = like(at)

    def transformed(fuse: Callable[..., Tensor], at: list[Tensor], along: tuple[Tensor, ...]) -> object:
        if name == "jvp":
            return jvp(fuse, tuple(at), along)[1]
        gradient = grad(lambda *x: (fuse(*x) ** 3).sum(), argnums=(0, 1, 2))
        return jvp(gradient, tuple(at), along)[1]

    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(fuse, at, along), transformed(plain, at, along))


# Attention


def attention_inputs(rows: int) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    q = torch.randn(2, rows, 4, 8)
    keys, values = ([torch.randn(2, 40, 2, 8) for _ in range(2)] for _ in range(2))
    return q, keys, values, torch.randn(2, 2, 8), torch.randn(2, 2, 8)


@pytest.mark.parametrize("rows", [1, 40], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("moving", ["q", "key", "value_weights"])
def test_attention_has_the_tangent_of_the_oracle_where_torch_has_one(moving: str, rows: int) -> None:
    q, keys, values, a, b = attention_inputs(rows)
    at = {"q": q, "key": keys[0], "value_weights": b}[moving]
    along = torch.randn_like(at)

    def tangent(attend: Callable[..., Tensor], **options: object) -> Tensor:
        def of(x: Tensor) -> Tensor:
            new = {"q": q, "key": keys[0], "value_weights": b, moving: x}
            new_keys = [new["key"], keys[1]]
            return attend(new["q"], new_keys, values, a, new["value_weights"], causal=True, **options)

        return jvp(of, (at,), (along,))[1]

    with sdpa_kernel(SDPBackend.MATH):
        got = tangent(fkv.fused_kv_attn_func, recompute_fusion=True)
    exact, same_maths = (tangent(reference.fused_kv_attn_func, dtype=x) for x in (F64, torch.float32))
    assert float(got.abs().max()) > 0.1
    assert_close(got, exact, same_maths, terms=40)


def test_attention_of_a_tangent_that_an_outer_transform_has() -> None:
    """Few rows, whose kernel has no tangents, and an inner transform that hides the outer one's."""
    q, keys, values, a, b = attention_inputs(1)
    attend = lambda q, a: fkv.fused_kv_attn_func(q, keys, values, a, b, causal=True).sum()  # noqa: E731
    expected = lambda q, a: reference.fused_kv_attn_func(  # noqa: E731
        q, keys, values, a, b, causal=True, dtype=torch.float32
    ).sum()
    along = torch.randn_like(a)

    def of_gradient(attend: Callable[..., Tensor]) -> Tensor:
        return jvp(lambda a: grad(lambda q: attend(q, a))(q), (a,), (along,))[1]

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(of_gradient(attend), of_gradient(expected))


def test_gradients_with_recomputed_fusion_have_tangents() -> None:
    q, keys, values, a, b = attention_inputs(40)
    along = torch.randn_like(keys[0])

    def tangent(recompute: bool) -> Tensor:
        leaf = q.clone().requires_grad_()
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            moving = [forward_ad.make_dual(keys[0], along), keys[1]]
            out = fkv.fused_kv_attn_func(leaf, moving, values, a, b, recompute_fusion=recompute)
            (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
            return forward_ad.unpack_dual(gradient).tangent

    assert torch.equal(tangent(True), tangent(False))


def cached_call(name: str) -> tuple[Callable[..., object], dict[str, object]]:
    """An operation and arguments of which every float tensor may move."""
    q, keys, values, a, b = attention_inputs(1)
    lengths = torch.tensor([40, 7], dtype=torch.int32)
    if name == "append":
        new = {"key": torch.randn(2, 1, 2, 8), "value": torch.randn(2, 1, 2, 8), "query": q}
        angles = torch.randn(40, 4)
        rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        caches = {"key_cache": keys[0], "value_cache": values[0], "cache_seqlens": lengths}
        return fkv.rope_append_kvcache, {**new, **caches, **rotary}
    if name == "backward":
        sources = {"grad": keys[0].clone(), "sources": keys, "weights": a}
        return fkv.fuse_kv_backward, {**sources, "grad_sources": [torch.zeros_like(x) for x in keys]}
    options = {"cached": {}, "cached_lse": {"return_lse": True}, "invariant": {"batch_invariant": True}}[name]
    weights = {"key_weights": a, "value_weights": b, "cache_seqlens": lengths}
    return fkv.fused_kv_attn_with_kvcache, {
        "q": q,
        "key_caches": keys,
        "value_caches": values,
        **weights,
        **options,
    }


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "within_another_transform"])
@pytest.mark.parametrize("name", ["append", "backward", "cached", "cached_lse", "invariant"])
def test_operations_without_a_tangent_refuse_every_argument_that_has_one(name: str, nested: bool) -> None:
    op, arguments = cached_call(name)
    for argument, value in arguments.items():
        first = value[0] if isinstance(value, list) else value
        if not isinstance(first, Tensor) or not first.is_floating_point():
            continue

        def call(x: Tensor, argument: str = argument, value: object = value) -> Tensor:
            op(**{**arguments, argument: [x, *value[1:]] if isinstance(value, list) else x})
            return x.sum()

        with pytest.raises(ValueError, match=rf"^{argument}(\[0\])? must not have a forward-mode tangent"):
            if nested:
                inner = grad(lambda y, x, call=call: y * call(x))
                jvp(lambda x, inner=inner: inner(torch.ones(()), x), (first,), (torch.ones_like(first),))
            else:
                jvp(call, (first,), (torch.ones_like(first),))


@pytest.mark.parametrize("name", ["append", "backward", "cached", "cached_lse", "invariant"])
def test_forward_mode_of_something_else_is_no_hindrance(name: str) -> None:
    op, arguments = cached_call(name)
    one = torch.ones(())
    assert jvp(lambda x: (op(**arguments), 2 * x)[1], (one,), (one,))[1] == 2


def test_lse_refuses_forward_mode() -> None:
    q, keys, values, a, b = attention_inputs(1)
    with pytest.raises(
        ValueError, match=r"keys\[0\] must not have a forward-mode tangent, as return_lse gives none"
    ):
        jvp(
            lambda x: fkv.fused_kv_attn_func(q, [x, keys[1]], values, a, b, return_lse=True)[1],
            (keys[0],),
            (keys[0],),
        )


def test_a_layer_over_a_cache_refuses_forward_mode() -> None:
    plan = fkv.CachePlan.named("fusedkv", num_layers=4)
    layer = fkv.FusedKVAttention(plan, 0, 32, 4, 2, 8, rope=fkv.RotaryEmbedding(8))
    cache = fkv.KVCache(plan, batch_size=1, max_len=8, num_kv_heads=2, head_dim=8)
    cache.advance(2)
    x = torch.randn(1, 2, 32)
    with torch.no_grad(), pytest.raises(ValueError, match="must not have a forward-mode tangent"):
        jvp(lambda x: layer(x, cache=cache)[0], (x,), (x,))


# torch.func.vmap, which jacfwd and jacrev call


def test_vmap_equals_a_loop() -> None:
    at = [torch.stack([x, 2 * x, x.flip(0)]) for x in inputs(2)]
    loop = [fuse(*(x[i] for x in at)) for i in range(3)]
    torch.testing.assert_close(torch.vmap(fuse)(*at), torch.stack(loop), rtol=0, atol=0)
    moved = [at[0].movedim(0, 2), at[1][0], at[2]]
    loop = [fuse(at[0][i], at[1][0], at[2][i]) for i in range(3)]
    torch.testing.assert_close(torch.vmap(fuse, in_dims=(2, None, 0))(*moved), torch.stack(loop))


def test_the_oracle_criterion_still_holds_for_results_in_forward_mode(device: torch.device) -> None:
    """The primal value of a dual result is what the operation returns without forward mode."""
    *sources, weights = inputs(dtype=torch.float32, device=device)

    def primal(sources: list[Tensor], weights: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, torch.ones_like(x)) for x in sources]
            return forward_ad.unpack_dual(fkv.fuse_kv(dual, weights)).primal

    assert_matches_oracle(primal, reference.fuse_kv, sources, weights)
