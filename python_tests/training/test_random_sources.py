"""Random sources: what is drawn, what a layer then reads, and that a run without them is unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_run
from torch import Tensor

from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.distributed import parallelize
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.plan import CachePlan, LayerPlan, Segment
from fusedkv_ext.training import loop
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.random_sources import draw_sources


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


def decoder(plan: CachePlan | str = "vanilla", **changes: object) -> Decoder:
    torch.manual_seed(1)
    return Decoder(tiny_config(plan, **changes)).double().train()


def ids() -> Tensor:
    return torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(2))


def loss_of(model: Decoder, sources: list[int] | None) -> Tensor:
    model.model.random_sources = sources
    return model.loss(ids(), ids())


# What is drawn


def test_sources_depend_on_seed_and_step_alone():
    before = torch.random.get_rng_state()
    drawn = [draw_sources(12, 0.5, seed, step) for seed in range(2) for step in range(2)]
    assert drawn == [draw_sources(12, 0.5, seed, step) for seed in range(2) for step in range(2)]
    assert len({tuple(sources) for sources in drawn}) == 4
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_earlier_layer_is_as_likely_as_another():
    steps, layers, p = 4000, 6, 0.6
    counts = torch.zeros(layers, layers)
    for step in range(steps):
        for i, j in enumerate(draw_sources(layers, p, 0, step)):
            counts[i, j] += 1
    for i in range(layers):
        expected = torch.tensor([p / i if j < i else 1 - p for j in range(i + 1)] if i else [1.0])
        error = 4.5 * (expected * (1 - expected) / steps).sqrt()  # standard deviations
        assert ((counts[i, : i + 1] / steps - expected).abs() <= error).all()
        assert not counts[i, i + 1 :].any()


def test_probability_one_redirects_every_layer_but_the_first():
    for step in range(50):
        sources = draw_sources(5, 1.0, 3, step)
        assert sources[0] == 0
        assert all(j < i for i, j in enumerate(sources) if i)


def test_probability_zero_draws_nothing():
    assert draw_sources(4, 0.0, 0, 0) is None


# What a layer reads


def nearest(sources: list[int]) -> CachePlan:
    return CachePlan("given", tuple(LayerPlan(Segment((j,)), Segment((j,))) for j in sources))


@pytest.mark.parametrize("sources", [[0, 0, 2, 2], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 2, 3]], ids=str)
def test_a_step_is_that_of_the_plan_with_these_sources(sources: list[int]):
    model, plan = decoder(), decoder(nearest(sources))
    plan.load_state_dict(model.state_dict(), strict=False)
    ours, theirs = loss_of(model, sources), plan.loss(ids(), ids())
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plan.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=0, atol=1e-15)
    for i, j in enumerate(sources):  # what nobody reads learns nothing
        read = i in sources
        for name in ("k_proj", "v_proj"):
            found = getattr(model.model.layers[i].self_attn, name).weight.grad
            assert (found is not None and bool(found.any())) == read, (i, j, name)


def test_a_redirected_layer_still_has_keys_and_values_for_others():
    model = decoder()
    loss_of(model, [0, 0, 1, 2]).backward()  # layer 1 reads layer 0, and layer 2 reads layer 1
    for i, layer in enumerate(model.model.layers):
        found = layer.self_attn.v_proj.weight.grad
        assert (found is not None and bool(found.any())) == (i < 3)


@pytest.mark.parametrize("how", ["reentrant", "non_reentrant"])
def test_activation_checkpointing_changes_nothing(how: str):
    plain, saving = decoder(), decoder()
    parallelize(saving, None, precision="fp32", activation_checkpointing=how)
    losses = [loss_of(model, [0, 0, 1, 0]) for model in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        if a.grad is None:  # nobody read it
            assert b.grad is None or not b.grad.any()
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-15)


def test_evaluation_reads_the_plan():
    model = decoder().eval()
    assert torch.equal(loss_of(model, [0, 0, 0, 0]), loss_of(model, None))


# Runs


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_run(tmp_path, **{"model.plan": "vanilla"})


def trained(folder: Path, config: TrainConfig, probability: float, **options: int) -> dict[str, Tensor]:
    config = config.updated([("run.random_sources", probability)])
    result = loop.run(loop.start(config, folder), SilentProgress(), **options)
    return load_pretrained(result.checkpoint).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_probability_zero_is_plain_training_bit_for_bit(tmp_path: Path, config: TrainConfig):
    plain = loop.run(loop.start(config, tmp_path / "plain"), SilentProgress())
    assert same(load_pretrained(plain.checkpoint).state_dict(), trained(tmp_path / "zero", config, 0.0))


@pytest.mark.parametrize("probability", [0.5, 1.0])  # with 1 the last layer's own projections never learn
def test_a_resumed_run_draws_the_same(tmp_path: Path, config: TrainConfig, probability: float):
    whole = trained(tmp_path / "whole", config, probability)
    assert not same(whole, trained(tmp_path / "zero", config, 0.0))
    trained(tmp_path / "parts", config, probability, stop_after=2)
    run, notes = loop.resume(tmp_path / "parts")
    assert notes == []
    result = loop.run(run, SilentProgress())
    assert same(whole, load_pretrained(result.checkpoint).state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.plan": "fusedkv"}, "model.plan is vanilla, got plan 'fusedkv'"),
        ({"model.plan": "cla"}, "model.plan is vanilla, got plan 'cla'"),
        (
            {
                "model.kv_lora_rank": 8,
                "model.qk_nope_head_dim": 8,
                "model.qk_rope_head_dim": 8,
                "model.v_head_dim": 8,
            },
            "must be 0 with latent attention",
        ),
        ({"run.random_sources": 1.5}, "run.random_sources must be from 0 to 1, got 1.5"),
        ({"run.random_sources": math.nan}, "run.random_sources must be from 0 to 1, got nan"),
    ],
    ids=["fusedkv", "cla", "latent", "above 1", "nan"],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, config: TrainConfig, changes: dict[str, object], message: str
):
    with pytest.raises(ConfigError, match=message):
        loop.start(config.updated({"run.random_sources": 0.5, **changes}.items()), tmp_path / "run")
