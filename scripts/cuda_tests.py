"""Which test files have CUDA tests. They are read, not imported: some import what a machine lacks."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "python_tests"
_CUDA = "pytest.mark.cuda"


def _fixtures_of(function: ast.FunctionDef) -> set[str]:
    """What pytest looks up for a test or a fixture: its arguments, without those of its own parametrize."""
    names = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    for call in function.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args:
            named = call.args if call.func.attr == "usefixtures" else call.args[:1]
            words = [
                node.value for each in named for node in ast.walk(each) if isinstance(node, ast.Constant)
            ]
            if call.func.attr == "usefixtures":
                names.update(words)
            elif call.func.attr == "parametrize":
                names -= {name.strip() for word in words for name in str(word).split(",")}
    return names


def _cuda_fixtures(tree: ast.Module, known: set[str]) -> set[str]:
    """`known` and the fixtures of a module that have the mark `cuda` or take one that has."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    fixtures = [each for each in functions if "pytest.fixture" in ast.unparse(each.decorator_list[0])]
    found = known | {
        each.name for each in fixtures if _CUDA in "".join(map(ast.unparse, each.decorator_list))
    }
    while new := {each.name for each in fixtures if _fixtures_of(each) & found} - found:
        found |= new
    return found


def files() -> list[str]:
    """Their paths below ROOT."""
    conftest = ast.parse((TESTS / "conftest.py").read_text(encoding="utf-8"))
    shared, found = _cuda_fixtures(conftest, set()), []
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        fixtures, nodes = _cuda_fixtures(tree, shared), list(ast.walk(tree))
        tests = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"]
        marked = any(isinstance(node, ast.Attribute) and ast.unparse(node) == _CUDA for node in nodes)
        if marked or any(_fixtures_of(test) & fixtures for test in tests):
            found.append(path.relative_to(ROOT).as_posix())
    return found
