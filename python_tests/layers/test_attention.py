"""FusedKVAttention against the definition of a plan, written out head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tiny import LAYERS, PLANS, randomise_fusion
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedkv_ext.cache.kv_cache import KV, KVCache
from fusedkv_ext.layers.attention import FusedKVAttention
from fusedkv_ext.layers.norm import RMSNorm
from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.testing import assert_near

HIDDEN, H, G, D = 32, 4, 2, 16
# Every option comes with every plan at least once, without the cross product of all of them.
VARIANTS = {
    "half-split, QK-norm": dict(qk_norm=True),
    "interleaved, window": dict(interleaved=True, sliding_window=3),
    "biases, one KV head per head": dict(bias=True, kv_heads=4),
}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def make_stack(
    plan: CachePlan, *, interleaved: bool = False, kv_heads: int = G, **options: object
) -> nn.ModuleList:
    rope = RotaryEmbedding(D, interleaved=interleaved)
    layers = range(plan.num_layers)
    stack = nn.ModuleList(
        FusedKVAttention(plan, i, HIDDEN, H, kv_heads, D, rope=rope, **options) for i in layers
    )
    randomise_fusion(stack)
    for parameter in stack.parameters():
        if parameter.dim() == 1:  # norms and biases, away from one and zero
            nn.init.uniform_(parameter, 0.5, 1.5)
    return stack


def run(
    stack: nn.ModuleList, x: Tensor, cache: KVCache | None = None, **options: object
) -> tuple[Tensor, list[KV]]:
    """x + attention, layer after layer; and the KV of every layer."""
    kvs: list[KV] = []
    for layer in stack:
        out, kv = layer(x, tuple(kvs[j] for j in layer.source_layers), cache=cache, **options)
        x = x + out
        kvs.append(kv)
    return x, kvs


Heads = dict[tuple[str, int], Tensor]  # (side, KV head) -> (B, T, D)


def by_definition(
    stack: nn.ModuleList, x: Tensor, kv_heads: int, window: int | None
) -> tuple[Tensor, list[Heads]]:
    """The same by the plan's words: each head of each layer gets keys and values of its own, then attends.

    Returns the output and what each layer stores.
    """
    tokens = x.shape[1]
    visible = torch.ones(tokens, tokens).tril().bool()
    if window is not None:
        visible &= ~torch.ones(tokens, tokens).tril(-window).bool()
    stored: list[Heads] = []
    for layer in stack:
        used, mine = heads_by_definition(layer, x, kv_heads, stored)
        stored.append(mine)
        q = projected(layer, layer.q_proj, layer.q_norm, x)
        outs = []
        for h in range(H):
            key, value = (used[side, h // (H // kv_heads)] for side in ("keys", "values"))
            scores = (q[:, :, h] @ key.transpose(1, 2) / D**0.5).masked_fill(~visible, -torch.inf)
            outs.append(scores.softmax(-1) @ value)
        x = x + layer.o_proj(torch.cat(outs, dim=-1))
    return x, stored


def heads_by_definition(
    layer: FusedKVAttention, x: Tensor, kv_heads: int, stored: list[Heads]
) -> tuple[Heads, Heads]:
    """What the heads of a layer attend to, and those of them that it stores."""
    plan, i = layer.plan, layer.layer
    own: Heads = {}
    if layer.k_proj is not None:
        heads = projected(layer, layer.k_proj, layer.k_norm, x).unbind(2)
        own |= {
            ("keys", h): tensor for h, tensor in zip(plan.stored_key_heads(i, kv_heads), heads, strict=True)
        }
    if layer.v_proj is not None:
        heads = layer.v_proj(x).unflatten(-1, (-1, D)).unbind(2)
        own |= {
            ("values", h): tensor
            for h, tensor in zip(plan.stored_value_heads(i, kv_heads), heads, strict=True)
        }
    used, mine = {}, {}
    for side in ("keys", "values"):
        for segment in getattr(plan.layers[i], side):
            for head in range(int(segment.heads[0] * kv_heads), int(segment.heads[1] * kv_heads)):
                tensors = [(own if j == i else stored[j])[side, head] for j in segment.sources]
                weights = fusion_weights(layer, side, head, kv_heads)
                used[side, head] = sum(w * tensor for w, tensor in zip(weights, tensors, strict=False))
                if i in segment.sources:
                    mine[side, head] = used[side, head]
    return used, mine


def projected(layer: FusedKVAttention, projection: nn.Linear, norm: RMSNorm | None, x: Tensor) -> Tensor:
    """Queries or keys, normalized and rotated: (B, T, heads, D)."""
    heads = projection(x).unflatten(-1, (-1, D))
    cos, sin = layer.rope.cos_sin(torch.arange(x.shape[1]))
    return apply_rotary(heads if norm is None else norm(heads), cos, sin, layer.interleaved)


def fusion_weights(layer: FusedKVAttention, side: str, head: int, kv_heads: int) -> Sequence[Tensor | float]:
    """The weights of one KV head, one for each of its sources: (D,) or 1."""
    for index, (start, stop, key, value) in enumerate(layer.plan.segments(layer.layer, kv_heads)):
        if start <= head < stop and (key if side == "keys" else value).fusion is not None:
            weights = layer.kv_fusion.key_weights if side == "keys" else layer.kv_fusion.value_weights
            return weights(index)[:, head - start].to(layer.q_proj.weight.dtype)
    return [1.0] * layer.plan.num_layers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", PLANS)
def test_it_computes_what_the_plan_says(plan: str, variant: str) -> None:
    options = VARIANTS[variant]
    stack = make_stack(PLANS[plan], **options).double()
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    kv_heads = options.get("kv_heads", G)
    with torch.no_grad():
        expected, stored = by_definition(stack, x, kv_heads, options.get("sliding_window"))
    out, kvs = run(stack, x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for kv, mine in zip(kvs, stored, strict=True):
        for side, tensor in (("keys", kv.key), ("values", kv.value)):
            heads = [mine[key] for key in mine if key[0] == side]
            assert (tensor is None) == (not heads)
            if heads:
                torch.testing.assert_close(tensor, torch.stack(heads, dim=2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", PLANS)
def test_with_a_cache_in_pieces_it_is_the_same(plan: str, variant: str, page_size: int | None) -> None:
    options = VARIANTS[variant]
    stack = make_stack(PLANS[plan], **options)
    cache = KVCache(PLANS[plan], 2, 12, options.get("kv_heads", G), D, page_size=page_size)
    x = torch.randn(2, 12, HIDDEN)
    with torch.no_grad():
        whole, kvs = run(stack, x)
        pieces = []
        for piece in x.split([5, 1, 1, 3, 1, 1], dim=1):
            cache.advance(piece.shape[1])
            pieces.append(run(stack, piece, cache)[0])
    assert_near(torch.cat(pieces, dim=1), whole, 32)
    if page_size is None:
        for i, kv in enumerate(kvs):
            for tensor, cached in ((kv.key, cache._keys[i]), (kv.value, cache._values[i])):
                assert tensor is None or assert_near(cached, tensor, 32) is None


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_cache_that_rotates_and_given_positions_are_the_same(plan: str, page_size: int | None) -> None:
    stack = make_stack(PLANS[plan], qk_norm=True)
    caches = [KVCache(PLANS[plan], 2, 12, G, D, page_size=page_size) for _ in range(2)]
    with torch.no_grad():
        for counts in ([2, 5], [1, 1], [3, 3]):
            x, kvs = torch.randn(2, max(counts), HIDDEN), []
            for cache in caches:
                cache.advance(counts)
            given = stack[0].rope.cos_sin(caches[0].positions(max(counts)))
            for layer in stack:
                sources = tuple(kvs[j] for j in layer.source_layers)
                options = {"last": 2} if layer is stack[-1] else {}
                expected, kv = layer(x, sources, position_embeddings=given, cache=caches[0], **options)
                out, same = layer(x, sources, cache=caches[1], **options)
                assert_near(out, expected)
                for a, b in zip(same, kv if layer.needs_positions else (None, None), strict=True):
                    assert a is b is None or torch.equal(a, b)
                kvs.append(kv)


@pytest.mark.parametrize("plan", PLANS)
def test_last_computes_the_last_rows_of_the_same(plan: str) -> None:
    stack = make_stack(PLANS[plan], qk_norm=True)
    x = torch.randn(2, 9, HIDDEN)
    with torch.no_grad():
        _, kvs = run(stack, x)
        for layer in stack:
            sources = tuple(kvs[j] for j in layer.source_layers)
            full, kv = layer(x, sources)
            last, same = layer(x, sources, last=2)
            assert_near(last, full[:, -2:], 16)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(kv, same, strict=True))
            if layer.plan.reads_only(layer.layer):
                assert_near(
                    layer(x[:, -2:], sources)[0], last
                )  # a reader's queries may be fewer than its keys


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_reach_every_source(plan: str) -> None:
    for layer in make_stack(PLANS[plan]):
        sources = tuple(
            KV(
                *(
                    torch.randn(2, 5, len(heads), D, requires_grad=True) if heads else None
                    for heads in (PLANS[plan].stored_key_heads(j, G), PLANS[plan].stored_value_heads(j, G))
                )
            )
            for j in layer.source_layers
        )
        out, _ = layer(torch.randn(2, 5, HIDDEN), sources)
        out.square().sum().backward()
        learnable = [p for p in layer.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learnable)
        for j, kv in zip(layer.source_layers, sources, strict=True):
            for names, tensor in ((PLANS[plan].key_sources, kv.key), (PLANS[plan].value_sources, kv.value)):
                if tensor is not None and j in names(layer.layer):
                    assert tensor.grad is not None and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", ["fusedkv", "yoco++", "patchwork"])
def test_gradients_are_the_same_under_activation_checkpointing(plan: str, reentrant: bool) -> None:
    stack = make_stack(PLANS[plan])
    x = torch.randn(2, 6, HIDDEN, requires_grad=True)
    run(stack, x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in (x, *stack.parameters())]
    for p in (x, *stack.parameters()):
        p.grad = None

    out, kvs = x, []
    for layer in stack:
        # Tensors as direct arguments, which is what the reentrant kind follows.
        flat = [tensor for j in layer.source_layers for tensor in kvs[j]]

        def call(x: Tensor, *flat: Tensor | None, layer=layer) -> tuple[Tensor, Tensor | None, Tensor | None]:
            sources = tuple(KV(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))
            out, kv = layer(x, sources)
            return out, *kv

        new, *kv = checkpoint(call, out, *flat, use_reentrant=reentrant)
        out = out + new
        kvs.append(KV(*kv))
    out.square().sum().backward()
    for p, grad in zip((x, *stack.parameters()), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_parameters_are_only_those_of_the_plan() -> None:
    def shapes(plan: str, i: int, **options: object) -> dict[str, tuple[int, ...]]:
        layer = FusedKVAttention(PLANS[plan], i, HIDDEN, H, G, D, **options)
        return {name: tuple(p.shape) for name, p in layer.named_parameters()}

    square, kv = (H * D, HIDDEN), (G * D, HIDDEN)
    assert shapes("vanilla", 3) == {
        "q_proj.weight": square,
        "k_proj.weight": kv,
        "v_proj.weight": kv,
        "o_proj.weight": (HIDDEN, H * D),
    }
    reader = shapes("fusedkv", 3, qk_norm=True, bias=True)
    assert reader == {
        "q_proj.weight": square,
        "q_proj.bias": (H * D,),
        "o_proj.weight": (HIDDEN, H * D),
        "o_proj.bias": (HIDDEN,),
        "q_norm.weight": (D,),
        "kv_fusion.key_0": (G, D // 2),
        "kv_fusion.key_1": (G, D // 2),
        "kv_fusion.value_0": (G, D),
        "kv_fusion.value_1": (G, D),
    }
    assert shapes("skipv1", 2)["v_proj.weight"] == (D, HIDDEN)
    assert "v_proj.weight" not in shapes("svformer", 2) and "k_proj.weight" in shapes("svformer", 2)
    assert "k_norm.weight" in shapes("svformer", 2, qk_norm=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_shifting_all_positions_changes_nothing(interleaved: bool) -> None:
    stack = make_stack(PLANS["fusedkv"], interleaved=interleaved).double()
    x = torch.randn(1, 7, HIDDEN, dtype=torch.float64)
    tables = [stack[0].rope.cos_sin(torch.arange(7) + shift) for shift in (0, 1000)]
    here, there = (run(stack, x, position_embeddings=table)[0] for table in tables)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)  # cos and sin are fp32


def test_bf16_keeps_fp32_fusion_weights_and_autocast_agrees() -> None:
    stack = make_stack(PLANS["fusedkv"], qk_norm=True)
    x = torch.randn(2, 9, HIDDEN)
    with torch.no_grad():
        exact = run(stack, x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            autocast, kvs = run(stack, x)
        assert kvs[0].key.dtype == kvs[0].value.dtype == torch.bfloat16
        stack.bfloat16()
        low = run(stack, x.bfloat16())[0]
    assert low.dtype == torch.bfloat16 and stack[3].kv_fusion.key_0.dtype == torch.float32
    for out in (autocast, low):
        torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def test_without_rope_there_are_no_positions() -> None:
    layer = FusedKVAttention(PLANS["vanilla"], 0, HIDDEN, H, G, D)
    x = torch.randn(1, 6, HIDDEN)
    with torch.no_grad():
        last, _ = layer(x, last=1)
        shuffled, _ = layer(torch.cat((x[:, [3, 1, 4, 0, 2]], x[:, 5:]), dim=1), last=1)
    assert_near(shuffled, last)


def test_errors_name_what_is_wrong() -> None:
    stack = make_stack(PLANS["fusedkv"])
    x = torch.randn(2, 4, HIDDEN)
    _, kv = stack[0](x)
    with pytest.raises(ValueError, match=r"sources must be the KV of layers \(0, 1\).*layer 3.*got 1"):
        stack[3](x, (kv,))
    with pytest.raises(ValueError, match=r"x must have shape \(B, S, 32\), got \(2, 4, 5\)"):
        stack[0](x[..., :5])
    with pytest.raises(ValueError, match="last must be at least 1"):
        stack[0](x, last=0)
    with pytest.raises(ValueError, match="cache must be for plan 'fusedkv' .*, got one for 'yoco'"):
        stack[0](x, cache=KVCache(PLANS["yoco"], 2, 8, G, D))
    with pytest.raises(ValueError, match="call advance"), torch.no_grad():
        stack[0](x, cache=KVCache(PLANS["fusedkv"], 2, 8, G, D))
    with pytest.raises(ValueError, match="multiple of num_key_value_heads, got 4 and 3"):
        FusedKVAttention(PLANS["vanilla"], 0, HIDDEN, 4, 3, D)
    with pytest.raises(ValueError, match="sliding_window must be"):
        FusedKVAttention(PLANS["vanilla"], 0, HIDDEN, H, G, D, sliding_window=0)
    with pytest.raises(ValueError, match="whole heads"):
        FusedKVAttention(PLANS["skipv1"], 1, HIDDEN, 3, 3, D)


def test_plans_cover_what_they_should() -> None:
    """The by-hand plans really mix before storing, store one side, and cut heads."""
    mixing = {
        name for name, plan in PLANS.items() if any(layer.mixes_before_storing for layer in make_stack(plan))
    }
    assert mixing == {"resformer", "yoco++", "patchwork"}
    # Besides the layers that mix, those whose new keys or values are mixed.
    needing = {name: [layer.needs_positions for layer in make_stack(PLANS[name])] for name in PLANS}
    assert needing["yoco++"] == [True, True, False, False] and needing["patchwork"] == needing["yoco++"]
    assert all(needing["resformer"]) and not any(any(needing[name]) for name in PLANS.keys() - mixing)
    assert max(len(plan.segments(i, G)) for plan in PLANS.values() for i in range(LAYERS)) == 2
