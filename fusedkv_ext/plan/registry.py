"""What a method of the registry is: a builder of layers, where it comes from, and what to compare it as."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedkv_ext.plan.pieces import LayerPlan

Builder = Callable[..., Iterable[LayerPlan]]
METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class Method:
    """A published method.

    build: ``(num_layers, *, options) -> LayerPlans``, from layer 0 on. paper: its name and where it stands.
    keys, values: the equations of layer i in the papers' letters, layers counted from 1. cache: its size,
    relative to vanilla attention with as many KV heads. kv_heads: the KV heads of a model that has that many
    under the other methods. variants: options that a comparison of all methods runs beside the defaults.
    """

    name: str
    build: Builder
    paper: str
    keys: str
    values: str
    cache: str
    kv_heads: Callable[[int], int]
    variants: tuple[Mapping[str, Any], ...]

    @property
    def options(self) -> dict[str, Any]:
        """The builder's keywords with their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def equation(self) -> str:
        """Keys and values in one line."""
        return f"{self.keys}; {self.values}"

    @property
    def summary(self) -> str:
        """The builder's docstring: what the method is and what its options mean."""
        return inspect.getdoc(self.build) or ""


def method(
    name: str,
    *,
    paper: str,
    keys: str,
    values: str,
    cache: str,
    kv_heads: Callable[[int], int] = lambda heads: heads,
    variants: Iterable[Mapping[str, Any]] = (),
) -> Callable[[Builder], Builder]:
    """Registers a builder as ``CachePlan.named(name, ...)``; see ``Method`` for the arguments."""

    def register(build: Builder) -> Builder:
        if name in METHODS:
            raise ValueError(f"plan {name!r} is registered twice")
        METHODS[name] = Method(name, build, paper, keys, values, cache, kv_heads, tuple(variants))
        return build

    return register
