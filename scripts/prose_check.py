"""Checks the prose of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/: short sentences, no retired words.

    python scripts/prose_check.py [FILE ...]

Prints `file:line: finding` for every sentence of more than MAX_WORDS words and for every retired word, and
exits with 1 if there is one. The retired words are the first column of the last table of docs/glossary.md.
Code and generated blocks are never read. Headings and table rows are read for retired words only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
MAX_WORDS = 30

_CODE = re.compile(r"`+[^`]+`+")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_LIST_ITEM = re.compile(r"^\s*(?:[*+-]|\d+\.)\s+")
_TABLE_ROW = re.compile(r"\s*\|")
# A sentence ends with a mark, and perhaps a quote or bracket, before a space; or with its block.
_END = re.compile(r"""(?<!\be\.g)(?<!\bi\.e)[.?!][*"')\]]*(?=\s|$)""")
_WORD = re.compile(r"\S*\w\S*")


class Block(NamedTuple):
    """Lines that belong together: a paragraph, a list item, a heading or a table row."""

    line: int
    lines: list[str]
    is_prose: bool


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a Markdown document, without its code and its generated parts."""
    current: Block | None = None
    fence = generated = in_list = False
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            fence = not fence
        elif stripped.startswith("<!--"):
            generated = stripped.startswith("<!-- generated:") or (generated and stripped != "<!-- end -->")
        item = _LIST_ITEM.match(line)
        if item or line[:1].strip():
            in_list = bool(item)
        code = current is None and line.startswith(" " * (8 if in_list else 4)) and not item
        skipped = fence or generated or code or not stripped or stripped.startswith(("```", "<!--"))
        is_prose = not (stripped.startswith("#") or _TABLE_ROW.match(line))
        starts = not is_prose or item or current is None or not current.is_prose
        if (skipped or starts) and current is not None:
            yield current
            current = None
        if not skipped:
            if current is None:
                current = Block(number, [], is_prose)
            current.lines.append(line)
    if current is not None:
        yield current


def plain(text: str) -> str:
    """Text as it is read: code spans become the word `CODE`, links their text."""
    return _LINK.sub(r"\1", _CODE.sub("CODE", text))


def sentences(block: Block) -> Iterator[tuple[int, str]]:
    """The sentences of a block, each with the line where it begins."""
    text = "\n".join(block.lines)
    # Code spans may hold full stops: masked by as many characters, so that positions stay.
    masked = _CODE.sub(lambda m: "".join("\n" if c == "\n" else "x" for c in m[0]), text)
    begin = 0
    for end in [*(match.end() for match in _END.finditer(masked)), len(text)]:
        part = text[begin:end]
        if part.strip():
            start = begin + len(part) - len(part.lstrip())
            yield block.line + text.count("\n", 0, start), _LIST_ITEM.sub("", part, count=1)
        begin = end


def words(sentence: str) -> int:
    """The number of words; a code span counts as one."""
    return len(_WORD.findall(plain(sentence)))


def retired_words(glossary: str) -> dict[str, str]:
    """The last table of the glossary: retired phrase -> what to write. Cells may list several phrases."""
    table = re.findall(r"(?:^\|.*\n?)+", glossary, re.MULTILINE)[-1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table]
    return {phrase.strip(): better for old, better in rows for phrase in old.split(",")}


def findings(text: str, retired: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """What is wrong with a document: line and message."""
    patterns = {
        phrase: re.compile(r"\b" + r"\s+".join(map(re.escape, phrase.split())) + r"s?\b", re.IGNORECASE)
        for phrase in retired
    }
    for block in blocks(text):
        for line, sentence in sentences(block):
            shown = " ".join(sentence.split())
            if block.is_prose and (count := words(sentence)) > MAX_WORDS:
                yield line, f"{count} words, at most {MAX_WORDS}: {shown}"
            for phrase, pattern in patterns.items():
                if pattern.search(plain(sentence)):
                    yield line, f'"{phrase}" is retired, write "{retired[phrase]}": {shown}'


def documents() -> list[Path]:
    """The documents of the repository that are checked."""
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]


def main(arguments: list[str]) -> int:
    """Checks the named files, or all documents. Returns the exit status."""
    glossary = GLOSSARY.read_text(encoding="utf-8")
    retired = retired_words(glossary)
    table = glossary.rindex("\n\n|")
    count = 0
    for path in map(Path, arguments) if arguments else documents():
        text = path.read_text(encoding="utf-8")
        if path.resolve() == GLOSSARY:
            text = text[:table]
        for line, message in findings(text, retired):
            print(f"{os.path.relpath(path, ROOT)}:{line}: {message}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
