"""`make floor`: what only a torch newer than the oldest has is found before a build with the oldest fails."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "floor_check.py"


@pytest.fixture
def floor_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("floor_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(floor_check: ModuleType) -> list[tuple[str, list[str]]]:
    """What `make floor` compiles: (source, command)."""
    if not (floor_check.BUILD / "compile_commands.json").is_file():
        reason = f"needs {floor_check.BUILD}; run `make floor`"
        if os.environ.get("FUSEDKV_REQUIRE_FLOOR"):
            pytest.fail(reason)
        pytest.skip(reason)
    return floor_check.compile_commands(floor_check.headers_folder())


def elsewhere(commands: list[tuple[str, list[str]]], csrc: Path) -> list[tuple[str, list[str]]]:
    """The same of a copy of csrc."""
    return [
        (source, [word.replace(str(ROOT / "csrc"), str(csrc)) for word in command])
        for source, command in commands
    ]


@pytest.mark.parametrize(
    "header, source, flavor",
    [
        ("new_tensor.h", "attn_decode.cpp", "-D_C_EXPORTS"),
        ("device.h", "fuse_kv_cuda.cpp", "-DUSE_CUDA"),
    ],
    ids=["cpu", "cuda"],
)
def test_a_planted_newer_macro_fails(
    floor_check: ModuleType,
    commands: list[tuple[str, list[str]]],
    tmp_path: Path,
    header: str,
    source: str,
    flavor: str,
) -> None:
    """STABLE_TORCH_ERROR_CODE_CHECK came with torch 2.13, where TORCH_TARGET_VERSION does not hide it."""
    chosen = [(path, command) for path, command in commands if path.endswith(source) and flavor in command]
    if not chosen and flavor == "-DUSE_CUDA":
        pytest.skip("`make floor` found no nvcc here, or CUDA turned off")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    copied = elsewhere(chosen, tmp_path / "csrc")
    assert len(copied) == 1 and floor_check.compile_all(copied) == []
    planted = tmp_path / "csrc" / "api" / header
    code = planted.read_text(encoding="utf-8")
    assert " TORCH_ERROR_CODE_CHECK" in code
    planted.write_text(code.replace(" TORCH_ERROR_CODE_CHECK", " STABLE_TORCH_ERROR_CODE_CHECK"))
    (said,) = floor_check.compile_all(copied)
    assert header in said and "STABLE_TORCH_ERROR_CODE_CHECK" in said


def test_every_source_of_the_binding_layer_is_compiled(
    floor_check: ModuleType,
    commands: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    sources = {Path(source).relative_to(ROOT).as_posix() for source, _ in commands}
    on_disk = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "api").glob("*.cpp")}
    assert sources == on_disk | {"csrc/bindings.cpp"}
    installed = Path(torch.__file__).parent / "include"
    for _, command in commands:
        assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in command and str(installed) not in command
    # One that CMakeLists.txt forgets is an error, not one source less.
    known = json.loads((floor_check.BUILD / "compile_commands.json").read_text())
    (tmp_path / "compile_commands.json").write_text(
        json.dumps([entry for entry in known if not entry["file"].endswith("api/schema.cpp")])
    )
    monkeypatch.setattr(floor_check, "BUILD", tmp_path)
    with pytest.raises(floor_check.CannotCheck, match="CMakeLists.txt compiles no .*schema.cpp"):
        floor_check.compile_commands(floor_check.headers_folder())


def test_without_an_index_it_says_so_and_fails(tmp_path: Path) -> None:
    for name in ("scripts", "build"):
        (tmp_path / name).mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    offline = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
    }
    command = [sys.executable, str(tmp_path / "scripts" / SCRIPT.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=offline)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("floor: pip could not fetch the wheel of torch 2.11.0")
    assert list((tmp_path / "build").iterdir()) == []
