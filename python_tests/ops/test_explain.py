"""explain: the path that a call takes, on both sides of the crossover, and what it moves at least."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import torch
from cases import Case, cache_inputs, dense_inputs, named
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import dispatch, native

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "ops"
NATIVE = ("attn_with_kvcache", "fuse_kv", "fuse_kv_pair", "fuse_kvcache")


class Spy:
    """torch.ops.fusedkv, with the names of the operations that are called on some tokens."""

    def __init__(self) -> None:
        self.ops, self.calls = native._ops, []

    def __getattr__(self, name: str) -> object:
        def call(*args: object) -> object:
            if not (isinstance(args[0], Tensor) and args[0].numel() == 0):  # prefill checks on no rows
                self.calls.append(name)
            return getattr(self.ops, name).default(*args)

        return type("Packet", (), {"default": staticmethod(call)})


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    spy = Spy()
    monkeypatch.setattr(native, "_ops", spy)
    return spy.calls


def dense_ops(path: str, case: Case) -> set[str]:
    if path == "fold":
        return {"attn_with_kvcache"}
    sides = [m > 1 or case.weights != "none" for m in (case.m_k, case.m_v)]
    return {"fuse_kv_pair"} if all(sides) else {"fuse_kv"} if any(sides) else set()


DENSE_CASES = {
    "fold": [
        Case("one_row", S=1, T=40),
        Case("32_rows", S=16, T=40),
        Case("more_rows_than_keys", S=16, T=5),
        Case("not_causal", S=16, T=16, causal=False),
    ],
    "fuse-once": [
        Case("34_rows", S=17, T=40),
        Case("values_alone", S=17, T=40, m_k=1, weights="none"),
        Case("nothing_to_fuse", S=17, T=40, m_k=1, m_v=1, weights="none"),
        Case("float64", S=1, T=40, dtype=torch.float64),
        Case("rows_before_the_first_token_that_see", S=16, T=5, causal=False),
    ],
}


@pytest.mark.parametrize(**named([case for cases in DENSE_CASES.values() for case in cases]))
def test_path_of_fused_kv_attn_func_is_what_runs(case: Case, called: list[str]) -> None:
    args = dense_inputs(case, CPU)
    said = fkv.explain(*args, causal=case.causal)
    assert case in DENSE_CASES[said.path]
    fkv.fused_kv_attn_func(*args, causal=case.causal)
    assert set(called) == dense_ops(said.path, case)
    assert said.rows == case.S * case.H // case.G


def test_gradients_take_the_dense_path(called: list[str]) -> None:
    q, *rest = dense_inputs(Case("grad", S=1, T=9), CPU)
    said = fkv.explain(q.requires_grad_(), *rest)
    assert said.path == "fuse-once" and "requires grad" in said.reason
    fkv.fused_kv_attn_func(q, *rest)
    assert called == ["fuse_kv_pair"]
    with torch.no_grad():
        assert fkv.explain(q, *rest).path == "fold"


def test_document_ids_take_the_dense_path(called: list[str]) -> None:
    args = dense_inputs(Case("packed", S=1, T=9), CPU)
    ids = torch.zeros(2, 9, dtype=torch.int32)
    said = fkv.explain(*args, document_ids=ids)
    assert said.path == "fuse-once" and "document_ids" in said.reason
    fkv.fused_kv_attn_func(*args, causal=True, document_ids=ids)
    assert called == ["fuse_kv_pair"]


def test_causal_is_by_default_that_of_the_call_explained() -> None:
    """False for fused_kv_attn_func, True for fused_kv_attn_with_kvcache."""
    args = dense_inputs(Case("default", S=7, T=19), CPU)
    lengths = torch.full((2,), 19, dtype=torch.int32)
    for state, causal in (({}, False), ({"cache_seqlens": lengths}, True)):
        said = fkv.explain(*args, **state)
        assert said == fkv.explain(*args, **state, causal=causal)
        assert said.flops != fkv.explain(*args, **state, causal=not causal).flops
    functions = (fkv.fused_kv_attn_func, fkv.fused_kv_attn_with_kvcache)
    assert [inspect.signature(f).parameters["causal"].default for f in functions] == [False, True]


CACHE_CASES = [
    Case("one_row", S=1, T=40),
    Case("32_rows_paged", S=16, T=40, page_size=4, lengths=(40, 3)),
    Case("34_rows", S=17, T=40),
    Case("34_rows_paged", S=17, T=40, page_size=4, lengths=(40, 3)),
    Case("34_rows_paged_one_source", S=17, T=40, page_size=4, m_k=1, m_v=1, weights="none"),
    Case("34_rows_one_source", S=17, T=40, m_k=1, m_v=1, weights="none"),
]


@pytest.mark.parametrize(**named(CACHE_CASES))
@pytest.mark.parametrize("return_lse", [False, True])
def test_path_of_fused_kv_attn_with_kvcache_is_what_runs(
    case: Case, return_lse: bool, called: list[str]
) -> None:
    args, state = cache_inputs(case, CPU)
    said = fkv.explain(*args, **state, return_lse=return_lse)
    assert said.path == ("fold" if case.S <= 16 or return_lse else "fuse-once")
    fkv.fused_kv_attn_with_kvcache(*args, **state, return_lse=return_lse)
    expected = {"fuse_kvcache"} if case.page_size else {"fuse_kv"} if case.weights != "none" else set()
    if said.path == "fold":
        expected = {"attn_with_kvcache"}
    assert set(called) == expected
    assert said.path == "fold" or said.kernel.startswith("torch SDPA")
    assert all(name in said.kernel for name in expected - {"attn_with_kvcache"})


@pytest.mark.parametrize(
    ("dtype", "sources", "dim", "most"),
    [
        (BF16, 1, 128, 512),
        (BF16, 2, 128, 512),
        (torch.float16, 2, 72, 512),
        (BF16, 1, 256, 512),
        (BF16, 2, 256, 32),
        (BF16, 3, 128, 32),
        (torch.float32, 2, 128, 32),
    ],
)
def test_cuda_folds_more_rows_where_tensor_cores_do(
    dtype: torch.dtype, sources: int, dim: int, most: int
) -> None:
    assert dispatch.decode_max_rows("cuda", dtype, sources, dim) == most
    assert dispatch.decode_max_rows("cpu", dtype, sources, dim) == 32
    keys = [torch.empty(1, 4096, 1, dim, dtype=dtype, device="meta")] * sources
    for rows, path in ((most, "fold"), (most + 1, "fuse-once")):
        q = torch.empty(1, rows, 1, dim, dtype=dtype, device="meta")
        said = fkv.explain(q, keys, keys, device="cuda")
        assert said.path == path and f"{rows} query rows" in said.reason and f" {most} for " in said.reason


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """explain() then speaks of an H100, wherever the test runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def paged_call(steps: int = 1) -> tuple[tuple, dict[str, Tensor]]:
    """Two bfloat16 sources of 8 KV heads of 128 in pages of 16, four query heads each, three sequences."""
    q = torch.empty(3, steps, 32, 128, dtype=BF16, device="meta")
    pools = [torch.empty(900, 16, 8, 128, dtype=BF16, device="meta") for _ in range(4)]
    weights = [torch.empty(2, 8, 128, device="meta") for _ in range(2)]
    state = {
        "cache_seqlens": torch.tensor([4641, 1730, 0], dtype=torch.int32),
        "block_table": torch.empty(3, 300, dtype=torch.int32, device="meta"),
    }
    return (q, pools[:2], pools[2:], *weights), state


def test_bytes_and_flops_of_a_decode_step_by_hand() -> None:
    args, state = paged_call()
    said = fkv.explain(*args, **state, device="cpu", bandwidth=20e9)
    tokens = 4641 + 1730
    kv = tokens * 8 * 128 * 4 * 2  # heads, channels, two keys and two values, bytes
    q_and_out, lse = 2 * (3 * 32 * 128 * 2), 3 * 32 * 4
    weights, tables = 2 * (2 * 8 * 128 * 4), 4 * (3 + 291 + 109)  # lengths; ceil(4641 / 16), ceil(1730 / 16)
    assert said.bytes == kv + q_and_out + lse + weights + tables
    assert said.flops == 2 * tokens * 32 * 4 * 128  # each query head: two keys, two values
    assert said.roof_us == pytest.approx(said.bytes / 20e3)
    assert said.splits == 10 and said.blocks is None  # ceil(4641 / 512)
    assert said.kernel == f"attn_decode/cpu.cpp, SIMD target {native.cpu_level()}"


def test_bytes_and_flops_of_a_prefill_by_hand() -> None:
    args, state = paged_call(steps=100)
    said = fkv.explain(*args, **state, device="cpu")
    tokens = 4641 + 1730
    kv = 2 * tokens * 8 * 128 * 2 * 4  # keys and values: two read, one written, one read by attention
    assert said.bytes == kv + 2 * (3 * 100 * 32 * 128 * 2) + 2 * (2 * 8 * 128 * 4) + 4 * (3 + 291 + 109)
    scores = sum(sum(range(length - 99, length + 1)) for length in (4641, 1730))
    assert said.flops == 2 * scores * 32 * 2 * 128 + 2 * (3 * tokens * 8 * 128)
    assert (said.path, said.splits, said.roof_us) == ("fuse-once", None, None)


def test_a_window_moves_only_what_is_seen() -> None:
    args, state = paged_call()
    said = fkv.explain(*args, **state, device="cpu", window_size=(1023, -1))
    whole = fkv.explain(*args, **state, device="cpu")
    unseen = (4641 - 1024) + (1730 - 1024)
    pages = (4641 - 1024) // 16 + (1730 - 1024) // 16
    assert whole.bytes - said.bytes == unseen * 8 * 128 * 4 * 2 + 4 * pages
    assert said.flops == 2 * 2 * 1024 * 32 * 4 * 128
    assert said.splits == 3  # tokens 3617 .. 4640 on a grid of 512


def test_scores_of_masks_are_counted_row_by_row() -> None:
    for case in (
        Case("causal", S=7, T=19),
        Case("not_causal", S=7, T=19, causal=False),
        Case("window", S=19, T=19, window=(4, 2), causal=False),
        Case("more_rows_than_keys", S=9, T=4, window=(3, 1), causal=False),
    ):
        q, keys, values, _, _ = dense_inputs(dataclasses.replace(case, m_k=1, m_v=1, B=1, H=1, G=1), CPU)
        said = fkv.explain(q, keys, values, causal=case.causal, window_size=case.window)
        left, right = (case.window[0], 0) if case.causal else case.window
        seen = sum(
            (left < 0 or t >= p - left) and (right < 0 or t <= p + right)
            for p in range(case.T - case.S, case.T)
            for t in range(case.T)
        )
        assert said.flops == 2 * seen * 2 * case.D, case


def test_lengths_on_meta_count_as_full() -> None:
    args, state = paged_call()
    full = torch.full((3,), 4800, dtype=torch.int32)
    on_meta = {**state, "cache_seqlens": state["cache_seqlens"].to("meta")}
    said = fkv.explain(*args, **on_meta, device="cpu")
    assert said == fkv.explain(*args, **{**state, "cache_seqlens": full}, device="cpu")


def test_cuda_launch_is_that_of_the_whole_batch(no_gpu: None) -> None:
    args, state = paged_call()
    said = fkv.explain(*args, **state, device="cuda", bandwidth=3.35e12, sm_count=132)
    costs = [math.ceil(4641 / 32) + 1, math.ceil(1730 / 32) + 1, 2]  # an empty sequence is a cell of zeros
    assert said.blocks == 132  # one per SM, with six warps
    assert said.splits == math.ceil(costs[0] / math.ceil(8 * sum(costs) / said.blocks))
    assert said.kernel == "attn_decode/mma_warp.cu, 8 rows"


@pytest.mark.parametrize(
    ("heads", "sources", "kernel"),
    [
        (8, 1, "mma_warp.cu, 8 rows"),
        (128, 2, "mma_block.cu, 16 rows"),
        (1024, 2, "mma_block.cu, 64 rows"),
        (8, 3, "fallback.cu, 4 rows"),
    ],
)
def test_cuda_kernel_follows_rows_and_sources(heads: int, sources: int, kernel: str, no_gpu: None) -> None:
    q = torch.empty(1, 1, heads, 128, dtype=BF16, device="meta")
    caches = [torch.empty(1, 4096, 8, 128, dtype=BF16, device="meta")] * sources
    lengths = torch.tensor([4096], dtype=torch.int32)
    said = fkv.explain(q, caches, caches, cache_seqlens=lengths, device="cuda")
    assert said.kernel == f"attn_decode/{kernel}"
    assert (SOURCES / said.kernel.split(",")[0]).is_file()


def test_batch_invariant_calls_fold_with_fixed_splits(no_gpu: None, called: list[str]) -> None:
    args, state = paged_call(steps=200)
    said = fkv.explain(*args, **state, device="cuda", batch_invariant=True)
    assert (said.path, said.splits) == (
        "fold",
        5,
    ) and "is batch-invariant" in said.reason  # ceil(4641 / 1024)
    args, state = cache_inputs(CACHE_CASES[2], CPU)
    assert fkv.explain(*args, **state, batch_invariant=True).path == "fold"
    fkv.fused_kv_attn_with_kvcache(*args, **state, batch_invariant=True)
    assert called == ["attn_with_kvcache"]


def test_it_prints_aligned_lines(no_gpu: None) -> None:
    args, state = paged_call()
    for device, blocks in (("cpu", False), ("cuda", True)):
        lines = str(fkv.explain(*args, **state, device=device)).splitlines()
        names = [
            "path",
            "kernel",
            "rows",
            "splits",
            *["blocks", "memory"] * blocks,
            "bytes",
            "flops",
            "roof",
            "reason",
        ]
        assert [line.split()[0] for line in lines] == names
        assert all(line[6:8] == "  " and line[8] != " " for line in lines)
        assert lines[-2] == "roof    give bandwidth="


def test_an_explanation_is_frozen() -> None:
    said = fkv.explain(*dense_inputs(Case("frozen"), CPU))
    assert isinstance(said, fkv.Explanation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        said.path = "fold"


ERRORS = [
    (dict(device="mps"), ValueError, "device must be cpu or cuda, got mps"),
    (dict(device=None), ValueError, "q must be on cpu or cuda, got meta"),
    (dict(bandwidth=0), ValueError, "bandwidth must be bytes per second > 0, or None, got 0"),
    (dict(cache_seqlens=None), ValueError, "block_table must be passed with cache_seqlens"),
    (
        dict(cache_seqlens=torch.ones(2)),
        ValueError,
        r"cache_seqlens must have shape \(B,\) = \(3,\), got \(2,\)",
    ),
    (
        dict(cache_seqlens=torch.tensor([1, 4801, 0])),
        ValueError,
        r"cache_seqlens\[1\] must be from 0 to 4800, the tokens of the cache, got 4801",
    ),
    (dict(document_ids=torch.zeros(3, 9)), ValueError, "document_ids must not be passed with cache_seqlens"),
    (dict(window_size=4), TypeError, "window_size must be two ints .* got 4"),
    (dict(q=torch.empty(3, 32, 128)), ValueError, r"q must have 4 dims \(B, S, H, D\), got \(3, 32, 128\)"),
    (
        dict(q=torch.empty(3, 1, 32, 64, dtype=BF16)),
        ValueError,
        r"keys\[0\] must be \(B, T, G, D\) with B = ",
    ),
    (
        dict(q=torch.empty(3, 1, 30, 128, dtype=BF16)),
        ValueError,
        "q must have a multiple of keys.0.'s 8 heads, got 30",
    ),
    (dict(q=torch.empty(3, 1, 32, 128)), TypeError, "must be float32 as q, got bfloat16"),
    (dict(q=3), TypeError, "q must be .* got int"),
    (dict(keys=[]), ValueError, "keys must hold 1 to 32 tensors, got 0"),
    (dict(key_weights=torch.ones(3, 1, 1)), ValueError, "key_weights must be broadcastable to "),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS)
def test_errors_name_the_argument(changes: dict, kind: type[Exception], message: str) -> None:
    args, state = paged_call()
    names = ("q", "keys", "values", "key_weights", "value_weights")
    call = {**dict(zip(names, args, strict=True)), **state, "device": "cpu", **changes}
    with pytest.raises(kind, match=message):
        fkv.explain(**call)
