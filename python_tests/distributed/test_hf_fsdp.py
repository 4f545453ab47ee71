"""FSDP2: two processes that share the weights give the loss and the gradients of one.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import torch.distributed as dist
from hf_ranks import example, same
from hf_tiny import VOCAB, tiny_model
from ranks import HAS_GLOO, gradients, part, rank_main, run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from fusedkv_ext.hf.attention import SharedKV
from fusedkv_ext.hf.cache import HAS_DUMMY_LAYER

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

PLANS = ("vanilla", "fusedkv", "fusedkv-lite", "cla", "skipv1", "resformer", "yoco++", "patchwork")
CASES = [
    (family, plan, checkpointing)
    for plan in PLANS
    for family in ("llama", "qwen3")
    for checkpointing in (False, True)
]
SAVED = ("qwen3", "fusedkv")


def build(family: str, plan: str) -> PreTrainedModel:
    """In float64, but for the norms, which round to float32 within."""
    torch.manual_seed(0)
    return tiny_model(family, plan, use_cache=False).double().train()


def batch() -> Tensor:
    return torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))


def sharded(model: PreTrainedModel) -> PreTrainedModel:
    """As training scripts do it: one group for each decoder layer, one for the rest."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def step(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradient of every parameter, whole."""
    logits = model(ids).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), gradients(model)


def one_step(family: str, plan: str, checkpointing: bool, ids: Tensor, shard: bool) -> tuple[Any, ...]:
    model = build(family, plan)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return step(sharded(model) if shard else model, ids)


def in_bf16(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.bfloat16, **options).train()


def bf16_step(model: PreTrainedModel, ids: Tensor) -> Tensor:
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def share_by_dict(model: PreTrainedModel) -> None:
    """Hands a plain dict from layer to layer, through the hooks of FSDP2 if there are any."""

    def unwrap(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "shared_kv_states": kwargs["shared_kv_states"].data}

    def wrap(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        shared = SharedKV()
        shared.data = kwargs["shared_kv_states"]
        return args, {**kwargs, "shared_kv_states": shared}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(unwrap, with_kwargs=True, prepend=True)
        layer.register_forward_pre_hook(wrap, with_kwargs=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    """What each of the two processes found."""
    return run_ranks(__file__, folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_give_the_loss_and_every_gradient_of_one(case: tuple, ranks: list[dict]) -> None:
    loss, grads = one_step(*case, batch(), shard=False)
    same((ranks[0][case][0] + ranks[1][case][0]) / 2, loss)
    for found in (rank[case][1] for rank in ranks):
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            same(found[name], grad)


def test_a_plain_dict_between_layers_would_be_caught(ranks: list[dict]) -> None:
    """FSDP2 rebuilds a dict that contains tensors with gradients: what a layer then stores is lost."""
    model = build("llama", "fusedkv")
    share_by_dict(model)
    loss, grads = step(model, batch())
    expected = one_step("llama", "fusedkv", False, batch(), shard=False)
    assert loss == expected[0] and all(torch.equal(grads[name], grad) for name, grad in expected[1].items())
    for rank in ranks:
        assert "needs keys and values of layer 1, which has not run" in rank["dict"]


def test_weights_that_were_sharded_are_saved_as_one_folder_and_load_bit_for_bit(
    ranks: list[dict], folder: Path
) -> None:
    assert all(rank["shards"] for rank in ranks)
    model = build(*SAVED)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.float64)
    assert type(loaded) is type(model) and loaded.config.plan == model.config.plan
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("how", ["own group", "transformers"])
def test_fusion_weights_in_fp32_beside_bf16_are_gathered_too(
    how: str, ranks: list[dict], folder: Path
) -> None:
    """FSDP2 wants one dtype per group, so they are a group of their own, gathered when they are called."""
    if "skipped" in ranks[0][how]:
        pytest.skip(ranks[0][how]["skipped"])
    model, grads = in_bf16(folder), []
    for rank, ids in zip(ranks, batch().chunk(2), strict=True):
        model.zero_grad()
        loss = bf16_step(model, ids)
        assert torch.equal(rank[how]["loss"], loss)
        grads.append(gradients(model))
    names = [name for name in grads[0] if "kv_fusion" in name]
    assert len(names) == 8
    for name, grad in grads[0].items():
        expected = (grad.double() + grads[1][name].double()) / 2
        error = 1e-5 if name in names else 2**-7
        for rank in ranks:
            found = rank[how]["gradients"][name].double()
            assert (found - expected).abs().max() <= error * expected.abs().max(), name


def test_the_documents_example_is_true(ranks: list[dict], folder: Path) -> None:
    """It trained in two processes and saved; one loads the result."""
    trained = AutoModelForCausalLM.from_pretrained(folder / "trained")
    start = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert trained.config.architectures == start.config.architectures == [type(start).__name__]
    for (name, weight), other in zip(trained.named_parameters(), start.parameters(), strict=True):
        assert weight.dtype == other.dtype == torch.float32
        assert torch.isfinite(weight).all() and not torch.equal(weight, other), name


# What the processes of `ranks` do


def _dict_instead(ids: Tensor) -> str:
    model = sharded(build("llama", "fusedkv"))
    share_by_dict(model)
    try:
        step(model, ids)
    except ValueError as error:
        return str(error)
    return "nothing"


def _save(folder: Path) -> bool:
    """Whether this rank held parts of the weights only."""
    model = sharded(build(*SAVED))
    parts = all(isinstance(layer, FSDPModule) for layer in model.model.layers)
    weight = model.model.layers[0].self_attn.q_proj.weight
    parts = parts and part(weight).numel() == weight.numel() // 2
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if dist.get_rank() == 0:
        build(*SAVED).save_pretrained(folder / "saved", state_dict=state)
        build(*SAVED).float().save_pretrained(folder / "model")
    return parts


def _bf16(folder: Path, ids: Tensor, how: str) -> dict[str, Any]:
    if how == "own group":
        model = in_bf16(folder)
        for layer in model.model.layers:
            if layer.self_attn.kv_fusion is not None:
                fully_shard(layer.self_attn.kv_fusion)
        model = sharded(model)
    elif not HAS_DUMMY_LAYER:
        return {"skipped": "before 5.23 transformers puts weights of all dtypes into one group"}
    else:
        model = in_bf16(folder, distributed_config=DistributedConfig(fsdp_size=2))
        assert isinstance(model.model.layers[3], FSDPModule)
    return {"loss": bf16_step(model, ids), "gradients": gradients(model)}


def _work(folder: Path) -> dict[Any, Any]:
    ids = batch().chunk(2)[dist.get_rank()]
    found: dict[Any, Any] = {case: one_step(*case, ids, shard=True) for case in CASES}
    found["dict"] = _dict_instead(ids)
    found["shards"] = _save(folder)
    dist.barrier()
    for how in ("own group", "transformers"):
        found[how] = _bf16(folder, ids, how)
    dist.barrier()
    exec(example("fully_shard"), {})
    return found


if __name__ == "__main__":
    rank_main(_work)
