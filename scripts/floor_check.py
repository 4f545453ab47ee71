"""Compiles the binding layer against the headers of the oldest torch that pyproject.toml allows.

TORCH_TARGET_VERSION hides functions that a newer torch has added, but no macros of its headers. Only
torch/include of that torch is kept, in build/; sources and flags are those of CMakeLists.txt. Nothing is
linked or run. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "floor"
# The smallest wheel, 80 MB; torch's stable headers are the same in all wheels of a version.
WHEEL = ("--platform", "macosx_11_0_arm64", "--python-version", "3.12", "--implementation", "cp")


class CannotCheck(Exception):
    """Something that the check needs is not there."""


def floor_version() -> str:
    """The oldest torch that pyproject.toml allows."""
    found = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise CannotCheck('pyproject.toml names no oldest torch; expected a dependency "torch>=X.Y"')
    return f"{found[1]}.0"


def headers_folder() -> Path:
    return ROOT / "build" / f"torch-{floor_version()}"


def fetch(folder: Path) -> None:
    """Puts torch/include of the oldest torch into ``folder``, which pip has to get a wheel for once."""
    version = floor_version()
    print(f"floor: fetching the headers of torch {version} into {folder} (once)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        options = ("--no-deps", "--only-binary", ":all:", *WHEEL, "--dest", scratch)
        command = [sys.executable, "-m", "pip", "download", "-qq", *options, f"torch=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise CannotCheck(
                f"pip could not fetch the wheel of torch {version}, whose headers are to be compiled against "
                f"(it said: {said}); run this where pip reaches an index, or copy {folder} from such a run"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(scratch, [n for n in wheel.namelist() if n.startswith("torch/include/")])
        (Path(scratch) / "torch").rename(folder)


def configure(python: str) -> None:
    """Lets CMake write down how each source is compiled, for CUDA and for the executor too."""
    find_nvcc = [python, str(ROOT / "build_support" / "native_config.py"), "nvcc"]
    off = os.environ.get("FUSEDKV_CUDA") == "0"
    cuda = "OFF" if off or not subprocess.check_output(find_nvcc).strip() else "ON"
    options = [f"-DPython_EXECUTABLE={python}", f"-DFUSEDKV_CUDA={cuda}", "-DFUSEDKV_SIMT=ON"]
    command = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "--log-level=WARNING", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotCheck(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


def compile_commands(headers: Path) -> list[tuple[str, list[str]]]:
    """(source, command that checks it against ``headers``) of the binding layer, as CMake compiles it."""
    sources = {str(path) for path in [*ROOT.glob("csrc/api/*.cpp"), *ROOT.glob("csrc/*.cpp")]}
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise CannotCheck(f"{sys.executable} has no torch; run it by the Python that builds (make floor)")
    installed = str(Path(torch.origin).parent / "include")
    found = []
    for entry in json.loads((BUILD / "compile_commands.json").read_text(encoding="utf-8")):
        words = shlex.split(entry["command"])
        if entry["file"] not in sources:
            continue
        if installed not in words:
            raise CannotCheck(f"{entry['file']} is compiled without {installed}; CMakeLists.txt has changed")
        output = words.index("-o")
        kept = words[:output] + words[output + 2 :]
        command = [str(headers / "include") if word == installed else word for word in kept]
        found.append((entry["file"], [*command, "-fsyntax-only"]))
    if unseen := sources - {source for source, _ in found}:
        raise CannotCheck(f"CMakeLists.txt compiles no {', '.join(sorted(unseen))}; add it there")
    return found


def compile_all(commands: list[tuple[str, list[str]]]) -> list[str]:
    """What the compiler says of each source that does not compile."""

    def errors(command: list[str]) -> str:
        done = subprocess.run(command, cwd=BUILD, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = pool.map(errors, [command for _, command in commands])
    return [text for text in said if text]


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        version, headers = floor_version(), headers_folder()
        if not headers.is_dir():
            fetch(headers)
        shutil.rmtree(BUILD, ignore_errors=True)
        configure(sys.executable)
        commands = compile_commands(headers)
    except CannotCheck as error:
        print(f"floor: {error}", file=sys.stderr)
        return 1
    if not any("-DUSE_CUDA" in command for _, command in commands):
        why = "FUSEDKV_CUDA=0 turns CUDA off" if os.environ.get("FUSEDKV_CUDA") == "0" else "no nvcc here"
        print(f"floor: *_cuda.cpp are compiled for the executor only and skipped for CUDA, {why}")
    if failed := compile_all(commands):
        print(*failed, sep="\n", file=sys.stderr)
        print(
            f"floor: {len(failed)} of {len(commands)} do not compile against torch {version}", file=sys.stderr
        )
        return 1
    print(f"floor: {len(commands)} compile against the headers of torch {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
