#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds for that GPU, runs the CUDA tests, compute-sanitizer on the small cases and
# the benchmark, and writes everything into one file, gpu_check.json, in under 9 minutes.
#
# usage: [PYTHON=python3] [OUT=build/gpu_check] scripts/gpu_check.sh
# PYTHON has torch with CUDA, pybind11, pytest, cmake and ninja; nothing is installed or downloaded. The libraries are
# built into fusedkv_ext/. Exits with 1 when a stage fails and with 2 where it cannot run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu_check}

cannot() { echo "gpu_check: $*" >&2; exit 2; }

command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || cannot "no NVIDIA GPU here (nvidia-smi finds none)"
command -v "${CUDACXX:-nvcc}" >/dev/null || cannot "no nvcc here; it comes with the CUDA toolkit"
command -v "$python" >/dev/null || cannot "no '$python' here; set PYTHON"
for module in torch pybind11 pytest; do
  "$python" -c "import $module" 2>/dev/null || cannot "$python has no $module"
done
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || \
  cannot "torch $("$python" -c 'import torch; print(torch.__version__)') of $python sees no GPU"
# The scripts of PYTHON's environment first: cmake and ninja may be there only.
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
for tool in cmake ninja; do command -v "$tool" >/dev/null || cannot "no $tool here"; done

mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Hopper's kernels want the architecture-specific target; others take the plain one.
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))')}
export TORCH_CUDA_ARCH_LIST

# stage NAME SECONDS COMMAND...: output to a log, result and time to $work/stages, never ends the script.
stage() {
  local name=$1 limit=$2 began=$SECONDS code=0 result=passed
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  [ $code -eq 0 ] || result=failed
  [ $code -ne 124 ] || result="timed out after $limit s"
  printf '%s\t%s\t%s\n' "$name" "$result" $((SECONDS - began)) >>"$work/stages"
  tail -n 3 "$out/$name.log"
  echo "== $name: $result, $((SECONDS - began)) s"
  [ "$result" = passed ]
}

build() {
  local folder=build/gpu-check
  cmake -S . -B "$folder" -G Ninja "-DPython_EXECUTABLE=$(command -v "$python")" -DFUSEDKV_CUDA=ON
  cmake --build "$folder"
  cmake --install "$folder" --prefix fusedkv_ext
  "$python" -c 'from fusedkv_ext import _native; info = _native.build_info(); print(info)
raise SystemExit(0 if info["cuda_ops"] else info["cuda_error"])'
}
export -f build
export python

sanitize() {  # TOOL SECONDS
  # Without torch's caching allocator every tensor is an allocation of its own, and its bounds are checked.
  stage "sanitizer-$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider -m cuda -k "test_matches_oracle and not long" \
    python_tests/test_fuse_kv.py || true
}

if stage build 180 bash -euo pipefail -c build; then
  stage tests 150 "$python" -m pytest -q -p no:cacheprovider -m cuda "--junitxml=$work/tests.xml" || true
  stage benchmark 60 "$python" benchmarks/quick.py --device cuda --tokens 131072 --rounds 50 \
    --json "$work/benchmark.json" || true
  if command -v compute-sanitizer >/dev/null; then
    sanitize memcheck 60
    sanitize racecheck 60
  else
    printf 'sanitizer\tnot run: no compute-sanitizer here\t0\n' >>"$work/stages"
  fi
fi

"$python" - "$work" "$out/gpu_check.json" <<'PYTHON'
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

import torch

work, target = Path(sys.argv[1]), Path(sys.argv[2])


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


stages = [line.split("\t") for line in (work / "stages").read_text().splitlines()]
changed = ask("git", "status", "--porcelain", "--untracked-files=no")
report = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "commit": ask("git", "rev-parse", "HEAD"),
    "uncommitted_changes": None if changed is None else bool(changed),
    "gpu": torch.cuda.get_device_name(),
    "driver": (ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0] or None,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "stages": {name: {"result": result, "seconds": int(seconds)} for name, result, seconds in stages},
}
if (work / "tests.xml").exists():
    suites = ElementTree.parse(work / "tests.xml").getroot().iter("testsuite")
    counts = [{key: int(s.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for s in suites]
    report["tests"] = {key: sum(c[key] for c in counts) for key in ("tests", "failures", "errors", "skipped")}
if (work / "benchmark.json").exists():
    report["benchmark"] = json.loads((work / "benchmark.json").read_text())
target.write_text(json.dumps(report, indent=1) + "\n")
print(f"gpu_check: wrote {target}")
bad = [name for name, result, _ in stages if result != "passed" and not result.startswith("not run")]
sys.exit(f"gpu_check: {', '.join(bad)} did not pass" if bad else 0)
PYTHON
