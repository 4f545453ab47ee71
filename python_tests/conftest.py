"""What every test gets: a seed of its own, a bounded number of threads, and the devices that this machine
has."""

from __future__ import annotations

import os
import random
import re
import zlib
from collections.abc import Callable, Generator, Iterator

# Tests make thousands of tiny parallel regions: threads that spin between them keep each other from the
# cores. OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

MAX_THREADS = min(2, os.cpu_count() or 1)

# Operations that have a CUDA kernel. A CUDA test that needs another one is skipped, and only such a test.
CUDA_OPS = {"fuse_kv"}
NO_KERNEL = re.compile(r"Could not run 'fusedkv::(\w+)' with arguments from the 'CUDA' backend")


def pytest_configure() -> None:
    torch.set_num_threads(MAX_THREADS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    try:
        return (yield)
    except NotImplementedError as error:
        missing = NO_KERNEL.search(str(error))
        if missing is None or missing[1] in CUDA_OPS:
            raise
        pytest.skip(f"{missing[1]} has no CUDA kernel")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seeds by the test's own name, so that neither the order nor the selection of tests changes their
    data."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads torch uses until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Runs the test once per kind of device; CUDA is skipped where it cannot run."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and a torch built with CUDA")
    return torch.device(request.param)
