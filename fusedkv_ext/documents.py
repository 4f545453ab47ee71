"""Parts of documents that are made from data: what stands between `<!-- generated: KIND [FILE] -->` and
`<!-- end -->`. Tests check that the committed documents are what the data gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_MARKED = re.compile(r"(<!-- generated: ([\w-]+)(?: ([\w./-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


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
