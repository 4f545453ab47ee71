"""What decoding costs on the CPU, without a clock: instructions, pages of the caches that are touched, and
memory that a step allocates. Slower code has more of one of them."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import instruction_counts
import pytest
import torch
from cases import NO_SUCH_PAGE, Case, named, random_weights
from instruction_counts import COUNTER, RECORD, ROOT, CannotCountError
from tiny import tiny_decoder
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fusedkv_ext import fused_kv_attn_with_kvcache
from fusedkv_ext.ops import native

PAGE = mmap.PAGESIZE


# ---- instructions ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counter() -> None:
    """The counter of the sources as they are now. `make test` builds it first and demands it."""
    sources = [ROOT / "CMakeLists.txt", ROOT / "scripts" / "count_instructions.cpp"]
    for folder in ("common", "cpu", "ops"):
        files = (ROOT / "csrc" / folder).rglob("*")
        sources += [path for path in files if path.suffix in (".h", ".cpp")]
    reason = None
    if not COUNTER.exists():
        reason = f"needs {COUNTER}; run `make instructions`"
    elif COUNTER.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        reason = f"{COUNTER} is older than the kernels; run `make instructions`"
    if reason and os.environ.get("FUSEDKV_REQUIRE_COUNTER"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def counts(counter: None) -> instruction_counts.Counts:
    try:
        return instruction_counts.measure()
    except CannotCountError as error:
        pytest.skip(str(error))


def test_every_level_of_this_cpu_is_counted(counts: instruction_counts.Counts) -> None:
    assert list(counts["instructions"]) == native.cpu_levels()
    assert all(counts["instructions"].values())


@pytest.mark.parametrize("name", native.cpu_levels())
def test_instructions_of_a_decode_call_are_the_recorded_ones(
    name: str, counts: instruction_counts.Counts
) -> None:
    recorded = json.loads(RECORD.read_text())
    of_level = recorded["instructions"].get(name, {})
    for what in ("tokens", "lines"):
        assert counts[what] == recorded[what], f"recorded for other {what}: `make instructions ARGS=--record`"
    print(instruction_counts.table(counts, recorded))
    if reason := instruction_counts.other_compiler(counts, recorded):
        pytest.skip(reason)
    wrong = instruction_counts.deviations(counts["instructions"][name], of_level)
    assert not wrong, (
        f"{name}: {'; '.join(wrong)}. If that is meant (fewer, or for something worth more): "
        "`make instructions ARGS=--record`"
    )


def test_a_tenth_more_or_fewer_instructions_are_found() -> None:
    assert instruction_counts.deviations({"a": 1100, "b": 900}, {"a": 1000, "b": 1000}) == []
    (more,) = instruction_counts.deviations({"a": 1101, "b": 1000}, {"a": 1000, "b": 1000})
    assert more.startswith("a: counted 1101, recorded 1000")
    assert len(instruction_counts.deviations({"a": 899}, {"a": 1000})) == 1
    assert len(instruction_counts.deviations({"a": 1}, {"b": 1})) == 2


# ---- bytes -------------------------------------------------------------------------------------------------


class Fresh:
    """Tensors of zeros in memory that the system has not backed yet, and which of its pages someone touched.

    The system backs a page when it is first read or written, and mincore says which are. A prefetch does not
    count: of a page that is not there it does nothing.
    """

    def __init__(self) -> None:
        self.mincore = ctypes.CDLL(None, use_errno=True).mincore
        self.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self.areas: list[mmap.mmap] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, from the start of a page on."""
        size = torch.Size(shape).numel()
        area = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        self.areas.append(area)
        return torch.frombuffer(area, dtype=dtype, count=size).view(shape)

    def touched(self, x: Tensor) -> set[int]:
        """Numbers of the touched pages of a tensor of ``zeros``."""
        storage = x.untyped_storage()
        there = (ctypes.c_ubyte * -(-storage.nbytes() // PAGE))()
        if self.mincore(storage.data_ptr(), storage.nbytes(), there):
            raise OSError(ctypes.get_errno(), "mincore")
        return {page for page, flags in enumerate(there) if flags & 1}


@pytest.fixture
def fresh() -> Fresh:
    if not sys.platform.startswith("linux"):
        pytest.skip("asks Linux which pages of a process are there")
    fresh = Fresh()
    probe = fresh.zeros((4, PAGE), torch.uint8)
    before, _, after = fresh.touched(probe), int(probe[2, 5]), fresh.touched(probe)
    if (before, after) != (set(), {2}):
        pytest.skip(f"this system's mincore does not follow single pages: {before}, then {after}")
    return fresh


def pages_of(x: Tensor) -> set[int]:
    """Pages of its storage that a vector of neighboring elements lies in."""
    first = x.storage_offset() * x.element_size()
    return set(range(first // PAGE, (first + x.numel() * x.element_size() - 1) // PAGE + 1))


def visible(case: Case, b: int) -> set[int]:
    """Tokens of sequence b that any of its query tokens sees (the last S, causal)."""
    length = case.lengths[b]
    left = case.window[0] if case.window[0] >= 0 else length
    positions = [t for t in range(length - case.S, length) if t >= 0]
    return {t for position in positions for t in range(max(0, position - left), position + 1)}


# A token is 4 KiB, so that pages tell tokens apart: exactly where pages are 4 KiB, in groups where larger.
CASES = [
    Case("all", B=1, S=1, T=600, lengths=(600,)),
    Case("part_of_the_cache", B=1, S=1, T=600, lengths=(77,)),
    Case("ragged", B=4, S=1, T=90, lengths=(90, 1, 0, 33)),
    Case("two_query_tokens", B=2, S=2, T=70, lengths=(70, 41)),
    Case("window", B=1, S=1, T=700, lengths=(700,), window=(100, -1)),
    Case("window_over_two_splits", B=1, S=1, T=600, lengths=(560,), window=(99, -1)),
    Case("window_of_two_query_tokens", B=2, S=2, T=300, lengths=(300, 217), window=(40, -1)),
    Case("window_of_one_token", B=1, S=1, T=300, lengths=(300,), window=(0, -1)),
    Case("paged", B=2, S=1, T=80, lengths=(80, 33), page_size=16),
    Case("paged_ragged_window", B=3, S=1, T=600, lengths=(600, 17, 0), window=(70, -1), page_size=16),
    Case("paged_odd_window", B=2, S=2, T=70, lengths=(70, 31), window=(20, -1), page_size=7),
    Case("head_major", B=2, S=1, T=200, lengths=(200, 77), layout="transposed"),
    Case("head_major_window", B=2, S=1, T=200, lengths=(200, 77), window=(64, -1), layout="transposed"),
]


def make_caches(fresh: Fresh, case: Case, slots: tuple[int, int]) -> list[Tensor]:
    """m_k + m_v caches (rows, slots of a row, G, D), head-major with the layout "transposed"."""
    rows, length = slots
    if case.layout == "transposed":
        shape = rows, case.G, length, case.D
        return [fresh.zeros(shape, case.dtype).transpose(1, 2) for _ in range(case.m_k + case.m_v)]
    return [fresh.zeros((rows, length, case.G, case.D), case.dtype) for _ in range(case.m_k + case.m_v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(**named(CASES))
def test_decoding_touches_what_it_sees_and_nothing_else(
    level: str, case: Case, dtype: torch.dtype, fresh: Fresh
) -> None:
    heads = 4096 // dtype.itemsize // 128
    case = replace(case, dtype=dtype, G=heads, H=2 * heads, D=128)
    slots, table = (case.B, case.T), None
    if case.page_size:
        per_row = -(-case.T // case.page_size)
        slots = case.B * per_row, case.page_size
        table = torch.randperm(slots[0], dtype=torch.int32).view(case.B, per_row)
        for b, length in enumerate(case.lengths):
            table[b, -(-length // case.page_size) :] = NO_SUCH_PAGE
    caches = make_caches(fresh, case, slots)
    fused_kv_attn_with_kvcache(
        torch.randn(case.B, case.S, case.H, case.D).to(dtype),
        caches[: case.m_k],
        caches[case.m_k :],
        random_weights("channel", case.m_k, case.G, case.D),
        random_weights("channel", case.m_v, case.G, case.D),
        cache_seqlens=torch.tensor(case.lengths, dtype=torch.int32),
        block_table=table,
        window_size=case.window,
    )
    expected = set()
    for b in range(case.B):
        for t in visible(case, b):
            at = (b, t) if table is None else (int(table[b, t // case.page_size]), t % case.page_size)
            for head in range(case.G):
                expected |= pages_of(caches[0][at][head])
    assert expected
    for i, cache in enumerate(caches):
        touched = fresh.touched(cache)
        missing, extra = expected - touched, touched - expected
        assert touched == expected, f"source {i}: {len(extra)} pages too many, {len(missing)} not touched"


def test_reads_are_seen_page_by_page(fresh: Fresh) -> None:
    x = fresh.zeros((9, PAGE // 4), torch.float32)
    assert fresh.touched(x) == set()
    x[3].sum()
    x[5:7, -1].sum()
    assert fresh.touched(x) == {3, 5, 6}
    x.sum()
    assert fresh.touched(x) == set(range(9))


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[None, 512], ids=["contiguous", "paged"])
def step(request: pytest.FixtureRequest) -> Iterator[Callable[[], object]]:
    """One decode step of a warm model: two sequences over three splits, no new page and no new split soon."""
    model = tiny_decoder("fusedkv", max_position_embeddings=1200)
    cache = model.make_cache(2, 1200, page_size=request.param)
    with torch.inference_mode():
        model(torch.randint(1, 61, (2, 1100)), cache=cache, logits_to_keep=1)
        ids = torch.randint(1, 61, (2, 1))

        def step() -> object:
            return model(ids, cache=cache, logits_to_keep=1)

        for _ in range(4):
            step()
        yield step


def test_a_warm_decode_step_grows_no_workspace(step: Callable[[], object]) -> None:
    before = native.workspace_allocations()
    for _ in range(16):
        step()
    assert native.workspace_allocations() == before


def test_every_decode_step_asks_for_the_same_memory(step: Callable[[], object]) -> None:
    def asked() -> list[int]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        events = profiler.profiler.kineto_results.events()
        return sorted(event.nbytes() for event in events if event.name() == "[memory]")

    asked()  # the profiler's own first time
    first = asked()
    assert first and sum(first) == 0
    for _ in range(8):
        assert asked() == first


# In a process of its own: here an earlier test may have had the largest workspace that there is.
GROWTH = """
import torch
from fusedkv_ext import fused_kv_attn_with_kvcache
from fusedkv_ext.ops import native

def grown_by(tokens, heads, dim, sources):
    before = native.workspace_allocations()
    caches = [torch.zeros(1, tokens, heads, dim) for _ in range(sources)]
    length = torch.tensor([tokens], dtype=torch.int32)
    fused_kv_attn_with_kvcache(torch.zeros(1, 1, 4 * heads, dim), caches, caches, cache_seqlens=length)
    return native.workspace_allocations() - before

torch.set_num_threads(1)
small, large = (64, 1, 16, 1), (1100, 4, 64, 2)
print([grown_by(*size) > 0 for size in (small, small, large, large, small, large)])
"""


def test_a_workspace_grows_with_the_problem_and_stays() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "[True, False, True, False, False, False]", done.stdout + done.stderr
