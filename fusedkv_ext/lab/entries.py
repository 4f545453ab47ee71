"""What experiments compare: a method of the registry with its options, written `cla:factor=3`, or a plan in a
JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.plan import METHODS
from fusedkv_ext.plan.labels import parse_label
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.trainer import resolve_plan


@dataclass(frozen=True)
class Entry:
    """A method with its non-default options as (name, value) pairs.

    Attributes:
        method: a name of the registry, or the path of a plan's JSON file, which ends in `.json`.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """`name` or `name:option=value:option=value`, which `parse` reads back; of a file its bare name."""
        name = Path(self.method).stem if _is_file(self.method) else self.method
        return ":".join([name, *(f"{key}={_text(value)}" for key, value in self.options)])

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return self.label.replace(":", ",").replace("/", "of")

    @property
    def paper(self) -> str:
        """Where the method comes from."""
        return self.method if _is_file(self.method) else METHODS[self.method].paper

    def config(self, base: TrainConfig) -> TrainConfig:
        """`base` with this method in the place of its plan. Raises ConfigError for options out of range, and
        for options in `base`, which would be ignored.
        """
        if base.model.plan_options:
            raise ConfigError(
                f"model.plan_options {base.model.plan_options} belong to no method here; give options with "
                "the method, as in cla:factor=3"
            )
        heads = base.model.num_key_value_heads
        if not _is_file(self.method):
            heads = METHODS[self.method].kv_heads(heads)
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


def _is_file(method: str) -> bool:
    return method.endswith(".json")


def parse(label: str) -> Entry:
    """The entry of a label. Raises ConfigError for an unknown method or option, listing those there are."""
    if _is_file(label):
        return Entry(label)
    try:
        method, options = parse_label(label)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Entry(method.name, tuple(options.items()))


def parse_all(labels: Iterable[str]) -> list[Entry]:
    """Entries of labels; `all` is every method of the registry and its variants.

    Empty labels are left out, and what is named twice counts once. Raises ConfigError as `parse` does, and
    for two files of one name.
    """
    found: dict[str, Entry] = {}
    for label in filter(None, map(str.strip, labels)):
        for entry in every() if label == "all" else [parse(label)]:
            if found.setdefault(entry.label, entry) != entry:
                other = found[entry.label].method
                raise ConfigError(f"{other} and {entry.method} are both called {entry.label}; rename one")
    return list(found.values())


def every() -> list[Entry]:
    """Every method of the registry with its defaults, followed by its variants."""
    return [
        Entry(name, tuple(options.items()))
        for name, method in METHODS.items()
        for options in ({}, *method.variants)
    ]
