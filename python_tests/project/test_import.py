"""What ``import fusedkv_ext`` needs, costs and says when it cannot work. Everything runs in fresh
interpreters."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

import fusedkv_ext

PACKAGE = Path(fusedkv_ext.__file__).resolve().parent


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` from ``folder``, where nothing of the repository can be found by accident."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def test_works_from_any_folder_without_gpu_and_compiler(tmp_path: Path) -> None:
    code = """
import torch, fusedkv_ext as fkv
x = torch.ones(1, 2, 1, 16)
assert torch.equal(fkv.fuse_kv([x, x], torch.ones(2, 1, 1)), 2 * x)
assert not torch.cuda.is_initialized()
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_takes_less_than_a_second_beyond_torch(tmp_path: Path) -> None:
    code = """
import time, torch
start = time.perf_counter()
import fusedkv_ext
print(time.perf_counter() - start)
"""
    seconds = [float(run_python(code, tmp_path).stdout) for _ in range(3)]
    assert statistics.median(seconds) < 1, seconds


def test_brings_no_optional_package_and_changes_no_setting(tmp_path: Path) -> None:
    code = """
import os, sys, torch
def state():
    return (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.initial_seed(), torch.are_deterministic_algorithms_enabled())
before, modules = state(), set(sys.modules)
import fusedkv_ext
assert state() == before
optional = {"matplotlib", "rich", "safetensors", "tokenizers", "transformers", "huggingface_hub"}
print(sorted(optional & (set(sys.modules) - modules)))
"""
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def import_of_a_copy(folder: Path, native_files: dict[str, bytes]) -> subprocess.CompletedProcess[str]:
    """Imports a copy of the package that has these files in place of its native module."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, folder / "fusedkv_ext", ignore=ignored)
    for name, content in native_files.items():
        (folder / "fusedkv_ext" / name).write_bytes(content)
    # The finder of an editable install would supply the module that the copy lacks.
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import fusedkv_ext
"""
    return run_python(code, folder, PYTHONPATH=str(folder))


def only_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The message of the ImportError that ended a run."""
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), done.stderr
    return last


def test_missing_native_module_gives_one_clear_sentence(tmp_path: Path) -> None:
    sentence = only_sentence(import_of_a_copy(tmp_path, {}))
    assert "fusedkv_ext" in sentence and "missing" in sentence and "pip install" in sentence


def test_native_module_that_cannot_be_loaded_gives_one_clear_sentence(tmp_path: Path) -> None:
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sentence = only_sentence(import_of_a_copy(tmp_path, {name: b"not a shared object"}))
    assert "fusedkv_ext" in sentence and "does not load" in sentence and "pip install" in sentence


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    lazy = {"conversion", "hf", "testing"}
    assert set(dir(fusedkv_ext)) == set(fusedkv_ext.__all__) | lazy
    for name in fusedkv_ext.__all__:
        assert getattr(fusedkv_ext, name) is not None
    assert importlib.import_module("fusedkv_ext.testing") is fusedkv_ext.testing


def test_no_public_name_is_that_of_a_submodule() -> None:
    """Importing the submodule would put it in the place of the function or class."""
    shadowed = [name for name in fusedkv_ext.__all__ if importlib.util.find_spec(f"fusedkv_ext.{name}")]
    assert not shadowed
