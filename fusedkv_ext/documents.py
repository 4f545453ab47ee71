"""Parts of documents that are made from data: what stands between `<!-- generated: KIND [FILE] -->` and
`<!-- end -->`. Tests check that the committed documents are what the data gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MARKED = re.compile(r"(<!-- generated: ([\w-]+)(?: ([\w./-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table in Markdown; numbers: all columns but the first are flush right."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(titles) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows)) + "\n"


def filled(text: str, blocks: Mapping[str, Callable[[str], str]]) -> str:
    """A document with its generated parts made anew.

    blocks: KIND -> function of FILE ("" where the mark names none) that returns lines.
    Raises ValueError for a KIND that is not among them.
    """

    def part(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        if kind not in blocks:
            raise ValueError(f"unknown generated block {kind!r}; known: {', '.join(blocks)}")
        return f"{begin}{blocks[kind](name or '')}{end}"

    return _MARKED.sub(part, text)


def filled_from_results(text: str, blocks: Mapping[str, Callable[[Any], str]], folder: Path) -> str:
    """As ``filled``, with functions of the content of FILE, a JSON file of ``folder``."""

    def of_file(block: Callable[[Any], str]) -> Callable[[str], str]:
        return lambda name: block(json.loads((folder / name).read_text(encoding="utf-8")))

    return filled(text, {kind: of_file(block) for kind, block in blocks.items()})
