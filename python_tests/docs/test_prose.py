"""scripts/prose_check.py: what it finds in documents, and that the documents of the repository are clean."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import prose_check  # noqa: E402

LONG = " ".join(["word"] * 31)
SHORT = " ".join(["word"] * 30)
RETIRED = {"blind row": "fully masked row", "made anew": "recomputed"}


def found(text: str) -> list[tuple[int, str]]:
    """Line and kind of everything that is found."""
    kinds = {"at most 30": "long", "retired": "retired"}
    return [
        (line, kind)
        for line, message in prose_check.findings(text, RETIRED)
        for mark, kind in kinds.items()
        if mark in message
    ]


def test_the_documents_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert prose_check.main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        f"{SHORT}.",
        f"{SHORT}. {SHORT}! {SHORT}? {SHORT}",
        f'"{SHORT}." {SHORT}.',
        f"**{SHORT}.** {SHORT}.",
        f"* {SHORT}\n* {SHORT}",
        f"1. {SHORT}\n2. {SHORT}",
        f"Words like `{LONG}` count once.",
        f"[{SHORT}](a_file.md).",
        f"{SHORT}.\n\n    {LONG}\n",
        f"* {SHORT}:\n\n        {LONG}\n",
        f"```text\n{LONG} blind row\n```",
        f"<!-- generated: table -->\n{LONG} blind row\n<!-- end -->",
        f"# {LONG}",
        f"| {LONG} | {LONG} |\n|---|---|\n| {LONG} | {LONG} |",
        "A `blind row` in code, blindrows and the blind.",
    ],
    ids=lambda text: text[:20].replace("\n", " "),
)
def test_what_is_fine(text: str) -> None:
    assert found(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{LONG}.", [(1, "long")]),
        (f"{SHORT}.\n{SHORT}.\n{LONG}", [(3, "long")]),
        (f"A sentence. {LONG.replace(' ', chr(10), 3)}.", [(1, "long")]),
        (f"{SHORT}, e.g. this one.", [(1, "long")]),
        (f"* {SHORT}\n* {LONG}\n", [(2, "long")]),
        (f"* {SHORT}\n\n    {LONG}\n", [(3, "long")]),
        (f"```sh\na\n```\n{LONG}", [(4, "long")]),
        (f"<!-- generated: a -->\n<!-- end -->\n{LONG}", [(3, "long")]),
        ("The rows are\nBlind\nrows.", [(1, "retired")]),
        ("# A blind row", [(1, "retired")]),
        ("| a |\n|---|\n| made anew |", [(3, "retired")]),
        ("[made anew](file.md)", [(1, "retired")]),
    ],
)
def test_what_is_found(text: str, expected: list[tuple[int, str]]) -> None:
    assert found(text) == expected


def test_findings_name_file_line_and_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Title\n\nAll is well. A blind row is what stands here.\n")
    assert prose_check.main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    for line in lines:
        assert "page.md:3: " in line and line.endswith("A blind row is what stands here.")


def test_retired_words_come_from_the_glossary() -> None:
    glossary = "| term | meaning |\n|---|---|\n| a | b |\n\n| old | new |\n|---|---|\n| c, d e | f |\n"
    assert prose_check.retired_words(glossary) == {"c": "f", "d e": "f"}
    real = prose_check.retired_words(prose_check.GLOSSARY.read_text())
    assert real["blind row"] == "fully masked row" and len(real) > 30
