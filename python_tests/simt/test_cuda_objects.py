"""What `make cuda-objects` leaves behind: no kernel spills registers or has a stack frame, and the linked
library has every op. Skipped where that did not run on the sources as they are now."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-objects"
# The rest of a wheel, the CPU kernels and Python, is 2 MB; all of it has 40 MB.
MAX_FATBIN_BYTES = 35e6

# Recorded from nvcc 13.0, names shortened: a kernel that is fine, one that spills and calls a function that
# was not inlined, and the second one again for another architecture.
RECORDED = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4demo4attnIfLi4ELb0EEEvNS_1PE' for 'sm_80'
ptxas info    : Function properties for _ZN4demo4attnIfLi4ELb0EEEvNS_1PE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 17 registers, used 1 barriers, 376 bytes cmem[0]
ptxas info    : Compile time = 2.365 ms
ptxas info    : Compiling entry function '_ZN4demo4attnINS_4bf16ELi48ELb1EEEvNS_1PE' for 'sm_80'
ptxas info    : Function properties for _ZN4demo4attnINS_4bf16ELi48ELb1EEEvNS_1PE
    416 bytes stack frame, 4472 bytes spill stores, 9488 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 416 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 148.005 ms
ptxas info    : Function properties for _ZN4demo6helperEPKfi
    0 bytes stack frame, 104 bytes spill stores, 108 bytes spill loads
ptxas info    : Compiling entry function '_ZN4demo4attnINS_4bf16ELi48ELb1EEEvNS_1PE' for 'sm_90a'
ptxas info    : Function properties for _ZN4demo4attnINS_4bf16ELi48ELb1EEEvNS_1PE
    400 bytes stack frame, 4500 bytes spill stores, 9516 bytes spill loads
ptxas info    : Used 32 registers, used 2 barriers, 400 bytes cumulative stack size, 256 bytes smem
"""


@pytest.fixture(scope="module")
def ptxas_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxas_report", ROOT / "scripts" / "ptxas_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The report, if it is about the sources as they are now."""
    path = BUILD / "ptxas.json"
    sources = [ROOT / "CMakeLists.txt"]
    for folder in ("common", "cuda", "ops", "api"):
        files = (ROOT / "csrc" / folder).rglob("*")
        sources += [p for p in files if p.suffix in {".h", ".cuh", ".cu"} or p.stem.endswith("_cuda")]
    reason = None
    if not path.exists():
        reason = "make cuda-objects has not run"
    elif path.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        reason = "the sources are newer than the last make cuda-objects"
    if reason is not None:
        if os.environ.get("FUSEDKV_REQUIRE_CUDA_OBJECTS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return json.loads(path.read_text())


def test_every_decode_kernel_fits_the_gpus_it_is_for(report: dict[str, Any]) -> None:
    """227 KiB, as a block may have on sm_90; test_decode_launch.py has the GPUs with less."""
    dynamic = {row["kernel"]: row["dynamic"] for row in report["kernels"] if "Kernel<" in row["kernel"]}
    assert len(dynamic) == 102 and all(dynamic.values())
    assert max(dynamic.values()) <= 227 * 1024


def test_parser(ptxas_report: ModuleType) -> None:
    rows = ptxas_report.parse(RECORDED)
    columns = ("arch", "entry", "registers", "stack", "spill_stores", "spill_loads", "shared", "barriers")
    assert [tuple(row[c] for c in columns) for row in rows] == [
        ("sm_80", True, 17, 0, 0, 0, 0, 1),
        ("sm_80", True, 32, 416, 4472, 9488, 256, 1),
        ("sm_80", False, None, 0, 104, 108, 0, 0),
        ("sm_90a", True, 32, 400, 4500, 9516, 256, 2),
    ]
    assert [ptxas_report.spills(row) for row in rows] == [False, True, True, True]


@pytest.mark.parametrize(
    ("full", "short"),
    [
        (
            "void demo::(anonymous namespace)::attn<float, 4, false>(demo::(anonymous namespace)::P)",
            "attn<float, 4, false>",
        ),
        ("void fusedkv::fuse_kv<fusedkv::bf16, (int)2, (bool)1>(fusedkv::P)", "fuse_kv<bf16, 2, 1>"),
        ("void a::k<a::Tile<a::f16, 64>, (unsigned int)3>(a::P, void (*)(int))", "k<Tile<f16, 64>, 3>"),
        ("fusedkv::plan(fusedkv::P)", "plan"),
        ("_Z5other", "_Z5other"),
    ],
)
def test_short_names(ptxas_report: ModuleType, full: str, short: str) -> None:
    assert ptxas_report.shorten(full) == short


def test_no_kernel_spills_or_has_a_stack_frame(report: dict[str, Any], ptxas_report: ModuleType) -> None:
    wrong = [
        f"{row['kernel']} {row['arch']} ({row['file']}): {row['stack']} bytes of stack, "
        f"{row['spill_stores']} stored, {row['spill_loads']} loaded"
        for row in report["kernels"]
        if ptxas_report.spills(row)
    ]
    assert report["kernels"] and not wrong, "\n".join(wrong)


def test_every_kernel_is_compiled_for_both_architectures(report: dict[str, Any]) -> None:
    written = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "ops").rglob("*.cu")}
    assert {entry["file"].split()[0] for entry in report["files"]} == written
    by_arch = [
        {(row["file"], row["kernel"]) for row in report["kernels"] if row["entry"] and row["arch"] == arch}
        for arch in ("sm_80", "sm_90a")
    ]
    assert by_arch[0] and by_arch[0] == by_arch[1]


def test_gpu_code_leaves_the_wheel_small(report: dict[str, Any]) -> None:
    assert sum(entry["fatbin_bytes"] for entry in report["files"]) < MAX_FATBIN_BYTES


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads the real library")
def test_library_loads_and_has_every_op(report: dict[str, Any]) -> None:
    """In a process of its own: registrations stay for as long as a process lives."""
    program = f"""
import torch, fusedkv_ext
torch.ops.load_library({str(BUILD / "_C_cuda.so")!r})
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedkv::")]
assert names
print(*[name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    missing = done.stdout.split()
    assert not missing, f"without a CUDA implementation: {missing}"
