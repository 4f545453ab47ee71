"""The steps of gpu_check.sh: each has its time limit, none needs another, each is in the report when it ends.

Standard library only, except where another process asks torch about the GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cuda_tests

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "build" / "gpu-bundle"
BUILD = ROOT / "build" / "gpu-check"
BUILT = BUILD / "native"
CASES = "python_tests/simt/test_sanitizer_cases.py"

TOTAL = 570  # seconds, of all steps
DRY_FACTOR = 4  # as much time in a dry run, for small and busy machines
LEAST = 10  # with less left a step is not begun
OUT_OF_TIME = 124
FINDING = 9  # exit code of compute-sanitizer
NEVER: frozenset[int] = frozenset()

FACTS = """
import json, sys, torch
facts = dict(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    facts |= dict(gpu=p.name, capability=[p.major, p.minor], multiprocessors=p.multi_processor_count,
                  memory_bytes=p.total_memory)
print(json.dumps(facts))
"""


class CannotRun(Exception):
    """This machine lacks something that the check needs."""


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        seconds: At most.
        command: For so many seconds.
        needs: Modules or programs, without one of which it is left out.
        fails: Exit codes that fail the run. None: all but 0.
        asked: Runs only when --only names it.
    """

    name: str
    seconds: int
    command: Callable[[int], list[str]]
    needs: tuple[str, ...] = ()
    fails: frozenset[int] | None = None
    asked: bool = False


@dataclass
class Result:
    """rc: exit status of the step, 124 where time ran out, None where it did not run."""

    name: str
    rc: int | None
    seconds: float = 0.0
    reason: str = ""
    summary: list[str] = field(default_factory=list)


def ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_machine(commit: str | None, dry: bool) -> dict[str, Any]:
    """What the results are about; raises CannotRun where there is nothing to run on."""
    query = ("--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader")
    driver = ask("nvidia-smi", *query)
    if not driver and not dry:
        raise CannotRun("no NVIDIA GPU here (nvidia-smi finds none)")
    facts = json.loads(ask(sys.executable, "-c", FACTS) or "{}")
    if "gpu" not in facts and not dry:
        raise CannotRun(f"the torch of {sys.executable} sees no GPU")
    keys = ("driver", "max_sm_clock", "max_memory_clock", "power_limit")
    changed = ask("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry": dry,
        "commit": commit or ask("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        **facts,
        **dict(zip(keys, map(str.strip, (driver or "").split("\n")[0].split(",")), strict=False)),
        "cpu_cores": os.cpu_count(),
    }


# ---- the steps -------------------------------------------------------------------------------------------


def pytest(dry: bool, *arguments: str) -> list[str]:
    how = ["--collect-only", "-q"] if dry else ["-v", "--tb=short"]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda", *how, *arguments]


def tests(dry: bool, out: Path) -> list[str]:
    cores = min(8, os.cpu_count() or 1)
    workers = ["-n", str(cores)] if importlib.util.find_spec("xdist") and not dry else []
    # A file that this machine cannot import costs its own tests, not those of the others.
    options = ["--continue-on-collection-errors", f"--junitxml={out / 'tests.xml'}"]
    return pytest(dry, *options, *workers, *cuda_tests.files())


def benchmark(dry: bool, *options: str) -> list[str]:
    return [sys.executable, "benchmarks/gpu.py", *options, *(["--device", "cpu"] if dry else [])]


def ncu(dry: bool) -> list[str]:
    # The first two of four calls warm up.
    which = ["--kernel-name", "regex:attn_decode", "--launch-skip", "2", "--launch-count", "2"]
    how = ["--clock-control", "none", "--set", "full", "--print-details", "all"]
    return ["ncu", *how, *which, *benchmark(dry, "--profile")]


def sanitizer(dry: bool, tool: str) -> list[str]:
    # Only our kernels are instrumented; the option has had two names.
    known = ask("compute-sanitizer", "--help") or "--kernel-name "
    option = "--kernel-name" if "--kernel-name " in known else "--kernel-regex"
    how = [
        "--tool",
        tool,
        "--error-exitcode",
        str(FINDING),
        "--report-api-errors",
        "no",
        option,
        "kns=fusedkv",
    ]
    # Without torch's caching allocator each tensor is an allocation of its own, with bounds of its own.
    env = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return [*env, "compute-sanitizer", *how, *pytest(dry, CASES, "-k", "test_attention")]


def build() -> list[str]:
    """For this GPU, into BUILT. One shell, as a step is one process."""
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFUSEDKV_CUDA=ON", "-DFUSEDKV_SIMT=OFF"]
    commands = [
        ["cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja", "--log-level=WARNING", *options],
        ["cmake", "--build", str(BUILD), "--target", "_C", "_C_cuda"],
        ["cmake", "--install", str(BUILD), "--prefix", str(BUILT)],
        ["env", f"FUSEDKV_NATIVE_DIR={BUILT}", sys.executable, "scripts/load_native.py"],
    ]
    return ["bash", "-ec", "\n".join(map(shlex.join, commands))]


def all_steps(out: Path, dry: bool) -> list[Step]:
    torch, tested = ("torch", "numpy"), ("pytest", "torch", "numpy")
    checked = ("compute-sanitizer", *tested)

    def load(_: int) -> list[str]:
        return [sys.executable, "scripts/load_native.py", *(["--dry"] if dry else [])]

    def bench(name: str, seconds: int, families: str, *options: str) -> Step:
        def command(seconds: int) -> list[str]:
            # It ends by itself, with the rows that it has.
            limits = ("--seconds", str(seconds - 5), "--stall", "240", "--json", str(out / f"{name}.json"))
            return benchmark(dry, "--families", families, *limits, *options)

        return Step(name, seconds, command, torch, NEVER)

    def sanitize(tool: str, asked: bool = True) -> Step:
        return Step(tool, 60, lambda _: sanitizer(dry, tool), checked, frozenset({FINDING}), asked)

    quick, more = ("--quick", "--no-compile"), "fuse,append,ragged,crossover,head_dim,layout,chunked"
    return [
        Step("library", 60, load, ("torch",), NEVER),
        Step("build", 150, lambda _: build(), ("cmake", "ninja", "pybind11", "torch")),
        Step("smoke", 40, lambda _: pytest(dry, CASES), tested),
        bench("headline", 170, "decode,coded,latency,schedule", *quick),
        Step("tests", 80, lambda _: tests(dry, out), tested),
        bench("operations", 100, more, *quick),
        bench("model", 80, "model,prefill", *quick),
        Step("ncu", 40, lambda _: ncu(dry), ("ncu", *torch), NEVER),
        sanitize("memcheck", asked=False),
        bench("compile", 120, "decode,fuse", "--headline"),
        *map(sanitize, ("racecheck", "synccheck", "initcheck")),
    ]


# ---- running them ----------------------------------------------------------------------------------------


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
        return OUT_OF_TIME


def run_step(step: Step, seconds: float, log_path: Path) -> Result:
    """Appends to the log, and quotes from it."""
    began = time.monotonic()
    with log_path.open("ab") as log:
        log.write(f"\n==== {step.name}\n".encode())
        log.flush()
        start = log.tell()
        try:
            rc = run(step.command(int(seconds)), log, seconds)
        except Exception as error:  # whatever goes wrong with one step, the next one runs
            log.write(f"{type(error).__name__}: {error}\n".encode())
            rc = 127
    with log_path.open("rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").split("\n")
    said = [line.strip("= ") for line in lines if re.search(SUMMARY, line)]
    summary = said or [line for line in lines if line.strip()][-1:]
    reason = f"ended after {seconds:.0f} s" if rc == OUT_OF_TIME else ""
    return Result(step.name, rc, round(time.monotonic() - began, 1), reason, summary[-12:])


# pytest's and compute-sanitizer's last lines, benchmarks/gpu.py's, and what decides in ncu's.
SUMMARY = (
    r"^=+ .*(SUMMARY:|passed|failed| error)|\d+ tests (collected|ran)|^\d+ rows, \d+ errors|^roof, "
    r"|^    (Duration|DRAM Throughput|Achieved Occupancy|No Eligible|Warp Cycles Per Issued) "
)


def load_library(step: Step, seconds: float, log: Path) -> Result:
    """The steps use the first library that loads: FUSEDKV_NATIVE_DIR's or the bundle's, the package's own."""
    named = os.environ.pop("FUSEDKV_NATIVE_DIR", None)
    folders = [named] if named else [str(BUNDLE)] if BUNDLE.is_dir() else []
    for folder in (*folders, ""):
        os.environ["FUSEDKV_NATIVE_DIR"] = folder
        result = run_step(step, seconds, log)
        if result.rc == 0:
            result.reason = f"from {folder or 'fusedkv_ext'}"
            break
    return result


def lacking(step: Step) -> str:
    for name in step.needs:
        if shutil.which(name) is None and importlib.util.find_spec(name) is None:
            return f"no {name} here"
    return ""


def run_next(step: Step, results: list[Result], left: float, log: Path) -> Result:
    seconds = min(step.seconds, left)
    libraries = [result.rc for result in results if result.name in ("library", "build")]
    if step.name == "build" and 0 in libraries:
        return Result(step.name, None, reason="a library loads, so none is built")
    if step.name not in ("library", "build") and libraries and 0 not in libraries:
        return Result(step.name, None, reason="there is no library with CUDA ops")
    if seconds < LEAST:
        return Result(step.name, None, reason="no time left")
    if reason := lacking(step):
        return Result(step.name, None, reason=reason)
    if step.name == "library":
        return load_library(step, seconds, log)
    result = run_step(step, seconds, log)
    if step.name == "build" and result.rc == 0:
        os.environ["FUSEDKV_NATIVE_DIR"] = str(BUILT)
    return result


def write_report(out: Path, machine: dict[str, Any], results: list[Result], seconds: float) -> None:
    report: dict[str, Any] = {**machine, "seconds": round(seconds, 1)}
    report["steps"] = [asdict(result) for result in results]
    try:
        suites = list(ElementTree.parse(out / "tests.xml").getroot().iter("testsuite"))
        counted = ("tests", "failures", "errors", "skipped")
        report["tests"] = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in counted}
    except (OSError, ElementTree.ParseError):
        pass
    report["benchmarks"] = {}
    for result in results:
        try:
            report["benchmarks"][result.name] = json.loads((out / f"{result.name}.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
    beside = out / "gpu_check.json.new"
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(out / "gpu_check.json")


def check(steps: list[Step], machine: dict[str, Any], out: Path, total: float = TOTAL) -> int:
    began = time.monotonic()
    results: list[Result] = []
    for step in steps:
        print(f"== {step.name}", flush=True)
        result = run_next(step, results, total - (time.monotonic() - began), out / "gpu_check.log")
        results.append(result)
        write_report(out, machine, results, time.monotonic() - began)
        print(*result.summary, sep="\n")
        print(f"== {step.name}: rc {result.rc}, {result.seconds} s {result.reason}", flush=True)
    print(f"gpu_check: wrote {out / 'gpu_check.json'} and gpu_check.log")
    bad = [
        step.name
        for step, result in zip(steps, results, strict=True)
        if result.rc and (step.fails is None or result.rc in step.fails)
    ]
    if bad:
        print(f"gpu_check: {', '.join(bad)} did not pass", file=sys.stderr)
    return 1 if bad else 0


def set_environment(machine: dict[str, Any]) -> None:
    if "capability" in machine:
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
    parser.add_argument("--list", action="store_true", help="print the steps, their limits and commands")
    parser.add_argument("--only", help="steps to run, with commas between them")
    parser.add_argument("--dry", action="store_true", help="run every step as far as it goes without a GPU")
    parser.add_argument("--commit", help="what to call the sources where there is no git repository")
    given = parser.parse_args()
    out = Path(os.environ.get("OUT", ROOT / "build" / "gpu_check")).resolve()
    factor = DRY_FACTOR if given.dry else 1
    steps = [replace(step, seconds=factor * step.seconds) for step in all_steps(out, given.dry)]
    every = {step.name: step for step in steps}
    names = given.only.split(",") if given.only else [name for name in every if not every[name].asked]
    if unknown := set(names) - set(every):
        parser.error(f"unknown steps {sorted(unknown)}; expected some of {list(every)}")
    # The others use what these find.
    names = [name for name in every if name in {"library", "build", *names}]
    # The scripts of this Python's environment first: cmake and ninja may be there only.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    name_nvcc()
    if given.list:
        for step in map(every.__getitem__, names):
            print(f"{step.name} (at most {step.seconds} s of {TOTAL})")
            print(f"  {shlex.join(step.command(step.seconds))}")
        return 0
    try:
        machine = find_machine(given.commit, given.dry)
    except CannotRun as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    set_environment(machine)
    out.mkdir(parents=True, exist_ok=True)
    # Of an earlier run.
    for path in [*out.glob("*.json"), out / "tests.xml", out / "gpu_check.log"]:
        path.unlink(missing_ok=True)
    return check([every[name] for name in names], machine, out, factor * TOTAL)


if __name__ == "__main__":
    sys.exit(main())
