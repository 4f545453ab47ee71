"""Loads the native modules and calls their operations.

``_C`` (schemas and CPU operations) is always loaded, ``_C_cuda`` only if torch has CUDA. The folder that
FUSEDKV_NATIVE_DIR names is searched before the package's own, for another build beside the installed one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

_BUILD = "pip install --no-build-isolation ."
_BUILD_HINT = f"build it with `{_BUILD}` in the environment that has torch"


def _why_not(error: ImportError) -> str:
    """Why there is no native module, and what to do."""
    if importlib.util.find_spec("fusedkv_ext._C") is not None:
        torch_name = f"torch {torch.__version__}"
        return f"does not load with {torch_name} ({error}): it is for another Python or torch; {_BUILD_HINT}"
    source = Path(__file__).resolve().parents[2]
    if (source / "setup.py").is_file():
        return (
            f"is missing in the source tree {source}, which hides an installed package; start Python in "
            "another folder, or install with `pip install --no-build-isolation -e .`"
        )
    return f"is missing; {_BUILD_HINT}"


if _folder := os.environ.get("FUSEDKV_NATIVE_DIR"):
    sys.modules["fusedkv_ext"].__path__.insert(0, _folder)
try:
    from fusedkv_ext import _C
except ImportError as error:
    raise ImportError(f"fusedkv_ext's native module _C {_why_not(error)}.") from None


def _load_cuda_ops() -> str | None:
    """Loads ``_C_cuda.so``. Returns None, or why there are no CUDA operations and what to do."""
    rebuild = f"rebuild with `FUSEDKV_CUDA=1 {_BUILD}` in the source tree"
    torch_name = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{torch_name} has no CUDA; install a torch with CUDA, then {rebuild}"
    if reason := _C.build_info()["cuda_reason"]:
        return f"fusedkv_ext was built without CUDA ops: {reason}; {rebuild}"
    try:
        torch.ops.load_library(os.path.join(os.path.dirname(_C.__file__), "_C_cuda.so"))
    except OSError as error:
        return f"fusedkv_ext's CUDA ops do not load with {torch_name}: {error.__cause__ or error}; {rebuild}"
    return None


def _warn_without_cuda_ops() -> None:
    """Repeats the warning of the build on a machine with a GPU, because pip hides a build's output."""
    info = _C.build_info()
    expected = info["warning"] or not info["cuda_reason"]
    if _cuda_error and expected and torch.version.cuda and torch.cuda.device_count():
        warnings.warn(_cuda_error, stacklevel=3)


_cuda_error = _load_cuda_ops()
_warn_without_cuda_ops()

_wanted_level = os.environ.get("FUSEDKV_CPU_LEVEL")
if _wanted_level and _wanted_level not in _C.cpu_levels():
    warnings.warn(
        f"FUSEDKV_CPU_LEVEL={_wanted_level} is not one of this CPU's levels {_C.cpu_levels()}; "
        f"using {_C.cpu_level()}",
        stacklevel=2,
    )

_ops = torch.ops.fusedkv
_NATIVE_ERROR = re.compile(r"fusedkv (ValueError|TypeError): (.*)")


def build_info() -> dict[str, Any]:
    """Properties of the loaded modules: torch, CUDA and its code, SIMD targets, why CUDA ops are absent."""
    return {
        **_C.build_info(),
        "cpu_level": _C.cpu_level(),
        "cpu_levels": _C.cpu_levels(),
        "cuda_ops": _cuda_error is None,
        "cuda_error": _cuda_error,
    }


def cuda_error() -> str | None:
    """Why there are no CUDA operations, and what to do; None if there are."""
    return _cuda_error


def cpu_levels() -> list[str]:
    """SIMD targets of this build that this CPU runs, best first; the last is ``"portable"``."""
    return _C.cpu_levels()


def cpu_level() -> str:
    """The SIMD target that the CPU kernels use."""
    return _C.cpu_level()


def set_cpu_level(level: str) -> None:
    """Selects the SIMD target that the CPU kernels use from now on (for tests).

    Raises:
        ValueError: This CPU does not run it.
    """
    if not _C.set_cpu_level(level):
        raise ValueError(f"level must be one of {_C.cpu_levels()}, got {level!r}")


def advise_huge_pages(tensor: torch.Tensor) -> bool:
    """Asks the system for huge pages in the memory of a CPU tensor that is not written yet.

    Returns:
        False if there is nothing to ask for: less than 2 MiB, or not Linux. Nothing changes then.
    """
    return _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def workspace_allocations() -> int:
    """How often the scratch memory of a CPU thread has grown; constant once decoding has warmed up."""
    return _C.workspace_allocations()


def kept_memory_bytes() -> int:
    """Bytes of large CPU results of :func:`fuse_kv` that were freed and are kept for reuse."""
    return _C.kept_memory_bytes()


def release_kept_memory() -> None:
    """Returns that memory to the system."""
    _C.release_kept_memory()


def run_op(name: str, *args: Any) -> Any:
    """Calls a native operation. Its checks arrive as RuntimeError and leave as the Python type they name.

    Args:
        name: The operation's name in ``torch.ops.fusedkv``.
        args: The arguments of its schema, in order.

    Returns:
        What the operation returns.

    Raises:
        ValueError: A shape, stride, length or page is wrong.
        TypeError: A dtype is wrong.
    """
    op = getattr(_ops, name).default
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        match = _NATIVE_ERROR.search(str(error))
        if match is None:
            raise
        kind = ValueError if match[1] == "ValueError" else TypeError
        raise kind(match[2]) from None
