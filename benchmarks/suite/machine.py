"""Where the numbers come from: processor, caches, GPU, versions, commit; and how quiet the machine was."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.ops import native


def keep_freed_memory() -> None:
    """Has glibc's malloc give freed memory to the next tensor rather than back to the system.

    Otherwise a large new tensor may or may not bring thousands of page faults, as the heap happens to look:
    the same call then takes one time or three. No effect with another C library. Process-wide.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def commit() -> str:
    """Of the tree that this file is tracked in, "-dirty" where it was changed; "unknown" without one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        for command in (
            ["ls-files", "--error-unmatch", Path(__file__).name],
            ["describe", "--always", "--dirty", "--exclude", "*"],
        ):
            done = subprocess.run([*git, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Where the numbers come from. Caches: bytes of each level as the system tells them, per instance."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "level": native.cpu_level(),
        "cache_bytes": _cache_bytes(),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """What the driver tells of a GPU."""
    p = torch.cuda.get_device_properties(device)
    return {
        "device": p.name,
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "memory_bytes": p.total_memory,
        "cuda": torch.version.cuda,
        **gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi tells them; empty where it does not."""
    names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (x.strip() for x in done.stdout.splitlines()[0].split(",")), strict=False))


def _cache_bytes() -> dict[str, int]:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[-1:] in units:
            found[f"L{level}"] = int(size[:-1]) * units[size[-1]]
    return found


def busy_seconds() -> float:
    """CPU seconds that all processes but this one and its children have used so far; 0 where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    # user, nice, system, (idle, iowait,) irq, softirq, steal; guest time is part of user.
    total = sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return total - own.user - own.system - own.children_user - own.children_system


def resident_bytes(field: str) -> int:
    """Of this process: "VmRSS" now, "VmHWM" at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_with_exact_memory(command: list[str]) -> str:
    """Runs a process whose freed memory goes back to the system at once, so that none is counted twice.

    Returns:
        Its output.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    suite = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([suite, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip()[-500:]}")
    return done.stdout
