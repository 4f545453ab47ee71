"""The driver of scripts/gpu_check.sh, with commands that need no GPU in place of its stages'."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
MACHINE = {"gpu": "none", "torch": "2.11.0"}


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPTS / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def shell(line: str) -> list[str]:
    return ["bash", "-c", line]


def test_list_names_every_stage(gpu_check: ModuleType) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines() if line[0] != " "] == list(gpu_check.LIMITS)
    assert gpu_check.TOTAL < 540
    assert sum(seconds for name, seconds in gpu_check.LIMITS.items() if name != "benchmark") < gpu_check.TOTAL


def test_stage_ends_at_its_limit_with_all_it_started(gpu_check: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "late"
    began = time.monotonic()
    result = gpu_check.run_stage("tests", [shell(f"(sleep 2; touch {mark}) & wait")], 0.5, tmp_path / "log")
    assert result.rc == 124 and time.monotonic() - began < 2
    time.sleep(2)
    assert not mark.exists()


def test_every_stage_is_recorded(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"/></testsuites>'
    lines = {
        "build": ["true", "echo built"],
        "tests": [f"echo '{suite}' >{tmp_path}/tests.xml", "echo '== 1 failed =='; exit 1", "echo unseen"],
        "memcheck": ["echo '========= ERROR SUMMARY: 0 errors'"],
        "benchmark": [f"echo '[1]' >{tmp_path}/benchmark.json; exit 3"],
    }
    monkeypatch.setattr(gpu_check, "commands", lambda name, *_: [shell(line) for line in lines[name]])
    monkeypatch.setattr(gpu_check.shutil, "which", lambda tool: "/bin/true")
    assert gpu_check.check(list(lines), MACHINE, tmp_path, tmp_path) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert [stage["rc"] for stage in stages.values()] == [0, 1, 0, 3]
    assert stages["tests"]["summary"] == ["1 failed"]
    assert stages["memcheck"]["summary"] == ["ERROR SUMMARY: 0 errors"]
    assert report["tests"] == dict(tests=3, failures=1, errors=0, skipped=1)
    assert report["benchmark"] == [1] and report["gpu"] == "none"
    lines["tests"] = ["true"]
    assert gpu_check.check(list(lines), MACHINE, tmp_path, tmp_path) == 0


def test_nothing_runs_after_a_failed_build(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "commands", lambda *_: [shell("exit 2")])
    assert gpu_check.check(["build", "tests"], MACHINE, tmp_path, tmp_path) == 1
    stages = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert [(stage["rc"], stage["reason"]) for stage in stages] == [(2, ""), (None, "the build failed")]


def test_says_what_is_missing(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ask", lambda *command: None)
    with pytest.raises(gpu_check.CannotRun, match="no NVIDIA GPU"):
        gpu_check.find_machine(None)
