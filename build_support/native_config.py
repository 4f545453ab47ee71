"""What the native build needs to know: torch, nvcc, the CUDA architectures, and why there are no CUDA ops.

CMakeLists.txt runs this file and sets what it prints. ``backend.py`` asks first, so that pip shows one
sentence and not CMake's log. Importing it needs the standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

DEFAULT_TOOLKIT = "/usr/local/cuda"
NVCC_PLACES = f"CUDACXX, CUDA_HOME, CUDA_PATH, PATH, {DEFAULT_TOOLKIT}"
MIN_TORCH = (2, 11)
MIN_MAJOR = 8  # bfloat16 tensor cores and cp.async

# Of these, those that nvcc knows: Blackwell's (100, 120) since CUDA 12.8, the others since 11.8. PTX of 9.0
# is for all other GPUs after Hopper, such as 11.0 and what follows 12: drivers compile it at the first call.
DEFAULT_ARCHITECTURES = ("80-real", "90a-real", "100-real", "120-real", "90-virtual")
# As in torch/utils/cpp_extension.py.
NAMED_ARCHITECTURES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class ConfigError(Exception):
    """One sentence: what is wrong with this build, and what to do."""


@dataclass(frozen=True)
class NativeConfig:
    """Names are CMake's variables, in lower case; what is not there is empty.

    Attributes:
        cuda_architectures: in CMake's notation, such as ``80-real``.
        cuda_code: the same in nvcc's, such as ``sm_80``.
        cuda_reason: why the installed package will have no CUDA ops; empty if it will.
        build_warning: what is doubtful about this build, for ``fusedkv info``.
    """

    torch_dir: str
    torch_version: str
    torch_cuda: str
    pybind11_dir: str
    nvcc: str = ""
    nvcc_version: str = ""
    cuda_architectures: tuple[str, ...] = ()
    cuda_code: tuple[str, ...] = ()
    cuda_reason: str = ""
    build_warning: str = ""

    @property
    def label(self) -> str:
        """The local part of the package's version: pip shows it, and no other word of a successful build."""
        return "cpu" if self.cuda_reason else "cu" + self.nvcc_version.replace(".", "")

    def cmake_code(self) -> str:
        lines = []
        for name, value in asdict(self).items():
            text = ";".join(value) if isinstance(value, tuple) else value
            lines.append(f"set({name.upper()} [==[{text}]==])")
        return "\n".join(lines)


def wanted_cuda(environ: Mapping[str, str]) -> str:
    """FUSEDKV_CUDA as the option of CMakeLists.txt: ``AUTO`` if it is empty or unset, ``ON`` or ``OFF``."""
    given = environ.get("FUSEDKV_CUDA", "")
    if given not in ("", "0", "1"):
        raise ConfigError(
            f"FUSEDKV_CUDA must be 0 (no CUDA ops) or 1 (CUDA ops or an error), got {given!r}; "
            "unset it to build them where torch has CUDA and there is an nvcc."
        )
    return {"": "AUTO", "0": "OFF", "1": "ON"}[given]


def find_tool(name: str) -> str | None:
    """The tool of this environment (pip installs cmake and ninja as scripts), else the one on PATH."""
    beside_python = Path(sysconfig.get_path("scripts")) / name
    return str(beside_python) if beside_python.exists() else shutil.which(name)


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """What the user names comes first (CUDACXX, CUDA_HOME, CUDA_PATH), then PATH, then /usr/local/cuda."""
    path = environ.get("PATH", "")
    if compiler := environ.get("CUDACXX"):
        if found := shutil.which(compiler, path=path):
            return found
        raise ConfigError(
            f"CUDACXX must be the path of nvcc, got {compiler!r}, which is no program; "
            "correct it, or unset it (flags belong in NVCC_APPEND_FLAGS)."
        )
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environ.get(variable):
            if found := shutil.which(os.path.join(home, "bin", "nvcc")):
                return found
            raise ConfigError(
                f"{variable} must be the folder of a CUDA toolkit, got {home!r}, which has no bin/nvcc; "
                "correct it, or unset it."
            )
    return shutil.which("nvcc", path=path) or shutil.which(os.path.join(DEFAULT_TOOLKIT, "bin", "nvcc"))


def ask_nvcc(nvcc: str, option: str) -> str:
    try:
        return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"{nvcc} must be a working nvcc, and `nvcc {option}` fails ({error}); "
            "set CUDA_HOME to a CUDA toolkit, or FUSEDKV_CUDA=0 to build without CUDA ops."
        ) from None


def native_architectures() -> list[str]:
    """The GPUs that torch sees, as torch reads ``native``: PTX for the newest."""
    read_torch()  # a clear error where there is none
    import torch

    count = torch.cuda.device_count()
    found = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
    if not found:
        raise ConfigError(
            f"TORCH_CUDA_ARCH_LIST=native needs a GPU here, and torch {torch.__version__} sees none; "
            "name architectures, such as TORCH_CUDA_ARCH_LIST='8.0;9.0'."
        )
    return [f"{major}.{minor}" for major, minor in found[:-1]] + ["{}.{}+PTX".format(*found[-1])]


def parse_architectures(text: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, as torch writes it, in CMake's notation.

    Entries are numbers (``8.0``, ``9.0a``, ``9.0+PTX``), torch's names (``Hopper``, ``Ampere+Tegra``) and
    ``native``, with semicolons, commas or spaces between them. Nothing but separators means the default.
    """
    entries: list[str] = []
    for entry in re.split(r"[;,\s]+", text.strip(";, \t\n")):
        named = NAMED_ARCHITECTURES.get(entry, entry).split(";")
        entries += native_architectures() if entry == "native" else named
    if entries == [""]:
        return DEFAULT_ARCHITECTURES
    architectures = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ConfigError(
                f"TORCH_CUDA_ARCH_LIST must hold entries such as 8.0, 9.0a, 9.0+PTX, native or "
                f"{', '.join(list(NAMED_ARCHITECTURES)[-6:])}, got {entry!r}; correct it, or unset it."
            )
        major, minor, suffix, ptx = match.groups()
        if int(major) < MIN_MAJOR:
            raise ConfigError(
                f"TORCH_CUDA_ARCH_LIST must hold architectures of {MIN_MAJOR}.0 (Ampere) or newer, got "
                f"{entry} in {text!r}; leave it out, as the kernels need instructions that those GPUs lack."
            )
        architectures.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return tuple(dict.fromkeys(architectures))


def code_names(architectures: tuple[str, ...]) -> tuple[str, ...]:
    """What nvcc, and ``torch.cuda.get_arch_list()``, call the code for them."""
    names = []
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        names += [f"sm_{number}"] if kind != "virtual" else []
        names += [f"compute_{number}"] if kind != "real" else []
    return tuple(names)


def known_to(nvcc: str, architectures: tuple[str, ...]) -> tuple[str, ...]:
    """Those that nvcc can compile for, in CMake's notation or its own."""
    known = set(re.findall(r"\d+", ask_nvcc(nvcc, "--list-gpu-arch")))
    return tuple(name for name in architectures if known & set(re.findall(r"\d+", name)))


def check_nvcc_knows(nvcc: str, version: str, code: tuple[str, ...]) -> None:
    known = known_to(nvcc, code)
    unknown = [name for name in code if name not in known]
    if unknown:
        raise ConfigError(
            f"nvcc {version} ({nvcc}) cannot compile for {', '.join(unknown)}; set TORCH_CUDA_ARCH_LIST to "
            "architectures that it knows, or CUDA_HOME to another CUDA toolkit."
        )


def read_torch() -> tuple[str, str, str]:
    """Folder, version and CUDA version ("" for none) of this Python's torch, without its slow import."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None:
        raise ConfigError(
            f"fusedkv_ext needs torch>=2.11 in the Python that builds it, and {sys.executable} has none; "
            "run `pip install 'torch>=2.11'` there."
        )
    facts = runpy.run_path(str(folder / "version.py"))
    version, cuda = str(facts["__version__"]), facts["cuda"] or ""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MIN_TORCH:
        raise ConfigError(f"fusedkv_ext needs torch>=2.11, got {version}; run `pip install 'torch>=2.11'`.")
    return str(folder), version, cuda


def configure(wanted: str, environ: Mapping[str, str]) -> NativeConfig:
    """Decides what is built.

    Args:
        wanted: ``OFF``; ``AUTO``, CUDA ops where torch has CUDA and there is an nvcc; or ``ON``, compile the
            CUDA sources, without nvcc an error. They are installed where torch has CUDA.
        environ: the environment variables.

    Raises:
        ConfigError: what the user asked for cannot be had.
    """
    torch_dir, torch_version, torch_cuda = read_torch()
    try:
        import pybind11
    except ImportError:
        raise ConfigError(
            f"fusedkv_ext needs pybind11 in the Python that builds it, {sys.executable}; "
            "run `pip install pybind11` there."
        ) from None
    common = (torch_dir, torch_version, torch_cuda, pybind11.get_cmake_dir())
    no_cuda = "" if torch_cuda else f"it was built with torch {torch_version}, which has no CUDA"
    if wanted == "OFF":
        return NativeConfig(*common, cuda_reason=no_cuda or "it was built with FUSEDKV_CUDA=0")
    if wanted == "AUTO" and no_cuda:
        return NativeConfig(*common, cuda_reason=no_cuda)

    architectures = parse_architectures(environ.get("TORCH_CUDA_ARCH_LIST", ""))
    major = torch_cuda.split(".")[0]
    toolkit = f"a CUDA {major} toolkit" if major else "a CUDA toolkit"
    nvcc = find_nvcc(environ)
    if nvcc is None and wanted == "ON":
        raise ConfigError(
            f"CUDA ops were asked for (FUSEDKV_CUDA=1), and no nvcc was found (looked at {NVCC_PLACES}); "
            f"set CUDA_HOME to {toolkit}, or FUSEDKV_CUDA=0 to build without CUDA ops."
        )
    if nvcc is None:
        warning = (
            f"torch {torch_version} has CUDA {torch_cuda}, and no nvcc was found (looked at {NVCC_PLACES}), "
            f"so there are no CUDA ops; set CUDA_HOME to {toolkit} and build again, or say FUSEDKV_CUDA=0."
        )
        reason = f"no nvcc was found when it was built (looked at {NVCC_PLACES})"
        return NativeConfig(*common, cuda_reason=reason, build_warning=warning)

    release = re.search(r"release (\d+\.\d+)", ask_nvcc(nvcc, "--version"))
    if release is None:
        raise ConfigError(f"{nvcc} must be NVIDIA's nvcc, and tells no release; set CUDA_HOME to {toolkit}.")
    if architectures is DEFAULT_ARCHITECTURES:
        architectures = known_to(nvcc, architectures)
    code = code_names(architectures)
    check_nvcc_knows(nvcc, release[1], code)
    warning = ""
    if torch_cuda and release[1].split(".")[0] != major:
        warning = (
            f"nvcc {release[1]} ({nvcc}) is of another CUDA major version than torch {torch_version}, which "
            f"has CUDA {torch_cuda}, so the CUDA ops may not run; set CUDA_HOME to {toolkit} and build again."
        )
    return NativeConfig(*common, nvcc, release[1], architectures, code, no_cuda, warning)


def main(arguments: list[str]) -> None:
    """``nvcc`` prints its path, or nothing; ``cmake AUTO|ON|OFF`` prints code for CMakeLists.txt."""
    try:
        if arguments == ["nvcc"]:
            print(find_nvcc(os.environ) or "")
        elif arguments[:1] == ["cmake"] and arguments[1:] in (["AUTO"], ["ON"], ["OFF"]):
            print(configure(arguments[1], os.environ).cmake_code())
        else:
            raise ConfigError(
                f"arguments must be `nvcc` or `cmake AUTO|ON|OFF` (FUSEDKV_CUDA), got {arguments}."
            )
    except ConfigError as error:
        sys.exit(f"fusedkv_ext: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
