#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: smoke tests, the benchmarks, the CUDA tests, ncu and compute-sanitizer, in under 10
# minutes. Each step has a time limit and none needs another. gpu_check.json is written anew after every step.
#
# usage: [PYTHON=python3] [OUT=build/gpu_check] scripts/gpu_check.sh [--list] [--only STEP,...] [--dry] [--commit HASH]
# PYTHON has torch with CUDA, pytest and numpy; nothing is installed or downloaded. The library is the first that loads:
# FUSEDKV_NATIVE_DIR's or that of `make gpu-bundle` in build/gpu-bundle, then the one in fusedkv_ext/; if none does, one is
# built in build/gpu-check, for which PYTHON needs pybind11, cmake and ninja. fusedkv_ext/ stays as it is.
# --dry goes through all steps without a GPU. Exits with 1 when the build, a test or memcheck fails and with 2 where it
# cannot run. A benchmark, or a tool that runs out of time, fails nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "gpu_check: no '$python' here; set PYTHON" >&2; exit 2; }
exec "$python" scripts/gpu_check.py "$@"
