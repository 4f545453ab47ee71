"""FSDP2: processes that share the weights of a decoder give the loss and every gradient of one.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import HAS_GLOO, gradients, part, rank_main, run_ranks
from tiny import PLANS
from torch import Tensor, nn

from fusedkv_ext import Decoder, DecoderConfig
from fusedkv_ext.cache.kv_cache import KV

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

if HAS_GLOO:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    from fusedkv_ext.distributed import Layout, make_mesh, parallelize, synchronize

VOCAB = 64
CASES = [
    (plan, checkpointing)
    for plan in ("vanilla", "fusedkv", "fusedkv-lite", "skipv1", "cla", "resformer", "yoco++")
    for checkpointing in (None, "non_reentrant", "reentrant")
]
OPTIONS: dict[str, dict[str, Any]] = {
    "experts": {"plan": "fusedkv", "num_experts": 4},
    "latents": {
        "plan": "fusedkv",
        "head_dim": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "a window, untied": {"plan": "fusedkv-lite", "sliding_window": 5, "tie_word_embeddings": False},
}
COPIES = ("vanilla", "fusedkv", "skipv1")


def build(plan: str, **options: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{**sizes, "plan": PLANS.get(plan, plan), **options})).double()


def batch() -> Tensor:
    return torch.randint(VOCAB, (8, 12), generator=torch.Generator().manual_seed(1))


def step(model: Decoder, ids: Tensor, parts: int = 1, ranks: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of ``ids``, added up over the processes by the caller, and every gradient, whole."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, ids_part in enumerate(ids.chunk(parts), 1):
        if ranks > 1:
            synchronize(model, i == parts)
        # The processes take the loss without logits, the one process with them.
        whole = model.loss(ids_part, ids_part) if ranks > 1 else model(ids_part, ids_part)[1]
        part_loss = whole / (parts * ranks)
        part_loss.backward()
        loss += part_loss.detach()
    return loss, gradients(model)


class DictLayer(nn.Module):
    """A layer that hands on keys and values in a dict, as many models do."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self.index = layer, index

    def forward(self, x: Tensor, shared: dict[int, KV]) -> Tensor:
        sources = [shared[j] for j in self.layer.self_attn.source_layers]
        x, shared[self.index], _ = self.layer(x, sources)
        return x


class DictModel(nn.Module):
    """The layers of a decoder, fed by a dict."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.embed, self.head = model.model.embed_tokens, model.lm_head
        self.layers = nn.ModuleList(DictLayer(layer, i) for i, layer in enumerate(model.model.layers))
        self.norm = model.model.norm

    def forward(self, ids: Tensor) -> Tensor:
        x, shared = self.embed(ids), {}
        for layer in self.layers:
            x = layer(x, shared)
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    return run_ranks(__file__, tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of four processes found."""
    return run_ranks(__file__, tmp_path_factory.mktemp("fsdp4"), processes=4)


def assert_same(ranks: list[dict], case: object, alone: tuple[Tensor, dict[str, Tensor]]) -> None:
    loss, grads = alone
    torch.testing.assert_close(sum(rank[case][0] for rank in ranks), loss, rtol=1e-12, atol=0)
    for found in (rank[case][1] for rank in ranks):
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            largest = grad.abs().max().item()
            assert largest > 1e-9, name
            torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12 * largest, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_give_the_loss_and_every_gradient_of_one(case: tuple, two: list[dict]) -> None:
    assert_same(two, case, step(build(case[0]), batch()))


@pytest.mark.parametrize("case", OPTIONS)
def test_so_they_do_with_experts_latents_and_windows(case: str, two: list[dict]) -> None:
    assert_same(two, case, step(build(**OPTIONS[case]), batch()))


@pytest.mark.parametrize("plan", COPIES)
def test_four_processes_with_two_copies_give_the_loss_and_every_gradient_of_one(
    plan: str, four: list[dict]
) -> None:
    assert_same(four, plan, step(build(plan), batch()))


def test_accumulating_gradients_takes_no_further_reductions(two: list[dict]) -> None:
    assert_same(two, "parts", step(build("fusedkv"), batch()))
    for rank in two:
        first, *_, last = rank["reductions"]
        assert first == 0 and last == rank["reductions of one part"] > 0


def test_fusion_weights_of_all_layers_travel_together(two: list[dict]) -> None:
    """Four layers and the rest of the model; fusion weights, of two layers here, add one message."""
    for rank in two:
        assert rank["gathers"] == {"vanilla": 5, "fusedkv": 6}


def test_a_process_keeps_its_part_of_every_parameter_only(two: list[dict], four: list[dict]) -> None:
    total = sum(weight.numel() for weight in build("fusedkv").parameters())
    assert [rank["kept"] for rank in two] == [total // 2] * 2
    assert [rank["kept"] for rank in four] == [total // 2] * 4  # two copies


def test_a_plain_dict_between_layers_would_be_caught(two: list[dict]) -> None:
    """FSDP2 rebuilds a dict that holds tensors with gradients: what a layer then puts into it is lost."""
    ids, model = batch(), build("fusedkv")
    positions = model.model.rope.cos_sin(torch.arange(ids.shape[1]))
    assert positions[0].shape[0] == ids.shape[1]
    torch.testing.assert_close(DictModel(model)(ids), build("fusedkv")(ids), rtol=1e-12, atol=1e-12)
    assert all(rank["dict"].startswith("KeyError") for rank in two)


def test_in_bf16_fusion_weights_stay_fp32_in_the_pass_and_in_the_sum(two: list[dict]) -> None:
    for rank in two:
        assert rank["dtypes"] == {
            "parameters": {torch.float32},
            "gradients": {torch.float32},
            "projection": torch.bfloat16,
            "fusion": torch.float32,
            "positions": torch.float32,
        }
    alone = build("fusedkv").float()
    fusions = {n: g for n, g in step(alone, batch())[1].items() if "kv_fusion" in n}
    assert len(fusions) == 8
    for name, grad in fusions.items():
        found = two[0]["bf16"][name]
        assert (found - grad).norm() < 0.05 * grad.norm(), name
        assert not torch.equal(found, found.bfloat16().float()), name


def test_compiled_layers_give_the_same(two: list[dict]) -> None:
    loss, grads = step(build("fusedkv").float(), batch())
    torch.testing.assert_close(sum(rank["compiled"][0] for rank in two), loss.float(), rtol=1e-5, atol=0)
    for name, grad in grads.items():
        found = two[0]["compiled"][1][name]
        torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item(), msg=name)
    assert two[0]["graphs"] == 2, "one for layers that store, one for layers that fuse"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (dict(tp=3), "1 x any x 1 x 3, but there are 4 processes"),
        (dict(dp_shard=2), "1 x 2 x 1 x 1, but there are 4 processes"),
        (dict(dp_replicate=8), "8 x any x 1 x 1, but there are 4 processes"),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error(layout: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**layout).sizes(4)


def test_a_layout_names_the_dimension_that_cannot_be() -> None:
    assert Layout(cp=2).sizes(8) == (1, 4, 2, 1)
    with pytest.raises(ValueError, match="cp must be >= 1, got 0"):
        Layout(cp=0)


# What the processes do


def _counted(model: Decoder, ids: Tensor, parts: int) -> tuple[Any, list[int], int]:
    """A step's loss and gradients; reductions after each part; gathers of the first forward."""
    reductions, gathers, loss = [], 0, torch.zeros((), dtype=torch.float64)
    for i, ids_part in enumerate(ids.chunk(parts), 1):
        synchronize(model, i == parts)
        with CommDebugMode() as forward:
            part_loss = model(ids_part, ids_part)[1] / (parts * dist.get_world_size())
        with CommDebugMode() as backward:
            part_loss.backward()
        gathers = gathers or forward.get_total_counts()
        counts = backward.get_comm_counts()
        reductions.append(sum(n for op, n in counts.items() if "reduce" in str(op)))
        loss += part_loss.detach()
    return (loss, gradients(model)), reductions, gathers


def _bf16(mesh: Any, ids: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = build("fusedkv").float()
    parallelize(model, mesh, precision="bf16")
    attention, seen = model.model.layers[3].self_attn, {}

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["projection"] = attention.q_proj.weight.dtype
        seen["fusion"] = kwargs["fusion"].keys[0].dtype
        seen["positions"] = kwargs["position_embeddings"][0].dtype

    attention.register_forward_pre_hook(look, with_kwargs=True)
    _, grads = step(model, ids, ranks=mesh.data_ranks)
    seen["parameters"] = {weight.dtype for weight in model.parameters()}
    seen["gradients"] = {grad.dtype for grad in grads.values()}
    return seen, grads


def _compiled(mesh: Any, ids: Tensor) -> tuple[Any, int]:
    from torch._dynamo.utils import counters

    counters.clear()
    model = build("fusedkv").float()
    parallelize(model, mesh, compile=True)
    loss, grads = step(model, ids, ranks=mesh.data_ranks)
    return (loss.float(), grads), counters["stats"]["unique_graphs"]


def _dict(ids: Tensor) -> str:
    model = DictModel(build("fusedkv"))
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    try:
        model(ids)
    except KeyError as error:
        return repr(error)
    return "nothing"


def _work(folder: Path) -> dict[Any, Any]:
    copies = 2 if dist.get_world_size() == 4 else 1
    mesh = make_mesh(Layout(dp_replicate=copies), "cpu")
    ids, found = batch().chunk(mesh.data_ranks)[mesh.data_rank], {}

    def shared(plan: str, **options: Any) -> Decoder:
        model = build(plan, **options)
        parallelize(model, mesh)
        return model

    model = shared("fusedkv")
    found["kept"] = sum(part(weight).numel() for weight in model.parameters())
    if copies == 2:
        return found | {plan: step(shared(plan), ids, ranks=4) for plan in COPIES}
    for plan, checkpointing in CASES:
        model = build(plan)
        parallelize(model, mesh, activation_checkpointing=checkpointing)
        found[plan, checkpointing] = step(model, ids, ranks=2)
    for case, options in OPTIONS.items():
        found[case] = step(shared(**options), ids, ranks=2)
    found["parts"], found["reductions"], _ = _counted(shared("fusedkv"), ids, 4)
    found["gathers"] = {}
    for plan in ("vanilla", "fusedkv"):
        _, reductions, found["gathers"][plan] = _counted(shared(plan), ids, 1)
    found["reductions of one part"] = reductions[0]
    found["dict"] = _dict(ids)
    found["dtypes"], found["bf16"] = _bf16(mesh, ids)
    found["compiled"], found["graphs"] = _compiled(mesh, ids)
    return found


if __name__ == "__main__":
    rank_main(_work)
