"""fusedkv bench: time operations and models beside torch and beside the memory bandwidth measured in the run.

Families: decode, fuse, prefill, train, model; none named: all. Every row is checked against the oracle before
it is timed. At the end each goal is printed with what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from fusedkv_ext.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="decode, fuse, prefill, train, model")
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


def run(args: argparse.Namespace) -> int:
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    import torch

    from fusedkv_ext.bench import measure, plots, report, settings
    from fusedkv_ext.bench.run import run as run_suite

    unknown = [name for name in args.families if name not in settings.FAMILIES]
    if unknown:
        raise ConfigError(f"unknown family {unknown[0]!r}; known: {', '.join(settings.FAMILIES)}")
    families = args.families or list(settings.FAMILIES)
    if args.plots:
        if "decode" not in families:
            raise ConfigError("--plots draws the curves of decode, which is not among the families")
        plots.need_matplotlib()
    chosen = settings.QUICK if args.quick else settings.FULL
    chosen = replace(chosen, rounds=args.rounds) if args.rounds else chosen
    chosen = chosen.only(args.dtype) if args.dtype else chosen
    if args.threads:
        torch.set_num_threads(args.threads)
    target = args.json and args.json.replace("{threads}", str(torch.get_num_threads()))
    if target and target != "-":  # found out before minutes of timing
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    measure.keep_freed_memory()
    out = sys.stderr if target == "-" else sys.stdout
    print(report.HEADER, file=out, flush=True)
    result = run_suite(families, chosen, lambda row: print(report.line(asdict(row)), file=out, flush=True))
    print(f"\n{report.conditions(result)}\n{report.summary(result)}", file=out)
    if args.plots:
        print("wrote " + ", ".join(map(str, plots.save_all(result, args.plots))), file=out)
    if target == "-":
        print(json.dumps(result))
    elif target:
        Path(target).write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {target}")
    return 0
