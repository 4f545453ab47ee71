"""The registry of methods: one builder per method, and nothing else to touch when a method is added.

A builder takes the number of layers and keyword options and returns the rows of the layers, from layer 0 on.
``CachePlan.named``, the command line, the tests and the documentation's table read ``METHODS``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fusedkv_ext.plan.pieces import Fusion, LayerPlan, Segment, whole_number


@dataclass(frozen=True)
class Method:
    """A published method: its builder and where it comes from.

    equation: in the papers' letters, layers counted from 1. options: the builder's keywords, with defaults.
    """

    name: str
    build: Callable[..., Iterable[LayerPlan]]
    paper: str
    equation: str

    @property
    def options(self) -> dict[str, Any]:
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The builder's docstring: what the method is and what its options mean."""
        return inspect.getdoc(self.build) or ""


METHODS: dict[str, Method] = {}
FUSEDKV_PAPER = "FusedKV, arXiv:2512.03870"


def method(name: str, *, paper: str, equation: str) -> Callable[[Callable], Callable]:
    """Registers a builder ``(num_layers, *, options) -> LayerPlans`` as ``CachePlan.named(name, ...)``."""

    def register(build: Callable[..., Iterable[LayerPlan]]) -> Callable[..., Iterable[LayerPlan]]:
        if name in METHODS:
            raise ValueError(f"plan {name!r} is registered twice")
        METHODS[name] = Method(name, build, paper, equation)
        return build

    return register


def _take(
    key: int, value: int, key_fusion: Fusion | None = None, value_fusion: Fusion | None = None
) -> LayerPlan:
    """A layer with the keys of layer ``key`` and the values of layer ``value``."""
    return LayerPlan(Segment((key,), fusion=key_fusion), Segment((value,), fusion=value_fusion))


def _storing_first(
    num_layers: int, storage_layers: int | None, reader: Callable[[int], LayerPlan]
) -> list[LayerPlan]:
    """The first n layers keep their own K and V, the others are ``reader(n)``."""
    n = max(1, num_layers // 2)
    if storage_layers is not None:
        n = whole_number(storage_layers, "storage_layers", minimum=1)
    if n > num_layers:
        raise ValueError(f"storage_layers must be at most the number of layers {num_layers}, got {n}")
    return [*(_take(i, i) for i in range(n)), *[reader(n)] * (num_layers - n)]


def _initial(init: str, sources: tuple[int, ...], hot: int) -> tuple[float, ...] | str:
    """Numbers of a named init; ``hot`` is the source that gets the 1 under "lite"."""
    if init == "normal":
        return "normal"
    if init == "lite":
        return tuple(float(j == hot) for j in sources)
    if init in ("half", "uniform"):
        return (1 / len(sources),) * len(sources)
    raise ValueError(f"init must be one of lite, normal, half, uniform, got {init!r}")


@method("vanilla", paper="GQA, arXiv:2305.13245", equation="K_i, V_i own")
def _vanilla(num_layers: int) -> list[LayerPlan]:
    """Every layer stores its own keys and values: MHA, GQA or MQA by the number of KV heads."""
    return [_take(i, i) for i in range(num_layers)]


@method(
    "fusedkv",
    paper=FUSEDKV_PAPER,
    equation="K_i = a_1 (.) K_1 + a_n (.) K_n, V_i = b_1 (.) V_1 + b_n (.) V_n for i > n",
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
    """Layers above the first n fuse the keys and the values of the first and of the last storage layer.

    storage_layers: n, default num_layers // 2. granularity, tie_values, multiplier: see Fusion.
    init: "lite" (start as fusedkv-lite: keys 1 on layer n, values 1 on layer 1), "normal" (N(0, 1)), "half"
    or "uniform" (one over the number of sources). With n = 1 both sources are one layer and become one.
    """

    def reader(n: int) -> LayerPlan:
        sources = (0,) if n == 1 else (0, n - 1)
        key = Fusion(granularity, _initial(init, sources, n - 1), tied=True, multiplier=multiplier)
        value = Fusion(granularity, _initial(init, sources, 0), tied=tie_values, multiplier=multiplier)
        return LayerPlan(Segment(sources, fusion=key), Segment(sources, fusion=value))

    return _storing_first(num_layers, storage_layers, reader)


@method("fusedkv-lite", paper=FUSEDKV_PAPER, equation="K_i = K_n, V_i = V_1 for i > n")
def _fusedkv_lite(num_layers: int, *, storage_layers: int | None = None) -> list[LayerPlan]:
    """Layers above the first n take the keys of layer n and the values of layer 1.

    storage_layers: n, default num_layers // 2.
    """
    return _storing_first(num_layers, storage_layers, lambda n: _take(n - 1, 0))


@method("fusedkv-lite-learnable", paper=FUSEDKV_PAPER, equation="K_i = a (.) K_n, V_i = b (.) V_1 for i > n")
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

    init: "lite" (all ones) or "normal" (N(0, 1)). The other options as in fusedkv.
    """
    if init not in ("lite", "normal"):
        raise ValueError(f"init must be lite or normal, got {init!r}")
    start = "normal" if init == "normal" else (1.0,)
    key = Fusion(granularity, start, tied=True, multiplier=multiplier)
    value = Fusion(granularity, start, tied=tie_values, multiplier=multiplier)
    return _storing_first(num_layers, storage_layers, lambda n: _take(n - 1, 0, key, value))


@method("yoco", paper="YOCO, arXiv:2405.05254", equation="K_i = K_n, V_i = V_n for i > n")
def _yoco(num_layers: int, *, storage_layers: int | None = None) -> list[LayerPlan]:
    """Layers above the first n take the keys and the values of layer n.

    storage_layers: n, default num_layers // 2. This is YOCO as the FusedKV paper compares it: full attention
    below n, where the YOCO paper has windowed or gated attention.
    """
    return _storing_first(num_layers, storage_layers, lambda n: _take(n - 1, n - 1))


@method("cla", paper="CLA, arXiv:2405.12981", equation="K_i = K_j, V_i = V_j with j = i - (i - 1) mod factor")
def _cla(num_layers: int, *, factor: int = 2) -> list[LayerPlan]:
    """The first of every ``factor`` layers in a row stores keys and values, the others take them over."""
    factor = whole_number(factor, "factor", minimum=1)
    return [_take(i - i % factor, i - i % factor) for i in range(num_layers)]
