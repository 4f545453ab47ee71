"""What mypy and editors read is true: the stub of the native module, arguments that are converted."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import fusedkv_ext
from fusedkv_ext import _C

STUB = Path(fusedkv_ext.__file__).with_name("_C.pyi")


def described() -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_stub_has_the_functions_of_the_module() -> None:
    built = {name for name in dir(_C) if not name.startswith("_")}
    assert set(described()) == built


def test_the_stub_has_their_arguments_results_and_docstrings() -> None:
    """pybind11 puts a signature into the first line of each docstring."""
    for name, node in described().items():
        signature, _, text = (getattr(_C, name).__doc__ or "").partition("\n")
        arguments, result = re.fullmatch(rf"{name}\((.*)\) -> (.+)", signature).groups()
        names = [part.split(":")[0].strip() for part in arguments.split(",") if part]
        stub = node.args
        if not stub.posonlyargs:  # otherwise the binding names no argument
            assert names == [argument.arg for argument in stub.args], name
        assert len(names) == len(stub.posonlyargs + stub.args), name
        assert ast.unparse(node.returns).split("[")[0] == result.split("[")[0], name
        assert ast.get_docstring(node) == text.strip(), name


def test_the_package_has_the_stub() -> None:
    pyproject = (STUB.parents[1] / "pyproject.toml").read_text()
    assert 'fusedkv_ext = ["py.typed", "_C.pyi"]' in pyproject


@pytest.mark.parametrize("kind", ["CachePlan", "DecoderConfig", "LayerPlan", "Segment"])
def test_arguments_for_type_checkers_are_the_fields(kind: str) -> None:
    """Dataclasses that convert their arguments declare an ``__init__`` under TYPE_CHECKING."""
    made = getattr(fusedkv_ext, kind)
    path = Path(inspect.getsourcefile(made))
    (node,) = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == kind
    )
    (init,) = (
        item for item in ast.walk(node) if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    )
    arguments = init.args.args[1:]
    assert [argument.arg for argument in arguments] == [field.name for field in fields(made)]
    assert len(init.args.defaults) == len(arguments) - sum(
        parameter.default is inspect.Parameter.empty
        for parameter in inspect.signature(made).parameters.values()
    )
