"""scripts/sass_cycles.py: what machine code says, which instructions execute, and when they issue."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import sass
import sass_cycles
from sass import Clock, Control, Instruction
from sass_warp import MASK, Warp

SCRIPTS = Path(sass.__file__).parent


def instruction(
    text: str,
    stall: int = 1,
    write: int | None = None,
    read: int | None = None,
    wait: tuple[int, ...] = (),
    at: int = 0,
) -> Instruction:
    """One instruction from its SASS: `@P0 IADD3 R0, R1, R2, RZ`."""
    guard = ""
    if text.startswith("@"):
        guard, text = text[1:].split(" ", 1)
    opcode, _, operands = text.partition(" ")
    parts = tuple(x.strip() for x in operands.split(",")) if operands else ()
    return Instruction(at, guard, opcode, parts, Control(stall, write, read, wait), ())


def executed(
    listing: str, registers: dict[int, int] | None = None, most: int = 1000
) -> tuple[Warp, list[str]]:
    """Runs lines of SASS, with labels as `NAME:`. Returns the warp at its end and the opcodes it issued."""
    code, labels = [], {}
    for line in listing.strip().splitlines():
        line = line.strip()
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(code)
        else:
            code.append(instruction(line, at=16 * len(code)))
    code.append(instruction("EXIT", at=16 * len(code)))
    warp = Warp(code, labels, {}, {})
    for thread in warp.threads:
        thread.registers |= registers or {}
    return warp, [x.name for x, active in warp.run(most) if active]


# ---- the decoder


@pytest.mark.parametrize(
    "high, expected",
    [
        (0x000FE20000000800, Control(1, None, None, ())),  # LDC R1, c[0x0][0x28]
        (0x000E620000000300, Control(1, 1, None, ())),  # LDC R6, c[0x0][0xc]
        (0x000FC80000000000, Control(4, None, None, ())),  # IMAD.WIDE.U32
        (0x004FE20000011402, Control(1, None, None, (2,))),  # SHF, of what an LDG loads
        (0x0003E2000E901D4A, Control(1, None, 1, ())),  # LDGSTS
        (0x000E220000000000, Control(1, 0, None, ())),  # LDGDEPBAR
        (0x003FDE00078E00FF, Control(15, None, None, (0, 1))),
    ],
)
def test_scheduling_fields_are_decoded(high: int, expected: Control) -> None:
    assert sass.control(high) == expected


LISTING = """\
//--------------------- .text._Z5otherv --------------------------
_Z5otherv:
        /*0000*/                   EXIT ;                          /* 0x000000000000794d */
                                                                   /* 0x000fea0003800000 */
//--------------------- .text._Z4kernv --------------------------
	.section	.text._Z4kernv,"ax",@progbits
.text._Z4kernv:
	//## File "/x/a.cuh", line 7 inlined at "/x/k.cu", line 3
	//## File "/x/k.cu", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000fe20000000800 */
.L_x_0:
	//## File "/x/k.cu", line 4
        /*0010*/              @!P0 IADD3 R2, R1.reuse, 0x1, RZ ;   /* 0x0000000101020810 */
                                                                   /* 0x004fe20007ffe0ff */
        /*0020*/               @P1 BRA `(.L_x_0) ;                 /* 0xfffffffc00fc1947 */
                                                                   /* 0x000fea000383ffff */
"""


def test_instructions_labels_and_inlined_lines_are_read() -> None:
    code, labels = sass.parse(LISTING, "kern")
    assert [x.opcode for x in code] == ["LDC", "IADD3", "BRA"]
    assert labels[".L_x_0"] == 0x10 and [x.address for x in code] == [0, 0x10, 0x20]
    assert [x.guard for x in code] == ["", "!P0", "P1"]
    assert code[1].operands == ("R2", "R1", "0x1", "RZ") and code[1].control.wait == (2,)
    assert code[0].source == (("/x/a.cuh", 7), ("/x/k.cu", 3))
    # An instruction without lines of its own is on those of the one before.
    assert code[1].source == code[2].source == (("/x/k.cu", 4),)


@pytest.mark.parametrize("pattern, count", [("absent", 0), ("_Z", 2)])
def test_a_name_of_no_or_of_two_kernels_is_an_error(pattern: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count}"):
        sass.parse(LISTING, pattern)


def test_each_source_line_has_its_function(tmp_path: Path) -> None:
    path = tmp_path / "x.cuh"
    path.write_text(
        "namespace n {\n"
        "constexpr int kOne = one(1);\n"
        "template <typename T>\n"
        "__device__ int first(int a,\n"
        "                     int b) {\n"
        "  return a;\n"
        "}\n"
        "int outside;\n"
        "__global__ void __launch_bounds__(32, 1)\n"
        "    second(int a) {\n"
        "  first(a);\n"
        "}\n"
        "}  // namespace n\n"
    )
    names = sass_cycles.functions_of(path)
    assert [names[i] for i in (2, 6, 8, 11, 13)] == ["", "first", "", "second", ""]


# ---- time


def waits(*code: Instruction) -> tuple[list[int], int]:
    """Cycles that each instruction waits for scoreboards, and when the next could issue."""
    clock = Clock()
    return [clock.issue(x)[0] for x in code], clock.now


LOAD = sass.LATENCIES["LDG"]


def test_without_scoreboards_time_is_the_sum_of_stall_counts() -> None:
    assert waits(instruction("IADD3", stall=4), instruction("IMAD", stall=5), instruction("MOV")) == (
        [0] * 3,
        10,
    )


def test_loads_in_flight_together_are_waited_for_once() -> None:
    def load(board: int) -> Instruction:
        return instruction("LDG.E", stall=2, write=board)

    use = instruction("FADD", stall=4, wait=(0,))
    # The first issues at 0; its use waits until it has come.
    assert waits(load(0), use, load(0), use) == ([0, LOAD - 2, 0, LOAD - 2], 2 * (LOAD + 4))
    # The second comes 2 cycles after the first.
    assert waits(load(0), load(0), use) == ([0, 0, LOAD + 2 - 4], LOAD + 2 + 4)
    # Another scoreboard is another load's.
    assert waits(load(0), load(1), use) == ([0, 0, LOAD - 4], LOAD + 4)


def test_an_instruction_waits_until_a_store_has_read_the_register_that_it_overwrites() -> None:
    code = instruction("STG.E", read=3), instruction("MOV", wait=(3,))
    assert waits(*code) == ([0, sass.READ_LATENCY - 1], sass.READ_LATENCY + 1)


def test_of_two_groups_of_copies_only_the_older_one_is_waited_for() -> None:
    copy, commit = instruction("LDGSTS.E", stall=10), instruction("LDGDEPBAR", write=0)
    one, none = instruction("DEPBAR.LE SB0, 0x1"), instruction("DEPBAR.LE SB0, 0x0")
    # The groups are copied by LOAD and by LOAD + 11. The wait begins at 22.
    assert waits(copy, commit, copy, commit, one)[0][-1] == LOAD - 22
    assert waits(copy, commit, copy, commit, none)[0][-1] == LOAD + 11 - 22
    assert waits(copy, commit, one)[0][-1] == 0


def test_a_load_whose_guard_does_not_hold_takes_its_turn_only() -> None:
    clock = Clock()
    clock.issue(instruction("LDG.E", stall=2, write=0), active=False)
    assert clock.issue(instruction("FADD", wait=(0,))) == (0, 1)


# ---- execution


def test_both_sides_of_a_branch_execute_and_lanes_meet_again() -> None:
    warp, opcodes = executed("""
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x8, PT
        BSSY B0, `(end)
        @P0 BRA `(else)
        IADD3 R1, R0, 0x64, RZ
        BRA `(end)
        else:
        IMAD R1, R0, R0, RZ
        end:
        BSYNC B0
        VOTE.ANY R2, PT, PT
    """)
    assert [t.registers[1] for t in warp.threads] == [i + 100 if i < 8 else i * i for i in range(32)]
    # Together again: all lanes vote.
    assert [t.registers[2] for t in warp.threads] == [2**32 - 1] * 32
    assert Counter(opcodes) == Counter("S2R ISETP BSSY BRA BRA IADD3 IMAD BSYNC VOTE EXIT".split())


def test_a_loop_executes_as_often_as_its_slowest_lane() -> None:
    warp, opcodes = executed("""
        S2R R0, SR_LANEID
        MOV R1, RZ
        BSSY B0, `(end)
        again:
        VIADD R1, R1, 0x2
        ISETP.LT.AND P0, PT, R1, R0, PT
        @P0 BRA `(again)
        end:
        BSYNC B0
    """)
    assert opcodes.count("VIADD") == 16
    assert [t.registers[1] for t in warp.threads] == [max(2, i + i % 2) for i in range(32)]


def test_a_loop_that_does_not_end_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="has not ended"):
        executed("again:\nBRA `(again)")


def test_an_unknown_opcode_is_an_error_that_names_it() -> None:
    with pytest.raises(NotImplementedError, match=r"UTMALDG.2D at 0x0"):
        executed("UTMALDG.2D [UR8], [UR4]")


def test_shuffles_and_votes_see_the_other_lanes() -> None:
    warp, _ = executed("""
        S2R R0, SR_LANEID
        SHFL.BFLY PT, R1, R0, 0x4, 0x1f
        SHFL.IDX PT, R2, R0, 0x3, 0x1f
        SHFL.UP P1, R3, R0, 0x1, RZ
        ISETP.GT.AND P0, PT, R0, 0x1d, PT
        VOTE.ANY R4, P2, P0
        POPC R5, R4
    """)
    for i, t in enumerate(warp.threads):
        assert [t.registers[r] for r in (1, 2, 3, 4, 5)] == [i ^ 4, 3, max(i - 1, 0), 3 << 30, 2]
        assert (t.predicate("P1"), t.predicate("P2")) == (i > 0, True)


# What nvcc 13.0 makes of a / b for uint32_t.
DIVISION = """
    I2F.U32.RP R4, R6
    ISETP.NE.U32.AND P2, PT, R6, RZ, PT
    MUFU.RCP R4, R4
    IADD3 R2, R4, 0xffffffe, RZ
    F2I.FTZ.U32.TRUNC.NTZ R3, R2
    IMAD.MOV.U32 R2, RZ, RZ, RZ
    IMAD.MOV R5, RZ, RZ, -R3
    IMAD R5, R5, R6, RZ
    IMAD.HI.U32 R3, R3, R5, R2
    IMAD.HI.U32 R2, R3, R36, RZ
    IMAD.MOV R3, RZ, RZ, -R2
    IMAD R3, R6, R3, R36
    ISETP.GE.U32.AND P0, PT, R3, R6, PT
    @P0 IADD3 R3, R3, -R6, RZ
    @P0 VIADD R2, R2, 0x1
    ISETP.GE.U32.AND P1, PT, R3, R6, PT
    @P1 VIADD R2, R2, 0x1
    @!P2 LOP3.LUT R2, RZ, R6, RZ, 0x33, !PT
"""


def test_the_compilers_division_divides() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        a, b = numbers.getrandbits(32), max(numbers.getrandbits(numbers.randrange(1, 33)), 1)
        warp, _ = executed(DIVISION, {36: a, 6: b})
        assert warp.threads[0].registers[2] == a // b, (a, b)


def test_64_bit_arithmetic_has_carries() -> None:
    numbers = random.Random(1)
    for _ in range(50):
        a, b = (numbers.getrandbits(numbers.choice([31, 33, 64])) for _ in range(2))
        warp, _ = executed(
            """
            IADD3 R4, P0, R0, R2, RZ
            IADD3.X R5, R1, R3, RZ, P0, !PT
            IADD3 R6, P0, R0, -R2, RZ
            IADD3.X R7, R1, ~R3, RZ, P0, !PT
            IMAD.WIDE.U32 R8, R0, R2, R4
            LEA R10, P1, R0, R2, 0x2
            LEA.HI.X R11, R0, R3, R1, 0x2, P1
            SHF.R.S64 R12, R0, 0x5, R1
            SHF.R.S32.HI R13, RZ, 0x5, R1
            ISETP.GE.U32.AND P2, PT, R0, R2, PT
            ISETP.GE.AND.EX P2, PT, R1, R3, PT, P2
            SEL R14, 0x1, RZ, P2
            """,
            {0: a & MASK, 1: a >> 32, 2: b & MASK, 3: b >> 32},
        )
        t = warp.threads[0]
        whole = (1 << 64) - 1

        def as_signed(x: int) -> int:
            return x - (1 << 64) if x >> 63 else x

        assert t.pair("R4") == a + b & whole
        assert t.pair("R6") == a - b & whole
        assert t.pair("R8") == (a & MASK) * (b & MASK) + (a + b & whole) & whole
        assert t.pair("R10") == (a << 2) + b & whole
        assert t.pair("R12") == as_signed(a) >> 5 & whole
        assert t.registers[14] == (as_signed(a) >= as_signed(b))


# ---- the whole


COST = sass_cycles.Cost(1234, 5678, 2)


def test_only_what_is_between_the_marks_of_a_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sass_cycles.BEGIN}\nold\n{sass_cycles.END}\nafter\n")
    sass_cycles.write_page(page, sass_cycles.markdown({"a": {"x": COST}, "b": {"x": COST}}))
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| x | 1,234 | 5,678 (2) | 1,234 | 5,678 (2) |" in lines
    page.write_text("no marks")
    with pytest.raises(sass_cycles.CannotModelError, match="must contain"):
        sass_cycles.write_page(page, "text")


def test_the_documentation_says_that_cycles_are_modelled() -> None:
    text = (SCRIPTS.parent / "docs" / "performance.md").read_text()
    before, begin, rest = text.partition(sass_cycles.BEGIN)
    table, end, _ = rest.partition(sass_cycles.END)
    assert begin and end and "Modelled, not measured" in before[before.rindex("\n### ") :]
    assert all(f"| {part}" in table for part in sass_cycles.PARTS)


def test_a_missing_tool_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "sass_cycles.py"), str(SCRIPTS.parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": str(tmp_path), "NVCC": "/no/nvcc"}
    )
    assert done.returncode == 1 and "/no/nvcc" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> sass_cycles.Kernel:
    for name in ("nvcc", "nvdisasm"):
        try:
            sass_cycles.tool(name)
        except sass_cycles.CannotModelError as error:
            pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("sass")
    sass_cycles.copy_sources(str(SCRIPTS.parent), folder)
    return sass_cycles.compile_kernel(folder, sources=2)


def test_a_warp_multiplies_as_often_as_its_tokens_need(kernel: sass_cycles.Kernel) -> None:
    """16 tokens of 2 sources with 128 channels: 16 products of 16 x 8 x 16 for scores, 16 for the output."""
    counts = Counter(code.name for code, active in sass_cycles.warp(kernel, rows=4, splits=2).run() if active)
    assert counts["HMMA"] == sass_cycles.STEPS * 32
    assert counts["LDSM"] == sass_cycles.STEPS * 32
    assert counts["ATOMG"] == 1  # this block asks whether it is the last one


def test_parts_grow_with_what_they_depend_on(kernel: sass_cycles.Kernel) -> None:
    few, many = (sass_cycles.measure(kernel, [rows], [splits]) for rows, splits in ((1, 2), (8, 40)))
    assert many["merge_states, R = 8"].cycles > few["merge_states, R = 1"].cycles
    assert many["merge_splits, R = 8, 40 splits"].cycles > 2 * few["merge_splits, R = 1, 2 splits"].cycles
    assert many["one step"] == few["one step"]
    fold = few["query fold"]
    # All loads of the queries and of the weights are in flight together.
    assert fold.instructions > 100 and fold.waits <= 2


def test_costs_by_function_add_up_to_the_whole(kernel: sass_cycles.Kernel) -> None:
    trace = list(sass_cycles.warp(kernel, rows=1, splits=2).run())
    clock = Clock()
    for code, active in trace:
        clock.issue(code, active)
    costs = sass_cycles.by_function(kernel, trace)
    assert sum(cost.instructions for cost in costs.values()) == len(trace)
    assert sum(cost.cycles for cost in costs.values()) == clock.now
    assert any(name.startswith("run_steps/fold_queries") for name in costs)
