"""CachePlan: what it accepts, what it answers, what it says; and that docs/methods.md is true."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction as F
from pathlib import Path

import pytest
import torch

from fusedkv_ext.lab.pages import methods as page
from fusedkv_ext.plan import METHODS, CachePlan, Fusion, LayerPlan, Segment, method

METHODS_PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def own(i: int) -> LayerPlan:
    return LayerPlan(Segment((i,)), Segment((i,)))


# --- Named plans ---


def test_names_are_those_of_the_registry():
    assert CachePlan.names() == tuple(METHODS)
    assert {"vanilla", "fusedkv", "fusedkv-lite", "fusedkv-lite-learnable", "yoco", "cla"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_registry_entries_are_complete(name):
    entry = METHODS[name]
    assert entry.name == name
    assert re.search(r"arXiv:\d{4}\.\d{5}", entry.paper)
    assert "K_i" in entry.equation and "V_i" in entry.equation
    assert entry.summary


def test_the_page_of_the_methods_is_what_the_registry_gives():
    text = METHODS_PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.BLOCKS) == text, "make docs"
    assert all(f'CachePlan.named("{name}", L)' in text for name in METHODS)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_at_every_depth(name, num_layers):
    plan = CachePlan.named(name, num_layers)
    assert (plan.name, plan.num_layers) == (name, num_layers)
    assert 0 in plan.storage_layers
    assert CachePlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json()) == plan.to_dict()
    assert hash(CachePlan.named(name, num_layers)) == hash(plan)
    assert str(plan).startswith(f"{name}: {num_layers} layer")


# Sources of the layers of an 8-layer model; n = 4, and the layers that store follow `own`.
ROWS = {
    "vanilla": {},
    "fusedkv": dict.fromkeys(range(4, 8), ((0, 3), (0, 3))),
    "fusedkv-lite": dict.fromkeys(range(4, 8), ((3,), (0,))),
    "fusedkv-lite-learnable": dict.fromkeys(range(4, 8), ((3,), (0,))),
    "yoco": dict.fromkeys(range(4, 8), ((3,), (3,))),
    "cla": {i: ((i - 1,), (i - 1,)) for i in (1, 3, 5, 7)},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_named_plans(name):
    plan = CachePlan.named(name, 8)
    for i in range(8):
        keys, values = ROWS[name].get(i, ((i,), (i,)))
        assert (plan.key_sources(i), plan.value_sources(i)) == (keys, values)
        assert plan.source_layers(i) == tuple(sorted({*keys, *values} - {i}))
        assert plan.reads_only(i) == (i in ROWS[name])
        assert plan.layers[i].has_fusion == (i >= 4 and name in ("fusedkv", "fusedkv-lite-learnable"))
    assert plan.storage_layers == tuple(i for i in range(8) if i not in ROWS[name])
    assert plan.prefill_layers == {"vanilla": 8, "cla": 7}.get(name, 4)
    assert plan.bytes_per_token(2, 16, torch.bfloat16) == 2 * 2 * 2 * 16 * len(plan.storage_layers)


@pytest.mark.parametrize(("num_layers", "n"), [(1, 1), (2, 1), (3, 1), (5, 2), (9, 4)])
def test_default_number_of_storage_layers(num_layers, n):
    assert CachePlan.named("fusedkv-lite", num_layers).storage_layers == tuple(range(n))


def test_options_of_fusedkv():
    plan = CachePlan.named(
        "fusedkv",
        6,
        storage_layers=2,
        granularity="shared_channel",
        init="normal",
        tie_values=True,
        multiplier=35,
    )
    assert plan.storage_layers == (0, 1)
    assert plan.layers[5].keys == (Segment((0, 1), fusion=Fusion("shared_channel", "normal", True, 35.0)),)
    assert plan.layers[5].values == plan.layers[5].keys
    assert CachePlan.named("fusedkv", 6).layers[5].values[0].fusion == Fusion("channel", (1.0, 0.0), False)


@pytest.mark.parametrize(
    ("init", "keys", "values"),
    [
        ("lite", (0.0, 1.0), (1.0, 0.0)),
        ("half", (0.5, 0.5), (0.5, 0.5)),
        ("uniform", (0.5, 0.5), (0.5, 0.5)),
        ("normal", "normal", "normal"),
    ],
)
def test_initial_values_of_fusedkv(init, keys, values):
    layer = CachePlan.named("fusedkv", 4, init=init).layers[3]
    assert (layer.keys[0].fusion.init, layer.values[0].fusion.init) == (keys, values)
    # One storage layer: both sources are the same layer, and their weights one weight.
    lone = CachePlan.named("fusedkv", 4, init=init, storage_layers=1).layers[3].keys[0]
    assert (lone.sources, lone.fusion.init) == ((0,), "normal" if init == "normal" else (1.0,))


def test_initial_values_of_fusedkv_lite_learnable():
    ones = CachePlan.named("fusedkv-lite-learnable", 4, tie_values=False).layers[3]
    assert ones.keys[0].fusion == Fusion("channel", (1.0,), tied=True)
    assert ones.values[0].fusion == Fusion("channel", (1.0,), tied=False)
    normal = CachePlan.named("fusedkv-lite-learnable", 4, init="normal", tie_values=True).layers[3]
    assert normal.values[0].fusion == Fusion("channel", "normal", tied=True)


def test_cla_factor():
    plan = CachePlan.named("cla", 8, factor=3)
    assert plan.storage_layers == (0, 3, 6)
    assert [plan.key_sources(i) for i in (1, 2, 4, 7)] == [(0,), (0,), (3,), (6,)]
    assert plan.cache_ratio == F(3, 8)


@pytest.mark.parametrize(("layers", "n"), [(30, 24), (30, 20), (30, 1), (7, 3), (5, 5)])
def test_cla_spreads_its_storage_layers_evenly(layers: int, n: int):
    plan = CachePlan.named("cla", layers, storage_layers=n)
    assert len(plan.storage_layers) == n and plan.storage_layers[0] == 0
    ends = (*plan.storage_layers[1:], layers)
    groups = [end - begin for begin, end in zip(plan.storage_layers, ends, strict=True)]
    assert max(groups) - min(groups) <= 1
    for i in range(layers):
        nearest = max(j for j in plan.storage_layers if j <= i)
        assert plan.key_sources(i) == plan.value_sources(i) == (nearest,)
    if layers % n == 0:
        assert plan.layers == CachePlan.named("cla", layers, factor=layers // n).layers


def test_names_are_read_kindly():
    assert CachePlan.named("FusedKV_Lite", 4) == CachePlan.named("fusedkv-lite", 4)


def test_labels_carry_options():
    assert CachePlan.named("cla:factor=3", 6) == CachePlan.named("cla", 6, factor=3)
    label = "FusedKV:storage_layers=2:granularity=head"
    assert CachePlan.named(label, 6) == CachePlan.named("fusedkv", 6, storage_layers=2, granularity="head")
    assert CachePlan.named("fusedkv:storage_layers=2", 6, granularity="head") == CachePlan.named(label, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("cla:factor", 4), {}, ValueError, "expected option=value after ':', as in cla:factor=3, got 'fac"),
        (("cla:", 4), {}, ValueError, "expected option=value after ':', as in cla:factor=3, got ''"),
        (("cla:factr=2", 4), {}, ValueError, "'cla' has no option 'factr'; its options: factor"),
        (("cla:factor=2:factor=2", 4), {}, ValueError, "option 'factor' must be given once"),
        (("cla:factor=2", 4), {"factor": 2}, ValueError, "'factor' must be given once, got it in 'cla:fac"),
        (("nope:factor=2", 4), {}, ValueError, "plan name must be one of vanilla, gqa, .*, got 'nope'"),
        (("nope", 4), {}, ValueError, "plan name must be one of vanilla, gqa, .*, got 'nope'"),
        ((None, 4), {}, TypeError, "name must be a str"),
        (("yoco", 0), {}, ValueError, "num_layers must be at least 1, got 0"),
        (("yoco", "8"), {}, TypeError, "num_layers must be an int, got '8'"),
        (("yoco", True), {}, TypeError, "num_layers must be an int"),
        (("vanilla", 4), {"factor": 2}, ValueError, "'vanilla' has no option 'factor'; its options: none"),
        (("cla", 4), {"factr": 2}, ValueError, "'cla' has no option 'factr'; its options: factor"),
        (("cla", 4), {"factor": 0}, ValueError, "plan 'cla': factor must be at least 1, got 0"),
        (("cla", 4), {"factor": 1.5}, TypeError, "plan 'cla': factor must be an int"),
        (("fusedkv", 4), {"storage_layers": 5}, ValueError, "must be at most num_layers=4, got 5"),
        (("fusedkv", 4), {"storage_layers": 0}, ValueError, "storage_layers must be at least 1"),
        (("fusedkv", 4), {"init": "zero"}, ValueError, "init must be one of lite, normal, half, uniform"),
        (
            ("fusedkv", 4),
            {"granularity": "chanel"},
            ValueError,
            "granularity must be one of channel, .*'chanel'",
        ),
        (("fusedkv", 4), {"multiplier": 0.0}, ValueError, "multiplier must be positive"),
        (("fusedkv", 4), {"multiplier": float("nan")}, ValueError, "multiplier must be finite"),
        (("fusedkv", 4), {"tie_values": 1}, TypeError, "tied must be a bool"),
        (("fusedkv-lite-learnable", 4), {"init": "half"}, ValueError, "init must be lite or normal"),
        (("resformer", 4), {"share": "1/2"}, TypeError, "share must be a number, got '1/2'"),
        (("resformer", 4), {"share": float("nan")}, ValueError, "share must be finite"),
    ],
)
def test_bad_names_and_options(arguments, options, error, message):
    with pytest.raises(error, match=message):
        CachePlan.named(*arguments, **options)


def test_a_method_is_one_entry():
    def build(num_layers, *, first=0):
        return [LayerPlan(Segment((first,)), Segment((first,))) for _ in range(num_layers)]

    entry = dict(paper="none", keys="K_i = K_1", values="V_i = V_1", cache="1/L")
    method("first-only", **entry)(build)
    try:
        assert CachePlan.named("first-only", 4).storage_layers == (0,)
        with pytest.raises(ValueError, match="no option 'last'; its options: first"):
            CachePlan.named("first-only", 4, last=1)
        with pytest.raises(ValueError, match="registered already"):
            method("first-only", **entry)(build)
    finally:
        del METHODS["first-only"]


# --- What each method stores and reads ---

# Name, options, ratio to vanilla, and for one layer: that layer, key sources, value sources, layers it needs.
EIGHT_LAYERS = [
    ("vanilla", {}, F(1), (6, (6,), (6,), ())),
    ("gqa", {}, F(1), (6, (6,), (6,), ())),
    ("mqa", {}, F(1), (6, (6,), (6,), ())),
    ("fusedkv", {}, F(1, 2), (6, (0, 3), (0, 3), (0, 3))),
    ("fusedkv-lite", {}, F(1, 2), (6, (3,), (0,), (0, 3))),
    ("fusedkv-lite-learnable", {}, F(1, 2), (6, (3,), (0,), (0, 3))),
    ("fusedkv-lite-rev", {}, F(1, 2), (6, (0,), (3,), (0, 3))),
    ("dense-fusion", {}, F(1, 2), (6, (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))),
    ("dense-fusion", {"storage_layers": 2}, F(1, 4), (6, (0, 1), (0, 1), (0, 1))),
    ("yoco", {}, F(1, 2), (6, (3,), (3,), (3,))),
    ("yoco++", {}, F(1, 2), (2, (0, 2), (0, 2), (0,))),
    ("yoco++", {"storage_layers": 6}, F(3, 4), (7, (5,), (5,), (5,))),
    ("cla", {}, F(1, 2), (5, (4,), (4,), (4,))),
    ("cla", {"factor": 3}, F(3, 8), (5, (3,), (3,), (3,))),
    ("yoco-v", {}, F(3, 4), (6, (6,), (3,), (3,))),
    ("cla-v", {}, F(3, 4), (5, (5,), (4,), (4,))),
    ("cla-v", {"factor": 3}, F(1, 2) + F(3, 16), (5, (5,), (3,), (3,))),
    ("skipv1", {}, F(3, 4) + F(1, 32), (5, (5,), (5, 0), (0,))),
    ("skipv1", {"skip": "1/4"}, F(1, 2) + F(1, 2) * F(1 * 4 + 7 * 3, 8 * 4), (5, (5,), (5, 0), (0,))),
    ("skipv1", {"skip": 0.75}, F(1, 2) + F(1, 2) * F(1 * 4 + 7 * 1, 8 * 4), (5, (5,), (5, 0), (0,))),
    ("skipv1-yoco", {}, F(1, 2) + F(1, 32), (6, (3,), (6, 0), (0, 3))),
    ("skipkv1", {}, F(1, 2) + F(1, 16), (6, (6, 0), (6, 0), (0,))),
    ("resformer", {}, F(1), (6, (6,), (0, 6), (0,))),
    ("svformer", {}, F(1, 2) + F(1, 16), (6, (6,), (0,), (0,))),
]


def test_every_method_is_in_the_table_above():
    assert {name for name, *_ in EIGHT_LAYERS} == set(METHODS)


@pytest.mark.parametrize(("name", "options", "ratio", "row"), EIGHT_LAYERS)
def test_sources_and_size_of_each_method(name, options, ratio, row):
    plan, vanilla = CachePlan.named(name, 8, **options), CachePlan.named("vanilla", 8)
    assert plan.cache_ratio == ratio
    sizes = [p.bytes_per_token(4, 16, torch.float16) for p in (plan, vanilla)]
    assert F(*sizes) == ratio and sizes[1] == 8 * 2 * 4 * 16 * 2
    i, keys, values, needed = row
    assert (plan.key_sources(i), sorted(plan.value_sources(i))) == (keys, sorted(values))
    assert plan.source_layers(i) == needed
    assert CachePlan.from_json(plan.to_json(indent=1)) == plan


@pytest.mark.parametrize("name", METHODS)
def test_every_variant_differs_from_the_default(name):
    plans = [CachePlan.named(name, 8, **options) for options in ({}, *METHODS[name].variants)]
    assert len(set(plans)) == len(plans)


def test_kv_heads_that_methods_are_compared_with():
    wanted = {name: METHODS[name].kv_heads(8) for name in METHODS}
    assert wanted == dict.fromkeys(METHODS, 8) | {"gqa": 4, "mqa": 1}
    assert METHODS["gqa"].kv_heads(1) == 1


def test_the_top_of_a_prompt_is_skipped_where_the_top_layers_only_read():
    """Prefill ends at the last layer that stores; off (all layers) where the last one does."""
    ends = {name: CachePlan.named(name, 8).prefill_layers for name in METHODS}
    early = dict.fromkeys(
        (
            "fusedkv",
            "fusedkv-lite",
            "fusedkv-lite-learnable",
            "fusedkv-lite-rev",
            "dense-fusion",
            "yoco",
            "yoco++",
        ),
        4,
    )
    assert ends == dict.fromkeys(METHODS, 8) | early | {"cla": 7}


def test_skipv1_figures_of_the_paper():
    """SkipV1Former with GQA, 355M: 24 layers, 98304 -> 74752 bytes per token."""
    vanilla, skip = CachePlan.named("vanilla", 24), CachePlan.named("skipv1", 24)
    for heads, dtype in ((16, torch.bfloat16), (8, torch.float32)):  # the two shapes that have these sizes
        assert vanilla.bytes_per_token(heads, 64, dtype) == 98304
        assert skip.bytes_per_token(heads, 64, dtype) == 74752


def test_fusedkv_figures_of_the_paper():
    """Every cross-layer method of FusedKV's main table has half of the cache."""
    for name in ("fusedkv", "fusedkv-lite", "yoco", "cla"):
        assert CachePlan.named(name, 24).cache_ratio == F(1, 2)


def test_yoco_plus_plus_mixes_before_it_stores():
    plan = CachePlan.named("yoco++", 8)
    assert plan.storage_layers == (0, 1, 2, 3) and plan.prefill_layers == 4
    assert plan.stored_key_heads(2, 2) == (0, 1)
    assert plan.layers[2].keys[0].fusion.init == (0.0, 1.0)
    assert plan.key_sources(7) == (3,)
    assert "a0*K0 + ai*own" in str(plan)


# --- Heads ---


def test_stored_heads_and_segments_of_a_split_layer():
    plan = CachePlan.named("skipv1", 4)
    assert plan.stored_key_heads(2, 4) == (0, 1, 2, 3)
    assert plan.stored_value_heads(2, 4) == (0, 1)
    low, high = plan.segments(2, 4)
    assert (low.start, low.stop, low.key.sources, low.value.sources) == (0, 2, (2,), (2,))
    assert (high.start, high.stop, high.key.sources, high.value.sources) == (2, 4, (2,), (0,))


def test_segments_are_the_common_refinement():
    keys = (
        Segment((1,), ("1/4", 1)),
        Segment((0,), (0, "1/4")),
    )  # in any order, kept in the order of the heads
    values = (Segment((0,), (0, "1/2")), Segment((1,), ("1/2", 1)))
    plan = CachePlan("split", [own(0), LayerPlan(keys, values)])
    pieces = [(p.start, p.stop, p.key.sources, p.value.sources) for p in plan.segments(1, 8)]
    assert pieces == [(0, 2, (0,), (0,)), (2, 4, (1,), (0,)), (4, 8, (1,), (1,))]
    assert plan.stored_key_heads(1, 8) == (2, 3, 4, 5, 6, 7)
    assert plan.stored_value_heads(1, 8) == (4, 5, 6, 7)


def test_shares_that_are_no_whole_heads():
    plan = CachePlan.named("skipv1", 4)
    message = r"layer 1 values: num_kv_heads must be a multiple of 2, got 3; heads 0\.\.1/2 of it"
    for ask in (
        lambda: plan.bytes_per_token(3, 16, torch.float32),
        lambda: plan.stored_value_heads(1, 3),
        lambda: plan.segments(1, 3),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 16, torch.float32), ValueError, "num_kv_heads must be at least 1, got 0"),
        ((2, 0, torch.float32), ValueError, "head_dim must be at least 1, got 0"),
        ((2, 16.0, torch.float32), TypeError, "head_dim must be an int"),
        ((2, 16, "bf16"), TypeError, "dtype must be a torch.dtype, got 'bf16'"),
    ],
)
def test_bad_shapes(arguments, error, message):
    with pytest.raises(error, match=message):
        CachePlan.named("vanilla", 2).bytes_per_token(*arguments)


@pytest.mark.parametrize("layer", [4, -1, "0"])
def test_layers_that_are_not_there(layer):
    with pytest.raises((ValueError, TypeError), match="layer must be"):
        CachePlan.named("yoco", 4).key_sources(layer)


# --- Validation ---


def one(key=None, value=None) -> CachePlan:
    """A plan of three layers whose layer 2 has the given segments; layer 1 stores the lower half of its
    values alone."""
    lower = LayerPlan(Segment((0,)), (Segment((1,), (0, "1/2")), Segment((0,), ("1/2", 1))))
    return CachePlan("broken", [own(0), lower, LayerPlan(key or Segment((2,)), value or Segment((2,)))])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (
            {"key": Segment((3,))},
            r"layer 2 keys: source 3 is out of range for a plan with 3 layers \(0 to 2\)",
        ),
        (
            {"key": Segment((1,))},
            r"layer 2 keys: needs heads 0\.\.1 of layer 1, which stores nothing of its keys",
        ),
        (
            {"value": Segment((0, 1))},
            r"layer 2 values: needs heads 0\.\.1 of layer 1, which stores heads 0\.\.1/2 of its values",
        ),
        (
            {"value": (Segment((2,), (0, "1/4")), Segment((1,), ("1/4", 1)))},
            r"layer 2 values: needs heads 1/4\.\.1 of layer 1, which stores heads 0\.\.1/2",
        ),
        ({"key": Segment((2,), (0, "1/2"))}, r"layer 2 keys: heads 1/2\.\.1 are covered by no segment"),
        ({"value": Segment((2,), ("1/2", 1))}, r"layer 2 values: heads 0\.\.1/2 are covered by no segment"),
        (
            {"value": (Segment((2,), (0, "1/2")), Segment((0,), ("1/4", 1)))},
            r"layer 2 values: heads 1/4\.\.1/2 are covered twice",
        ),
        (
            {"key": (Segment((2,), (0, "1/3")), Segment((0,), ("2/3", 1)))},
            r"layer 2 keys: heads 1/3\.\.2/3 are covered by no segment",
        ),
    ],
)
def test_invalid_plans_name_the_layer_and_the_side(segments, message):
    with pytest.raises(ValueError, match=message):
        one(**segments)


def test_sources_are_earlier_layers():
    with pytest.raises(
        ValueError, match="layer 0 values: a source must be at most 0, the layer itself, got 1"
    ):
        CachePlan("upward", [LayerPlan(Segment((0,)), Segment((1,))), own(1)])


def test_the_lower_half_may_be_read():
    plan = one(value=(Segment((1,), (0, "1/2")), Segment((2,), ("1/2", 1))))
    assert plan.stored_value_heads(2, 4) == (2, 3) and plan.source_layers(2) == (1,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Segment(()), ValueError, "sources must name at least one layer"),
        (lambda: Segment((1, 1)), ValueError, r"sources must name each layer once, got \(1, 1\)"),
        (lambda: Segment((-1,)), ValueError, "a source layer must be at least 0, got -1"),
        (lambda: Segment((True,)), TypeError, "a source layer must be an int, got True"),
        (lambda: Segment(0), TypeError, "sources must be a tuple of layer indices, got 0"),
        (lambda: Segment((0,), (1, 0)), ValueError, "0 <= start < stop <= 1, got 1..0"),
        (lambda: Segment((0,), (0, 2)), ValueError, "0 <= start < stop <= 1"),
        (lambda: Segment((0,), (0, "half")), ValueError, "must be a fraction .* got 'half'"),
        (lambda: Segment((0,), "1/2"), TypeError, "heads must be a pair"),
        (lambda: Segment((0,), fusion="lite"), TypeError, "fusion must be a Fusion or None, got str"),
        (lambda: Segment((0, 1), fusion=Fusion(init=(1.0,))), ValueError, "one number per source, got 1"),
        (lambda: Fusion(init="lite"), ValueError, "init must be .*, got 'lite'"),
        (lambda: Fusion(init=1.0), TypeError, "init must be .*, got 1.0"),
        (lambda: Fusion(init=(float("inf"),)), ValueError, "init must be finite"),
        (lambda: Fusion(init=("1",)), TypeError, "init must be a number, got '1'"),
        (lambda: Fusion(multiplier=-1), ValueError, "multiplier must be positive"),
        (lambda: LayerPlan("own", Segment((0,))), TypeError, "keys must be a tuple of Segment"),
        (lambda: LayerPlan(Segment((0,)), (0,)), TypeError, "values must be a tuple of Segment"),
        (lambda: CachePlan("", [own(0)]), TypeError, "name must be a non-empty str"),
        (lambda: CachePlan("x", []), ValueError, "layers must hold at least one"),
        (lambda: CachePlan("x", [own(0), None]), TypeError, "layer 1 must be a LayerPlan, got NoneType"),
        (
            lambda: CachePlan("x", [own(0), LayerPlan((), ())]),
            ValueError,
            r"layer 1 keys: heads 0\.\.1 are covered",
        ),
    ],
)
def test_bad_pieces(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_key_weights_per_channel_are_always_tied():
    free = Segment((0, 1), fusion=Fusion("channel", (1, 0), tied=False))
    layer = LayerPlan(free, free)
    assert layer.keys[0].fusion.tied and not layer.values[0].fusion.tied
    assert layer == LayerPlan(replace(free, fusion=replace(free.fusion, tied=True)), free)


def test_plans_cannot_be_changed():
    plan = CachePlan.named("yoco", 4)
    with pytest.raises(FrozenInstanceError):
        plan.name = "mine"
    with pytest.raises(FrozenInstanceError):
        plan.layers[0].keys = ()


# --- JSON ---


def test_json_is_plain_and_complete():
    data = CachePlan.named("fusedkv", 2, storage_layers=1, init="normal").to_dict()
    assert data["format"] == 1 and data["name"] == "fusedkv"
    assert data["layers"][1]["values"] == [
        {
            "sources": [0],
            "heads": ["0", "1"],
            "fusion": {
                "granularity": "channel",
                "init": "normal",
                "tied": False,
                "multiplier": 1.0,
                "learnable": True,
            },
        }
    ]


def test_json_written_by_hand():
    text = """{"format": 1, "name": "mine", "layers": [
        {"keys": [{"sources": [0]}], "values": [{"sources": [0]}]}, {"keys": [{"sources": [0, 1], "fusion":
        {"granularity": "scalar", "init": [0, 1], "learnable": false}}],
         "values": [{"sources": [1], "heads": [0, "1/2"]}, {"sources": [0], "heads": [0.5, 1], "fusion":
         null}]}]}"""
    plan = CachePlan.from_json(text)
    assert plan.layers[1].keys[0].fusion == Fusion("scalar", (0.0, 1.0), learnable=False)
    assert plan.layers[1].values == (Segment((1,), (F(0), F(1, 2))), Segment((0,), (F(1, 2), F(1))))


def corrupted(change) -> dict:
    data = json.loads(CachePlan.named("fusedkv", 4).to_json())
    return change(data) or data


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda d: d.update(format=2),
            ValueError,
            "format of the cache plan must be at most 1, got 2; upgrade",
        ),
        (lambda d: d.pop("format") and None, ValueError, 'must have "format"'),
        (lambda d: d.update(format="1"), TypeError, "format of the cache plan must be an int"),
        (lambda d: d.update(color=1), ValueError, "CachePlan has no field 'color'; it has name, layers"),
        (lambda d: d.pop("layers") and None, TypeError, "layers must be a list"),
        (lambda d: d.pop("name") and None, TypeError, "name must be a non-empty str, got None"),
        (
            lambda d: d["layers"][3].pop("keys") and None,
            TypeError,
            "layer 3 keys: must be a list of segments",
        ),
        (lambda d: d["layers"][3].update(kyes=1), ValueError, "layer 3: LayerPlan has no field 'kyes'"),
        (
            lambda d: d["layers"][2]["keys"][0].update(sources=[9, 0]),
            ValueError,
            "layer 2 keys: source 9 is out of range for a plan with 4 layers",
        ),
        (
            lambda d: d["layers"][2]["keys"][0].update(sources=[0, 0]),
            ValueError,
            "layer 2 keys: sources must name",
        ),
        (
            lambda d: d["layers"][2]["keys"][0].pop("sources") and None,
            ValueError,
            "layer 2 keys: .* must have sources",
        ),
        (
            lambda d: d["layers"][2]["values"][0]["fusion"].update(s=1),
            ValueError,
            "layer 2 values: Fusion has no",
        ),
        (lambda d: [1], TypeError, "a cache plan must be a mapping, got list"),
    ],
)
def test_bad_json(change, error, message):
    with pytest.raises(error, match=message):
        CachePlan.from_dict(corrupted(change))


def test_text_that_is_not_json():
    with pytest.raises(ValueError, match="a cache plan must be JSON"):
        CachePlan.from_json(CachePlan.named("yoco", 4).to_json()[:-2])


# --- The drawing ---


def test_table_of_fusedkv_lite():
    assert str(CachePlan.named("fusedkv-lite", 8)).splitlines() == [
        "fusedkv-lite: 8 layers, counted from 0",
        "",
        "layers  stores   keys  values",
        "------  -------  ----  ------",
        "0-3     K, V     own   own",
        "4-7     nothing  K3    V0",
        "",
        "cache: 4 key and 4 value tensors of vanilla's 16: 1/2 (50.0%) of vanilla",
        "prefill: 4 of 8 layers see the whole prompt",
        "kept for the layer's own attention alone: K of layer 0; K and V of layers 1-2; V of layer 3",
        "  (no later layer reads these, but the layer itself does at every step: they belong to the cache)",
    ]


def test_table_of_fusedkv_names_the_weights():
    text = str(CachePlan.named("fusedkv", 8, init="half", multiplier=2, tie_values=True))
    assert "4-7     nothing  a0*K0 + a3*K3  b0*V0 + b3*V3" in text
    weights = "channel, tied per RoPE pair, start at 0.5, 0.5, parameter times 2"
    assert f"weights a of layers 4-7: {weights}" in text
    assert f"weights b of layers 4-7: {weights}" in text


def test_table_joins_only_equal_neighbors():
    lines = str(CachePlan.named("cla", 4)).splitlines()
    assert [line.split() for line in lines[4:8]] == [
        ["0", "K,", "V", "own", "own"],
        ["1", "nothing", "K0", "V0"],
        ["2", "K,", "V", "own", "own"],
        ["3", "nothing", "K2", "V2"],
    ]
    assert "own attention alone" not in "\n".join(lines)  # every stored tensor is read by the layer above
    assert "own attention alone" not in str(CachePlan.named("vanilla", 4))


def test_table_of_split_heads():
    text = str(CachePlan.named("skipv1", 24))
    assert "1-23    K, V[0:1/2]  own   [0:1/2] own, [1/2:1] V0" in text
    assert "24 key and 12.5 value tensors of vanilla's 48: 73/96 (76.0%) of vanilla" in text
    assert "scalar, start at 0.5, 0.5, fixed" in str(CachePlan.named("resformer", 4))
