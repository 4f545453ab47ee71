"""Entry of pip: configures and builds CMakeLists.txt with Ninja. Downloads nothing.

Build with ``pip install --no-build-isolation .`` (or ``-e .``), so that the torch of this environment is the
one compiled against. ``FUSEDKV_CUDA=0`` leaves the CUDA ops out and ``1`` insists on them;
``TORCH_CUDA_ARCH_LIST`` chooses their architectures; ``MAX_JOBS`` limits the compilers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))
from native_config import find_tool, wanted_cuda  # noqa: E402


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions; a second build only recompiles what changed."""

    def run(self) -> None:
        # setuptools would look for compilers first; CMake does that.
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build_dir = ROOT / "build" / f"cmake-{tag}"
        target = (
            ROOT / "fusedkv_ext" if self.editable_mode else Path(self.build_lib).resolve() / "fusedkv_ext"
        )
        cmake = find_tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFUSEDKV_CUDA={wanted_cuda(os.environ)}",
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        for command in (
            configure,
            [cmake, "--build", str(build_dir), *jobs],
            [cmake, "--install", str(build_dir), "--prefix", str(target)],
        ):
            if subprocess.run(command).returncode:
                sys.exit(f"fusedkv_ext: native build failed: {' '.join(command)}")


setup(ext_modules=[Extension("fusedkv_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
