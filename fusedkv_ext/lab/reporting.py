"""Tables, atomic writing of files, and generated parts of documents.

A generated part is between `<!-- generated: KIND [FILE] -->` and `<!-- end -->`. Tests check that the
committed documents match the data.
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
    """Formats a Markdown table; with `numbers`, all columns but the first are right-aligned."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(titles) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows)) + "\n"


def aligned(rows: Sequence[Sequence[str]], *, rule: bool = True) -> str:
    """Formats rows as aligned text: the first column is left-aligned, the others right-aligned.

    Args:
        rows: The cells, header first.
        rule: Adds a line of dashes below the header.
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
    """Writes a text file atomically and returns its path."""
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path


def filled(text: str, blocks: Mapping[str, Callable[[str], str]]) -> str:
    """Fills in the generated parts of a document.

    Args:
        text: The document.
        blocks: KIND -> function from FILE ("" if the marker has none) to the content.

    Raises:
        ValueError: A KIND is unknown.
    """

    def part(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        if kind not in blocks:
            raise ValueError(f"a generated block must be one of {', '.join(blocks)}, got {kind!r}")
        return f"{begin}{blocks[kind](name or '')}{end}"

    return _MARKED.sub(part, text)


def filled_from_results(text: str, blocks: Mapping[str, Callable[[Any], str]], folder: Path) -> str:
    """Like ``filled``, for functions of the content of FILE, which is a JSON file in ``folder``."""

    def of_file(block: Callable[[Any], str]) -> Callable[[str], str]:
        return lambda name: block(json.loads((folder / name).read_text(encoding="utf-8")))

    return filled(text, {kind: of_file(block) for kind, block in blocks.items()})
