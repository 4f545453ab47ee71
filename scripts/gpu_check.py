"""The stages of gpu_check.sh, each with a time limit; gpu_check.json is written anew after every one of them.

Standard library only, except where another process asks torch about the GPU.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = "build/gpu-check"

# Seconds. What the stages before it do not use is the benchmark's.
TOTAL = 525
LIMITS = {"build": 150, "tests": 130, "memcheck": 60, "racecheck": 60, "synccheck": 60, "benchmark": TOTAL}
BENCHMARK_MARGIN = 20
SANITIZERS = ("memcheck", "racecheck", "synccheck")
TESTS = ROOT / "python_tests"
_CUDA = "pytest.mark.cuda"

MACHINE = """
import json, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps(dict(gpu=p.name, capability=[p.major, p.minor], multiprocessors=p.multi_processor_count,
                      memory_bytes=p.total_memory, torch=torch.__version__, cuda=torch.version.cuda)))
"""
LOADED = (
    "from fusedkv_ext.ops import native as n; i = n.build_info(); print(i); raise SystemExit(i['cuda_error'])"
)


class CannotRun(Exception):
    """This machine lacks something that the check needs."""


@dataclass
class Result:
    """rc: exit status of the stage's last command, 124 where time ran out, None where it did not run."""

    name: str
    rc: int | None
    seconds: float = 0.0
    reason: str = ""
    summary: list[str] = field(default_factory=list)


def ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_machine(commit: str | None) -> dict[str, Any]:
    """What the results are about; raises CannotRun where there is nothing to run on."""
    driver = ask(
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    )
    if not driver:
        raise CannotRun("no NVIDIA GPU here (nvidia-smi finds none)")
    for tool, hint in (
        ("nvcc", "it comes with the CUDA toolkit"),
        ("cmake", "pip has it"),
        ("ninja", "pip has it"),
    ):
        if shutil.which(os.environ.get("CUDACXX", tool) if tool == "nvcc" else tool) is None:
            raise CannotRun(f"no {tool} here; {hint}")
    for module in ("torch", "pybind11"):
        if ask(sys.executable, "-c", f"import {module}") is None:
            raise CannotRun(f"{sys.executable} has no {module}")
    machine = ask(sys.executable, "-c", MACHINE)
    if machine is None:
        raise CannotRun(f"the torch of {sys.executable} sees no GPU")
    keys = ("driver", "max_sm_clock", "max_memory_clock", "power_limit")
    changed = ask("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or ask("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        **json.loads(machine),
        **dict(zip(keys, (x.strip() for x in driver.splitlines()[0].split(",")), strict=False)),
        "nvcc": (ask(os.environ.get("CUDACXX", "nvcc"), "--version") or "").split("\n")[-1],
        "cpu_cores": os.cpu_count(),
    }


def check_packages(names: list[str]) -> None:
    """Raises CannotRun where a stage of these would find out late that a package is missing."""
    if not {"tests", *SANITIZERS} & set(names):
        return
    for module in ("pytest", "numpy"):
        if ask(sys.executable, "-c", f"import {module}") is None:
            raise CannotRun(
                f"{sys.executable} has no {module}, which the tests need; pip install {module}, or leave the "
                "tests out: --only build,benchmark"
            )


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


def cuda_test_files() -> list[str]:
    """The test files that have CUDA tests. They are read, not imported: some import what a machine lacks."""
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


def sanitizer_command(tool: str) -> list[str]:
    # Only our kernels are instrumented; the option has had two names.
    known = ask("compute-sanitizer", "--help") or "--kernel-name "
    option = "--kernel-name" if "--kernel-name " in known else "--kernel-regex"
    return [
        # Without torch's caching allocator each tensor is an allocation of its own, with bounds of its own.
        *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"),
        *(option, "kns=fusedkv", *pytest_command("python_tests/simt/test_sanitizer_cases.py")),
    ]


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", *arguments]


def commands(name: str, seconds: float, work: Path) -> list[list[str]]:
    """A stage's commands, to be done in so many seconds; each runs if those before it succeeded."""
    if name in SANITIZERS:
        return [sanitizer_command(name)]
    if name == "benchmark":
        # It ends by itself and writes its rows then.
        limit = str(int(seconds) - BENCHMARK_MARGIN)
        return [[sys.executable, "benchmarks/gpu.py", "--seconds", limit, "--json", f"{work}/benchmark.json"]]
    if name == "tests":
        workers = ["-n", "4"] if ask(sys.executable, "-c", "import xdist") is not None else []
        # A file that this machine cannot import costs its own tests, not those of the others.
        options = ["--continue-on-collection-errors", f"--junitxml={work / 'tests.xml'}"]
        return [pytest_command(*options, *workers, *cuda_test_files())]
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFUSEDKV_CUDA=ON", "-DFUSEDKV_SIMT=OFF"]
    return [
        ["cmake", "-S", ".", "-B", BUILD, "-G", "Ninja", "--log-level=WARNING", *options],
        ["cmake", "--build", BUILD],
        ["cmake", "--install", BUILD, "--prefix", "fusedkv_ext"],
        [sys.executable, "-c", LOADED],
    ]


def run(command: list[str], log: Any, seconds: float) -> int:
    """Exit status, or 124 after ending the command and what it started, when time runs out."""
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    try:
        return child.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, kind)
                child.wait(timeout=3)
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue
        return 124


def run_stage(name: str, steps: list[list[str]], seconds: float, log_path: Path) -> Result:
    began = time.monotonic()
    rc = 0
    with log_path.open("wb") as log:
        for step in steps:
            rc = run(step, log, seconds - (time.monotonic() - began))
            if rc:
                break
    lines = log_path.read_text(errors="replace").splitlines()
    summary = [
        line.strip("= ") for line in lines if re.match(r"=+ .*(SUMMARY:|passed|failed| error)", line)
    ] or lines[-1:]
    reason = f"ended after {seconds:.0f} s" if rc == 124 else ""
    return Result(name, rc, round(time.monotonic() - began, 1), reason, summary[-4:])


def write_report(target: Path, machine: dict[str, Any], results: list[Result], work: Path) -> None:
    report: dict[str, Any] = {**machine, "stages": [asdict(result) for result in results]}
    if (work / "tests.xml").exists():
        suites = list(ElementTree.parse(work / "tests.xml").getroot().iter("testsuite"))
        counted = ("tests", "failures", "errors", "skipped")
        report["tests"] = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in counted}
    if (work / "benchmark.json").exists():
        try:
            report["benchmark"] = json.loads((work / "benchmark.json").read_text())
        except json.JSONDecodeError as error:
            report["benchmark"] = f"unreadable: {error}"
    target.write_text(json.dumps(report, indent=1) + "\n")


def check(names: list[str], machine: dict[str, Any], out: Path, work: Path) -> int:
    began = time.monotonic()
    results: list[Result] = []
    for name in names:
        left = TOTAL - (time.monotonic() - began)
        print(f"== {name}", flush=True)
        if results and results[0].name == "build" and results[0].rc != 0:
            result = Result(name, None, reason="the build failed")
        elif name in SANITIZERS and shutil.which("compute-sanitizer") is None:
            result = Result(name, None, reason="no compute-sanitizer here")
        elif left < 2 * BENCHMARK_MARGIN:
            result = Result(name, None, reason="no time left")
        else:
            seconds = min(LIMITS[name], left)
            result = run_stage(name, commands(name, seconds, work), seconds, out / f"{name}.log")
        results.append(result)
        write_report(out / "gpu_check.json", machine, results, work)
        print(*result.summary, sep="\n")
        print(f"== {name}: rc {result.rc}, {result.seconds} s {result.reason}", flush=True)
    print(f"gpu_check: wrote {out / 'gpu_check.json'}")
    bad = [r.name for r in results if r.rc and r.name != "benchmark"]
    if bad:
        print(f"gpu_check: {', '.join(bad)} did not pass", file=sys.stderr)
    return 1 if bad else 0


def set_environment(machine: dict[str, Any]) -> None:
    major, minor = machine["capability"]
    # Hopper's and Blackwell's own instructions want the architecture-specific target.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}" + ("a" if major >= 9 else ""))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def name_nvcc() -> None:
    """Finds an nvcc that is not on PATH as the build does; a variable that leads nowhere is its error."""
    if nvcc := ask(sys.executable, "build_support/native_config.py", "nvcc"):
        os.environ["CUDACXX"] = nvcc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the stages, their limits and commands")
    parser.add_argument("--only", default=",".join(LIMITS), help="stages to run, with commas between them")
    parser.add_argument("--commit", help="what to call the sources where there is no git repository")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(LIMITS):
        parser.error(f"unknown stages {sorted(unknown)}; expected some of {list(LIMITS)}")
    # The scripts of this Python's environment first: cmake and ninja may be there only.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    name_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if given.list:
            for name in names:
                print(f"{name} (at most {LIMITS[name]} s of {TOTAL})")
                print(
                    *("  " + shlex.join(command) for command in commands(name, LIMITS[name], work)), sep="\n"
                )
            return 0
        try:
            machine = find_machine(given.commit)
            check_packages(names)
        except CannotRun as error:
            print(f"gpu_check: {error}", file=sys.stderr)
            return 2
        set_environment(machine)
        out = Path(os.environ.get("OUT", ROOT / "build" / "gpu_check")).resolve()
        out.mkdir(parents=True, exist_ok=True)
        return check(names, machine, out, work)


if __name__ == "__main__":
    sys.exit(main())
