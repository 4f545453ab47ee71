"""scripts/gpu_check.sh from beginning to end without a GPU, with stand-ins for ncu and compute-sanitizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

FAKES = {
    "ncu": 'while [ "$1" != "$PYTHON" ]; do shift; done; "$@"; echo "    Duration  us  1.5"',
    "compute-sanitizer": 'if [ "$1" = --help ]; then exit; fi; echo "$*" >&2; kill -SEGV $$',
}


def listed_steps() -> list[str]:
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if " (at most " in line]


def test_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name, line in FAKES.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    environ = {**os.environ, "PYTHON": sys.executable, "OUT": str(out)}
    environ["PATH"] = f"{tools}:{os.environ['PATH']}"
    command = [str(SCRIPTS / "gpu_check.sh"), "--dry", "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "gpu_check.json").read_text())
    found = {step["name"]: step for step in report["steps"]}
    assert list(found) == listed_steps()
    # The fake compute-sanitizer crashes, and the step after it runs all the same.
    expected = dict.fromkeys(found, 0) | {"build": None, "memcheck": -11}
    assert {name: step["rc"] for name, step in found.items()} == expected, done.stdout
    assert found["build"]["reason"] == "a library loads, so none is built"
    assert "Duration  us  1.5" in found["ncu"]["summary"][-1]
    assert "kns=fusedkv" in found["memcheck"]["summary"][-1]
    for name in ("smoke", "tests"):
        assert "tests collected" in found[name]["summary"][-1]
    families = {name: {row["family"] for row in x["rows"]} for name, x in report["benchmarks"].items()}
    assert families == {
        "headline": {"decode", "coded", "latency", "schedule"},
        "operations": {"fuse", "append", "ragged", "crossover", "head_dim", "layout", "chunked"},
        "model": {"model", "prefill"},
        "compile": {"decode", "fuse"},
    }
    assert not [row["error"] for x in report["benchmarks"].values() for row in x["rows"] if row["error"]]
    # As many files, and as small ones, as the machine gives back.
    assert len(list(out.iterdir())) <= 8 and report["commit"] == "abc" and report["dry"]

    command = [sys.executable, "benchmarks/gpu.py", "--report", str(out / "gpu_check.json")]
    tables = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "commit abc" in tables and "### Whole decoders" in tables and "### Chunked prefill" in tables
