"""divide_ranks: how a number of coefficients is divided among the layers of a cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import tiny_model, tokens

from fusedkv_ext.cache.codec import Codec, CodecPlan
from fusedkv_ext.cache.codec.fit import spectrum
from fusedkv_ext.conversion.coding import code_model, collect_stored
from fusedkv_ext.conversion.rank_budget import RULES, divide_ranks
from fusedkv_ext.plan.pieces import SIDES

LABELS = ["pca:rank=4", "pca:rank=4,bits=4", "think:rank=4"]


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = tiny_model("llama", "vanilla")
    return model, collect_stored(model, tokens(8, 32))


def ranks(codecs: CodecPlan) -> dict[tuple[int, str], int]:
    found = {(i, s): codecs.codec(i, s).rank for i in range(codecs.num_layers) for s in SIDES}
    return {place: rank for place, rank in found.items() if rank is not None}


def error(codecs: CodecPlan, samples: Any) -> float:
    """What is left of E[e^T M e] over all tensors."""
    total = 0.0
    for (i, side), rank in ranks(codecs).items():
        vectors, metric, _ = samples[i, side]
        total += float(spectrum(codecs.codec(i, side), vectors, metric)[:, rank:].sum())
    return total


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("rule", RULES)
def test_a_budget_is_kept_and_the_model_takes_the_codecs(rule: str, label: str, measured: Any) -> None:
    model, samples = measured
    uniform = CodecPlan.named(label, model.config.plan)
    codecs = divide_ranks(rule, uniform, model, samples)
    own, budget = ranks(codecs), ranks(uniform)
    assert own.keys() == budget.keys() and codecs.name == f"{label}, {rule}"
    assert sum(budget.values()) - 2 * len(budget) < sum(own.values()) <= sum(budget.values())
    code_model(model, codecs, samples)
    assert CodecPlan.from_json(codecs.to_json()) == model.config.codecs == codecs


@pytest.mark.parametrize("label", LABELS)
def test_water_filling_has_the_least_error_of_all_divisions(label: str, measured: Any) -> None:
    model, samples = measured
    uniform = CodecPlan.named(label, model.config.plan)
    found = divide_ranks("water-filling", uniform, model, samples)
    assert error(found, samples) <= min(
        error(divide_ranks(rule, uniform, model, samples), samples) for rule in RULES
    )
    step = 1 if label == "pca:rank=4" else 2
    places, budget = list(ranks(found)), sum(ranks(uniform).values())
    savings = {}
    for i, side in places:
        vectors, metric, _ = samples[i, side]
        savings[i, side] = spectrum(found.codec(i, side), vectors, metric).sum(0)
    # Any change of two tensors by one step each makes it worse.
    for one, other in itertools.permutations(places, 2):
        more, less = ranks(found)[one] + step, ranks(found)[other] - step
        if more <= 8 and less >= step:
            gain = savings[one][more - step : more].sum() - savings[other][less : less + step].sum()
            assert gain <= 1e-12
    assert sum(ranks(found).values()) == budget


def test_the_ramp_is_lorcs(measured: Any) -> None:
    """r_l = r_max (1 - (max log K - log K_l) / (max log K - min log K) (1 - r_min / r_max))."""
    model, samples = measured
    found = ranks(divide_ranks("ramp", CodecPlan.named("pca:rank=4", model.config.plan), model, samples))
    layers = model.get_decoder().layers

    def condition(weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cond(weight.detach().double())

    K = [
        torch.stack(
            [condition(x.self_attn.k_proj.weight) * condition(x.self_attn.v_proj.weight) for x in layers[i:]]
        ).prod()
        for i in range(len(layers))
    ]
    log = torch.stack(K).log()
    t = 1 - (log.max() - log) / (log.max() - log.min())
    r_min = 2.0
    r_max = min(8.0, r_min + (4 - r_min) / float(t.mean()))
    expected = r_max * (1 - (log.max() - log) / (log.max() - log.min()) * (1 - r_min / r_max))
    for side in SIDES:
        own = torch.tensor([found[i, side] for i in range(len(layers))])
        assert (own - expected).abs().max() <= 1 and (own.diff() <= 0).all() and own[0] > own[-1]


def test_what_has_no_rank_or_several_is_refused(measured: Any) -> None:
    model, samples = measured
    plan = model.config.plan
    with pytest.raises(
        ValueError, match="rank budget must be one of uniform, ramp, water-filling, got 'lorc'"
    ):
        divide_ranks("lorc", CodecPlan.named("pca:rank=4", plan), model, samples)
    with pytest.raises(ValueError, match="codecs must have a rank for a rank budget, got int8"):
        divide_ranks("ramp", CodecPlan.named("int8", plan), model, samples)
    pairs = [(Codec(rank=2 + 2 * (i % 2)), Codec(rank=4)) for i in range(plan.num_layers)]
    with pytest.raises(ValueError, match=r"one rank for all keys for a rank budget, got \[2, 4\]"):
        divide_ranks("water-filling", CodecPlan("mixed", pairs), model, samples)
