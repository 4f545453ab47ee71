#!/usr/bin/env bash
# Fails if a built library uses anything of libtorch but its stable ABI, or needs a torch newer than 2.11.
# usage: scripts/abi_check.sh BIN    (BIN: the bin folder of the environment that fusedkv_ext was built in)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${1:?usage: scripts/abi_check.sh BIN}

if ! [ -x "$bin/torch-abi-audit" ]; then
  if "$bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
    echo "abi: skipped, torch-abi-audit needs Python 3.11"
    exit 0
  fi
  echo "abi: torch-abi-audit is missing in $bin; it is in constraints.txt" >&2
  exit 1
fi

shopt -s nullglob
libraries=(fusedkv_ext/*.so)
if [ ${#libraries[@]} -eq 0 ]; then
  echo "abi: no library in fusedkv_ext/; build first (make build)" >&2
  exit 1
fi
# The CUDA ops as cuda-objects links them, where torch has no CUDA.
libraries+=(build/cuda-objects/_C_cuda*.so)
for library in "${libraries[@]}"; do
  "$bin/torch-abi-audit" "$library" --check torch
  "$bin/torch-abi-audit" "$library" --json | "$bin/python" -c '
import json, sys
audit = json.load(sys.stdin)
for found in audit["extensions"] + audit["bundled_libs"]:
    floor = found["torch"]["min_torch_version"]
    if floor and tuple(map(int, floor.split(".")[:2])) > (2, 11):
        sys.exit("abi: " + found["path"] + " needs torch " + floor + "; 2.11 has to do")'
done
echo "abi: ${#libraries[@]} libraries use the stable ABI only, torch 2.11 or older is enough"
