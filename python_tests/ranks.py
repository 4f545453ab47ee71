"""Several processes for tests: a test file hands itself to torchrun, each rank saves what it found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedkv_ext
from fusedkv_ext.training.metrics import read_metrics

HAS_GLOO = dist.is_available() and dist.is_gloo_available()


def torchrun(*arguments: object, folder: Path, processes: int = 2) -> subprocess.Popen[str]:
    """torchrun with these arguments, in ``folder``; each process with one thread."""
    root, here = Path(fusedkv_ext.__file__).parents[1], Path(__file__).parent
    search = os.pathsep.join(filter(None, [str(root), str(here), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            *map(str, arguments),
        ],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def run_ranks(file: str, folder: Path, processes: int = 2) -> list[dict[Any, Any]]:
    """Runs ``file`` with ``folder`` as its argument in that many processes: what each rank found."""
    folder.mkdir(parents=True, exist_ok=True)
    started = torchrun(file, folder, folder=folder, processes=processes)
    _, err = started.communicate(timeout=float(os.environ.get("FUSEDKV_TEST_TIMEOUT", "180")))
    assert started.returncode == 0, err[-4000:]
    return [torch.load(folder / f"rank{i}.pt", weights_only=False) for i in range(processes)]


def processes_of(parent: int) -> dict[int, int]:
    """Process ids below torchrun, by rank; needs /proc."""
    found = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith("RANK=")}
    return found


def wait_for_step(run: Path, step: int) -> None:
    """Until the metrics in the folder of a run say that a training step is done."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (run / "metrics.jsonl").exists():
            if any(r["kind"] == "train" and r["step"] >= step for r in read_metrics(run / "metrics.jsonl")):
                return
        time.sleep(0.05)
    pytest.fail(f"no step {step} in {run} within a minute")


def rank_main(work: Callable[[Path], dict[Any, Any]]) -> None:
    """What a test file does where torchrun runs it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    try:
        found = work(folder)
        torch.save(found, folder / f"rank{dist.get_rank()}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as __main__.py does, and for its reason


def whole(tensor: Tensor) -> Tensor:
    """All ranks' parts of a DTensor; together on all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that is trained, whole; together on all ranks."""
    return {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.requires_grad}
