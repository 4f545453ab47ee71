"""Plans that are found for a trained model: what is planted is found, budgets are kept."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from hf_folders import tiny_llama
from hf_tiny import tokens

from fusedkv_ext.conversion import convert_model
from fusedkv_ext.conversion.absorb import absorb
from fusedkv_ext.conversion.kvsharer import kvsharer
from fusedkv_ext.conversion.plan_search import SourceTable, prefix_costs, search, search_prefix
from fusedkv_ext.conversion.second_moments import collect
from fusedkv_ext.plan import CachePlan

LAYERS = 6


@pytest.fixture(scope="module")
def planted():
    """A model whose layer 3 has the keys of layer 1 and the values of layer 2, and its second_moments."""
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=LAYERS, tie_word_embeddings=False)
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers[:3]:  # the stream stays, so that equal projections give equal keys and values
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        layers[3].self_attn.k_proj.weight.copy_(layers[1].self_attn.k_proj.weight)
        layers[3].self_attn.v_proj.weight.copy_(layers[2].self_attn.v_proj.weight)
    ids = tokens(16, 64)
    return model, ids, collect(model, ids)


@pytest.fixture(scope="module")
def table(planted):
    model, _, second_moments = planted
    return SourceTable(second_moments, model, weighted=False)


def test_planted_duplicates_are_found(table):
    assert table.explained("key", 3, (1,)) > 0.99 and table.explained("value", 3, (2,)) > 0.99
    assert table.explained("key", 3, (0,)) < 0.9
    found = search(table, storage_layers=LAYERS - 1)
    assert found.plan.storage_layers == (0, 1, 2, 4, 5)
    assert 1 in found.plan.key_sources(3) and 2 in found.plan.value_sources(3)
    assert found.cost < 0.02


def test_the_table_says_what_fitting_and_maps_reach(planted, table):
    model, ids, second_moments = planted
    for plan in (search(table, storage_layers=3).plan, search_prefix(table, 3).plan):
        converted = convert_model(
            model, plan, calibration=ids, refitted=(), second_moments=second_moments
        ).model
        for repair in absorb(converted, model, second_moments):
            sources = (plan.key_sources if repair.side == "key" else plan.value_sources)(repair.layer)
            expected = repair.before if repair.side == "key" else repair.after
            share = table.explained(repair.side, repair.layer, sources)
            assert share == pytest.approx(expected, abs=0.05)  # rounds of maps and the ridge differ


def test_two_sources_explain_no_less_than_one(table):
    for i in range(1, LAYERS):
        for side in ("key", "value"):
            for j in range(i):
                one = table.explained(side, i, (j,))
                assert 0 <= one <= 1 + 1e-9
                assert all(table.explained(side, i, (j, k)) > one - 0.02 for k in range(i))
    assert math.isinf(table.explained("key", 2, (3,)))  # a later layer explains nothing


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("budget", [dict(storage_layers=1), dict(storage_layers=4), dict(budget=0.6)])
def test_budgets_are_kept(table, budget, separate):
    found = search(table, **budget, separate=separate)
    most = budget.get("budget", budget.get("storage_layers", 0) / LAYERS)
    assert float(found.plan.cache_ratio) <= most + 1e-9
    assert float(found.plan.cache_ratio) > most - (0.5 if separate else 1) / LAYERS
    assert 0 in found.plan.key_sources(0) and found.plan.name == "fusedkv-search"
    assert CachePlan.from_json(found.plan.to_json()) == found.plan
    if separate:
        assert found.cost <= search(table, **budget).cost + 1e-9


@pytest.mark.parametrize(
    "bad", [{}, dict(storage_layers=3, budget=0.5), dict(budget=0.1), dict(storage_layers=7)]
)
def test_budgets_that_say_nothing_are_refused(table, bad):
    with pytest.raises(ValueError, match="storage"):
        search(table, **bad)


def test_prefix_plans_store_the_first_layers(table):
    one, each = search_prefix(table, 3), search_prefix(table, 3, per_reader=True)
    for found in (one, each):
        assert found.plan.storage_layers == (0, 1, 2)
    assert len({one.plan.layers[i] for i in range(3, LAYERS)}) == 1
    assert each.cost <= one.cost
    rows = prefix_costs(table)
    assert [n for n, *_ in rows] == list(range(1, LAYERS))
    shares = [v for (_, side), v in one.explained.items() if side == "key"]
    assert rows[2][1] == pytest.approx(sum(shares) / 3)


def test_found_plans_convert(planted, table):
    model, ids, second_moments = planted
    for separate in (False, True):
        plan = search(table, storage_layers=3, separate=separate).plan
        converted = convert_model(model, plan, calibration=ids, second_moments=second_moments).model
        assert torch.isfinite(converted(ids[:1]).logits).all()


def test_found_plans_read_caches_of_layers_that_see_as_much():
    from test_hf_convert import plain

    types = ["sliding_attention", "full_attention"] * 2
    model = plain("qwen3", layer_types=types, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    ids = tokens(8, 64)
    windowed = SourceTable(collect(model, ids), model)
    plans = [search(windowed, storage_layers=n).plan for n in (2, 3)]
    for plan in (*plans, kvsharer(model, ids, 2, threshold=-1)):
        for i in range(4):
            assert {types[j] for j in plan.source_layers(i)} <= {types[i]}
        convert_model(model, plan)
    with pytest.raises(ValueError, match="layers with windows"):
        search(windowed, storage_layers=1)


def test_kvsharer_shares_until_the_budget_or_the_threshold(planted):
    model, ids, _ = planted
    texts, implementation = ids[:4, :32], model.config._attn_implementation
    plan = kvsharer(model, texts, 3, threshold=-1.0)
    assert len(plan.storage_layers) == 3 and 0 in plan.storage_layers
    assert all(plan.key_sources(i) == plan.value_sources(i) for i in range(LAYERS))
    assert kvsharer(model, texts, 3, threshold=1.1) == CachePlan(
        "kvsharer", CachePlan.named("vanilla", 6).layers
    )
    other = kvsharer(model, texts, 3, threshold=-1.0, similar_first=True)
    assert other != plan and len(other.storage_layers) == 3
    assert model.config._attn_implementation == implementation


def test_kvsharer_accepts_what_the_converted_model_says(planted):
    """The last hidden states that it compares are those of the plan that it returns."""
    model, ids, _ = planted
    texts = ids[:4, :32]

    def similarity(plan):
        converted = convert_model(model, plan).model
        with torch.no_grad():
            a, b = (m.model(texts).last_hidden_state.flatten(1) for m in (model, converted))
        return torch.cosine_similarity(a, b).mean().item()

    threshold = 0.8
    plan = kvsharer(model, texts, 1, threshold=threshold)
    assert len(plan.storage_layers) < LAYERS
    assert similarity(plan) > threshold - 1e-4
