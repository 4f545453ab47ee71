"""Maps of keys and values that projections absorb: exact, and what they explain."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_folders import tiny_llama
from hf_tiny import tiny_model, tokens

from fusedkv_ext.conversion import convert_model
from fusedkv_ext.conversion.absorb import _scaled_rotation, absorb, absorb_into_output, absorb_into_query
from fusedkv_ext.conversion.explained_variance import explained_layers, explained_table
from fusedkv_ext.conversion.second_moments import collect
from fusedkv_ext.plan import CachePlan

G, D = 4, 8  # of hf_tiny
READERS = (2, 3)


def with_maps(model, keys=None, values=None):
    """The model with explicit maps (G, D, D) on what reading layers read."""

    def mapped(attend):
        def run(query, k, v, *rest):
            def through(tensors, maps):
                if maps is None:
                    return tensors
                return [None if x is None else torch.einsum("gde,btge->btgd", maps, x) for x in tensors]

            return attend(query, through(k, keys), through(v, values), *rest)

        return run

    for i in READERS:
        attention = model.model.layers[i].self_attn
        attention._attend = mapped(attention._attend)
    return model


def pair_of_models(plan="fusedkv"):
    model = tiny_model("llama", plan, "eager").double()
    twin = tiny_model("llama", plan, "eager").double()
    twin.load_state_dict(model.state_dict())
    return model, twin


def test_complex_maps_of_keys_are_absorbed_exactly_in_spite_of_rope():
    torch.manual_seed(0)
    maps = torch.stack([_scaled_rotation(torch.randn(D // 2, dtype=torch.complex128)) for _ in range(G)])
    model, twin = pair_of_models()
    ids = tokens(2, 50)
    with torch.no_grad():
        plain = model(ids).logits
        explicit = with_maps(model, keys=maps)(ids).logits
        for i in READERS:
            for head in range(G):
                absorb_into_query(twin.model.layers[i].self_attn.q_proj, head, maps[head], G)
        absorbed = twin(ids).logits
    assert (explicit - plain).abs().max() > 1e-2
    torch.testing.assert_close(absorbed, explicit, rtol=1e-11, atol=1e-11)


def test_other_maps_of_keys_are_not():
    torch.manual_seed(0)
    maps = torch.eye(D).double() + 0.3 * torch.randn(G, D, D).double()
    model, twin = pair_of_models()
    ids = tokens(2, 50)
    with torch.no_grad():
        explicit = with_maps(model, keys=maps)(ids).logits
        for i in READERS:
            for head in range(G):
                absorb_into_query(twin.model.layers[i].self_attn.q_proj, head, maps[head], G)
        assert (twin(ids).logits - explicit).abs().max() > 1e-2


def test_any_map_of_values_is_absorbed_exactly():
    torch.manual_seed(0)
    maps = torch.randn(G, D, D).double()
    model, twin = pair_of_models("fusedkv-lite")  # its one source is what is read: the map comes after fusion
    ids = tokens(2, 50)
    with torch.no_grad():
        plain = model(ids).logits
        explicit = with_maps(model, values=maps)(ids).logits
        for i in READERS:
            for head in range(G):
                absorb_into_output(twin.model.layers[i].self_attn.o_proj, head, maps[head], G)
        absorbed = twin(ids).logits
    assert (explicit - plain).abs().max() > 1e-2
    torch.testing.assert_close(absorbed, explicit, rtol=1e-11, atol=1e-11)


def planted(attention, source):
    """Makes a layer's keys (values) a map per head of another's, with both reading the same stream."""
    with torch.no_grad():
        for head in range(2):
            rows = slice(head * 8, head * 8 + 8)
            k = _scaled_rotation(torch.randn(4, dtype=torch.complex128)).float()
            attention.k_proj.weight[rows] = k @ source.k_proj.weight[rows]
            attention.v_proj.weight[rows] = torch.randn(8, 8) @ source.v_proj.weight[rows]


@pytest.mark.parametrize("plan", ["fusedkv", "fusedkv-lite", "cla"])
def test_planted_maps_are_found_and_give_the_original_back(plan):
    torch.manual_seed(0)
    model = tiny_llama()
    layers = model.model.layers
    with torch.no_grad():  # no layer but the last adds to the stream: all see the same rows
        for layer in layers[:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    for layer in layers[1:]:
        planted(layer.self_attn, layers[0].self_attn)
    ids = tokens(8, 64)
    second_moments = collect(model, ids)
    converted = convert_model(model, plan, calibration=ids, refitted=(), second_moments=second_moments).model
    with torch.no_grad():
        before = (converted(ids).logits - model(ids).logits).abs().max()
        report = absorb(converted, model, second_moments, ridge=1e-7)
        after = (converted(ids).logits - model(ids).logits).abs().max()
    by_layer = {(repair.layer, repair.side): repair for repair in report}
    assert {layer for layer, _ in by_layer} == set(
        converted.config.plan.layers and [i for i in range(4) if converted.config.plan.reads_only(i)]
    )
    assert by_layer[3, "value"].before < 0.9 and by_layer[3, "value"].after > 0.999
    if plan != "fusedkv":  # of two sources the one common phase cannot serve; of one it does
        assert by_layer[3, "key"].after > 0.999
        assert after < 1e-2 * before


def test_maps_explain_more_and_both_sides_report():
    torch.manual_seed(0)
    model, ids = tiny_llama(), tokens(16, 64)
    second_moments = collect(model, ids)
    converted = convert_model(
        model, "fusedkv", calibration=ids, refitted=(), second_moments=second_moments
    ).model
    fitted = explained_layers(converted, model, second_moments)
    report = absorb(converted, model, second_moments)
    assert {(r.layer, r.side) for r in report} == {(i, s) for i in READERS for s in ("key", "value")}
    for repair in report:
        assert fitted[repair.layer, repair.side] == pytest.approx(repair.before, abs=1e-5)
        assert repair.after > repair.before + 0.01
    rows = explained_table(converted.config.plan, fitted, report)
    assert [row[0] for row in rows[1:]] == ["2", "3"] and len({len(row) for row in rows}) == 1
    assert rows[1][1:2] == ["0, 1"] and rows[1][3] == f"{report[0].after:.1%}"


def test_qwen3_has_no_maps_of_keys():
    from test_hf_convert import plain

    model, ids = plain("qwen3"), tokens(8, 64)
    second_moments = collect(model, ids)
    converted = convert_model(
        model, "fusedkv", calibration=ids, refitted=(), second_moments=second_moments
    ).model
    with pytest.raises(ValueError, match="q_norm stands between"):
        absorb(converted, model, second_moments, keys=True)
    queries = [layer.self_attn.q_proj.weight.clone() for layer in converted.model.layers]
    assert {repair.side for repair in absorb(converted, model, second_moments)} == {"value"}
    for layer, query in zip(converted.model.layers, queries, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, query)


def test_a_plan_that_shares_nothing_is_left_alone():
    model, ids = tiny_llama(), tokens(4, 64)
    converted = convert_model(model, CachePlan.named("vanilla", 4)).model
    assert absorb(converted, model, collect(model, ids)) == []
    for name, weight in model.named_parameters():
        assert torch.equal(converted.get_parameter(name), weight), name
