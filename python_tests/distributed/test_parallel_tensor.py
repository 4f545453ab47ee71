"""Tensor parallelism: processes that share the heads of a decoder give the loss, every gradient, the step of
the optimizer and the tokens of one.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import HAS_GLOO, part, rank_main, run_ranks, whole
from tiny import PLANS, hybrid, randomise_fusion, tiny_config
from torch import Tensor, nn

from fusedkv_ext import CachePlan, Decoder
from fusedkv_ext.plan import Fusion, LayerPlan, Segment

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

if HAS_GLOO:
    from torch.distributed.device_mesh import init_device_mesh

    from fusedkv_ext.distributed import Layout, make_mesh, parallelize
    from fusedkv_ext.distributed.tensor import HeadOrder, apply_tp, check_shares, head_order, head_orders

Case = tuple[str, dict[str, Any]]  # a plan, and changes of the configuration

GRANULAR = {
    f"fusedkv, {granularity}": CachePlan.named("fusedkv", 4, granularity=granularity)
    for granularity in ("shared_channel", "head", "scalar")
}
LEARNED = {"resformer, learned": CachePlan.named("resformer", 4, learnable=True)}


def _thirds() -> CachePlan:
    """Fusion weights of all heads in a plan that treats a third of the heads in its own way."""
    first, second = (LayerPlan(Segment((i,)), Segment((i,))) for i in (0, 2))
    fusion, third = Fusion("channel", "normal"), Fraction(1, 3)
    values = (Segment((0, 1), (Fraction(0), third), fusion), Segment((0,), (third, Fraction(1))))
    reading = LayerPlan(Segment((0, 2), fusion=fusion), Segment((0, 2), fusion=fusion))
    return CachePlan("thirds", (first, LayerPlan(Segment((0, 1), fusion=fusion), values), second, reading))


OWN_PLANS = {**GRANULAR, **LEARNED, "thirds": _thirds()}
FOUR_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
TWO: dict[str, Case] = {
    **{name: (name, {}) for name in ("vanilla", "fusedkv", "fusedkv-lite", "cla", "resformer", "yoco++")},
    **{name: (name, {}) for name in (*GRANULAR, *LEARNED)},
    **{name: (name, FOUR_HEADS) for name in ("skipv1", "skipv1-yoco", "patchwork")},
    "fewer KV heads": ("fusedkv", {"num_key_value_heads": 1}),
    "fewer KV heads, mixed": ("resformer, learned", {"num_key_value_heads": 1, "attention_bias": True}),
    "a tied head": ("fusedkv", {"tie_word_embeddings": True}),
    "biases, even vocabulary": ("cla", {"attention_bias": True, "vocab_size": 64}),
    "biases, cut heads": ("skipv1", {**FOUR_HEADS, "attention_bias": True}),
    "windows, no norms": ("fusedkv-lite", {**hybrid("fusedkv-lite"), "qk_norm": False}),
    "fused again": ("fusedkv", {"recompute_fusion": True}),
}
FOUR: dict[str, Case] = {
    "fusedkv": ("fusedkv", FOUR_HEADS),
    "skipv1": ("skipv1", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}),
    "fewer KV heads": ("fusedkv", {"attention_bias": True, "tie_word_embeddings": True}),
    "one KV head": ("fusedkv, shared_channel", {"num_key_value_heads": 1}),
    "one KV head, mixed": ("yoco++", {"num_key_value_heads": 1}),
}
CHECKPOINTED = [
    (name, how)
    for name in ("fusedkv", "skipv1", "cla", "resformer")
    for how in ("reentrant", "non_reentrant")
]
GENERATED = ("fusedkv", "skipv1", "patchwork", "fewer KV heads", "windows, no norms")
OTHER_WAYS = ("fusedkv", "skipv1")
# Of which a step of the optimizer is compared as well
OPTIMIZED = ("fusedkv", "skipv1", "fewer KV heads", "a tied head", "biases, cut heads")
WITH_FSDP: dict[str, Case] = {
    "fusedkv": ("fusedkv", {"tie_word_embeddings": True}),
    # A tensor rank has 3 of 6 heads, of which a data rank has 2 and another 1
    "thirds": ("thirds", {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}),
    "fewer KV heads": ("fusedkv", {"num_key_value_heads": 1}),
}


def build(case: Case, seed: int = 0) -> Decoder:
    name, changes = case
    plan = {**PLANS, **OWN_PLANS}[name]
    torch.manual_seed(seed)
    model = Decoder(tiny_config(plan, **changes))
    randomise_fusion(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("norm.weight", "bias")):  # ones and zeros would hide an order
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def batch(vocab_size: int = 61) -> Tensor:
    return torch.randint(vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


def step(
    model: Decoder, orders: dict[str, HeadOrder], ids: Tensor | None = None, optimize: bool = True
) -> dict[str, Any]:
    """Loss and gradients, and with ``optimize`` their norm, and weights and moments after a step of AdamW.

    All whole and in the order of one process.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: whole(orders[name].canonical(tensor) if name in orders else tensor.detach()).clone()
            for name, tensor in tensors.items()
        }

    every = batch(model.config.vocab_size)
    ids = every if ids is None else ids
    loss = model.loss(ids, ids) * len(ids) / len(every)
    loss.backward()
    with torch.no_grad():  # of whole logits
        rounding = 1e-12 if loss.dtype == torch.float64 else 1e-6
        beside = model(ids, ids)[1] * len(ids) / len(every)
        torch.testing.assert_close(beside, loss, rtol=rounding, atol=0)
    for name, weight in weights.items():
        assert placements(weight.grad) == placements(weight), name
    found: dict[str, Any] = {
        "loss": loss.detach(),
        "gradients": canonical({name: weight.grad for name, weight in weights.items()}),
    }
    if optimize:
        adamw = torch.optim.AdamW(weights.values(), lr=0.01, fused=True)
        found["norm"] = whole(nn.utils.clip_grad_norm_(weights.values(), 0.5)).detach()
        adamw.step()
        found["weights"] = canonical(weights)
        found["moments"] = canonical({n: adamw.state[weight]["exp_avg_sq"] for n, weight in weights.items()})
    return found


def placements(tensor: Tensor) -> object:
    return getattr(tensor, "placements", None)


def prompts() -> list[Tensor]:
    return [row[:length] for row, length in zip(batch(), (9, 4), strict=True)]


def generated(model: Decoder, name: str) -> dict[str, Any]:
    cache = model.make_cache(2, 16)
    found = {"tokens": model.generate(prompts(), 5), "bytes": cache.nbytes}
    if name in OTHER_WAYS:
        found["uncached"] = model.generate(prompts(), 5, use_cache=False)
        found["paged"] = model.generate(prompts(), 5, page_size=4)
        found["sampled"] = model.generate(prompts(), 5, temperature=1.0, top_k=20, seed=3)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    return run_ranks(__file__, tmp_path_factory.mktemp("tensor2"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of four processes found."""
    return run_ranks(__file__, tmp_path_factory.mktemp("tensor4"), processes=4)


def assert_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    torch.testing.assert_close(found["loss"], alone["loss"], rtol=1e-12, atol=0)
    assert found.keys() == alone.keys()
    if "norm" in alone:
        torch.testing.assert_close(found["norm"], alone["norm"], rtol=1e-9, atol=0)
    for kind in alone.keys() & {"gradients", "weights", "moments"}:
        assert found[kind].keys() == alone[kind].keys()
        for name, expected in alone[kind].items():
            largest = expected.abs().max().item()
            assert kind != "gradients" or largest > 1e-9, name
            torch.testing.assert_close(
                found[kind][name], expected, rtol=1e-8, atol=1e-9 * largest, msg=f"{kind} {name}"
            )


def alone(case: Case, **options: Any) -> dict[str, Any]:
    """What one process finds, with all logits."""
    model = build(case).double()
    with mock.patch.object(Decoder, "loss", lambda self, ids, labels: self(ids, labels)[1]):
        return step(model, {}, **options)


@pytest.mark.parametrize("name", TWO)
def test_two_processes_give_loss_gradients_and_step_of_one(name: str, two: list[dict]) -> None:
    expected = alone(TWO[name], optimize=name in OPTIMIZED)
    for rank in two:
        assert_same(rank["steps"][name], expected)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_give_loss_gradients_and_step_of_one(name: str, four: list[dict]) -> None:
    expected = alone(FOUR[name], optimize=name in OPTIMIZED)
    for rank in four:
        assert_same(rank["steps"][name], expected)


@pytest.mark.parametrize("name", WITH_FSDP)
def test_with_fsdp2_four_processes_give_gradients_and_step_of_one(name: str, four: list[dict]) -> None:
    expected = alone(WITH_FSDP[name])
    for rank, other in ((four[0], four[2]), (four[1], four[3])):  # of one head rank, one row each
        found = dict(rank["fsdp"][name])
        found["loss"] = found["loss"] + other["fsdp"][name]["loss"]
        assert_same(found, expected)


@pytest.mark.parametrize(("name", "how"), CHECKPOINTED)
def test_layers_that_run_again_change_nothing(name: str, how: str, two: list[dict]) -> None:
    expected = alone(TWO[name], optimize=False)
    for rank in two:
        assert_same(rank["again"][name, how], expected)


def test_compiled_layers_that_run_again_change_nothing(two: list[dict]) -> None:
    """In float32: of float64 torch 2.11 cannot compile the backward of attention."""
    expected = alone(TWO["fusedkv"], optimize=False)["gradients"]
    for rank in two:
        found = rank["compiled"]["gradients"]
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            atol = 1e-5 * grad.abs().max().item()
            torch.testing.assert_close(found[name].double(), grad, rtol=1e-3, atol=atol, msg=name)
        assert rank["graphs"] == 2 * 2, (
            "layers that store and layers that fuse, each with gradients and without"
        )


def test_norms_of_heads_need_the_sum_over_the_processes(two: list[dict]) -> None:
    expected = alone(TWO["vanilla"], optimize=False)["gradients"]
    for rank in two:
        wrong = [
            name
            for name, gradient in rank["unsummed"].items()
            if not torch.allclose(gradient, expected[name], rtol=1e-3)
        ]
        assert wrong
        assert all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in wrong)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tokens_and_cache_are_those_of_one(name: str, two: list[dict]) -> None:
    model = build(TWO[name])
    expected = generated(model, name)
    parts = min(model.config.num_key_value_heads, 2)
    for found in (rank["tokens"][name] for rank in two):
        assert found.keys() == expected.keys()
        for way in expected.keys() - {"bytes"}:
            assert torch.equal(found[way], expected[way]), way
        assert found["bytes"] * parts == expected["bytes"]


def test_processes_that_share_a_kv_head_project_it_alone(four: list[dict]) -> None:
    assert [rank["own rows"] for rank in four] == [(0, 16), (0, 16), (16, 32), (16, 32)]
    assert [rank["stored heads"] for rank in four] == [1] * 4


def test_parts_of_parameters_are_those_of_the_styles(two: list[dict]) -> None:
    for rank, words in zip(two, (31, 30), strict=True):  # 61 words
        shapes = rank["shapes"]
        assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (words, 32)
        prefix = "model.layers.0."
        assert shapes[prefix + "self_attn.q_proj.weight"] == (2 * 16, 32)
        assert shapes[prefix + "self_attn.k_proj.weight"] == (16, 32)
        assert shapes[prefix + "self_attn.o_proj.weight"] == (32, 2 * 16)
        assert shapes[prefix + "mlp.down_proj.weight"] == (32, 24)
        assert shapes["model.layers.3.self_attn.kv_fusion.value_0"] == (1, 16)
        assert shapes["model.norm.weight"] == (32,)
        assert rank["kinds"] == {"DTensor"}
        assert rank["tied"]


def test_the_first_process_says_what_the_weights_are(two: list[dict]) -> None:
    expected = build(TWO["fusedkv"], seed=0).state_dict()
    for rank in two:
        assert rank["of rank 0"].keys() == expected.keys()
        assert all(torch.equal(rank["of rank 0"][name], weight) for name, weight in expected.items())


def test_without_a_seed_processes_draw_the_same_tokens(two: list[dict]) -> None:
    assert torch.equal(two[0]["drawn"], two[1]["drawn"])


def test_errors_of_shared_models_say_what_to_do(two: list[dict]) -> None:
    for errors in (rank["errors"] for rank in two):
        assert "call apply_tp first, and once" in errors["twice"]
        assert "mesh of one dimension, got 2" in errors["mesh"]


def test_the_order_of_heads_gives_each_rank_its_share_of_every_range() -> None:
    assert head_order(PLANS["fusedkv"], 8, 4) == tuple(range(8))
    assert head_order(PLANS["fusedkv"], 2, 8) == (0, 1)
    assert head_order(PLANS["skipv1"], 8, 2) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert head_order(CachePlan.named("skipv1", 4, skip="1/4"), 8, 2) == (0, 1, 2, 6, 3, 4, 5, 7)
    assert not head_orders(build(("fusedkv", {})), 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_orders_of_parameters_lead_back(ranks: int) -> None:
    model = build(("patchwork", {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8}))
    orders = head_orders(model, ranks)
    assert any("kv_fusion" in name for name in orders)
    for name, order in orders.items():
        weight = model.get_parameter(name)
        assert not torch.equal(order.shared(weight), weight)
        assert torch.equal(order.canonical(order.shared(weight)), weight)


LATENT = {
    "head_dim": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.mark.parametrize(
    ("plan", "changes", "ranks", "message"),
    [
        ("fusedkv", LATENT, 2, r"latent attention .* \(dp_shard\) or the tokens \(cp\) instead"),
        ("fusedkv", {"num_experts": 4}, 2, r"num_experts=4 needs tp = 1; share the weights \(dp_shard\)"),
        ("fusedkv", {"num_attention_heads": 6}, 4, r"num_attention_heads \(6\) must be a multiple"),
        ("fusedkv", {"intermediate_size": 47}, 2, r"intermediate_size \(47\) must be a multiple of tp \(2\)"),
        ("fusedkv", {"num_attention_heads": 6, "num_key_value_heads": 3}, 2, r"_heads \(3\) must be a"),
        (
            "fusedkv",
            {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 32},
            4,
            r"num_key_value_heads \(3\) must divide tp \(4\)",
        ),
        ("skipv1", {}, 2, r"heads 0..0, which plan 'skipv1' treats alike, must be a multiple of tp \(2\)"),
        ("skipv1", {}, 4, r"plan 'skipv1' does not treat all KV heads alike.*num_key_value_heads=2 for tp=4"),
        ("fusedkv", {"vocab_size": 5}, 4, r"vocab_size \(5\) leaves some of tp=4 ranks without tokens"),
    ],
)
def test_what_ranks_cannot_share_is_refused(plan: str, changes: dict, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shares(tiny_config(plan, **changes), ranks)


# What the processes do


def _error(function: Any, *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def _shared(case: Case, mesh: Any, seed: int = 0) -> tuple[Decoder, dict[str, HeadOrder]]:
    model = build(case, seed).double()
    apply_tp(model, mesh)
    return model, head_orders(model, mesh.size())


def _steps(cases: dict[str, Case], mesh: Any) -> dict[str, Any]:
    found = {}
    for name, case in cases.items():
        model, orders = _shared(case, mesh)
        found[name] = step(model, orders, optimize=name in OPTIMIZED)
    return found


def _compiled() -> tuple[Any, int]:
    from torch._dynamo.utils import counters

    counters.clear()
    model = build(TWO["fusedkv"]).float()
    parallelize(model, make_mesh(Layout(tp=2), "cpu"), activation_checkpointing="non_reentrant", compile=True)
    return step(model, {}, optimize=False), counters["stats"]["unique_graphs"]


def _two() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    found: dict[str, Any] = {"steps": _steps(TWO, mesh), "again": {}, "tokens": {}}
    for name, how in CHECKPOINTED:
        model, orders = _shared(TWO[name], mesh)
        for layer in model.model.layers:
            layer.activation_checkpointing = how
        found["again"][name, how] = step(model, orders, optimize=False)

    found["compiled"], found["graphs"] = _compiled()

    model, _ = _shared(TWO["vanilla"], mesh)
    for module in model.modules():
        if hasattr(module, "of_heads"):
            module.of_heads = False
    found["unsummed"] = step(model, {}, optimize=False)["gradients"]

    for name in GENERATED:
        model = build(TWO[name])
        apply_tp(model, mesh)
        found["tokens"][name] = generated(model, name)

    model = build(TWO["a tied head"])
    apply_tp(model, mesh)
    found["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    model = build(TWO["fusedkv"], seed=dist.get_rank())
    apply_tp(model, mesh)
    found["shapes"] = {name: tuple(part(weight).shape) for name, weight in model.state_dict().items()}
    found["kinds"] = {type(weight).__name__ for weight in model.state_dict().values()}
    found["of rank 0"] = {name: whole(weight) for name, weight in model.state_dict().items()}
    torch.manual_seed(dist.get_rank())
    found["drawn"] = model.generate(prompts(), 5, temperature=1.0)
    found["errors"] = {
        "twice": _error(apply_tp, model, mesh),
        "mesh": _error(apply_tp, build(TWO["fusedkv"]), init_device_mesh("cpu", (2, 1))),
    }
    return found


def _four() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    found: dict[str, Any] = {"steps": _steps(FOUR, mesh), "fsdp": {}}
    model, _ = _shared(FOUR["fewer KV heads"], mesh)
    rows = model.model.layers[0].self_attn.k_proj.rows
    found["own rows"] = (rows.start, rows.stop)
    found["stored heads"] = model.make_cache(1, 8).keys(0).shape[2]
    layout = make_mesh(Layout(dp_shard=2, tp=2), "cpu")
    for name, case in WITH_FSDP.items():
        model = build(case).double()
        parallelize(model, layout)
        row = batch()[layout.data_rank :: 2]
        found["fsdp"][name] = step(model, head_orders(model, 2), row)
    return found


def _work(folder: Path) -> dict[str, Any]:
    return _two() if dist.get_world_size() == 2 else _four()


if __name__ == "__main__":
    rank_main(_work)
