"""The rules of the house that a program can check: who includes and imports whom, and how long things are."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from fast import FAST

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fusedkv_ext"
CSRC = ROOT / "csrc"

MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 80
MAX_FLOORS = 12

# The rooms of the package, lowest floor first. A module imports from floors below its own and from its own
# room, never from rooms on its own floor or above. docs/architecture.md lists them in the same order.
FLOORS = [
    {"errors", "extras"},
    {"plan", "ops"},
    {"cache", "testing"},
    {"generation"},
    {"layers"},
    {"checkpoint"},
    {"distributed"},
    {"training"},
    {"evaluation", "hf"},
    {"conversion", "vllm"},
    {"lab"},
    {"cli"},
]
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}
# Everything up to here runs with torch alone; what needs more imports it inside the function that needs it.
CORE = {name for names in FLOORS[: FLOOR_OF["checkpoint"] + 1] for name in names} | {"__init__"}
NATIVE_MODULE = "_C"
ENTRY_POINTS = {"__init__", "__main__"}

STABLE_TORCH = ("torch/csrc/stable/", "torch/headeronly/")
SHIM = "torch/csrc/inductor/aoti_torch/c/shim.h"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def native_files(*folders: str) -> list[Path]:
    suffixes = {".h", ".hpp", ".cuh", ".cpp", ".cu"}
    return sorted(p for folder in folders for p in (CSRC / folder).rglob("*") if p.suffix in suffixes)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The module or folder right below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Full names of everything a file imports, and whether that happens when the file itself is imported."""
    package = ["fusedkv_ext", *path.relative_to(PACKAGE).parts[:-1]]

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            yield from ((".".join([*module, alias.name]), at_import) for alias in node.names)
        deeper = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            deeper = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deeper)

    yield from visit(ast.parse(path.read_text()), True)


def test_every_python_module_is_in_a_room() -> None:
    unknown = {room(path) for path in python_files()} - set(FLOOR_OF) - ENTRY_POINTS
    assert not unknown, f"say in FLOORS where these rooms belong: {sorted(unknown)}"


def test_python_imports_point_to_lower_floors_only() -> None:
    wrong = []
    for path in python_files():
        own = room(path)
        if own in ENTRY_POINTS:
            continue
        for name, _ in imports(path):
            parts = name.split(".")
            if parts[0] != "fusedkv_ext" or len(parts) < 2 or parts[1] in (own, NATIVE_MODULE):
                continue
            if parts[1] not in FLOOR_OF or FLOOR_OF[parts[1]] >= FLOOR_OF[own]:
                wrong.append(f"{relative(path)} imports {name}")
    assert not wrong, "\n".join(wrong)


def module_name(path: Path) -> str:
    return ".".join(["fusedkv_ext", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


def test_no_module_imports_itself_through_others() -> None:
    """A chain of imports from a module back to itself would make the result depend on who imports first.

    Counted is what runs when a file is imported; an import inside a function is not.
    """
    files = {module_name(path): path for path in python_files()}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        at_import = [name for name, runs in imports(path) if runs and name != f"fusedkv_ext.{NATIVE_MODULE}"]
        targets = {name if name in files else name.rpartition(".")[0] for name in at_import}
        graph[module] = {name for name in targets if name in files and name != module}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(reversed(error.args[1]))}")
    assert len(order) == len(files)


def test_the_architecture_page_lists_the_rooms_by_floor() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^  (\w+)/ ", page[page.index("\nfusedkv_ext/ ") :], re.MULTILINE)
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(FLOORS) <= MAX_FLOORS
    assert listed == sorted(folders, key=lambda name: (FLOOR_OF[name], listed.index(name)))


def test_core_modules_import_nothing_but_torch_and_the_standard_library() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "fusedkv_ext"}
    wrong = [
        f"{relative(path)} imports {name}"
        for path in python_files()
        if room(path) in CORE
        for name, at_import in imports(path)
        if at_import and name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_reference_imports_torch_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch"}
    names = {name.split(".")[0] for name, _ in imports(PACKAGE / "ops" / "reference.py")}
    assert names <= allowed


@pytest.mark.parametrize("folder", ["common", "simt", "cuda", "cpu", "ops"])
def test_kernels_are_free_of_torch_and_python(folder: str) -> None:
    foreign = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
    wrong = [
        f"{relative(path)} includes {name}"
        for path in native_files(folder)
        for name in INCLUDE.findall(path.read_text())
        if foreign.search(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_native_includes_point_one_way() -> None:
    """common <- simt <- cuda, cpu <- ops <- api: a file includes its own folder and lower ones. An operation
    includes no other operation."""
    operations = sorted(f"ops/{path.name}" for path in (CSRC / "ops").iterdir())
    order = [["common"], ["simt"], ["cuda", "cpu"], operations, ["api"]]
    rank = {f"{folder}/": i for i, folders in enumerate(order) for folder in folders}
    wrong = []
    for path in native_files("."):
        own = next((folder for folder in rank if path.is_relative_to(CSRC / folder)), None)
        if own is None and path.parent != CSRC:
            wrong.append(f"{relative(path)} has no place in the order")
        for name in INCLUDE.findall(path.read_text()) if own else []:
            other = next(
                (x for x in rank if name.removeprefix("../").removeprefix("csrc/").startswith(x)), own
            )
            if other != own and rank[other] >= rank[own]:
                wrong.append(f"{relative(path)} includes {name}")
    assert not wrong, "\n".join(wrong)


def test_api_sees_only_the_stable_part_of_torch() -> None:
    wrong = [
        f"{relative(path)} includes {name}"
        for path in [*native_files("api"), *CSRC.glob("*.cpp")]
        for name in INCLUDE.findall(path.read_text())
        if name.startswith(("torch/", "ATen/", "c10/", "caffe2/"))
        and not (name.startswith(STABLE_TORCH) or name == SHIM)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_longer_than_it_may_be() -> None:
    files = [*python_files(), *sorted((ROOT / "python_tests").rglob("*.py")), *native_files(".")]
    lengths = {relative(path): len(path.read_text().splitlines()) for path in files}
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert not too_long, f"more than {MAX_FILE_LINES} lines: {too_long}"


def test_no_python_function_is_longer_than_it_may_be() -> None:
    too_long = []
    for path in [*python_files(), *sorted((ROOT / "python_tests").rglob("*.py")), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{relative(path)}: {node.name} has {lines} lines")
    assert not too_long, "\n".join(too_long)


def test_public_functions_are_annotated_and_those_of_the_core_documented() -> None:
    missing = []
    for path in python_files():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            internal = room(path) not in CORE or room(path).startswith("_")
            if not internal and not ast.get_docstring(node):
                missing.append(f"{relative(path)}: {node.name} has no docstring")
            if any(argument.annotation is None for argument in arguments) or node.returns is None:
                missing.append(f"{relative(path)}: {node.name} is not annotated in full")
    assert not missing, "\n".join(missing)


def test_nothing_is_left_for_later_in_comments() -> None:
    note = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    files = [*python_files(), *native_files("."), *sorted((ROOT / "python_tests").rglob("*.py"))]
    wrong = [relative(path) for path in files if note.search(path.read_text())]
    assert not wrong, f"unfinished business in {wrong}"


def test_simd_target_sources_bring_no_inline_functions_of_the_standard_library() -> None:
    """They are compiled with a target's flags: the linker could keep their AVX-512 copy for every CPU."""
    allowed = {"cstdint", "cstring", "immintrin.h"}
    sources = [*sorted((CSRC / "ops").glob("*/cpu.cpp")), CSRC / "cpu" / "target_table.cpp"]
    assert len(sources) > 1
    seen, wrong = set(), []
    while sources:
        path = sources.pop()
        for name in INCLUDE.findall(path.read_text()):
            own = CSRC / name
            if own.exists() and own not in seen:
                seen.add(own)
                sources.append(own)
            elif not own.exists() and name not in allowed:
                wrong.append(f"{relative(path)} includes {name}")
    assert seen and not wrong, "\n".join(wrong)


def test_the_fast_tests_are_of_every_room() -> None:
    """python_tests/fast.py names files of every folder of tests, with patterns that find tests."""
    tests = ROOT / "python_tests"
    assert {path.parent.name for path in tests.glob("*/test_*.py")} == {name.split("/")[0] for name in FAST}
    for name, pattern in FAST.items():
        found = re.findall(r"^ *def (test_\w+)", (tests / name).read_text(), re.MULTILINE)
        # Parameters in brackets are known when tests are collected.
        parts = [part.split(r"\[")[0].split(".*")[0] for part in re.split(r"\|(?![^(]*\))", pattern)]
        idle = [part for part in parts if not any(re.search(part, test) for test in found)]
        assert found and not idle, f"{name}: no test has {idle} in its name"
