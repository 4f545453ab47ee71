"""fusedkv demo: train vanilla, FusedKV-Lite and FusedKV on real text, and compare them in a table and plots.

Models of equal width train on the same tokens in the same order. Cache sizes are measured, and timed calls
are interleaved.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path

from fusedkv_ext.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small models, less than a minute: a smoke test")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="total time (default: 7; quick: 0.5)")


def run(args: argparse.Namespace) -> int:
    if args.minutes is not None and not 0.1 <= args.minutes <= 24 * 60:
        raise ConfigError(f"--minutes must be from 0.1 to 1440, got {args.minutes:g}")
    from fusedkv_ext.lab.demo import report
    from fusedkv_ext.lab.demo.run import run_demo
    from fusedkv_ext.lab.demo.settings import quick, standard
    from fusedkv_ext.training.progress import make_progress

    started = time.monotonic()
    settings = (quick if args.quick else standard)(args.minutes)
    progress = make_progress(sys.stderr if args.json else sys.stdout, interval=20.0)
    try:
        result = run_demo(settings, args.out, progress)
    finally:
        progress.close()
    seconds = time.monotonic() - started
    if args.json:
        print(json.dumps({**result.to_dict(), "out": str(args.out), "seconds": seconds}))
        return 0
    described = textwrap.fill(report.settings_text(result.settings), 100)
    print(f"\n{report.table(result)}\n\n{described}")
    print(
        f"\nwritten: {args.out / 'report.html'} (shows loss.png, cache.png, fusion_weights.png), results.json"
    )
    print(f"generate more: fusedkv generate {args.out / 'fusedkv'} --prompt 'def '")
    ratio = result.sample_cache_bytes / result.sample_cache_bytes_first
    print(
        f"\ntext from {result.models[-1].name}, out of a cache of {result.sample_cache_bytes:,} bytes "
        f"({ratio:.2f} of vanilla's), {seconds:.0f} s after the start:\n"
    )
    print(result.sample_prompt + result.sample_text)
    return 0
