"""What every test gets: a seed of its own, a bounded number of threads, and the devices that this machine
has."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch

MAX_THREADS = min(2, os.cpu_count() or 1)


def pytest_configure() -> None:
    torch.set_num_threads(MAX_THREADS)


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
