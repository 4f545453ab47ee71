"""Tests of the host executor of the CUDA kernels.

Single instructions are compared with the formulas of the PTX ISA. Kernels with a planted fault must be
caught.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LANES = range(32)


@pytest.fixture(params=[1, 2, 3], autouse=True)
def seed(request: pytest.FixtureRequest, simt: object) -> int:
    simt.configure(request.param)
    return request.param


def run(kernel: str, a: Tensor, b: Tensor | None = None, out: int = 0, fault: bool = False) -> Tensor:
    """`a` and `b` of 4-byte elements; `out` int32 elements come back, `a`'s number if not said."""
    result = torch.full((out or a.numel(),), -1, dtype=torch.int32)
    b = torch.zeros(1, dtype=torch.int32) if b is None else b
    torch.ops.fusedkv_simt.selftest(kernel, fault, a.contiguous(), b.contiguous(), result)
    return result


def bits16(x: Tensor) -> Tensor:
    """The 16-bit patterns of a bfloat16, float16 or int16 tensor, as int64."""
    return x.contiguous().view(torch.int16).long() & 0xFFFF


def packed(low: Tensor, high: Tensor) -> Tensor:
    """32-bit registers from two tensors of 16-bit patterns."""
    return (low | high << 16).to(torch.int32)


# ---- single instructions -----------------------------------------------------------------------------------

# "Matrix fragments for mma.m16n8k16" of the PTX ISA: (lane, register, half) -> (row, column).


def mma_a(lane: int, register: int, half: int) -> tuple[int, int]:
    i = 2 * register + half  # a0 .. a7
    row = lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8)
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def mma_b(lane: int, register: int, half: int) -> tuple[int, int]:
    i = 2 * register + half  # b0 .. b3
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def mma_c(lane: int, register: int) -> tuple[int, int]:
    return lane // 4 + (0 if register < 2 else 8), lane % 4 * 2 + (register & 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_has_the_layouts_of_the_ptx_isa(dtype: torch.dtype) -> None:
    # Small integers: all sums are exact.
    a, b = (torch.randint(-8, 9, shape).to(dtype) for shape in ((16, 16), (16, 8)))
    registers = []
    for x, place, count in ((a, mma_a, 4), (b, mma_b, 2)):
        halves = [
            torch.tensor([[int(bits16(x)[place(lane, r, h)]) for r in range(count)] for lane in LANES])
            for h in (0, 1)
        ]
        registers.append(packed(*halves))
    out = run("mma_bf16" if dtype == torch.bfloat16 else "mma_f16", *registers).view(torch.float32)
    expected = 2 * (a.float() @ b.float())
    for lane in LANES:
        for r in range(4):
            assert out[4 * lane + r] == expected[mma_c(lane, r)], (lane, r)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_has_the_layouts_of_the_ptx_isa(trans: bool) -> None:
    memory = torch.randint(0, 1 << 16, (32, 8))  # 32 rows of 8 elements
    rows = torch.randperm(32)  # lane i names row rows[i], for row i % 8 of matrix i // 8
    words = packed(memory[:, 0::2], memory[:, 1::2])
    out = run("ldmatrix_trans" if trans else "ldmatrix", words.flatten(), rows.to(torch.int32))
    for lane in LANES:
        for r in range(4):
            matrix = memory[rows[8 * r : 8 * r + 8]]
            matrix = matrix.T if trans else matrix
            row, column = lane // 4, lane % 4 * 2
            assert out[4 * lane + r] == packed(matrix[row, column], matrix[row, column + 1]), (lane, r)


def test_movmatrix_transposes_what_ldmatrix_gives() -> None:
    matrix = torch.randint(0, 1 << 16, (8, 8))

    def held(x: Tensor) -> Tensor:
        return packed(x[:, 0::2], x[:, 1::2]).flatten()  # lane 4 row + column / 2

    assert torch.equal(run("movmatrix", held(matrix)), held(matrix.T))


def test_shuffles_and_votes() -> None:
    x = torch.randint(-(1 << 31), 1 << 31, (32,)).to(torch.int32)
    out = run("shuffles", x, out=256).view(32, 8)
    values = [int(v) for v in x]

    def group(lane: int) -> list[int]:
        return [v for i, v in enumerate(values) if (i % 3 == 0) == (lane % 3 == 0)]

    odd = sum((v & 1) << i for i, v in enumerate(values))
    for lane in LANES:
        other = values[lane ^ 1]
        expected = [
            values[(lane * 7 + 3) % 32],
            values[lane // 8 * 8 + 5],
            values[lane ^ 9],
            values[lane + 3 if lane % 16 + 3 < 16 else lane],
            values[lane - 3 if lane >= 3 else lane],
            odd,
            any(v & 2 for v in group(lane)) | all(v & 4 for v in group(lane)) << 1,
            other ^ (lane ^ 1),
        ]
        assert [int(v) & 0xFFFFFFFF for v in out[lane]] == [int(v) & 0xFFFFFFFF for v in expected], lane


def test_conversions_round_like_torch(seed: int) -> None:
    # All exponents, with mantissas around every rounding border, and all 16-bit patterns in the low half.
    borders = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x18000, 0x7FFFFF]
    special = [s << 31 | e << 23 | m for s in (0, 1) for e in range(256) for m in borders]
    every = torch.randint(0, 1 << 16, (1 << 16,)) << 16 | torch.arange(1 << 16)
    bits = torch.cat([torch.tensor(special), every])
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    out = run("conversions", bits, out=2 * bits.numel())
    narrow, widened = out[: bits.numel()], out[bits.numel() :].view(torch.float32)
    for got, dtype in ((narrow & 0xFFFF, torch.bfloat16), (narrow >> 16 & 0xFFFF, torch.float16)):
        expected = bits.view(torch.float32).to(dtype)
        number = ~expected.isnan()
        assert torch.equal(got.long()[number], bits16(expected)[number])
        assert (got[~number] == 0x7FFF).all()
    expected = (bits & 0xFFFF).to(torch.int16).view(torch.float16).float()
    torch.testing.assert_close(widened, expected, rtol=0, atol=0, equal_nan=True)


# ---- planted faults ----------------------------------------------------------------------------------------

# Faults that end the launch with an error.
ERRORS = {
    "shared_out_of_bounds": r"selftest\.cu:\d+: store of 4 bytes of shared.* at offset 512.*out of bounds",
    "shared_not_aligned": r"selftest\.cu:\d+: store of 4 bytes of shared memory.*not aligned",
    "global_load_out_of_bounds": r"load of 4 bytes of global memory.*out of bounds.*byte -4 of 'a'",
    "global_store_out_of_bounds": r"store of 4 bytes of global memory.*out of bounds.*byte 512 of 'out'",
    "global_not_aligned": r"load of 16 bytes of global memory.*not aligned",
    "divergent_syncthreads": r"divergent __syncthreads",
    "skipped_syncthreads": r"deadlock.*__syncthreads.*exited",
    "exited_lane_in_mask": r"__shfl_sync.*0x00000100 have exited|deadlock.*__shfl_sync.*lanes 0x00000100",
    "lane_that_does_not_come": r"deadlock.*lanes 0x00000100 of warp 1 have not come|divergent __sync",
    "divergent_collective": r"deadlock.*__shfl_xor_sync.*selftest\.cu.*__shfl_xor_sync.*selftest\.cu",
    "missing_wait": r"selftest\.cu:\d+: cp.async to shared memory that an earlier cp.async may still write",
    "missing_commit": r"cp.async to shared memory that an earlier cp.async may still write",
    "shuffle_from_outside_the_mask": r"reads lane \d+, which is not in the shuffle's mask",
}
# Faults that show as a wrong result.
WRONG_RESULTS = [
    "missing_syncthreads",
    "missing_syncwarp",
    "missing_second_barrier",
    "short_wait",
    "stage_overwritten_in_use",
]


def numbers() -> Tensor:
    return torch.randint(0, 1 << 30, (2048,), dtype=torch.int32)


def input_of(kernel: str) -> Tensor:
    in_ring = kernel in ("missing_wait", "short_wait", "missing_commit", "stage_overwritten_in_use")
    return numbers() if in_ring else numbers()[:128]


@pytest.mark.parametrize("kernel", [*ERRORS, *WRONG_RESULTS])
def test_kernels_without_the_fault_pass(kernel: str) -> None:
    a = input_of(kernel)
    assert torch.equal(run(kernel, a), a.flip(0))


@pytest.mark.parametrize("kernel", ERRORS)
def test_faults_that_are_errors(kernel: str) -> None:
    a = input_of(kernel)
    with pytest.raises(RuntimeError, match=ERRORS[kernel]):
        run(kernel, a, fault=True)
    assert torch.equal(run(kernel, a), a.flip(0)), "the launch after a failed one"


@pytest.mark.parametrize("kernel", WRONG_RESULTS)
def test_faults_that_give_wrong_results(kernel: str) -> None:
    a = input_of(kernel)
    wrong = run(kernel, a, fault=True) != a.flip(0)
    assert wrong.any()


def test_the_seed_decides(seed: int, simt: object) -> None:
    a = input_of("missing_syncthreads")

    def result(seed: int) -> Tensor:
        simt.configure(seed)
        return run("missing_syncthreads", a, fault=True)

    assert torch.equal(result(seed), result(seed))
    assert not torch.equal(result(seed), result(seed + 1))


def test_launches_want_no_more_shared_memory_than_there_is(simt: object) -> None:
    a = input_of("missing_syncthreads")
    simt.configure(shared_per_block=511)
    with pytest.raises(RuntimeError, match="512 bytes of shared memory of 511"):
        run("missing_syncthreads", a)
    simt.configure(shared_per_block=512)
    run("missing_syncthreads", a)


def test_every_instruction_has_a_host_twin() -> None:
    function = re.compile(r"^(?:__device__ __forceinline__|inline) [\w ]+\b(\w+)\(", re.MULTILINE)
    names = [
        set(function.findall((CSRC / path).read_text().split("namespace fusedkv::ptx {")[1]))
        for path in ("cuda/ptx.cuh", "simt/ptx.h")
    ]
    assert names[0] and names[0] == names[1]
