"""fusedkv info: show versions, the CPU kernels in use and the CUDA support.

With --verify, run the forward operations against the oracle; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="run the forward operations against the oracle")
    parser.add_argument("--device", default="cpu", help="where to verify: cpu or cuda (default: %(default)s)")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Versions and features of this installation."""
    import torch

    from fusedkv_ext.ops import native

    extras = ("safetensors", "tokenizers", "rich", "matplotlib")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fusedkv_ext": _version("fusedkv_ext"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cuda_devices": devices,
        "threads": torch.get_num_threads(),
        "native": native.build_info(),
        "extras": {package: _version(package) for package in extras},
    }


def _print(info: dict[str, Any]) -> None:
    native = dict(info["native"])
    rows = [
        ("fusedkv_ext", info["fusedkv_ext"] or "not installed as a package"),
        ("Python", info["python"]),
        ("torch", f"{info['torch']}, {info['threads']} threads"),
        ("CPU kernels", f"{native.pop('cpu_level')} (this CPU runs: {', '.join(native.pop('cpu_levels'))})"),
        ("torch CUDA", info["torch_cuda"] or "none"),
        ("CUDA devices", ", ".join(info["cuda_devices"]) or "none"),
        ("CUDA ops", "loaded" if native.pop("cuda_ops") else f"none: {native.pop('cuda_error')}"),
    ]
    native.pop("cuda_error", None)
    for key, value in native.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        rows.append((f"build: {key.replace('_', ' ')}", "none" if shown in ("", None) else str(shown)))
    rows += [(package, version or "not installed") for package, version in info["extras"].items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def run(args: argparse.Namespace) -> int:
    info = collect()
    failed = 0
    if not args.json:
        _print(info)
    if args.verify:
        from fusedkv_ext.cli.verify import checks
        from fusedkv_ext.training.trainer import resolve_device

        info["verify"] = []
        for check in checks(resolve_device(args.device)):
            info["verify"].append(check.to_dict())
            failed += not check.passed
            if not args.json:
                print(
                    f"{'ok  ' if check.passed else 'FAIL'}  {check.op:<36} {check.dtype:<9} max error "
                    f"{check.max_error:.2e}, allowed {check.allowed:.2e}"
                    f"{f'; {check.complaint}' if check.complaint else ''}"
                )
        if not args.json:
            print(f"verify: {len(info['verify']) - failed} passed, {failed} failed")
    if args.json:
        print(json.dumps(info))
    return 1 if failed else 0
