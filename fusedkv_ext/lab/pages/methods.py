"""Generator of the tables of docs/methods.md from the registry.

python -m fusedkv_ext.lab.pages.methods ROOT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedkv_ext.lab.reporting import filled, table
from fusedkv_ext.plan.methods import METHODS
from fusedkv_ext.plan.registry import Method

DOCUMENT = "docs/methods.md"


def call(method: Method, options: Mapping[str, Any]) -> str:
    """The call that creates a plan, with L for the number of layers."""
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    return f'CachePlan.named("{method.name}", L{arguments})'.replace("'", '"')


def methods_table(_: str = "") -> str:
    """One row per method."""
    titles = ("call", "paper", "keys of layer i", "values of layer i", "cache")
    return table(titles, ((f"`{call(m, {})}`", m.paper, m.keys, m.values, m.cache) for m in METHODS.values()))


def descriptions(_: str = "") -> str:
    """One paragraph per method: its summary, its options, and its variants in comparisons."""
    parts = []
    for method in METHODS.values():
        text = " ".join(method.summary.split()).replace(" Args: ", " Options: ").replace("``", "`")
        defaults = ", ".join(f"`{name}={json.dumps(value)}`" for name, value in method.options.items())
        also = "; ".join(
            ", ".join(f"{k}={json.dumps(v)}" for k, v in some.items()) for some in method.variants
        )
        if defaults:
            text += f" Defaults: {defaults}."
        if also:
            text += f" Compared also with {also}."
        parts.append(f"* **{method.name}**: {text}\n")
    return "".join(parts)


BLOCKS = {"methods-table": methods_table, "methods-descriptions": descriptions}


def main(root: Path) -> None:
    """Generates the page of the repository at ``root``."""
    path = root / DOCUMENT
    path.write_text(filled(path.read_text(encoding="utf-8"), BLOCKS), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
