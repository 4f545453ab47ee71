"""Two processes for the tests of models of transformers: a test file hands itself to torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedkv_ext

HAS_GLOO = dist.is_available() and dist.is_gloo_available()


def run_ranks(file: str, folder: Path) -> list[dict[str, Any]]:
    """Runs ``file`` with ``folder`` as its argument in two processes: what each rank found."""
    root = Path(fusedkv_ext.__file__).parents[1]
    search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, file, folder], cwd=folder, env={**os.environ, **environment},
        text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{i}.pt") for i in range(2)]


def rank_main(work: Callable[[Path], dict[str, Any]]) -> None:
    """What a test file does where torchrun runs it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    try:
        found = work(folder)
        torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    finally:
        dist.destroy_process_group()


def example(word: str) -> str:
    """The program with ``word`` in docs/huggingface_training.md that torchrun is to run."""
    text = (Path(__file__).parents[1] / "docs" / "huggingface_training.md").read_text()
    (found,) = [
        body for body in re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if word in body
    ]
    return found


def whole(tensor: Tensor) -> Tensor:
    """All ranks' parts of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that is trained, whole; together on all ranks."""
    return {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.requires_grad}


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to norms that round to float32 within a model of float64; ``expected`` is not just zeros."""
    largest = expected.abs().max().item()
    assert largest > 1e-6
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * largest)
