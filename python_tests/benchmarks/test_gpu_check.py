"""scripts/gpu_check.sh: its driver with commands that need no GPU in place of its steps'."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

from fusedkv_ext import _C

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
MACHINE = {"gpu": "none", "torch": "2.11.0"}


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("FUSEDKV_NATIVE_DIR", "")
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPTS / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def shell(line: str) -> list[str]:
    return ["bash", "-c", line]


def steps_of(gpu_check: ModuleType, lines: dict[str, str], **options: object) -> list[object]:
    """Steps with the real limits and rules, and other commands."""
    known = {step.name: step for step in gpu_check.all_steps(Path("unused"), dry=False)}
    return [
        gpu_check.Step(
            name, known[name].seconds, lambda _, line=line: shell(line), (), known[name].fails, **options
        )
        for name, line in lines.items()
    ]


def read_steps(out: Path) -> dict[str, dict[str, object]]:
    return {step["name"]: step for step in json.loads((out / "gpu_check.json").read_text())["steps"]}


def test_list_names_every_step_and_they_fit_into_ten_minutes(gpu_check: ModuleType) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    named = [line.split()[0] for line in listed.splitlines() if line[0] != " " and "(at most" in line]
    steps = gpu_check.all_steps(Path("unused"), dry=False)
    assert named == [step.name for step in steps if not step.asked]
    assert named[:4] == ["library", "build", "smoke", "headline"] and named[-1] == "compile"
    assert gpu_check.TOTAL < 590
    # With a library that loads, every step before the compiled peers gets its time, even if each uses it up.
    limits = {step.name: step.seconds for step in steps if not step.asked}
    assert (
        sum(limits.values()) - limits["build"] - limits["compile"] - limits["memcheck"]
        <= gpu_check.TOTAL + 50
    )


def test_step_ends_at_its_limit_with_all_it_started(gpu_check: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "late"
    began = time.monotonic()
    step = gpu_check.Step("tests", 60, lambda _: shell(f"(sleep 2; touch {mark}) & wait"))
    result = gpu_check.run_step(step, 0.5, tmp_path / "log")
    assert result.rc == 124 and time.monotonic() - began < 2
    time.sleep(2)
    assert not mark.exists()


def test_every_step_is_recorded_whatever_becomes_of_the_others(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"/></testsuites>'
    lines = {
        "library": "echo loaded",
        "build": "exit 7",
        "smoke": "kill -SEGV $$",
        "headline": f"echo '[1]' >{tmp_path}/headline.json; exit 3",
        "tests": f"echo '{suite}' >{tmp_path}/tests.xml; echo '== 1 failed =='; exit 1",
        "operations": f"echo '[2]' >{tmp_path}/operations.json; sleep 100",
        "model": f"cp {tmp_path}/gpu_check.json {tmp_path}/seen",
        "memcheck": "echo '========= ERROR SUMMARY: 0 errors'",
    }
    monkeypatch.setattr(gpu_check, "BUNDLE", tmp_path / "none")
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    steps = steps_of(gpu_check, lines)
    steps[5] = gpu_check.Step("operations", 1, steps[5].command, (), steps[5].fails)
    assert gpu_check.check(steps, MACHINE, tmp_path) == 1
    found, report = read_steps(tmp_path), json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["rc"] for step in found.values()] == [0, None, -11, 3, 1, 124, 0, 0]
    assert found["library"]["reason"] == "from fusedkv_ext" and found["library"]["summary"] == ["loaded"]
    assert found["build"]["reason"] == "a library loads, so none is built"
    assert found["operations"]["reason"] == "ended after 1 s"
    assert found["tests"]["summary"] == ["1 failed"]
    assert found["memcheck"]["summary"] == ["ERROR SUMMARY: 0 errors"]
    assert report["tests"] == dict(tests=3, failures=1, errors=0, skipped=1)
    assert report["benchmarks"] == {"headline": [1], "operations": [2]} and report["gpu"] == "none"
    # The report of the steps before was there when a later one ran.
    assert len(json.loads((tmp_path / "seen").read_text())["steps"]) == 6
    assert "==== smoke" in (tmp_path / "gpu_check.log").read_text()


def test_only_the_build_tests_and_findings_fail_a_run(gpu_check: ModuleType, tmp_path: Path) -> None:
    failing = {
        (name, rc)
        for name in ("build", "smoke", "headline", "tests", "ncu", "memcheck", "compile")
        for rc in (1, 9)
        if gpu_check.check(steps_of(gpu_check, {name: f"exit {rc}"}), MACHINE, tmp_path)
    }
    always = {(name, rc) for name in ("build", "smoke", "tests") for rc in (1, 9)}
    assert failing == always | {("memcheck", 9)}


def test_nothing_runs_without_a_library(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "BUNDLE", tmp_path / "none")
    lines = {"library": "exit 1", "build": "exit 2", "smoke": "true"}
    assert gpu_check.check(steps_of(gpu_check, lines), MACHINE, tmp_path) == 1
    found = [(step["rc"], step["reason"]) for step in read_steps(tmp_path).values()]
    assert found == [(1, ""), (2, ""), (None, "there is no library with CUDA ops")]
    steps = steps_of(gpu_check, lines)
    steps[1] = gpu_check.Step("build", 60, steps[1].command, ("no_such_tool",))
    gpu_check.check(steps, MACHINE, tmp_path)
    found = [(step["rc"], step["reason"]) for step in read_steps(tmp_path).values()]
    assert found[1:] == [(None, "no no_such_tool here"), (None, "there is no library with CUDA ops")]


def test_the_first_library_that_loads_is_used_by_all_steps(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    monkeypatch.setattr(gpu_check, "BUNDLE", bundle)
    monkeypatch.setattr(gpu_check, "BUILT", tmp_path / "built")
    used = {}
    for name, line in {
        "bundle": "true",
        "own": 'test -z "$FUSEDKV_NATIVE_DIR"',
        "built": "false",
    }.items():
        lines = {"library": line, "build": "true", "smoke": 'echo "used $FUSEDKV_NATIVE_DIR."'}
        assert gpu_check.check(steps_of(gpu_check, lines), MACHINE, tmp_path) == 0
        used[name] = read_steps(tmp_path)["smoke"]["summary"]
        monkeypatch.setenv("FUSEDKV_NATIVE_DIR", "")
    assert used == {
        "bundle": [f"used {bundle}."],
        "own": ["used ."],
        "built": [f"used {tmp_path / 'built'}."],
    }


def test_a_step_that_cannot_be_begun_says_why(gpu_check: ModuleType, tmp_path: Path) -> None:
    steps = [*steps_of(gpu_check, {"ncu": "true", "tests": "true"}), *steps_of(gpu_check, {"model": "true"})]
    for i, needs in enumerate((("no_such_tool",), ("json", "no_such_module"))):
        steps[i] = gpu_check.Step(steps[i].name, 60, steps[i].command, needs)
    assert gpu_check.check(steps, MACHINE, tmp_path) == 0
    found = {name: (step["rc"], step["reason"]) for name, step in read_steps(tmp_path).items()}
    assert found["ncu"] == (None, "no no_such_tool here")
    assert found["tests"] == (None, "no no_such_module here") and found["model"] == (0, "")
    assert gpu_check.check(steps, MACHINE, tmp_path, total=5) == 0
    assert {step["reason"] for step in read_steps(tmp_path).values()} == {"no time left"}


def test_says_what_is_missing(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ask", lambda *command: None)
    with pytest.raises(gpu_check.CannotRun, match="no NVIDIA GPU"):
        gpu_check.find_machine(None, dry=False)
    monkeypatch.setattr(gpu_check, "ask", lambda *command: "{}" if "-c" in command else "1, 2")
    with pytest.raises(gpu_check.CannotRun, match="sees no GPU"):
        gpu_check.find_machine(None, dry=False)


def load(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "load_native.py"), "--dry"]
    environ = {**os.environ, "FUSEDKV_NATIVE_DIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)


def test_another_build_of_the_library_is_loaded_from_its_folder(tmp_path: Path) -> None:
    name = Path(_C.__file__).name
    shutil.copy(_C.__file__, tmp_path)
    assert load(tmp_path).stdout.splitlines()[0] == str(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "_C.cpython-27-x86_64-linux-gnu.so")
    refused = load(tmp_path)
    assert refused.returncode == 1 and f"{tmp_path} has no _C for Python " in refused.stderr


def test_ending_the_benchmark_ends_the_process_that_measures() -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--no-compile"]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environ) as child:
        assert child.stdout is not None and child.stdout.readline()
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert workers and all(Path(f"/proc/{worker}").exists() for worker in workers)
        child.send_signal(signal.SIGTERM)
        child.stdout.read()
        assert child.wait(timeout=20) == 143
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


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
    monkeypatch.setattr(gpu_check.cuda_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check.cuda_tests, "TESTS", folder)
    return folder


def test_files_are_found_by_their_fixtures_and_marks(gpu_check: ModuleType, suite: Path) -> None:
    with_cuda = sorted(name for name in SUITE if name not in ("conftest.py", "test_has_none.py"))
    assert gpu_check.cuda_tests.files() == [f"python_tests/{name}" for name in with_cuda]


def test_a_file_that_cannot_be_collected_costs_only_itself(
    gpu_check: ModuleType, suite: Path, tmp_path: Path
) -> None:
    tests = gpu_check.Step("tests", 60, lambda _: gpu_check.tests(dry=False, out=tmp_path))
    assert gpu_check.check([tests], MACHINE, tmp_path) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["tests"] == dict(tests=4, failures=0, errors=1, skipped=0)
    assert report["steps"][0]["rc"] == 1
    assert "a_package_that_this_machine_lacks" in (tmp_path / "gpu_check.log").read_text()


def test_no_cuda_test_of_this_session_is_in_another_file(
    gpu_check: ModuleType, request: pytest.FixtureRequest
) -> None:
    files = {item.path for item in request.session.items if item.get_closest_marker("cuda")}
    if not files:
        pytest.skip("needs CUDA tests in the same session; run the whole suite")
    assert files <= {ROOT / name for name in gpu_check.cuda_tests.files()}
