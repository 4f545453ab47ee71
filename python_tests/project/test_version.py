"""The package has one version number; whatever else names it, names the same."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest

import fusedkv_ext

ROOT = Path(__file__).resolve().parents[2]
VERSION = fusedkv_ext.__version__


def test_the_number_is_a_literal_in_the_package_and_nowhere_in_pyproject() -> None:
    """setuptools reads a literal from the file; anything else it would import, and torch with it."""
    tree = ast.parse((ROOT / "fusedkv_ext" / "__init__.py").read_text())
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert [ast.literal_eval(value) for value in values] == [VERSION]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", VERSION)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and 'attr = "fusedkv_ext.__version__"' in project
    assert not re.search(r"^version = \"", project, re.MULTILINE)


def test_the_installed_package_has_it_with_the_label_of_its_build() -> None:
    try:
        installed = metadata.version("fusedkv_ext")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    assert re.fullmatch(re.escape(VERSION) + r"\+(cpu|cu\d+)", installed)


def test_the_citation_has_it() -> None:
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == VERSION


def test_the_changelog_begins_with_it() -> None:
    changelog = ROOT / "CHANGELOG.md"
    numbers = re.findall(r"\b\d+\.\d+\.\d+\b", changelog.read_text())
    assert numbers[:1] == [VERSION]


def test_the_installation_page_shows_it() -> None:
    shown = re.findall(r"fusedkv_ext-(\d+\.\d+\.\d+)\+", (ROOT / "docs" / "install.md").read_text())
    assert shown and set(shown) == {VERSION}
