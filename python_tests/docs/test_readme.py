"""What the documents show is true: their Python runs, their commands, targets and files exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fusedkv_ext.cli.main import build_parser
from fusedkv_ext.plan import METHODS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(path.read_text()) if kind == language]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run_one_after_the_other(path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # CONTRIBUTING.md registers a method, which other tests must not meet: undone by monkeypatch.
    monkeypatch.setitem(METHODS, "mirror", None)
    del METHODS["mirror"]
    names: dict[str, object] = {"__name__": path.stem}
    if any("transformers" in body or "fkv.hf" in body for body in blocks(path, "python")):
        pytest.importorskip("transformers")
    for number, body in enumerate(blocks(path, "python"), 1):
        exec(compile(body, f"{path.name}, python block {number}", "exec"), names)


def test_readme_has_python_to_run() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing, f"{path.name} links to {missing}"


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("index", "fusedkv_ext"),
        ("hf", "fusedkv_ext.hf"),
        ("conversion", "fusedkv_ext.conversion"),
        ("testing", "fusedkv_ext.testing"),
    ],
)
def test_the_reference_has_every_public_name_once(page: str, module: str) -> None:
    """Read from the source, as importing some modules needs transformers."""
    path = ROOT.joinpath(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    (names,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    text = (ROOT / "docs" / "reference" / f"{page}.md").read_text()
    assert sorted(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) == sorted(f"{module}.{n}" for n in names)


def test_the_picture_of_the_house_is_true() -> None:
    """The tree in docs/architecture.md names what exists, and leaves out no module and no native file."""
    (tree,) = blocks(ROOT / "docs" / "architecture.md", "text")
    paths, folder = set(), ""
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        if line.startswith("      "):  # goes on from the line before
            continue
        if line.startswith("  "):
            paths.update(folder + part for part in name.split(","))
        else:
            folder = name
            paths.add(name)
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert not missing, f"docs/architecture.md names {missing}"
    package = ROOT / "fusedkv_ext"
    there = {f"fusedkv_ext/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    there |= {f"fusedkv_ext/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    there |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.*")}
    for pattern in ("*/*.*", "ops/*/*.*"):
        there |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern)}
    assert there <= paths, f"docs/architecture.md leaves out {there - paths}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(re.findall(r"`([^`\n]+)`", path.read_text()) + blocks(path, "sh"))
    missing = {name for name in re.findall(r"\bmake ([a-z][\w-]*)", code) if name not in targets}
    assert not missing, f"{path.name} names make targets that do not exist: {missing}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_command_lines_parse(path: Path) -> None:
    import shlex

    spans = re.findall(r"`(fusedkv [^`\n]+)`", path.read_text())
    lines = [line for body in blocks(path, "sh") for line in body.splitlines() if line.startswith("fusedkv ")]
    parser = build_parser()
    for line in [*spans, *lines]:
        # A command that is only named (`fusedkv train`) or elided (...) is not one to run.
        words = shlex.split(line, comments=True)[1:]
        if len(words) > 1 and "..." not in words:
            parser.parse_args(words)
