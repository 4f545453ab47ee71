"""Fusion weights: shapes, pairs, initial values, precision, the kept expansion; and the optimizer groups."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_decoder
from torch import nn

from fusedkv_ext.layers.fusion import FusionWeights, param_groups
from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment

G, D = 2, 8


def own(i: int) -> LayerPlan:
    return LayerPlan(Segment((i,)), Segment((i,)))


def two_layers(keys, values) -> CachePlan:
    """Layer 1 with the given segments; a Fusion stands for one segment that reads layer 0 and mixes with
    its own."""
    sides = [Segment((0, 1), fusion=side) if isinstance(side, Fusion) else side for side in (keys, values)]
    return CachePlan("two", [own(0), LayerPlan(*sides)])


def fusedkv(**options) -> FusionWeights:
    return FusionWeights(CachePlan.named("fusedkv", 4, **options), 3, G, D)


def fused(sources: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_j weights[j] (.) sources[j] of (m, B, T, G, D) by the definition."""
    return (weights[:, None, None].to(sources.dtype) * sources).sum(0)


# --- Shapes and pairs ---


@pytest.mark.parametrize(
    ("granularity", "key", "value", "tied_value"),
    [
        ("channel", (G, D // 2), (G, D), (G, D // 2)),
        ("shared_channel", (1, D // 2), (1, D), (1, D // 2)),
        ("head", (G, 1), (G, 1), (G, 1)),
        ("scalar", (1, 1), (1, 1), (1, 1)),
    ],
)
def test_shapes(granularity, key, value, tied_value):
    for tie, expected in ((False, value), (True, tied_value)):
        weights = fusedkv(granularity=granularity, tie_values=tie, init="normal")
        shapes = {name: tuple(p.shape) for name, p in weights.named_parameters()}
        assert shapes == {"key_0": key, "key_1": key, "value_0": expected, "value_1": expected}
        for side in (weights.key_weights(), weights.value_weights()):
            assert side.shape == (2, G, D) and side.dtype == torch.float32
        if granularity in ("shared_channel", "scalar"):
            assert torch.equal(weights.key_weights()[:, 0], weights.key_weights()[:, 1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_follow_the_rope_convention(interleaved):
    weights = FusionWeights(CachePlan.named("fusedkv", 4), 3, G, D, interleaved)
    with torch.no_grad():
        weights.key_1.copy_(torch.arange(8.0).reshape(2, 4))
    rows = [0, 0, 1, 1, 2, 2, 3, 3] if interleaved else [0, 1, 2, 3, 0, 1, 2, 3]
    assert weights.key_weights()[1].tolist() == [rows, [x + 4 for x in rows]]


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rope_leaves_the_other_channels_free(interleaved):
    weights = FusionWeights(CachePlan.named("fusedkv", 4), 3, 1, D, interleaved, rotary_dim=4)
    assert weights.key_0.shape == (1, 6) and weights.value_0.shape == (1, D)
    with torch.no_grad():
        weights.key_0.copy_(torch.arange(6.0))
    pairs = [0, 0, 1, 1] if interleaved else [0, 1, 0, 1]
    assert weights.key_weights()[0, 0].tolist() == [*pairs, 2, 3, 4, 5]


def test_tied_values_pair_as_keys_do():
    weights = FusionWeights(CachePlan.named("fusedkv", 4, tie_values=True, init="normal"), 3, G, D, True)
    pairs = weights.value_weights().unflatten(-1, (-1, 2))
    assert torch.equal(pairs[..., 0], pairs[..., 1])


def test_layers_without_fusion_have_no_parameters():
    for name, layer in (("fusedkv", 1), ("fusedkv-lite", 3), ("vanilla", 2)):
        weights = FusionWeights(CachePlan.named(name, 4), layer, G, D)
        assert not list(weights.parameters())
        assert weights.key_weights() is None and weights.value_weights() is None


def test_segments_have_weights_of_their_own():
    halves = [
        ((0, "1/4"), "channel", (1.0, 2.0)),
        (("1/4", "1/2"), None, None),
        (("1/2", 1), "head", (3.0, 4.0)),
    ]
    values = tuple(Segment((0, 1), h, g and Fusion(g, init)) for h, g, init in halves)
    weights = FusionWeights(two_layers(Segment((1,)), values), 1, 4, D)
    shapes = {name: tuple(p.shape) for name, p in weights.named_parameters()}
    assert shapes == {"value_s0_0": (1, D), "value_s0_1": (1, D), "value_s2_0": (2, 1), "value_s2_1": (2, 1)}
    assert weights.key_weights(0) is None and weights.value_weights(1) is None
    assert weights.value_weights(0).tolist() == [[[1.0] * D], [[2.0] * D]]
    assert weights.value_weights(2).tolist() == [[[3.0] * D] * 2, [[4.0] * D] * 2]


def test_segments_that_the_other_side_splits():
    """Weights belong to resolved segments: keys of one segment, values of two, so the keys' weights come in
    two parts."""
    values = (Segment((1,), (0, "1/4")), Segment((0,), ("1/4", 1), Fusion("shared_channel", (2.0,))))
    weights = FusionWeights(two_layers(Fusion("head", (0.0, 1.0)), values), 1, 4, D)
    with torch.no_grad():
        weights.key_0.copy_(torch.arange(4.0)[:, None])
    for _ in range(2):  # the second time from the kept tensors
        with torch.no_grad():
            low, high = weights.key_weights(0), weights.key_weights(1)
        assert low.shape == (2, 1, D) and high.shape == (2, 3, D)
        assert low[0, :, 0].tolist() == [0.0] and high[0, :, 0].tolist() == [1.0, 2.0, 3.0]
        assert weights.value_weights(0) is None and weights.value_weights(1).shape == (1, 3, D)


def test_a_lone_fused_segment_keeps_the_plain_names():
    values = (Segment((1,), (0, "1/2")), Segment((0,), ("1/2", 1), Fusion("head", (2.0,))))
    weights = FusionWeights(two_layers(Segment((1,)), values), 1, 4, D)
    assert [name for name, _ in weights.named_parameters()] == ["value_0"]
    assert weights.value_weights(1).shape == (1, 2, D)


def test_shapes_that_cannot_be():
    half = (Segment((0, 1), (0, "1/2"), Fusion()), Segment((1,), ("1/2", 1)))
    with pytest.raises(ValueError, match="layer 1 keys: num_kv_heads must be a multiple of 2, got 3"):
        FusionWeights(two_layers(half, Segment((1,))), 1, 3, D)
    with pytest.raises(ValueError, match="rotary_dim must be even and in 0..head_dim=8, got 10"):
        FusionWeights(CachePlan.named("fusedkv", 4), 3, G, D, rotary_dim=10)


# --- Values ---


def test_lite_start_equals_fusedkv_lite_exactly():
    weights = fusedkv()
    keys, values = torch.randn(2, 2, 3, 5, G, D)  # sources: layer 0 and layer 1, the last that stores
    assert torch.equal(fused(keys, weights.key_weights()), keys[1])
    assert torch.equal(fused(values, weights.value_weights()), values[0])
    lite = CachePlan.named("fusedkv-lite", 4)
    plan = CachePlan.named("fusedkv", 4)
    assert plan.key_sources(3)[1:] == lite.key_sources(3) and plan.value_sources(3)[:1] == lite.value_sources(
        3
    )


def test_multiplier_scales_the_parameter_and_not_the_start():
    plain, scaled = fusedkv(init="half"), fusedkv(init="half", multiplier=35.0)
    torch.testing.assert_close(scaled.key_weights(), plain.key_weights())
    torch.testing.assert_close(scaled.value_0, plain.value_0 / 35)
    scaled.value_weights().sum().backward()
    assert torch.equal(scaled.value_0.grad, torch.full((G, D), 35.0))


def test_normal_start_is_standard_normal_and_seeded():
    plan = CachePlan.named("fusedkv", 4, init="normal", multiplier=4.0)
    weights = FusionWeights(plan, 3, 32, 128)
    first = weights.value_weights().detach().clone()
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    draws = []
    for seed in (5, 5, 6):
        weights.reset_parameters(torch.Generator().manual_seed(seed))
        draws.append(weights.value_weights().detach().clone())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_gradients_reach_the_parameters_through_the_pairs():
    weights = fusedkv()
    outer = torch.arange(2.0 * G * D).reshape(2, G, D)
    (weights.key_weights() * outer).sum().backward()
    expected = outer[..., : D // 2] + outer[..., D // 2 :]
    assert torch.equal(weights.key_0.grad, expected[0]) and torch.equal(weights.key_1.grad, expected[1])
    assert weights.value_0.grad is None


def test_fixed_weights_are_saved_but_not_trained():
    plan = two_layers(Segment((1,)), Fusion("scalar", (0.25, 0.75), learnable=False))
    weights = FusionWeights(plan, 1, G, D)
    assert set(weights.state_dict()) == {"value_0", "value_1"}
    assert not weights.value_weights().requires_grad
    assert weights.value_weights()[:, 0, 0].tolist() == [0.25, 0.75]


# --- Relative positions ---


def scores(rope, interleaved, weights, offset, sources, query):
    """q . sum_j w_j (.) RoPE(k_j) with positions from ``offset`` on, in fp64: (S, T)."""
    positions = torch.arange(offset, offset + 6)
    angles = positions.double()[:, None] * rope._inv_freq[torch.device("cpu")]
    cos, sin = angles.cos(), angles.sin()
    keys = torch.stack([apply_rotary(source, cos, sin, interleaved) for source in sources])
    return torch.einsum("bsgd,btgd->gst", apply_rotary(query, cos, sin, interleaved), fused(keys, weights))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [D, 4])
def test_tied_keys_see_relative_positions_only(interleaved, rotary_dim):
    rope = RotaryEmbedding(D, theta=50.0, interleaved=interleaved, rotary_dim=rotary_dim)
    plan = CachePlan.named("fusedkv", 4, init="normal")
    weights = FusionWeights(plan, 3, G, D, interleaved, rotary_dim).double().key_weights().detach()
    other_convention = (
        FusionWeights(plan, 3, G, D, not interleaved, rotary_dim).double().key_weights().detach()
    )
    untied = torch.randn(2, G, D, dtype=torch.float64)
    sources, query = torch.randn(2, 1, 6, G, D).double(), torch.randn(1, 6, G, D).double()

    def moved(w):
        near = scores(rope, interleaved, w, 0, sources, query)
        return (scores(rope, interleaved, w, 1000, sources, query) - near).abs().max() / near.abs().max()

    assert moved(weights) < 1e-11
    assert moved(untied) > 1e-2
    assert moved(other_convention) > 1e-2  # pairs of the wrong convention are as bad as no pairs


# --- Precision ---


@pytest.mark.parametrize(
    "convert", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(dtype=torch.bfloat16)]
)
def test_weights_stay_fp32(convert):
    model = nn.Sequential(fusedkv(init="normal"), nn.Linear(4, 4))
    before = {name: p.detach().clone() for name, p in model[0].named_parameters()}
    convert(model)
    assert model[1].weight.dtype in (torch.bfloat16, torch.float16)
    for name, parameter in model[0].named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    assert model[0].key_weights().dtype == torch.float32


def test_weights_can_be_widened_and_come_back_to_fp32():
    weights = fusedkv()
    assert weights.double().key_weights().dtype == torch.float64
    assert weights.bfloat16().key_weights().dtype == torch.float32


def test_gradients_are_converted_with_the_weights():
    weights = fusedkv()
    weights.key_weights().sum().backward()
    assert weights.bfloat16().key_0.grad.dtype == torch.float32


def test_meta_device_then_reset():
    with torch.device("meta"):
        weights = fusedkv()
    weights.to_empty(device="cpu").reset_parameters()
    assert torch.equal(weights.key_weights(), fusedkv().key_weights())


# --- The kept expansion ---


def change_by_optimizer(weights):
    optimizer = torch.optim.SGD(weights.parameters(), lr=1.0)
    with torch.enable_grad():
        (weights.key_weights().sum() + weights.value_weights().sum()).backward()
    optimizer.step()


def change_by_adamw(weights):
    optimizer = torch.optim.AdamW(param_groups(weights, 0.1), lr=0.5)
    with torch.enable_grad():
        (weights.key_weights().sum() + weights.value_weights().sum()).backward()
    optimizer.step()


def change_in_place(weights):
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(1)


def change_by_loading(weights):
    weights.load_state_dict({name: p + 1 for name, p in weights.state_dict().items()})


def change_by_assigning(weights):
    weights.load_state_dict({name: p + 1 for name, p in weights.state_dict().items()}, assign=True)


def change_by_reset(weights):
    weights.reset_parameters()


def change_by_data(weights):
    for parameter in weights.parameters():
        parameter.data = parameter.data + 1


def change_behind_its_back(weights):
    for parameter in weights.parameters():
        parameter.data.add_(1)
    weights.clear_cache()


@pytest.mark.parametrize(
    "change",
    [
        change_by_optimizer,
        change_by_adamw,
        change_in_place,
        change_by_loading,
        change_by_assigning,
        change_by_reset,
        change_by_data,
        change_behind_its_back,
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_expansion_follows_the_parameters(change, mode):
    weights = fusedkv(init="normal")
    with mode():
        before = weights.key_weights(), weights.value_weights()
        assert weights.key_weights() is before[0] and weights.value_weights() is before[1]
    change(weights)
    with mode():
        after = weights.key_weights(), weights.value_weights()
        assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    with torch.enable_grad():
        fresh = weights.key_weights(), weights.value_weights()
    assert torch.equal(after[0], fresh[0]) and torch.equal(after[1], fresh[1])


def test_grad_mode_never_gets_the_kept_tensor():
    weights = fusedkv()
    with torch.no_grad():
        kept = weights.key_weights()
    live = weights.key_weights()
    assert not kept.requires_grad and live.requires_grad and weights.key_weights() is not live


def test_copies_do_not_share_the_kept_expansion():
    weights = fusedkv(init="normal")
    with torch.no_grad():
        weights.key_weights()
        twin = copy.deepcopy(weights)
        twin.key_0.add_(1)
        assert not torch.equal(twin.key_weights(), weights.key_weights())


def test_compiles_to_one_graph_in_both_modes():
    weights = fusedkv(init="normal")

    @torch.compile(fullgraph=True, backend="eager")
    def total():
        return weights.key_weights() + weights.value_weights()

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            expected = weights.key_weights() + weights.value_weights()
            torch.testing.assert_close(total(), expected)
    change_in_place(weights)
    with torch.no_grad():
        torch.testing.assert_close(total(), weights.key_weights() + weights.value_weights())


# --- Optimizer groups ---


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.kv_fusion = fusedkv()
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_param_groups(tied):
    model = Model(tied)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = param_groups(model, 0.1, lr=3e-4)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert (decay["name"], rest["name"]) == ("decay", "no_decay")
    assert decay["lr"] == rest["lr"] == 3e-4
    assert [names[id(p)] for p in decay["params"]] == ["proj.weight"] + ([] if tied else ["head.weight"])
    fusion = [f"kv_fusion.{name}" for name in ("key_0", "key_1", "value_0", "value_1")]
    assert [names[id(p)] for p in rest["params"]] == ["embed.weight", "proj.bias", "norm.weight", *fusion]
    torch.optim.AdamW(param_groups(model, 0.1, lr=3e-4))


def test_param_groups_without_a_rate_and_without_matrices():
    (group,) = param_groups(nn.LayerNorm(4), 0.1)
    assert group["name"] == "no_decay" and "lr" not in group and len(group["params"]) == 2


def test_weights_are_new_after_steps_of_an_optimizer_that_counts_no_versions() -> None:
    """Fused AdamW leaves the version counters of parameters as they are."""
    model = tiny_decoder("fusedkv")
    ids = torch.randint(0, 61, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            model(ids)  # keeps the expanded weights
        model(ids, labels=ids)[1].backward()
        optimizer.step()
        with torch.no_grad():
            found = model(ids)
            fresh = copy.deepcopy(model)
            for module in fresh.modules():
                if isinstance(module, FusionWeights):
                    module.clear_cache()
            torch.testing.assert_close(found, fresh(ids), rtol=0, atol=0)
    with torch.no_grad():
        before = model(ids)
    optimizer.step()  # without a forward in between: a change of the mode is what tells
    with torch.no_grad():
        assert not torch.equal(model.eval()(ids), before)
