"""Labels: a method with its options in one text, ``name`` or ``name:option=value:option=value``.

``CachePlan.named``, the configs and the command line read them with these functions.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from fusedkv_ext.plan.methods import METHODS
from fusedkv_ext.plan.registry import Method

__all__ = ["find_method", "parse_label", "split_label"]


def split_label(label: str) -> tuple[str, list[tuple[str, str]]]:
    """The name in a label and its options, whose values are still texts.

    Raises:
        ValueError: A part after ":" has no "=".
    """
    name, *pairs = label.split(":")
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"{label!r}: expected option=value after ':', as in cla:factor=3, got {pair!r}")
    return name, [(key, value) for key, _, value in (pair.partition("=") for pair in pairs)]


def parse_label(label: str) -> tuple[Method, dict[str, Any]]:
    """The method of a label and its options. Values are JSON where they parse, else texts.

    Raises:
        ValueError: The syntax is wrong, an option is given twice, or the method or an option is unknown.
    """
    name, pairs = split_label(label)
    options: dict[str, Any] = {}
    for key, text in pairs:
        if key in options:
            raise ValueError(f"{label!r}: option {key!r} must be given once, got it twice")
        options[key] = _value(text)
    return find_method(name, options), options


def find_method(name: str, options: dict[str, Any]) -> Method:
    """The method of a name, in any case and with - or _; its options must be among ``options``.

    Raises:
        ValueError: The name or an option is unknown; the message lists those there are.
    """
    found = METHODS.get(name.lower().replace("_", "-"))
    if found is None:
        close = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"plan name must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    if unknown := sorted(set(options) - set(found.options)):
        known, names = ", ".join(found.options) or "none", ", ".join(map(repr, unknown))
        raise ValueError(f"plan {found.name!r} has no option {names}; its options: {known}")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
