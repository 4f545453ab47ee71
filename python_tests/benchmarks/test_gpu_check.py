"""The driver of scripts/gpu_check.sh, with commands that need no GPU in place of its stages'."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
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


def test_missing_numpy_is_said_first_where_tests_are_to_run(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ask", lambda *command: None if command[-1] == "import numpy" else "")
    for name in ("tests", "racecheck"):
        with pytest.raises(gpu_check.CannotRun, match="no numpy, which the tests need; pip install numpy"):
            gpu_check.check_packages(["build", name])
    gpu_check.check_packages(["build", "benchmark"])


SUITE = {
    "conftest.py": """
        import pytest

        @pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.cuda)])
        def device(request):
            return request.param

        @pytest.fixture
        def tensor(device):
            return device

        @pytest.fixture
        def plain():
            return 1
        """,
    "test_asks_indirectly.py": "def test_one(tensor): pass",
    "test_marks_a_test.py": """
        import pytest

        @pytest.mark.cuda
        def test_one(): pass
        """,
    "test_has_a_fixture_of_its_own.py": """
        import pytest

        @pytest.fixture(autouse=True)
        def own(device): pass

        @pytest.mark.usefixtures("own")
        class TestAll:
            def test_one(self, own): pass
        """,
    "test_has_none.py": """
        import pytest

        def helper(device): pass

        @pytest.mark.parametrize(("plain", "device"), [(1, "cpu")])
        def test_one(plain, device): pass
        """,
    "test_cannot_be_imported.py": """
        import a_package_that_this_machine_lacks

        def test_one(device): pass
        """,
}


@pytest.fixture
def suite(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "python_tests"
    folder.mkdir()
    for name, text in SUITE.items():
        (folder / name).write_text(textwrap.dedent(text))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "TESTS", folder)
    return folder


def test_files_are_found_by_their_fixtures_and_marks(gpu_check: ModuleType, suite: Path) -> None:
    with_cuda = sorted(name for name in SUITE if name not in ("conftest.py", "test_has_none.py"))
    assert gpu_check.cuda_test_files() == [f"python_tests/{name}" for name in with_cuda]


def test_a_file_that_cannot_be_collected_costs_only_itself(
    gpu_check: ModuleType, suite: Path, tmp_path: Path
) -> None:
    steps = gpu_check.commands("tests", 60, tmp_path)
    result = gpu_check.run_stage("tests", steps, 60, tmp_path / "log")
    gpu_check.write_report(tmp_path / "report.json", {}, [result], tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tests"] == dict(tests=4, failures=0, errors=1, skipped=0) and result.rc == 1
    assert "a_package_that_this_machine_lacks" in (tmp_path / "log").read_text()


def test_no_cuda_test_of_this_session_is_in_another_file(
    gpu_check: ModuleType, request: pytest.FixtureRequest
) -> None:
    files = {item.path for item in request.session.items if item.get_closest_marker("cuda")}
    if not files:
        pytest.skip("needs CUDA tests in the same session; run the whole suite")
    assert files <= {gpu_check.ROOT / name for name in gpu_check.cuda_test_files()}
