"""Tensor parallelism of transformers: two processes that share the heads give what one gives.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from hf_ranks import example, same
from hf_tiny import CONFIGS, LAYERS, MODELS, VOCAB, sizes, tiny_model
from ranks import HAS_GLOO, gradients, part, rank_main, run_ranks
from tiny import PLANS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from fusedkv_ext.plan import CachePlan

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

CASES = {
    **{name: PLANS[name] for name in ("vanilla", "fusedkv", "fusedkv-lite", "cla", "resformer", "yoco++")},
    **{
        f"fusedkv, {granularity}": CachePlan.named("fusedkv", LAYERS, granularity=granularity)
        for granularity in ("shared_channel", "head", "scalar")
    },
}
# name: plan, KV heads, what is wrong with two ranks
REFUSED = {
    "skipv1": ("skipv1", 4, "layer 1 of plan 'skipv1' does not treat all KV heads alike"),
    "one KV head": ("fusedkv", 1, r"num_key_value_heads (1) must be a multiple of tp_size (2)"),
    "three KV heads": ("vanilla", 3, r"num_key_value_heads (3) must be a multiple of tp_size (2)"),
}


EVEN = 62  # words: before 5.23 the ranks must share the head evenly


def family(case: str) -> str:
    return "qwen3" if len(case) % 2 else "llama"


def batch() -> Tensor:
    return torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def run(model: PreTrainedModel) -> dict[str, Any]:
    ids = batch()
    logits = model(ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": gradients(model),
        "tokens": model.eval().generate(ids, max_new_tokens=6, do_sample=False),
        "shapes": {name: tuple(part(weight).shape) for name, weight in model.named_parameters()},
    }


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """In float64, but for norms and fusion weights."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    torch.manual_seed(0)
    for case, plan in CASES.items():
        tiny_model(family(case), plan, vocab_size=EVEN).save_pretrained(folder / case)
    tiny_model("llama", "fusedkv", vocab_size=EVEN).save_pretrained(folder / "model")
    for case, (plan, heads, _) in REFUSED.items():
        query = 6 if heads == 3 else 8
        config = CONFIGS["llama"](
            **sizes(cache_plan=plan, num_key_value_heads=heads, num_attention_heads=query)
        )
        MODELS["llama"](config).save_pretrained(folder / case)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    """What each of the two processes found."""
    return run_ranks(__file__, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_loss_gradients_and_tokens_of_one(case: str, ranks: list[dict], folder: Path) -> None:
    alone = run(load(folder / case))
    for found in (rank[case] for rank in ranks):
        same(found["loss"], alone["loss"])
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, grad in alone["gradients"].items():
            same(found["gradients"][name], grad)
        assert torch.equal(found["tokens"], alone["tokens"])


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_half_of_the_heads_and_their_fusion_weights(case: str, ranks: list[dict]) -> None:
    parts = [part for layer in CASES[case].layers for part in (*layer.keys, *layer.values)]
    by_head = {part.fusion.granularity in ("channel", "head") for part in parts if part.fusion}
    for found in (rank[case]["shapes"] for rank in ranks):
        assert found["model.layers.0.self_attn.k_proj.weight"] == (2 * 8, 48)
        assert found["model.layers.0.self_attn.o_proj.weight"] == (48, 4 * 8)
        rows = {shape[0] for name, shape in found.items() if "kv_fusion" in name}
        assert rows == {2 if each else 1 for each in by_head}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ranks_cannot_share_is_refused_before_weights_are_loaded(case: str, ranks: list[dict]) -> None:
    for rank in ranks:
        assert REFUSED[case][2] in rank[case]


def test_stages_cannot_read_caches_of_other_stages(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "plan 'fusedkv' reads keys and values of earlier layers" in rank["pipeline"]


def test_saved_by_two_ranks_is_what_one_loads(ranks: list[dict], folder: Path) -> None:
    saved, again = (load(folder / name).state_dict() for name in ("fusedkv", "saved"))
    assert saved.keys() == again.keys()
    for name, weight in saved.items():
        assert torch.equal(again[name], weight), name


def test_the_documents_example_is_true(ranks: list[dict], folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    assert all(torch.equal(rank["example"], tokens) for rank in ranks)


# What the processes of `ranks` do


def _refusal(folder: Path, **parallel: Any) -> str:
    try:
        load(folder, distributed_config=DistributedConfig(**parallel))
    except ValueError as error:
        return str(error)
    return "nothing"


def _work(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    parallel = {"tp_size": 2, "tp_plan": "auto"}
    for case in CASES:
        model = load(folder / case, distributed_config=DistributedConfig(**parallel))
        found[case] = run(model)
        if case == "fusedkv":
            model.save_pretrained(folder / "saved")
    for case in REFUSED:
        found[case] = _refusal(folder / case, **parallel)
    found["pipeline"] = _refusal(folder / "fusedkv", pp_size=2)
    names: dict[str, Any] = {}
    exec(example("tp_size"), names)
    found["example"] = names["tokens"]
    return found


if __name__ == "__main__":
    rank_main(_work)
