"""Tables and files of results, and the generated parts of documents.

Those parts are between `<!-- generated: KIND [FILE] -->` and `<!-- end -->`. Tests check that the committed
documents match the data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MARKED = re.compile(r"(<!-- generated: ([\w-]+)(?: ([\w./-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table in Markdown; numbers: all columns but the first are flush right."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(titles) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows)) + "\n"


def aligned(rows: Sequence[Sequence[str]], *, rule: bool = True) -> str:
    """Rows of cells as lines, a header first; the first column is left-aligned, the others right-aligned.

    Args:
        rows: the rows.
        rule: adds a line of dashes below the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if rule:
        lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def write(path: Path, text: str) -> Path:
    """Writes a text file in one go: an old one stays until the new one is complete."""
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path


def filled(text: str, blocks: Mapping[str, Callable[[str], str]]) -> str:
    """A document with its generated parts filled in.

    Args:
        text: the document.
        blocks: KIND -> function of FILE ("" if the mark names none) that returns lines.

    Raises:
        ValueError: a KIND is unknown.
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
