"""Latent attention against the equations of arXiv 2405.04434, for every plan that latents support.

Caches, chunked prefill, absorption and the early exit change only rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded_steps import RecordedSteps
from tiny import LAYERS, PLANS, hybrid, randomise_fusion, tiny_config, tiny_decoder
from torch import Tensor, nn

import fusedkv_ext as fkv
from fusedkv_ext.cache.kv_cache import KV, KVCache
from fusedkv_ext.cli.main import main
from fusedkv_ext.layers import latent_attention as mla
from fusedkv_ext.layers.decoder import Decoder, DecoderConfig
from fusedkv_ext.layers.latent_attention import LatentAttention
from fusedkv_ext.ops.rope import RotaryEmbedding
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment, latent_layers
from fusedkv_ext.testing import assert_close, assert_near

ROUNDINGS = 64  # two paths through four layers differ by a few more roundings than one operation
HIDDEN, H, R, N, D, V = 32, 3, 32, 16, 8, 24
SIZES = dict(kv_lora_rank=R, qk_nope_head_dim=N, qk_rope_head_dim=D, v_head_dim=V)
CANNOT = {"patchwork", "skipkv1"} & set(PLANS)  # they cut keys by heads
ON_LATENTS = [name for name in PLANS if name not in CANNOT]
CUT = [name for name in ON_LATENTS if any(len(layer.values) > 1 for layer in PLANS[name].layers)]
WHOLE = [name for name in ON_LATENTS if name not in CUT]
VARIANTS = {
    "half-split": {},
    "interleaved, window": dict(interleaved=True, sliding_window=3),
    "low-rank queries, biases": dict(q_lora_rank=16, bias=True),
}
# As fields of DecoderConfig.
LATENT = dict(SIZES, head_dim=None)
MODELS = {
    "plain": {},
    "windows, interleaved": dict(rope_interleaved=True, attention_bias=True),
    "low-rank queries": dict(q_lora_rank=16, num_attention_heads=3, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def some_ids(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape)


def make_model(plan: str, variant: str = "plain", **changes: object) -> Decoder:
    windows = latent_hybrid(plan) if "windows" in variant else {}
    return tiny_decoder(plan, **LATENT, **MODELS[variant], **windows, **changes)


def latent_hybrid(plan: str) -> dict[str, object]:
    """``hybrid``, where layers read by others on latents see everything."""
    rows = latent_layers(PLANS[plan])
    read = {j for i, row in enumerate(rows) for j in row.read_layers - {i}}
    types = [("sliding" if i % 2 and i not in read else "full") + "_attention" for i in range(len(rows))]
    return dict(hybrid(plan), layer_types=tuple(types))


def make_stack(
    plan: CachePlan, *, interleaved: bool = False, sizes: dict[str, int] = SIZES, **options: object
) -> nn.ModuleList:
    rope = RotaryEmbedding(sizes["qk_rope_head_dim"], interleaved=interleaved)
    layers = range(plan.num_layers)
    stack = nn.ModuleList(LatentAttention(plan, i, HIDDEN, H, rope=rope, **sizes, **options) for i in layers)
    randomise_fusion(stack)
    for parameter in stack.parameters():
        if parameter.dim() == 1:  # norms and biases, away from one and zero
            nn.init.uniform_(parameter, 0.5, 1.5)
    return stack


def run(stack: nn.ModuleList, x: Tensor, cache: KVCache | None = None, **options: object) -> Tensor:
    """x + attention, layer after layer."""
    kvs: list[KV] = []
    for layer in stack:
        out, kv = layer(x, tuple(kvs[j] for j in layer.source_layers), cache=cache, **options)
        x = x + out
        kvs.append(kv)
    return x


# ---- the equations -------------------------------------------------------------------------------------


def rotated(x: Tensor, interleaved: bool) -> Tensor:
    """RoPE of (B, T, D): the pair j of the token at t is a complex number, turned by t 10000^(-2j/D)."""
    pairs = torch.arange(D // 2)
    first, second = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + D // 2)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * 10000.0 ** (-2 * pairs.double() / D)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    out = torch.empty_like(x)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    y = x @ module.weight.to(x.dtype).T
    return y if module.bias is None else y + module.bias.to(x.dtype)


def normed(module: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight.to(x.dtype)


class Stored:
    """What a layer keeps of the equations: c (B, T, r) and k_pe (B, T, d), either None."""

    def __init__(self, c: Tensor | None, k_pe: Tensor | None) -> None:
        self.c, self.k_pe = c, k_pe


def own(layer: LatentAttention, x: Tensor, stores_rope: bool) -> Stored:
    """Equations 9 and 15: c = norm(W_dkv x), k_pe = RoPE(W_kr x)."""
    if layer.kv_a_proj_with_mqa is None:
        return Stored(None, None)
    both = linear(layer.kv_a_proj_with_mqa, x)
    width = both.shape[-1] - (D if stores_rope else 0)
    k_pe = rotated(both[..., width:], layer.interleaved) if stores_rope else None
    return Stored(normed(layer.kv_a_layernorm, both[..., :width]), k_pe)


def attended(layer: LatentAttention, x: Tensor, k_pe: Tensor, key_c: Tensor, value_c: Tensor) -> Tensor:
    """Equations 10, 11, 14 and 16 to 19, one head after the other."""
    q = x
    if layer.q_lora_rank is not None:
        q = normed(layer.q_a_layernorm, linear(layer.q_a_proj, x))
    q = linear(layer.q_proj if layer.q_lora_rank is None else layer.q_b_proj, q)
    tokens, up = x.shape[1], layer.kv_b_proj.weight.to(x.dtype)
    visible = torch.ones(tokens, tokens).tril().bool()
    if layer.window_size[0] >= 0:
        visible &= ~torch.ones(tokens, tokens).tril(-layer.window_size[0] - 1).bool()
    outs = []
    for h in range(H):
        q_nope, q_pe = q[..., h * (N + D) :][..., :N], q[..., h * (N + D) + N :][..., :D]
        w_uk, w_uv = up[h * (N + V) :][:N], up[h * (N + V) + N :][:V]
        scores = q_nope @ (key_c @ w_uk.T).mT + rotated(q_pe, layer.interleaved) @ k_pe.mT
        scores = (scores / math.sqrt(N + D)).masked_fill(~visible, -math.inf)
        outs.append(torch.softmax(scores, -1) @ (value_c @ w_uv.T))
    return linear(layer.o_proj, torch.cat(outs, -1))


def summed(tensors: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    if weights is None:
        return sum(tensors)
    return sum(w.to(x.dtype) * x for w, x in zip(weights.squeeze(1), tensors, strict=True))


def by_definition(stack: nn.ModuleList, x: Tensor, plan: CachePlan) -> Tensor:
    """Plans of whole latents: keys are sums of [k_pe ; c], values sums of c, over the plan's sources."""
    stored: list[Stored] = []
    for i, layer in enumerate(stack):
        (key,), (value,) = plan.layers[i].keys, plan.layers[i].values
        stored.append(own(layer, x, i in key.sources))
        fusion = layer.kv_fusion
        key_weights = None if fusion is None else fusion.key_weights()
        value_weights = None if fusion is None else fusion.value_weights()
        key_both = [torch.cat((stored[j].k_pe, stored[j].c), -1) for j in key.sources]
        both = summed(key_both, key_weights)
        if i in key.sources and i in value.sources and len(key.sources) > 1:  # one mix, stored: YOCO++
            stored[i] = Stored(both[..., D:], both[..., :D])
            value_c = both[..., D:]
        else:
            value_c = summed([stored[j].c for j in value.sources], value_weights)
        x = x + attended(layer, x, both[..., :D], both[..., D:], value_c)
    return x


def skipv1_by_definition(stack: nn.ModuleList, x: Tensor) -> Tensor:
    """SkipV1Former on MLA: every latent is [own share ; layer 1's share], that of layer 1 its share alone."""
    first: Tensor | None = None
    for layer in stack:
        mine = own(layer, x, True)
        assert mine.c is not None and mine.k_pe is not None
        c = mine.c if first is None else torch.cat((mine.c, first), -1)
        first = mine.c if first is None else first
        x = x + attended(layer, x, mine.k_pe, c, c)
    return x


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", WHOLE)
def test_every_plan_is_its_equations(plan: str, variant: str) -> None:
    stack, x = make_stack(PLANS[plan], **VARIANTS[variant]), torch.randn(2, 7, HIDDEN)
    with torch.no_grad():
        exact = by_definition(stack, x.double(), PLANS[plan])
        assert_close(run(stack, x), exact, by_definition(stack, x, PLANS[plan]))


@pytest.mark.parametrize(("skip", "widths"), [("1/2", (16, 16)), ("1/4", (8, 24)), ("3/4", (24, 8))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_skipv1_puts_a_share_of_the_latent_of_the_first_layer_into_all_others(
    variant: str, skip: str, widths: tuple[int, int]
) -> None:
    stack = make_stack(CachePlan.named("skipv1", LAYERS, skip=skip), **VARIANTS[variant])
    assert [layer.kv_a_layernorm.weight.shape[0] for layer in stack[:2]] == list(widths)
    x = torch.randn(2, 7, HIDDEN)
    with torch.no_grad():
        exact = skipv1_by_definition(stack, x.double())
        assert_close(run(stack, x), exact, skipv1_by_definition(stack, x))


def test_a_reading_layer_may_take_whole_latents_next_to_cut_ones() -> None:
    """Keys of layer 2 from layer 1, whose latent is [own ; layer 0's]; layer 2 stores half of c, no k_pe."""
    halves = (Fraction(0), Fraction(1, 2)), (Fraction(1, 2), Fraction(1))
    cut = [(Segment((i,), halves[0]), Segment((0,), halves[1])) for i in range(3)]
    own_0 = LayerPlan(Segment((0,)), Segment((0,)))
    plan = CachePlan("cut", (own_0, LayerPlan(Segment((1,)), cut[1]), LayerPlan(Segment((1,)), cut[2])))
    stack, x = make_stack(plan), torch.randn(1, 5, HIDDEN)

    def oracle(x: Tensor) -> Tensor:
        zero = own(stack[0], x, True)
        x = x + attended(stack[0], x, zero.k_pe, zero.c, zero.c)
        one = own(stack[1], x, True)
        c1 = torch.cat((one.c, zero.c), -1)
        x = x + attended(stack[1], x, one.k_pe, c1, c1)
        c2 = torch.cat((own(stack[2], x, False).c, zero.c), -1)
        return x + attended(stack[2], x, one.k_pe, c1, c2)

    with torch.no_grad():
        assert_close(run(stack, x), oracle(x.double()), oracle(x))
        cache = KVCache(plan, 1, 5, 1, R, rope_dim=D)
        cache.advance(5)
        assert_near(run(stack, x, cache), run(stack, x), ROUNDINGS)
    assert cache.nbytes == 5 * 4 * (3 * R // 2 + 2 * D)
    assert cache.nbytes == 5 * plan.latent_bytes_per_token(R, D, torch.float32)


def test_a_latent_that_keys_are_read_of_stays_whole() -> None:
    """Others read half of the values of layer 0, but layer 2 all of its keys."""
    cut = (Segment((1,), ("0", "1/2")), Segment((0,), ("1/2", "1")))
    rows = (Segment((0,)), Segment((0,))), (Segment((1,)), cut), (Segment((0,)), Segment((2,)))
    plan = CachePlan("cut", tuple(LayerPlan(*row) for row in rows))
    layers = latent_layers(plan)
    assert [layer.stored_channels(R) for layer in layers] == [R, R // 2, R]
    assert [layer.stores_rope for layer in layers] == [True, True, False]
    stack, x = make_stack(plan), torch.randn(1, 5, HIDDEN)

    def oracle(x: Tensor) -> Tensor:
        zero = own(stack[0], x, True)
        x = x + attended(stack[0], x, zero.k_pe, zero.c, zero.c)
        one = own(stack[1], x, True)
        c1 = torch.cat((one.c, zero.c[..., R // 2 :]), -1)
        x = x + attended(stack[1], x, one.k_pe, c1, c1)
        return x + attended(stack[2], x, zero.k_pe, zero.c, own(stack[2], x, False).c)

    with torch.no_grad():
        assert_close(run(stack, x), oracle(x.double()), oracle(x))


# ---- which plans, and what they cost -------------------------------------------------------------------


def test_plans_that_cut_keys_by_heads_are_refused_with_the_reason() -> None:
    assert CANNOT and len(ON_LATENTS) == len(PLANS) - len(CANNOT)
    for name in CANNOT:
        with pytest.raises(ValueError, match=rf"does not support plan '{name}': .* one rotated key"):
            make_model(name)


@pytest.mark.parametrize(
    ("last_two", "message"),
    [
        (
            [LayerPlan(Segment((1,)), Segment((0, 1))), LayerPlan(Segment((1,)), Segment((1,)))],
            "layer 1 mixes its values before it stores them and layer 2 reads the mix",
        ),
        (
            [
                LayerPlan(Segment((1,), fusion=Fusion("scalar")), Segment((0, 1))),
                LayerPlan(Segment((2,)), Segment((2,))),
            ],
            r"keys mixed of layers \(1,\) and values mixed of \(0, 1\)",
        ),
        (
            [
                LayerPlan(Segment((1,)), (Segment((1,), ("0", "1/2")), Segment((0,), ("1/2", "1")))),
                LayerPlan(Segment((0, 1)), Segment((2,))),
            ],
            "layer 2 sums over sources .*; a latent can be split or fused, not both",
        ),
    ],
    ids=["mix of values read", "mixes of other sources", "cut and fused"],
)
def test_what_one_latent_cannot_be_is_refused(last_two: list[LayerPlan], message: str) -> None:
    plan = CachePlan("odd", (LayerPlan(Segment((0,)), Segment((0,))), *last_two))
    with pytest.raises(ValueError, match=f"does not support plan 'odd': .*{message}"):
        latent_layers(plan)


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("plan", ON_LATENTS)
def test_bytes_per_token_are_those_of_the_cache(plan: str, page_size: int | None) -> None:
    cache = make_model(plan).make_cache(3, 16, page_size=page_size)
    assert cache.nbytes == 3 * 16 * PLANS[plan].latent_bytes_per_token(R, D, torch.float32)


def test_bytes_per_token_of_the_skipv1_paper() -> None:
    """Table 2 of arXiv 2510.16807: 24 layers, d_c = 256, d_R = 32, two bytes."""
    sizes = (256, 32, torch.bfloat16)
    for name, expected in (("vanilla", 13824), ("skipv1", 7680)):
        plan = CachePlan.named(name, 24)
        assert plan.latent_bytes_per_token(*sizes) == expected
        cache = KVCache(plan, 2, 10, 1, 256, dtype=torch.bfloat16, rope_dim=32)
        assert cache.nbytes == 2 * 10 * expected
    assert CachePlan.named("fusedkv", 24).latent_bytes_per_token(*sizes) == 13824 // 2


def test_names_are_those_of_deepseek_v3() -> None:
    names = set(make_model("fusedkv", q_lora_rank=16).model.layers[0].self_attn.state_dict())
    queries = {"q_a_proj", "q_a_layernorm", "q_b_proj"}
    latent = {"kv_a_proj_with_mqa", "kv_a_layernorm"}
    assert names == {f"{name}.weight" for name in queries | latent | {"kv_b_proj", "o_proj"}}
    reader = make_model("fusedkv").model.layers[3].self_attn
    modules = {name.split(".")[0] for name in reader.state_dict()}
    assert modules == {"q_proj", "kv_b_proj", "o_proj", "kv_fusion"}
    assert reader.kv_fusion.key_0.shape == (1, R + D // 2) and reader.kv_fusion.value_0.shape == (1, R)


# ---- caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("plan", ON_LATENTS)
def test_cached_in_pieces_and_left_padded_are_the_full_pass(
    plan: str, variant: str, page_size: int | None
) -> None:
    model = make_model(plan, variant)
    rows = [some_ids(n + 4) for n in (9, 1, 5)]
    with torch.no_grad():
        full = [model(row[None])[0] for row in rows]
        # Prompts of 9, 1 and 5 tokens padded on the left, then two tokens, then one by one.
        prompts = torch.stack([F.pad(row[:-4], (9 - len(row[:-4]), 0), value=7) for row in rows])
        cache = poisoned(model.make_cache(3, 16, page_size=page_size))
        first = model(prompts, cache=cache, lengths=[9, 1, 5])
        rest = torch.stack([row[-4:] for row in rows])
        steps = [model(piece, cache=cache) for piece in rest.split([2, 1, 1], dim=1)]
    cached = torch.cat((first, *steps), dim=1)
    for b, logits in enumerate(full):
        assert_near(cached[b, -len(logits) :], logits, ROUNDINGS)


def poisoned(cache: KVCache) -> KVCache:
    """What nobody wrote is NaN."""
    for layer in range(LAYERS):
        for side in (cache._keys[layer], cache._values[layer]):
            if side is not None:
                side.fill_(math.nan)
    return cache


def absorbed(stack: nn.ModuleList, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in stack:
        layer.absorbs_up_to = math.inf


def absorbed_in_blocks(stack: nn.ModuleList, monkeypatch: pytest.MonkeyPatch) -> None:
    absorbed(stack, monkeypatch)
    monkeypatch.setattr(mla, "native_head_dim", lambda *_: False)
    monkeypatch.setattr(mla, "_BLOCK", 5)


def up_projected(stack: nn.ModuleList, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in stack:
        layer.absorbs_up_to = 0


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", [absorbed, absorbed_in_blocks, up_projected])
@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "skipv1", "yoco++"])
def test_absorbed_is_up_projected(
    plan: str, way: Callable, variant: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, rows = make_stack(PLANS[plan], **VARIANTS[variant]), [torch.randn(n, HIDDEN) for n in (13, 6)]
    way(stack, monkeypatch)
    with torch.no_grad():
        full = [run(stack, row[None])[0] for row in rows]
        cache = poisoned(KVCache(PLANS[plan], 2, 16, 1, R, rope_dim=D, page_size=page_size))
        cache.advance([10, 3])
        prompts = torch.stack([F.pad(row[:-3], (0, 0, 13 - len(row), 0)) for row in rows])
        first = run(stack, prompts, cache)
        steps = []
        for new in torch.stack([row[-3:] for row in rows]).split([2, 1], dim=1):
            cache.advance(new.shape[1])
            steps.append(run(stack, new, cache))
    cached = torch.cat((first, *steps), dim=1)
    for b, out in enumerate(full):
        assert_near(cached[b, -len(out) :], out, ROUNDINGS)


def test_rows_before_a_sequence_get_nothing() -> None:
    """Their attention is zero: what comes out is the bias alone, whichever way it is computed."""
    for plan, cap in (("vanilla", math.inf), ("skipv1", math.inf), ("vanilla", 0)):
        stack = make_stack(PLANS[plan], bias=True)[:1]
        stack[0].absorbs_up_to = cap
        cache = KVCache(PLANS[plan], 2, 8, 1, R, rope_dim=D)
        cache.advance([5, 2])
        with torch.no_grad():
            out = stack[0](torch.randn(2, 5, HIDDEN), cache=cache)[0]
        assert torch.equal(out[1, :3], stack[0].o_proj.bias.expand(3, -1).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [None, 16], ids=["contiguous", "paged"])
def test_latents_wider_than_the_kernels_take(dtype: torch.dtype, page_size: int | None) -> None:
    """DeepSeek's r = 512 and d = 64, over more tokens than one block: against the up-projected pass."""
    sizes = dict(kv_lora_rank=512, qk_nope_head_dim=16, qk_rope_head_dim=64, v_head_dim=16)
    plan = CachePlan.named("fusedkv", 2)
    stack = make_stack(plan, sizes=sizes).to(dtype)
    x = torch.randn(2, 700, HIDDEN, dtype=dtype)
    with torch.no_grad():
        cache = KVCache(plan, 2, 700, 1, 512, dtype=dtype, rope_dim=64, page_size=page_size)
        cache.advance(699)
        assert 1 < stack[0].absorbs_up_to < 699  # the prompt is up-projected, the token absorbed
        run(stack, x[:, :-1], cache)
        cache.advance(1)
        step = run(stack, x[:, -1:], cache)
        same_maths = run(stack, x)[:, -1:]
        exact = run(stack.double(), x.double())[:, -1:]
    assert_close(step, exact, same_maths)


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("plan", ["fusedkv", "skipv1"])
def test_crop_reorder_and_free(plan: str, page_size: int | None) -> None:
    model, ids, new = make_model(plan), some_ids(3, 6), some_ids(3, 3)
    cache, index = model.make_cache(3, 12, page_size=page_size), torch.tensor([2, 0, 2])
    with torch.no_grad():
        model(torch.cat((ids, new), dim=1), cache=cache)
        cache.crop(6)
        cache.reorder(index)
        out = torch.cat([model(new[:, i : i + 1], cache=cache) for i in range(3)], dim=1)
        assert_near(out, model(torch.cat((ids[index], new), dim=1))[:, -3:], ROUNDINGS)
        cache.free(1)
        again = model(new[:, :2], cache=cache)
        assert_near(again[1], model(new[1:2, :2])[0], ROUNDINGS)


@pytest.mark.parametrize("plan", ON_LATENTS)
def test_early_exit_is_exact(plan: str) -> None:
    model, ids = make_model(plan), some_ids(2, 13)
    rows: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[1]))
    with torch.no_grad():
        full = model(ids)
        for keep in (1, 3):
            assert_near(model(ids, logits_to_keep=keep), full[:, -keep:], ROUNDINGS)
            cache = model.make_cache(2, 16)
            assert_near(model(ids, cache=cache, logits_to_keep=keep), full[:, -keep:], ROUNDINGS)
    # The last layer reads or is the one that exits: never does it see more rows than are kept.
    assert rows == [13, 1, 1, 3, 3]


@pytest.mark.parametrize("plan", ON_LATENTS)
def test_generation_with_and_without_a_cache(plan: str) -> None:
    model, prompts = make_model(plan), [some_ids(n) for n in (7, 2, 4)]
    slow = model.generate(prompts, 6, use_cache=False)
    assert torch.equal(model.generate(prompts, 6), slow)
    assert torch.equal(model.generate(prompts, 6, page_size=4), slow)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("plan", ["fusedkv", "skipv1"])
def test_a_captured_step_serves_other_lengths(
    plan: str,
    blocks: bool,
    recorded: RecordedSteps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompts = make_model(plan), [some_ids(n) for n in (5, 2)]
    monkeypatch.setattr(mla, "_capturing", lambda _cache: True)
    if blocks:
        monkeypatch.setattr(mla, "native_head_dim", lambda *_: False)
    plain = model.generate(prompts, 20, cuda_graph=False)
    assert torch.equal(model.generate(prompts, 20, page_size=4), plain)
    assert recorded.captures == 1


# ---- training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ON_LATENTS)
def test_the_loss_trains_everything(plan: str) -> None:
    model, ids = make_model(plan, "low-rank queries"), some_ids(2, 9)
    model(ids, labels=ids)[1].backward()
    learnable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    untouched = [name for name, p in learnable.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not untouched


@pytest.mark.parametrize("plan", ON_LATENTS)
def test_gradients_reach_every_source(plan: str) -> None:
    stack, x = make_stack(PLANS[plan]), torch.randn(1, 6, HIDDEN)
    kvs: list[KV] = []
    for layer in stack:
        given = [KV(kvs[j].key.detach().requires_grad_(), None) for j in layer.source_layers]
        out, kv = layer(x, given)
        kvs.append(kv)
        out.square().sum().backward()
        for j, source in zip(layer.source_layers, given, strict=True):
            assert source.key.grad is not None and source.key.grad.abs().sum() > 0, (plan, layer.layer, j)


def test_gradients_are_those_of_the_equations() -> None:
    for plan in ("fusedkv", "skipv1"):
        stack, x = make_stack(PLANS[plan]).double(), torch.randn(1, 5, HIDDEN, dtype=torch.float64)
        oracle = skipv1_by_definition(stack, x) if plan == "skipv1" else by_definition(stack, x, PLANS[plan])
        parameters = [parameter for parameter in stack.parameters() if parameter.requires_grad]
        probe = torch.randn_like(oracle)
        expected = torch.autograd.grad((oracle * probe).sum(), parameters)
        got = torch.autograd.grad((run(stack, x) * probe).sum(), parameters)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # fusion weights and sums of them are fp32


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("plan", ["fusedkv", "skipv1", "yoco++"])
def test_shifting_all_positions_changes_nothing(plan: str, interleaved: bool) -> None:
    stack, x = make_stack(PLANS[plan], interleaved=interleaved), torch.randn(2, 9, HIDDEN)
    rope = stack[0].rope

    def at(start: int) -> Tensor:
        return run(stack, x, position_embeddings=rope.cos_sin(torch.arange(start, start + 9)))

    with torch.no_grad():
        assert_near(at(1000), at(0), ROUNDINGS)
        if plan == "fusedkv":  # and the weights of the pairs are what keeps it so
            for layer in stack:
                if layer.kv_fusion is not None:
                    weights = torch.rand(2, 1, R + D)
                    layer.kv_fusion.key_weights = lambda segment, weights=weights: weights
            assert (at(1000) - at(0)).abs().max() > 1e-4


# ---- the rest of the house -----------------------------------------------------------------------------


def test_experts_and_windows_go_with_latents() -> None:
    model = make_model("fusedkv", "windows, interleaved", num_experts=4).eval()
    ids = some_ids(2, 10)
    with torch.no_grad():
        cache = model.make_cache(2, 10)
        pieces = [model(piece, cache=cache) for piece in ids.split([6, 1, 3], dim=1)]
        assert_near(torch.cat(pieces, dim=1), model(ids), ROUNDINGS)


def test_windows_are_checked_for_the_layers_that_latents_are_read_of() -> None:
    """ResFormer mixes when it reads here: a full layer needs more of layer 0 than a window keeps."""
    windows = dict(sliding_window=4, layer_types=("sliding_attention", *["full_attention"] * (LAYERS - 1)))
    assert tiny_config("resformer", **windows).sliding_window == 4
    with pytest.raises(ValueError, match="layer 1 has full attention but reads the cache of layer 0"):
        tiny_config("resformer", **LATENT, **windows)


def test_blocks_are_float32_under_autocast() -> None:
    """The same bits with and without it, once the queries have its dtype."""
    layer = make_stack(PLANS["skipv1"])[1].bfloat16()
    cache = KVCache(PLANS["skipv1"], 2, 9, 1, R, dtype=torch.bfloat16, rope_dim=D)
    for stored in cache._owned:
        stored.normal_()
    cache.advance(9)
    q_nope, q_pe = (torch.randn(2, 1, H, width).bfloat16() for width in (N, D))
    with torch.no_grad():
        plain = layer._attend_absorbed(q_nope, q_pe, cache, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer._attend_absorbed(q_nope, q_pe, cache, None), plain)


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1"])
def test_autocast_and_bf16(plan: str) -> None:
    model, ids = make_model(plan), some_ids(2, 8)
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            cache = model.make_cache(2, 8)
            assert cache.dtype == torch.bfloat16
            logits = torch.cat((model(ids[:, :7], cache=cache), model(ids[:, 7:], cache=cache)), dim=1)
        torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.15)
        model.bfloat16()
        if plan == "fusedkv":
            assert model.model.layers[3].self_attn.kv_fusion.key_0.dtype == torch.float32
        torch.testing.assert_close(model(ids).float(), exact, rtol=0.05, atol=0.3)


def test_checkpoints_and_configs_survive(tmp_path: Path) -> None:
    model, ids = make_model("skipv1", "low-rank queries"), some_ids(2, 8)
    assert DecoderConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    fkv.save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(fkv.load_pretrained(tmp_path)(ids), model(ids))


def test_the_command_line_says_what_latents_cost(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--kv-lora-rank", "256", "--rope-dim", "32"]
    assert main(["plan", "yoco", "--layers", "24", *sizes]) == 0
    assert "6,912 bytes per token with latents of 256 and rotated keys of 32" in capsys.readouterr().out
    assert main(["plan", "skipv1", "--layers", "24", "--kv-lora-rank", "13"]) == 2
    assert "kv_lora_rank must be a multiple of 2" in capsys.readouterr().err


def test_the_trainer_builds_it() -> None:
    from fusedkv_ext.errors import ConfigError
    from fusedkv_ext.lab.comparison import cache_bytes_per_token
    from fusedkv_ext.training.config import TrainConfig
    from fusedkv_ext.training.trainer import build_model

    sizes = {f"model.{name}": size for name, size in SIZES.items()}
    small = {"model.hidden_size": 32, "model.num_hidden_layers": 4, "model.plan": "yoco"}
    config = TrainConfig().updated((sizes | small).items())
    model = build_model(config, 61)
    assert cache_bytes_per_token(config, torch.float32) == model.make_cache(1, 1).nbytes
    assert model.config.kv_lora_rank == R and isinstance(model.model.layers[0].self_attn, LatentAttention)
    with pytest.raises(ConfigError, match="v_head_dim must be given with kv_lora_rank"):
        build_model(TrainConfig().updated((sizes | small | {"model.v_head_dim": None}).items()), 61)


def test_yarn_scales_the_scores_as_deepseek_does() -> None:
    scaling = dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0)
    rope = RotaryEmbedding(D, scaling=dict(scaling, mscale_all_dim=1.0))
    layer = LatentAttention(PLANS["vanilla"], 0, HIDDEN, H, rope=rope, **SIZES)
    assert layer.scale == pytest.approx((N + D) ** -0.5 * (0.1 * math.log(40) + 1) ** 2)
    plain = LatentAttention(PLANS["vanilla"], 0, HIDDEN, H, rope=RotaryEmbedding(D, scaling=scaling), **SIZES)
    assert plain.scale == pytest.approx((N + D) ** -0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": -8}, "kv_lora_rank must be a positive int, got -8"),
        ({"kv_lora_rank": 25, "plan": "skipv1"}, "kv_lora_rank must be a multiple of 2, got 25"),
        ({"qk_nope_head_dim": None}, "qk_nope_head_dim must be given with kv_lora_rank"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim must be a positive int, got 0"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, got 7"),
        ({"q_lora_rank": 0}, "q_lora_rank must be a positive int or None, got 0"),
        ({"head_dim": 16}, "head_dim must be None or qk_rope_head_dim=8 with kv_lora_rank, got 16"),
        ({"kv_lora_rank": None}, "qk_nope_head_dim must be None without kv_lora_rank"),
    ],
)
def test_bad_configs_name_the_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**({"plan": "fusedkv"} | LATENT | changes))


def test_bad_calls_say_what_is_wrong() -> None:
    plan = PLANS["yoco"]
    stack, x = make_stack(plan), torch.randn(1, 4, HIDDEN)
    with pytest.raises(ValueError, match=r"sources must be the KV of layers \(1,\)"):
        stack[3](x)
    ordinary = KVCache(plan, 1, 8, 1, R)
    with pytest.raises(ValueError, match="cache must have latents with rope_dim=8, got rope_dim=None"):
        stack[0](x, cache=ordinary)
    cache = KVCache(plan, 1, 8, 1, R, rope_dim=D)
    cache.advance(4)
    with pytest.raises(ValueError, match="not differentiable"):
        stack[0](x, cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="must get the 4 rows of this step, got 3"):
        stack[0](x[:, :3], cache=cache)
    with pytest.raises(ValueError, match="num_kv_heads must be 1 and rope_dim even"):
        KVCache(plan, 1, 8, 2, R, rope_dim=D)
    with pytest.raises(ValueError, match="rope must have qk_rope_head_dim=8 channels, got 16"):
        LatentAttention(plan, 0, HIDDEN, H, rope=RotaryEmbedding(16), **SIZES)
    with pytest.raises(ValueError, match="num_attention_heads must be at least 1, got 0"):
        LatentAttention(plan, 0, HIDDEN, 0, **SIZES)
    with pytest.raises(ValueError, match="sliding_window must be None or at least 1"):
        LatentAttention(plan, 0, HIDDEN, H, sliding_window=0, **SIZES)
