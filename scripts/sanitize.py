#!/usr/bin/env python3
"""Runs tests against the CPU ops built with AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize).

    sanitize.py BUILD [PYTEST ARGUMENTS]

BUILD is a build folder with -DFUSEDKV_SANITIZE=ON. BUILD/package links the Python sources of the tree and the
library of BUILD into one package, so that the library inside fusedkv_ext/ stays as it is. Python itself is
not instrumented, hence the compiler's libasan is preloaded. The first finding ends the process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "from fusedkv_ext import _C; print(_C.__file__)"


def compiler(build: Path) -> str:
    """The C++ compiler of a build folder."""
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
    if found is None:
        sys.exit(f"sanitize: {build} must be a build folder of CMake, got one without a C++ compiler")
    return found[1]


def runtime(cxx: str, name: str) -> Path:
    """A shared library that comes with the compiler."""
    path = Path(subprocess.check_output([cxx, f"-print-file-name={name}"], text=True).strip())
    if not path.is_absolute():
        sys.exit(f"sanitize: {cxx} has no {name}; build with a gcc that has the sanitizers' libraries")
    return path.resolve()


def make_package(build: Path) -> Path:
    """Links the package and the library of ``build`` together; returns the folder for PYTHONPATH."""
    libraries = [path for path in build.glob("_C.*") if b"__asan_report_load" in path.read_bytes()]
    if len(libraries) != 1:
        sys.exit(f"sanitize: {build} must have one _C with AddressSanitizer, got {len(libraries)}")
    folder = build / "package"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "fusedkv_ext").mkdir(parents=True)
    sources = [path for path in (ROOT / "fusedkv_ext").iterdir() if path.suffix != ".so"]
    for path in (*sources, *libraries):
        if path.name != "__pycache__":
            (folder / "fusedkv_ext" / path.name).symlink_to(path)
    return folder


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    build = Path(arguments[0]).resolve()
    package, cxx = make_package(build), compiler(build)
    # With libstdc++ beside it: libasan looks for the function that throws exceptions when it starts.
    preloaded = [str(runtime(cxx, name)) for name in ("libasan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        "PYTHONPATH": str(package),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={build / 'report'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={build / 'report'}",
        "FUSEDKV_SIMT_LIBRARY": str(build / "none"),  # the executor's fibers confuse AddressSanitizer
    }
    environment.pop("FUSEDKV_REQUIRE_SIMT", None)
    check = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=build, env=environment, stdout=subprocess.PIPE, text=True
    )
    if check.returncode or not check.stdout.startswith(str(package)):
        sys.exit(f"sanitize: fusedkv_ext must come from {package}, got {check.stdout.strip() or 'no import'}")
    for report in build.glob("report.*"):
        report.unlink()
    # The program pytest, as `python -m pytest` would put the tree itself before PYTHONPATH.
    pytest = Path(sys.executable).with_name("pytest")
    done = subprocess.run([str(pytest), "-q", *arguments[1:]], cwd=ROOT, env=environment)
    # pytest captures what an ending process prints.
    reports = sorted(build.glob("report.*"))
    for report in reports:
        print(report.read_text(errors="replace"), file=sys.stderr)
    return done.returncode or int(bool(reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
