"""The registry of methods: one entry per method. Adding a method changes nothing else.

A builder takes the number of layers and keyword options. It returns the rows of the layers, from layer 0 on.
``CachePlan.named``, the command line, the tests, the experiments and docs/methods.md read ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from fusedkv_ext.plan.pieces import Fusion, LayerPlan, Segment, real_number, share, whole_number
from fusedkv_ext.plan.registry import METHODS, method

__all__ = ["METHODS"]

FUSEDKV_PAPER = "FusedKV, arXiv:2512.03870"
SKIPV1_PAPER = "SkipV1Former, arXiv:2510.16807"
VALUE_RESIDUAL_PAPER = "Value residual learning, arXiv:2410.17897"
CLA_PAPER = "CLA, arXiv:2405.12981"
YOCO_PAPER = "YOCO, arXiv:2405.05254"


# Helpers that several methods use


def _take(
    key: int, value: int, key_fusion: Fusion | None = None, value_fusion: Fusion | None = None
) -> LayerPlan:
    """A layer with the keys of layer ``key`` and the values of layer ``value``."""
    return LayerPlan(Segment((key,), fusion=key_fusion), Segment((value,), fusion=value_fusion))


def _own(num_layers: int) -> list[LayerPlan]:
    return [_take(i, i) for i in range(num_layers)]


def _middle(num_layers: int, storage_layers: int | None) -> int:
    """n: ``storage_layers``, or half of the layers if it is None."""
    n = max(1, num_layers // 2)
    if storage_layers is not None:
        n = whole_number(storage_layers, "storage_layers", minimum=1)
    if n > num_layers:
        raise ValueError(f"storage_layers must be at most num_layers={num_layers}, got {n}")
    return n


def _storing_first(
    num_layers: int, storage_layers: int | None, reader: Callable[[int], LayerPlan]
) -> list[LayerPlan]:
    """The first n layers store their own K and V; the others are ``reader(n)``."""
    n = _middle(num_layers, storage_layers)
    return [*_own(n), *[reader(n)] * (num_layers - n)]


def _initial(init: str, sources: tuple[int, ...], hot: int) -> tuple[float, ...] | str:
    """The numbers of a named init; under "lite" source ``hot`` starts at 1 and the others at 0."""
    if init == "normal":
        return "normal"
    if init == "lite":
        return tuple(float(j == hot) for j in sources)
    if init in ("half", "uniform"):
        return (1 / len(sources),) * len(sources)
    raise ValueError(f"init must be one of lite, normal, half, uniform, got {init!r}")


def _skip_first(i: int, skip: Fraction | str) -> tuple[Segment, ...]:
    """The heads of layer i; the last share ``skip`` of them come from layer 0."""
    skip = share(skip)
    if not 0 < skip < 1:
        raise ValueError(f'skip must be between 0 and 1, such as "1/2", got {skip}')
    return (Segment((i,), (Fraction(0), 1 - skip)), Segment((0,), (1 - skip, Fraction(1))))


# Baselines


@method(
    "vanilla",
    paper="MHA, arXiv:1706.03762",
    keys="K_i",
    values="V_i",
    cache="1",
)
def _vanilla(num_layers: int) -> list[LayerPlan]:
    """Every layer stores its own keys and values."""
    return _own(num_layers)


@method(
    "gqa",
    paper="GQA, arXiv:2305.13245",
    keys="K_i",
    values="V_i",
    cache="1; compared with half of the KV heads",
    kv_heads=lambda heads: max(1, heads // 2),
)
def _gqa(num_layers: int) -> list[LayerPlan]:
    """Vanilla with groups of query heads per KV head.

    All methods support that through num_key_value_heads. Experiments give this one half of the KV heads of
    the others.
    """
    return _own(num_layers)


@method(
    "mqa",
    paper="MQA, arXiv:1911.02150",
    keys="K_i",
    values="V_i",
    cache="1; compared with one KV head",
    kv_heads=lambda heads: 1,
)
def _mqa(num_layers: int) -> list[LayerPlan]:
    """Vanilla with one KV head for all query heads. Experiments give this one a single KV head."""
    return _own(num_layers)


# FusedKV and its ablations


@method(
    "fusedkv",
    paper=FUSEDKV_PAPER,
    keys="K_i = a_1 (.) K_1 + a_n (.) K_n, i > n",
    values="V_i = b_1 (.) V_1 + b_n (.) V_n, i > n",
    cache="n/L",
    variants=(
        {"init": "half"},
        {"init": "normal"},
        {"granularity": "shared_channel"},
        {"granularity": "head"},
        {"granularity": "scalar"},
        {"granularity": "shared_channel", "init": "normal", "tie_values": True},
    ),
)
def _fusedkv(
    num_layers: int,
    *,
    storage_layers: int | None = None,
    granularity: str = "channel",
    init: str = "lite",
    tie_values: bool = False,
    multiplier: float = 1.0,
) -> list[LayerPlan]:
    """Layers above the first n fuse the keys and the values of the first and the last storage layer.

    With n = 1 the two sources are one layer and one source.

    Args:
        storage_layers: n, default num_layers // 2.
        granularity: see ``fkv.plan.Fusion``.
        init: "lite" starts as fusedkv-lite (keys 1 on layer n, values 1 on layer 1); "normal" is N(0, 1);
            "half" and "uniform" are one over the number of sources.
        tie_values: ties the value weights per RoPE pair, see ``fkv.plan.Fusion``.
        multiplier: see ``fkv.plan.Fusion``.
    """

    def reader(n: int) -> LayerPlan:
        sources = (0,) if n == 1 else (0, n - 1)
        key = Fusion(granularity, _initial(init, sources, n - 1), tied=True, multiplier=multiplier)
        value = Fusion(granularity, _initial(init, sources, 0), tied=tie_values, multiplier=multiplier)
        return LayerPlan(Segment(sources, fusion=key), Segment(sources, fusion=value))

    return _storing_first(num_layers, storage_layers, reader)


@method("fusedkv-lite", paper=FUSEDKV_PAPER, keys="K_i = K_n, i > n", values="V_i = V_1, i > n", cache="n/L")
def _fusedkv_lite(num_layers: int, *, storage_layers: int | None = None) -> list[LayerPlan]:
    """Layers above the first n use the keys of layer n and the values of layer 1.

    Args:
        storage_layers: n, default num_layers // 2.
    """
    return _storing_first(num_layers, storage_layers, lambda n: _take(n - 1, 0))


@method(
    "fusedkv-lite-learnable",
    paper=FUSEDKV_PAPER,
    keys="K_i = a (.) K_n, i > n",
    values="V_i = b (.) V_1, i > n",
    cache="n/L",
)
def _fusedkv_lite_learnable(
    num_layers: int,
    *,
    storage_layers: int | None = None,
    granularity: str = "channel",
    init: str = "lite",
    tie_values: bool = False,
    multiplier: float = 1.0,
) -> list[LayerPlan]:
    """fusedkv-lite with learnable weights on its keys and values.

    Args:
        storage_layers: n, default num_layers // 2.
        granularity: as in fusedkv.
        init: "lite" (all ones) or "normal" (N(0, 1)).
        tie_values: as in fusedkv.
        multiplier: as in fusedkv.
    """
    if init not in ("lite", "normal"):
        raise ValueError(f"init must be lite or normal, got {init!r}")
    start = "normal" if init == "normal" else (1.0,)
    key = Fusion(granularity, start, tied=True, multiplier=multiplier)
    value = Fusion(granularity, start, tied=tie_values, multiplier=multiplier)
    return _storing_first(num_layers, storage_layers, lambda n: _take(n - 1, 0, key, value))


@method(
    "fusedkv-lite-rev", paper=FUSEDKV_PAPER, keys="K_i = K_1, i > n", values="V_i = V_n, i > n", cache="n/L"
)
def _fusedkv_lite_rev(num_layers: int, *, storage_layers: int | None = None) -> list[LayerPlan]:
    """FusedKV's ablation with the sources of keys and values swapped; the paper finds it clearly worse.

    Args:
        storage_layers: n, default num_layers // 2.
    """
    return _storing_first(num_layers, storage_layers, lambda n: _take(0, n - 1))


@method(
    "dense-fusion",
    paper=FUSEDKV_PAPER,
    keys="K_i = sum_{j <= n} a_j K_j, i > n",
    values="V_i = sum_{j <= n} b_j V_j, i > n",
    cache="n/L",
)
def _dense_fusion(
    num_layers: int, *, storage_layers: int | None = None, granularity: str = "scalar"
) -> list[LayerPlan]:
    """FusedKV's probe: layers above the first n fuse the keys and values of all n, from 1/n each.

    Args:
        storage_layers: n, default num_layers // 2.
        granularity: see ``fkv.plan.Fusion``.
    """

    def reader(n: int) -> LayerPlan:
        every = Segment(tuple(range(n)), fusion=Fusion(granularity, (1 / n,) * n))
        return LayerPlan(every, every)

    return _storing_first(num_layers, storage_layers, reader)


# Whole keys and values of another layer


@method("yoco", paper=YOCO_PAPER, keys="K_i = K_n, i > n", values="V_i = V_n, i > n", cache="n/L")
def _yoco(num_layers: int, *, storage_layers: int | None = None) -> list[LayerPlan]:
    """Layers above the first n use the keys and the values of layer n.

    This is YOCO as in the comparison of the FusedKV paper: full attention below n. The YOCO paper has
    windowed or gated attention there.

    Args:
        storage_layers: n, default num_layers // 2.
    """
    return _storing_first(num_layers, storage_layers, lambda n: _take(n - 1, n - 1))


@method(
    "yoco++",
    paper="YOCO++, arXiv:2604.13556",
    keys="K_i = s (w_0 K_1 + w_1 K_i), 1 < i <= n; K_i = K_n, i > n",
    values="V_i = s (u_0 V_1 + u_1 V_i), 1 < i <= n; V_i = V_n, i > n",
    cache="n/L",
)
def _yoco_plus_plus(
    num_layers: int, *, storage_layers: int | None = None, multiplier: float = 35.0
) -> list[LayerPlan]:
    """yoco whose storage layers store a mix with the first layer; its learnable scalars start at 0 and 1.

    Args:
        storage_layers: n, default num_layers // 2.
        multiplier: s, a learning-rate multiplier; the parameters start at w_0 = 0 and w_1 = 1/s.
    """
    n = _middle(num_layers, storage_layers)
    fusion = Fusion("scalar", (0.0, 1.0), multiplier=multiplier)  # the weights as used: s w_0 and s w_1
    mixed = [Segment((0, i), fusion=fusion) for i in range(1, n)]
    return [*_own(1), *(LayerPlan(mix, mix) for mix in mixed), *[_take(n - 1, n - 1)] * (num_layers - n)]


@method(
    "cla",
    paper=CLA_PAPER,
    keys="K_i = K_j, j = i - (i - 1) mod factor",
    values="V_i = V_j",
    cache="1/factor, rounded up to whole layers",
    variants=({"factor": 3},),
)
def _cla(num_layers: int, *, factor: int = 2, storage_layers: int | None = None) -> list[LayerPlan]:
    """The first of every ``factor`` consecutive layers stores keys and values; the others reuse them.

    Args:
        factor: the number of consecutive layers with the same keys and values.
        storage_layers: n groups of L/n layers each, rounded to whole layers; then factor is unused.
    """
    factor = whole_number(factor, "factor", minimum=1)
    if storage_layers is None:
        return [_take(i - i % factor, i - i % factor) for i in range(num_layers)]
    n = _middle(num_layers, storage_layers)
    firsts = [group * num_layers // n for group in range(n)]
    nearest = [max(j for j in firsts if j <= i) for i in range(num_layers)]
    return [_take(j, j) for j in nearest]


@method(
    "yoco-v", paper=f"compared in {SKIPV1_PAPER}", keys="K_i", values="V_i = V_n, i > n", cache="1/2 + n/(2L)"
)
def _yoco_v(num_layers: int, *, storage_layers: int | None = None) -> list[LayerPlan]:
    """V-only YOCO: all layers store keys; those above the first n use the values of layer n.

    Args:
        storage_layers: n, default num_layers // 2.
    """
    n = _middle(num_layers, storage_layers)
    return [_take(i, min(i, n - 1)) for i in range(num_layers)]


@method(
    "cla-v",
    paper=f"compared in {SKIPV1_PAPER}",
    keys="K_i",
    values="V_i = V_j, j = i - (i - 1) mod factor",
    cache="1/2 + 1/(2 factor), rounded up to whole layers",
)
def _cla_v(num_layers: int, *, factor: int = 2) -> list[LayerPlan]:
    """V-only CLA: all layers store keys; the first of every ``factor`` consecutive layers stores values.

    Args:
        factor: the number of consecutive layers with the same values.
    """
    factor = whole_number(factor, "factor", minimum=1)
    return [_take(i, i - i % factor) for i in range(num_layers)]


# Heads and values of the first layer


@method(
    "skipv1",
    paper=SKIPV1_PAPER,
    keys="K_i",
    values="heads 1..(1 - skip)H: V_i; the others: those heads of V_1; i > 1",
    cache="1 - skip/2 + skip/(2L)",
    variants=({"skip": "1/4"}, {"skip": "3/4"}),
)
def _skipv1(num_layers: int, *, skip: Fraction | str = "1/2") -> list[LayerPlan]:
    """Layers above the first reuse the last share of the value heads of the first layer.

    Args:
        skip: that share of the heads, such as "1/4". With grouped heads it is a share of the KV heads.
    """
    later = [LayerPlan(Segment((i,)), _skip_first(i, skip)) for i in range(1, num_layers)]
    return [*_own(1), *later]


@method(
    "skipv1-yoco",
    paper=SKIPV1_PAPER,
    keys="K_i = K_n, i > n",
    values="V_i as in skipv1",
    cache="n/(2L) + (1 - skip)/2 + skip/(2L)",
)
def _skipv1_yoco(
    num_layers: int, *, storage_layers: int | None = None, skip: Fraction | str = "1/2"
) -> list[LayerPlan]:
    """skipv1 whose layers above the first n use the keys of layer n.

    Args:
        storage_layers: n, default num_layers // 2.
        skip: as in skipv1.
    """
    n = _middle(num_layers, storage_layers)
    later = [LayerPlan(Segment((min(i, n - 1),)), _skip_first(i, skip)) for i in range(1, num_layers)]
    return [*_own(1), *later]


@method(
    "skipkv1",
    paper=SKIPV1_PAPER,
    keys="heads 1..(1 - skip)H: K_i; the others: those heads of K_1; i > 1",
    values="the same of V_i and V_1",
    cache="1 - skip + skip/L",
)
def _skipkv1(num_layers: int, *, skip: Fraction | str = "1/2") -> list[LayerPlan]:
    """SkipV1Former's ablation: layers reuse keys of the first layer like values; worse than MHA in the paper.

    Args:
        skip: as in skipv1.
    """
    later = [LayerPlan(_skip_first(i, skip), _skip_first(i, skip)) for i in range(1, num_layers)]
    return [*_own(1), *later]


@method(
    "resformer",
    paper=VALUE_RESIDUAL_PAPER,
    keys="K_i",
    values="V_i = l V_i + (1 - l) V_1, i > 1, mixed before storing",
    cache="1",
    variants=({"learnable": True},),
)
def _resformer(num_layers: int, *, share: float = 0.5, learnable: bool = False) -> list[LayerPlan]:
    """Layers above the first mix their values with those of the first layer before they store them.

    Args:
        share: l, the weight of the layer's own values.
        learnable: the two scalars of each layer are trained, from l and 1 - l on; otherwise they are
            constant.
    """
    share = real_number(share, "share")
    fusion = Fusion("scalar", (1 - share, share), learnable=learnable)
    later = [LayerPlan(Segment((i,)), Segment((0, i), fusion=fusion)) for i in range(1, num_layers)]
    return [*_own(1), *later]


@method("svformer", paper=VALUE_RESIDUAL_PAPER, keys="K_i", values="V_i = V_1", cache="1/2 + 1/(2L)")
def _svformer(num_layers: int) -> list[LayerPlan]:
    """All layers store keys and use the values of the first layer."""
    return [_take(i, 0) for i in range(num_layers)]
