"""Times operations and models on the CPU beside torch and beside the memory bandwidth measured in the run.

    python benchmarks/cpu.py [FAMILY ...] [--quick] [--json FILE] [--plots DIR] [--dtype D] [--threads N]

Families: decode, coded, fuse, prefill, train, model; none named: all. Every row is checked against the oracle
before it is timed. At the end each goal is printed with what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from suite import machine, report, tables
from suite.cpu import plots, settings
from suite.cpu.run import run

from fusedkv_ext.lab.figures import need_matplotlib


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="decode, coded, fuse, prefill, train, model"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write machine, rows and goals there; {threads} in it is replaced; -: stdout, tables on stderr",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: less than 90 s")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the curves of decode as PNG")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per row (default: 15; quick: 5)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="rows of this dtype only")
    parser.add_argument("--threads", type=int, metavar="N", help="default: what torch uses")
    args = parser.parse_args(given)
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    unknown = [name for name in args.families if name not in settings.FAMILIES]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; known: {', '.join(settings.FAMILIES)}")
    args.families = args.families or list(settings.FAMILIES)
    if args.plots:
        if "decode" not in args.families:
            parser.error("--plots draws the curves of decode, which is not among the families")
        need_matplotlib()
    return args


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    chosen = settings.QUICK if args.quick else settings.FULL
    chosen = replace(chosen, rounds=args.rounds) if args.rounds else chosen
    chosen = chosen.only(args.dtype) if args.dtype else chosen
    if args.threads:
        torch.set_num_threads(args.threads)
    target = args.json and args.json.replace("{threads}", str(torch.get_num_threads()))
    if target and target != "-":  # found out before minutes of timing
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    machine.keep_freed_memory()
    out = sys.stderr if target == "-" else sys.stdout
    print(report.HEADER, file=out, flush=True)
    result = run(args.families, chosen, lambda row: print(report.line(asdict(row)), file=out, flush=True))
    print(f"\n{tables.conditions(result)}\n{tables.summary(result)}", file=out)
    if args.plots:
        print("wrote " + ", ".join(map(str, plots.save_all(result, args.plots))), file=out)
    if target == "-":
        print(json.dumps(result))
    elif target:
        Path(target).write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
