#!/usr/bin/env python3
"""Executed instructions and modelled cycles of the decode kernel's parts, from its SASS: no GPU is needed.

    sass_cycles.py                                                  of this tree
    sass_cycles.py 23a7db4 now=. --page docs/performance.md         of several, into the tables of a page

A tree is a git revision or a folder with csrc/. Its attn_decode/mma_warp.cu is compiled for sm_90a with
bfloat16 and head dim 128. Warp 0 of block 0 then runs in sass_warp.py: 8 sequences, 8 KV heads, pages of 16
tokens. The block has one chunk of the first work unit, and finishes last, so that it merges. sass.py
has the model of time: modelled, not measured.

Needs nvcc and nvdisasm: on PATH, or named by NVCC and NVDISASM. `pip download nvidia-cuda-nvdisasm` has the
second.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from sass import Clock, Instruction, parse
from sass_warp import Warp

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "attn_decode_mma_warp_kernel"
SOURCE = "csrc/ops/attn_decode/mma_warp.cu"
# Where the kernel's namespace ends. The functions that return all instances follow.
NAMESPACE_END = "\n}  // namespace\n"
# The project's flags (CMakeLists.txt).
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-arch=sm_90a", "-lineinfo"]
# Of sm_90: where the parameters and the size of the grid are in constant bank 0.
PARAMETERS, GRID, BLOCK = 0x210, 0xC, 0x0
# The case (sass_cycles.cpp).
SEQUENCES, HEADS, STEPS, TILE_TOKENS = 8, 8, 5, 32
LENGTHS, TABLE, SCHEDULE, COUNTERS = 0x260000000, 0x270000000, 0x280000000, 0x290000000
LONG_WAIT = 150  # cycles; only loads of global memory and atomics take that long
BEGIN, END = "<!-- modelled cycles -->", "<!-- end of modelled cycles -->"

START, COPIES, FOLD = "start-up", "first copies and page lookups", "query fold"
STEP, STATES = "one step", "states to shared memory"
# Parts by a function in the chain of inlined calls. The rest goes by its place between copies and products.
FUNCTIONS = {
    "find_chunk": START,
    "next_chunk": START,
    "start_copies": COPIES,
    "fold_queries": FOLD,
    "merge_splits": "merge_splits",
    "merge_states": "merge_states",
    "finish_chunk": "arrival",
}
PARTS = [START, COPIES, FOLD, STEP, STATES, "merge_states", "arrival", "merge_splits"]


@dataclass
class Cost:
    """What a part costs one warp: instructions, cycles, and how often it waits for global memory."""

    instructions: int = 0
    cycles: int = 0
    waits: int = 0

    def add(self, waited: int, stall: int) -> None:
        self.instructions += 1
        self.cycles += waited + stall
        self.waits += waited >= LONG_WAIT

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.instructions + other.instructions, self.cycles + other.cycles, self.waits + other.waits
        )


class CannotModelError(Exception):
    """Something that is needed is missing; the message says what."""


# ---- compilation ---------------------------------------------------------------------------------


def tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit."""
    found = os.environ.get(name.upper()) or shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if not found:
        raise CannotModelError(f"{name} must be on PATH, got none; install it or set {name.upper()}=PATH")
    return found


def run(command: Sequence[str | Path]) -> str:
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except OSError as error:
        raise CannotModelError(f"{command[0]} must be a program: {error}") from error
    if done.returncode != 0:
        raise CannotModelError(f"{Path(command[0]).name} failed:\n{done.stderr or done.stdout}")
    return done.stdout


def copy_sources(tree: str, to: Path) -> None:
    """csrc/ of a folder or of a git revision."""
    if (Path(tree) / "csrc").is_dir():
        shutil.copytree(Path(tree) / "csrc", to / "csrc")
        return
    done = subprocess.run(["git", "-C", ROOT, "archive", tree, "csrc"], capture_output=True)
    if done.returncode != 0:
        raise CannotModelError(
            f"{tree} must be a folder with csrc/ or a git revision: {done.stderr.decode()}"
        )
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(to)


@dataclass
class Kernel:
    """One instance of the kernel, and the program that prints its parameters."""

    code: list[Instruction]
    labels: dict[str, int]
    functions: dict[str, list[str]]  # by file: the function of each line
    parameters: Path
    sources: int


def compile_kernel(folder: Path, sources: int) -> Kernel:
    """Compiles the instance with `sources` sources of keys and of values."""
    source = folder / SOURCE
    whole = source.read_text()
    kernel, end, _ = whole.rpartition(NAMESPACE_END)
    if not end or f" {KERNEL}(" not in kernel:
        raise CannotModelError(
            f"{SOURCE} must define {KERNEL}, got another file; adapt {Path(__file__).name}"
        )
    instance = f"{KERNEL}<MmaWarpKernel<bf16, 128, {sources}, {sources}>>"
    text = (
        f"{kernel}{end}\nAttnKernelFunction instance() {{ return {instance}; }}\n\n}}  // namespace fusedkv\n"
    )
    cubin = folder / f"{sources}.cubin"
    try:
        source.write_text(text)
        run([tool("nvcc"), *FLAGS, "-cubin", "-I", folder / "csrc", "-o", cubin, source])
    finally:
        source.write_text(whole)
    code, labels = parse(run([tool("nvdisasm"), "-c", "-gi", "-hex", cubin]), KERNEL)
    files = {name for instruction in code for name, _ in instruction.source}
    program = folder / "parameters"
    compiler = os.environ.get("CXX", "g++")
    run([compiler, "-std=c++20", "-I", folder / "csrc", ROOT / "scripts/sass_cycles.cpp", "-o", program])
    return Kernel(code, labels, {name: functions_of(Path(name)) for name in files}, program, sources)


def functions_of(path: Path) -> list[str]:
    """For each line of a source file, the function at namespace scope that it is in, or ""."""
    names, header, name = [""], "", ""
    for line in path.read_text().splitlines() if path.is_file() else []:
        if not header and not name and re.match(r"[A-Za-z_]", line) and not line.startswith("namespace"):
            header = " "
        if header:
            header += line
            if "{" in line or ";" in line:
                found = re.search(r"(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", header))
                one_line = line.rstrip().endswith((";", "}")) and not line.startswith(" ")
                name, header = ("" if one_line or found is None else found[1]), ""
        names.append(name)
        if line.startswith("}"):
            name = ""
    return names


# ---- one case ------------------------------------------------------------------------------------


def warp(kernel: Kernel, rows: int, splits: int) -> Warp:
    """Warp 0 of block 0, with its parameters and memory, for `rows` query rows and `splits` splits."""
    threads = int(run([kernel.parameters, str(kernel.sources), str(rows), "16"]).split()[0])
    # What a split costs: the tiles of STEPS steps of all warps, and one tile for its start.
    cost = splits * (-(-threads // 32 * 16 * STEPS // TILE_TOKENS) + 1)
    tokens = (cost - 1) * TILE_TOKENS
    words = run([kernel.parameters, str(kernel.sources), str(rows), str(tokens)]).split()[1:]
    constants = {PARAMETERS + 4 * i: int(word, 16) for i, word in enumerate(words)}
    constants |= {GRID: SEQUENCES * HEADS * splits, GRID + 4: 1, GRID + 8: 1}
    constants |= {BLOCK: threads, BLOCK + 4: 1, BLOCK + 8: 1}
    memory = {SCHEDULE + 4 * b: b * cost for b in range(SEQUENCES + 1)}
    memory |= {LENGTHS + 4 * b: tokens for b in range(SEQUENCES)}
    memory |= {TABLE + 4 * i: i for i in range(tokens // 16)}
    memory |= {COUNTERS + 4 * i: splits - 1 for i in range(4)}  # all other splits are finished
    return Warp(kernel.code, kernel.labels, constants, memory)


def parts(kernel: Kernel, trace: Iterable[tuple[Instruction, bool]]) -> dict[str, Cost]:
    """Costs of a piece by part. "step" is one step, neither the first nor the last ones."""
    clock = Clock()
    executed = [(code, *clock.issue(code, active)) for code, active in trace]
    products = [i for i, (code, *_) in enumerate(executed) if code.name == "HMMA"]
    copies = [i for i, (code, *_) in enumerate(executed) if code.name == "LDGSTS"]
    # A step lies between two executions of the same product.
    steps = [i for i in products if executed[i][0] is executed[products[0]][0]]
    if not copies or len(steps) < 4:
        raise CannotModelError(f"a warp must copy, and do at least four steps, got {len(steps)}; raise STEPS")
    costs = {name: Cost() for name in PARTS}
    for i, (code, waited, stall) in enumerate(executed):
        place = (copies[0] <= i) + (products[0] <= i) + (products[-1] < i)
        inlined = [FUNCTIONS[f] for f in chain(kernel, code) if f in FUNCTIONS]
        name = START if place == 0 else inlined[0] if inlined else [START, COPIES, STEP, STATES][place]
        if name != STEP:
            costs[name].add(waited, stall)
    for _, waited, stall in executed[steps[1] : steps[2]]:
        costs[STEP].add(waited, stall)
    return costs


def by_function(kernel: Kernel, trace: Iterable[tuple[Instruction, bool]]) -> dict[str, Cost]:
    """Costs of a whole piece, its steps included, by the outermost two functions that the kernel calls."""
    clock = Clock()
    costs: dict[str, Cost] = {}
    for code, active in trace:
        calls = [name for name in reversed(chain(kernel, code)) if name not in ("", KERNEL)]
        costs.setdefault("/".join(calls[:2]) or "the kernel itself", Cost()).add(*clock.issue(code, active))
    return costs


def chain(kernel: Kernel, code: Instruction) -> list[str]:
    """The functions that an instruction is in, from the innermost outwards."""
    return [kernel.functions[name][line] for name, line in code.source if line < len(kernel.functions[name])]


# ---- tables --------------------------------------------------------------------------------------


def measure(kernel: Kernel, rows: Sequence[int], splits: Sequence[int]) -> dict[str, Cost]:
    """Costs by the lines of a table."""
    table: dict[str, Cost] = {}
    for r in rows:
        for n in splits:
            costs = parts(kernel, warp(kernel, r, n).run())
            merged, states = costs.pop("merge_splits"), costs.pop("merge_states")
            step, fixed = costs[STEP], states
            for name, cost in costs.items():
                fixed = fixed if cost is step else fixed + cost
                table.setdefault(name, cost)
            table.setdefault(f"merge_states, R = {r}", states)
            table.setdefault(f"a piece without its steps, R = {r}", fixed)
            table.setdefault(f"merge_splits, R = {r}, {n} splits", merged)
    order = [*PARTS, "a piece"]
    return dict(
        sorted(table.items(), key=lambda item: next(i for i, x in enumerate(order) if item[0].startswith(x)))
    )


def markdown(columns: dict[str, dict[str, Cost]]) -> str:
    """A table with a row per part and two columns per tree."""
    names = list(columns)
    header = ["part", *(f"{name}: {what}" for name in names for what in ("instructions", "cycles (waits)"))]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for part in dict.fromkeys(part for column in columns.values() for part in column):
        costs = [columns[name].get(part, Cost()) for name in names]
        cells = [(f"{c.instructions:,}", f"{c.cycles:,} ({c.waits})") for c in costs]
        lines.append([part, *(cell for pair in cells for cell in pair)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(page: Path, text: str) -> None:
    """Replaces what stands between the two marks of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CannotModelError(f"{page} must contain {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "trees", nargs="*", metavar="[NAME=]TREE", help="git revision or folder; default: this tree"
    )
    parser.add_argument(
        "--sources", type=int, nargs="+", default=[2, 1], choices=[1, 2], help="of keys, of values"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 4, 8], help="query rows per KV head, up to 8"
    )
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[9, 17, 43], help="of a sequence and KV head"
    )
    parser.add_argument("--page", type=Path, help="write the tables into this page, between its marks")
    parser.add_argument(
        "--functions", action="store_true", help="by function instead, of the first rows and splits"
    )
    arguments = parser.parse_args()
    tables: dict[int, dict[str, dict[str, Cost]]] = {m: {} for m in arguments.sources}
    try:
        for given in arguments.trees or [f"this tree={ROOT}"]:
            name, _, tree = given.rpartition("=")
            with tempfile.TemporaryDirectory() as folder:
                copy_sources(tree, Path(folder))
                for m in arguments.sources:
                    kernel = compile_kernel(Path(folder), m)
                    if arguments.functions:
                        trace = warp(kernel, arguments.rows[0], arguments.splits[0]).run()
                        tables[m][name or tree] = by_function(kernel, trace)
                    else:
                        tables[m][name or tree] = measure(kernel, arguments.rows, arguments.splits)
    except (CannotModelError, NotImplementedError, RuntimeError) as error:
        print(f"sass_cycles: {error}", file=sys.stderr)
        return 1
    titles = {1: "One source (m = 1):", 2: "Two sources (m = 2):"}
    text = "\n\n".join(f"{titles[m]}\n\n{markdown(table)}" for m, table in tables.items())
    print(text)
    if arguments.page and not arguments.functions:
        write_page(arguments.page, f"\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
