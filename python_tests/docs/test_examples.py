"""Every file in examples/ runs by itself, from any folder, as a newcomer would run it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_SECONDS = 120  # 20 on two idle cores; the rest is for machines that do something else beside


def names(tree: ast.Module) -> set[str]:
    """Top-level packages that a file imports."""
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in imported}


def test_there_is_an_example_of_each_kind() -> None:
    kinds = {"quickstart", "custom_block", "paged_decode", "convert_llama", "train_your_own_loop"}
    assert kinds <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    if "transformers" in names(ast.parse(path.read_text())):
        pytest.importorskip("transformers")
    # PYTHONPATH: the package that the tests run with, wherever it is.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example prints what it found"
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_what_it_shows_and_checks_it(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert f"python examples/{path.name}" in (ast.get_docstring(tree) or "")
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert checks or "assert_close" in text


def test_the_source_package_has_the_examples() -> None:
    assert "recursive-include examples *.py" in (ROOT / "MANIFEST.in").read_text().splitlines()
