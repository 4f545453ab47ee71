"""Entries of the registry of methods: a builder of layers, its paper and equations, and its comparisons."""

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

    Attributes:
        name: the name that ``CachePlan.named`` takes.
        build: ``(num_layers, *, options) -> LayerPlans``, from layer 0 on.
        paper: name and arXiv number of the paper.
        keys: the equation of the keys of layer i in the papers' letters, with layers counted from 1.
        values: the equation of the values.
        cache: the cache size, relative to vanilla attention with the same number of KV heads.
        kv_heads: maps the number of KV heads under other methods to the number under this one.
        variants: options that a comparison of all methods runs in addition to the defaults.
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
        """The keyword options of the builder, with their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def equation(self) -> str:
        """The equations of keys and values in one line."""
        return f"{self.keys}; {self.values}"

    @property
    def summary(self) -> str:
        """The docstring of the builder: the method and its options."""
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
    """Registers a builder as ``CachePlan.named(name, ...)``; see ``Method`` for the arguments.

    Raises:
        ValueError: the name is registered already.
    """

    def register(build: Builder) -> Builder:
        if name in METHODS:
            raise ValueError(f"name must be new, got {name!r}, which is registered already")
        METHODS[name] = Method(name, build, paper, keys, values, cache, kv_heads, tuple(variants))
        return build

    return register
