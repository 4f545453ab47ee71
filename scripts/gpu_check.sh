#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds for that GPU, runs the CUDA tests, compute-sanitizer on small cases and the
# benchmarks, and writes everything into one file, gpu_check.json, in under 9 minutes.
#
# usage: [PYTHON=python3] [OUT=build/gpu_check] scripts/gpu_check.sh [--list] [--only STAGE,...] [--commit HASH]
# PYTHON has torch with CUDA, pybind11, pytest, numpy, cmake and ninja; nothing is installed or downloaded. The libraries are
# built into fusedkv_ext/. Exits with 1 when the build, a test or a sanitizer fails and with 2 where it cannot run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "gpu_check: no '$python' here; set PYTHON" >&2; exit 2; }
exec "$python" scripts/gpu_check.py "$@"
