#!/usr/bin/env python3
"""Registers, spills and shared memory of every CUDA kernel, as ptxas reported them when it was compiled; and
the dynamic shared memory of the decode kernels, as their launcher asks for it.

    ptxas_report.py compile nvcc ...     compiler launcher (CMAKE_CUDA_COMPILER_LAUNCHER): runs nvcc with
                                         -Xptxas -v and keeps what ptxas says in OBJECT.ptxas
    ptxas_report.py report BUILD_DIR     prints the table and writes BUILD_DIR/ptxas.json

The log lies beside its object, so that a build in which nothing is compiled again still has a full report.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:.*?, (\d+) bytes smem)?")
TEMPLATE = re.compile(r"(\w+Kernel)<\w+, ([\d, ]+)>")
# What ptxas -v prints: for the log, not for the terminal.
VERBOSE = re.compile(r"^ptxas info\s*:|^\s+\d+ bytes stack frame")


def compile_with_log(command: list[str]) -> int:
    """Runs a compiler; if that makes an object, its ptxas output and time go to OBJECT.ptxas."""
    if "-c" not in command or "-o" not in command:
        return subprocess.run(command).returncode
    log = Path(command[command.index("-o") + 1] + ".ptxas")
    log.unlink(missing_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        [*command, "-Xptxas=-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    seconds = time.monotonic() - began
    for line in done.stdout.splitlines():
        if not VERBOSE.match(line):
            print(line)
    if done.returncode == 0:
        log.write_text(f"seconds {seconds:.1f}\n{done.stdout}")
    return done.returncode


def parse(text: str) -> list[dict[str, object]]:
    """One row per kernel and architecture in the output of ``ptxas -v``, in its order.

    Device functions that were not inlined have rows of their own, with ``entry`` False; their registers are
    those of the kernels that call them.
    """
    rows: list[dict[str, object]] = []
    arch, entry = "", ""
    row: dict[str, object] = {}
    for line in text.splitlines():
        if found := ENTRY.search(line):
            entry, arch = found.groups()
        elif found := PROPERTIES.search(line):
            row = dict(symbol=found[1], arch=arch, entry=found[1] == entry, registers=None, stack=0)
            row |= dict(spill_stores=0, spill_loads=0, shared=0, barriers=0)
            rows.append(row)
        elif row and (found := STACK.search(line)):
            row["stack"], row["spill_stores"], row["spill_loads"] = map(int, found.groups())
        elif row and (found := USED.search(line)):
            # Once per kernel, whether before or after the properties of the functions that it calls.
            kernel = next((r for r in reversed(rows) if r["symbol"] == entry and r["arch"] == arch), row)
            kernel["registers"] = int(found[1])
            kernel["barriers"], kernel["shared"] = int(found[2] or 0), int(found[3] or 0)
    return rows


def spills(row: dict[str, object]) -> bool:
    """Whether a kernel or function touches local memory."""
    return bool(row["stack"] or row["spill_stores"] or row["spill_loads"])


def demangle(symbols: list[str]) -> dict[str, str]:
    """Short names: ``fuse_kv_kernel<bf16, 2>`` without namespaces, parameters and casts of the arguments."""
    names = symbols
    if tool := shutil.which("cu++filt") or shutil.which("c++filt"):
        done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()
    return {symbol: shorten(name) for symbol, name in zip(symbols, names, strict=True)}


def shorten(name: str) -> str:
    name = name.replace("(anonymous namespace)", "anonymous")
    # A cast before a value, as in k<(int)4>, and the types of the parameters, which come last.
    name = re.sub(r"([<, ])\((?:unsigned )?[\w:]+\)", r"\1", name)
    if name.endswith(")"):
        depth = 0
        for at in range(len(name) - 1, -1, -1):
            depth += {")": 1, "(": -1}.get(name[at], 0)
            if depth == 0:
                name = name[:at]
                break
    name = re.sub(r"\b\w+::", "", name)
    # The return type of a function template stands before its name.
    return re.sub(r"^[\w*& ]+ (?=\w+<)", "", name)


def fatbin_bytes(built: Path) -> int:
    """Size of the GPU code inside a host object file."""
    done = subprocess.run(["size", "-A", "-d", str(built)], capture_output=True, text=True, check=True)
    sections = (
        line.split() for line in done.stdout.splitlines() if line.startswith((".nv_fatbin", "__nv_relfatbin"))
    )
    return sum(int(section[1]) for section in sections)


def collect(build: Path) -> dict[str, object]:
    """The report over all objects that this build folder makes from .cu files."""
    files, kernels = [], []
    root = Path(__file__).resolve().parent.parent
    for command in json.loads((build / "compile_commands.json").read_text()):
        source = Path(command["file"])
        if "fusedkv_cuda.dir/" not in command["output"]:
            continue
        built = build / command["output"]
        log = Path(f"{built}.ptxas")
        if not log.exists():
            sys.exit(f"ptxas_report: {log} is missing; delete {build} and run make cuda-objects")
        name = source_name(source, root)
        text = log.read_text()
        rows = parse(text)
        kernels += [{"file": name, **row} for row in rows]
        entries = [row for row in rows if row["entry"]]
        files.append(
            dict(
                file=name,
                kernels=len({row["symbol"] for row in entries}),
                compiled=len(entries),
                seconds=float(text.split(maxsplit=2)[1]),
                fatbin_bytes=fatbin_bytes(built),
            )
        )
    short = demangle(sorted({str(row["symbol"]) for row in kernels}))
    dynamic = dynamic_shared(build / "attn_layouts")
    for row in kernels:
        row["kernel"] = short[str(row["symbol"])]
        template = TEMPLATE.search(row["kernel"])
        row["dynamic"] = dynamic.get(f"{template[1]}<{template[2]}>") if template else None
    kernels.sort(key=lambda row: (row["file"], row["kernel"], row["arch"]))
    return dict(files=files, kernels=kernels)


def source_name(source: Path, root: Path) -> str:
    """The .cu file below the root; for units/KERNEL.ARGUMENTS.cu the included KERNEL.cu and the arguments."""
    if source.parent.name != "units":
        return source.relative_to(root).as_posix()
    kernel, arguments, _ = source.name.split(".")
    return f"csrc/ops/attn_decode/{kernel}.cu {arguments}"


def dynamic_shared(program: Path) -> dict[str, int]:
    """Dynamic shared memory of the decode kernels, by their template without the element type."""
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    lines = (line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    return {name: int(size) for name, size in lines}


def print_table(header: list[str], rows: list[list[object]]) -> None:
    text = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    for row in text:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells))


def report(build: Path) -> None:
    found = collect(build)
    (build / "ptxas.json").write_text(json.dumps(found, indent=1) + "\n")
    kernels, files = found["kernels"], found["files"]
    columns = ["arch", "registers", "stack", "spill_stores", "spill_loads", "shared", "dynamic", "barriers"]
    print_table(
        ["kernel", *columns],
        [[row["kernel"], *("-" if row[c] is None else row[c] for c in columns)] for row in kernels],
    )
    print()
    totals = [
        [f["file"], f["kernels"], f["compiled"], f"{f['seconds']:.1f}", f"{f['fatbin_bytes'] / 1e6:.2f}"]
        for f in files
    ]
    sums = [sum(f[key] for f in files) for key in ("kernels", "compiled", "seconds", "fatbin_bytes")]
    totals.append(["all", sums[0], sums[1], f"{sums[2]:.1f}", f"{sums[3] / 1e6:.2f}"])
    print_table(["file", "kernels", "x archs", "seconds", "fatbin MB"], totals)
    print(f"{sum(map(spills, kernels))} of {len(kernels)} with spills or a stack frame")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["compile", _, *_]:
            return compile_with_log(arguments[1:])
        case ["report", build]:
            report(Path(build).resolve())
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
