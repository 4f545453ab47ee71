"""What every test gets: a seed of its own, a bounded number of threads, and the devices that this machine
has. One of them is the executor of csrc/simt, which runs the CUDA kernels on the host."""

from __future__ import annotations

import os
import random
import re
import resource
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Tests make thousands of tiny parallel regions: threads that spin between them keep each other from the
# cores. OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from fast import FAST
from recorded_steps import RecordedSteps
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fusedkv_ext.ops
import fusedkv_ext.ops.autograd
from fusedkv_ext.generation.cuda_graph import CAPTURES
from fusedkv_ext.ops import fuse, native

MAX_THREADS = min(2, os.cpu_count() or 1)

TESTS = Path(__file__).resolve().parent
SIMT_LIBRARY = Path(
    os.environ.get("FUSEDKV_SIMT_LIBRARY")
    or Path(__file__).resolve().parent.parent / "build" / "simt" / "_C_simt.so"
)


def pytest_configure() -> None:
    torch.set_num_threads(MAX_THREADS)


def place(path: Path) -> str:
    """The path of a test file below this folder, as in fast.py."""
    return Path(os.path.relpath(path, TESTS)).as_posix()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m "not slow"`` does not even import the files whose tests are all slow."""
    if collection_path.suffix != ".py" or config.option.markexpr != "not slow":
        return None
    return True if place(collection_path) not in FAST else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what is not in fast.py."""
    for item in items:
        pattern = FAST.get(place(item.path))
        if pattern is None or not re.search(pattern, item.name):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped: each reason once, with the number of tests."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    if reasons:
        terminalreporter.section("why tests were skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")


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


class Simt:
    """The executor's settings."""

    def configure(self, seed: int = 1, sm_count: int = 3, shared_per_block: int = 227 * 1024) -> None:
        """Seed of its choices; multiprocessors and bytes of shared memory of the GPU that kernels see."""
        torch.ops.fusedkv_simt.configure(seed, sm_count, shared_per_block)


@pytest.fixture(scope="session")
def simt_library() -> Simt:
    """torch.ops.fusedkv_simt. `make test` builds it first and turns its absence into an error."""
    if not SIMT_LIBRARY.exists():
        reason = f"needs {SIMT_LIBRARY}; run `make simt`"
        if os.environ.get("FUSEDKV_REQUIRE_SIMT"):
            pytest.fail(reason)
        pytest.skip(reason)
    torch.ops.load_library(SIMT_LIBRARY)
    fusedkv_ext.ops.fakes.register_fakes("fusedkv_simt")
    fusedkv_ext.ops.autograd.register("fusedkv_simt")
    return Simt()


@pytest.fixture
def simt(simt_library: Simt) -> Iterator[Simt]:
    """The executor with its default settings, which a test may change."""
    simt_library.configure()
    yield simt_library
    simt_library.configure()


@pytest.fixture(params=["cpu", "simt1", "simt2", "simt3", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once per implementation of the ops: "cpu", "cuda", and "simt1" to "simt3", the CUDA
    kernels on CPU tensors in the executor with that seed."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and a torch built with CUDA")
    if request.param.startswith("simt"):
        request.getfixturevalue("simt").configure(seed=int(request.param[4:]))
        monkeypatch.setattr(native, "_ops", torch.ops.fusedkv_simt)
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend wants its tensors."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


@pytest.fixture(params=native.cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per level and goes back to the usual one afterwards."""
    before = native.cpu_level()
    native.set_cpu_level(request.param)
    yield request.param
    native.set_cpu_level(before)


@pytest.fixture(params=[*native.cpu_levels(), "simt1", "simt2", "simt3"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test with the CPU kernels of each level, and with the CUDA kernels in the executor."""
    before = native.cpu_level()
    if request.param.startswith("simt"):
        request.getfixturevalue("simt").configure(seed=int(request.param[4:]))
        monkeypatch.setattr(native, "_ops", torch.ops.fusedkv_simt)
    else:
        native.set_cpu_level(request.param)
    yield request.param
    native.set_cpu_level(before)


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file grows beyond so many bytes: the system refuses, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """Grows by the storages of K and V whenever attention fuses them."""
    storages: list[StorageWeakRef] = []
    fuse_both = fuse.fuse_both

    def recorded(*args: object) -> tuple[Tensor, Tensor]:
        pair = fuse_both(*args)
        storages.extend(StorageWeakRef(x.untyped_storage()) for x in pair)
        return pair

    monkeypatch.setattr(fuse, "fuse_both", recorded)
    return storages


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedSteps:
    """Makes the CPU a device that can capture a step, as a recording."""
    steps = RecordedSteps()
    monkeypatch.setitem(CAPTURES, "cpu", steps)
    return steps
