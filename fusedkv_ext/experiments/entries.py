"""What a comparison compares: a method of the registry with its options, written `cla:factor=3`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fusedkv_ext.plan import METHODS
from fusedkv_ext.train.config import ConfigError, TrainConfig, literal
from fusedkv_ext.train.trainer import resolve_plan


@dataclass(frozen=True)
class Entry:
    """A method and the options in which it differs from the method's defaults, as (name, value) pairs."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """`name` or `name:option=value:option=value`; `parse` reads it back."""
        return ":".join([self.method, *(f"{key}={_text(value)}" for key, value in self.options)])

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return self.label.replace(":", ",").replace("/", "of")

    def config(self, base: TrainConfig) -> TrainConfig:
        """`base` with this method in the place of its plan. Raises ConfigError for options out of range."""
        heads = METHODS[self.method].kv_heads(base.model.num_key_value_heads)
        config = base.updated(
            [
                ("model.plan", self.method),
                ("model.plan_options", dict(self.options)),
                ("model.num_key_value_heads", heads),
            ]
        )
        resolve_plan(config.model)
        return config


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse(label: str) -> Entry:
    """The entry of a label. Raises ConfigError for an unknown method or option, listing those there are."""
    name, *pairs = label.split(":")
    name = name.lower().replace("_", "-")
    method = METHODS.get(name)
    if method is None:
        raise ConfigError(f"unknown method {name!r}; known: all, {', '.join(METHODS)}")
    options = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in method.options:
            known = ", ".join(method.options) or "none"
            raise ConfigError(f"method {label!r}: expected option=value after ':', options: {known}")
        options.append((key, literal(value)))
    return Entry(name, tuple(options))


def parse_all(labels: Iterable[str]) -> list[Entry]:
    """Entries of labels; `all` is every method of the registry and its variants. Doubles count once."""
    found: dict[str, Entry] = {}
    for label in labels:
        for entry in every() if label == "all" else [parse(label)]:
            found[entry.label] = entry
    return list(found.values())


def every() -> list[Entry]:
    """Every method of the registry with its defaults, followed by its variants."""
    return [
        Entry(name, tuple(options.items()))
        for name, method in METHODS.items()
        for options in ({}, *method.variants)
    ]
