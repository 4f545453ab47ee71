"""Loads the native library that FUSEDKV_NATIVE_DIR names, or the package's own, and runs a kernel on a GPU.

load_native.py [--dry]    exits with 1 where it has no CUDA ops; --dry: where it does not load
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import fusedkv_ext as fkv
    from fusedkv_ext import _C
    from fusedkv_ext.ops import native

    folder, info = os.environ.get("FUSEDKV_NATIVE_DIR"), native.build_info()
    if folder and not os.path.samefile(Path(_C.__file__).parent, folder):
        sys.exit(f"{folder} has no _C for Python {sys.version.split()[0]}; {_C.__file__} is loaded instead")
    print(_C.__file__, info, sep="\n")
    if info["cuda_error"] and "--dry" not in sys.argv:
        sys.exit(info["cuda_error"])
    if info["cuda_ops"] and torch.cuda.is_available():
        # Code for another architecture loads, and fails here.
        x, weights = torch.ones(1, 2, 2, 64, device="cuda"), torch.ones(2, 2, 64, device="cuda")
        assert fkv.fuse_kv([x, x], weights).sum().item() == 2 * x.numel(), "fuse_kv gives a wrong sum"


if __name__ == "__main__":
    main()
