"""Entries of a comparison: methods of the registry with options (`cla:factor=3`), and JSON files of plans."""

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
    """A method with its options.

    Attributes:
        method: A name of the registry, or the path of a plan's JSON file, which ends in `.json`.
        options: Non-default options as (name, value) pairs.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """`name` or `name:option=value:option=value`, the inverse of `parse`. For a file, its stem."""
        name = Path(self.method).stem if _is_file(self.method) else self.method
        return ":".join([name, *(f"{key}={_text(value)}" for key, value in self.options)])

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return self.label.replace(":", ",").replace("/", "of")

    @property
    def paper(self) -> str:
        """The source of the method: its paper, or the path of its file."""
        return self.method if _is_file(self.method) else METHODS[self.method].paper

    def config(self, base: TrainConfig) -> TrainConfig:
        """Returns `base` with the plan of this method.

        Raises:
            ConfigError: An option is out of range, or `base` has plan options, which would be ignored.
        """
        if base.model.plan_options:
            raise ConfigError(
                f"model.plan_options must be empty here, got {base.model.plan_options}; give options with "
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
    """Parses a label.

    Raises:
        ConfigError: The method or an option is unknown. The message lists the known ones.
    """
    if _is_file(label):
        return Entry(label)
    try:
        method, options = parse_label(label)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Entry(method.name, tuple(options.items()))


def parse_all(labels: Iterable[str]) -> list[Entry]:
    """Parses labels. Empty labels and duplicates are dropped.

    Args:
        labels: Labels of entries. `all` stands for every method of the registry and its variants.

    Raises:
        ConfigError: A label is invalid, or two files have one name.
    """
    found: dict[str, Entry] = {}
    for label in filter(None, map(str.strip, labels)):
        for entry in every() if label == "all" else [parse(label)]:
            if found.setdefault(entry.label, entry) != entry:
                other = found[entry.label].method
                raise ConfigError(
                    f"labels must be unique, got {entry.label} for {other} and {entry.method}; rename one"
                )
    return list(found.values())


def every() -> list[Entry]:
    """All methods of the registry: each with its defaults, followed by its variants."""
    return [
        Entry(name, tuple(options.items()))
        for name, method in METHODS.items()
        for options in ({}, *method.variants)
    ]
