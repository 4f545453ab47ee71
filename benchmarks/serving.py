"""Compares serving in vLLM: plain Llama on vLLM's own attention, and cache plans, at equal KV memory.

    python benchmarks/serving.py [ENGINE ...] [--scenarios pressure room] [--early-exit] [--quick]
                                 [--json FILE]
    python benchmarks/serving.py --report FILE           Markdown of a result

ENGINE: "plain" or a cache plan, such as fusedkv or cla:factor=3; none named: plain, vanilla, fusedkv and
fusedkv-lite. All engines are in this process and take turns. Times are those that vLLM measures. Models
have random weights and are written to a temporary folder.

pressure: more requests than the memory holds. Requests at once, output tokens/s, TTFT, TPOT, preemptions.
room: memory for all requests. Seconds of prefill, and the best decode step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from suite import tables
from suite.serving import report
from suite.serving.run import run
from suite.serving.settings import ENGINES, ITEM_BYTES, QUICK, SCENARIOS, Settings, specs

SIZES = {
    "layers": "layers of the model",
    "hidden": "hidden size",
    "heads": "query heads",
    "kv_heads": "KV heads",
    "head_dim": "channels of a head",
    "requests": "plain requests that the memory holds, and requests of room",
    "queue": "requests of pressure",
    "prompt": "tokens of each prompt",
    "output": "tokens of each answer of pressure",
    "steps": "decode steps of room",
    "rounds": "turns of each engine",
    "block": "tokens of a block",
    "chunk": "the most tokens of a step",
    "threads": "threads of each engine",
}


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument(
        "--early-exit",
        action="store_true",
        help="also each plan whose last layers store nothing with kv_sharing_fast_prefill",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: to see that it works")
    parser.add_argument("--compile", action="store_true", help="with torch.compile rather than eager")
    parser.add_argument("--dtype", choices=tuple(ITEM_BYTES), help="default: bfloat16")
    defaults, quick = Settings(), QUICK
    for name, text in SIZES.items():
        shown = (
            f"{getattr(defaults, name)}; quick: {getattr(quick, name)}" if name != "threads" else "torch's"
        )
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{text} (default: {shown})"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, sizes and rows there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print Markdown of this result")
    args = parser.parse_args(given)
    for name in SIZES:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.engines = args.engines or list(ENGINES)
    args.settings = settings(args)
    try:
        args.specs = specs(args.engines, args.settings.layers, args.early_exit)
    except ValueError as error:
        parser.error(str(error))
    if args.report is None and find_spec("vllm") is None:
        parser.error("vLLM is not installed here; docs/serving.md has the commands")
    return args


def settings(args: argparse.Namespace) -> Settings:
    """The sizes that the options choose."""
    chosen = QUICK if args.quick else Settings()
    names = {field.name for field in fields(Settings)} & vars(args).keys()
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(chosen, eager=not args.compile, **given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.report:
        print(report.document(json.loads(args.report.read_text())), end="")
        return 0
    if args.json:  # found out before minutes of timing
        args.json.parent.mkdir(parents=True, exist_ok=True)
    result = run(
        args.scenarios, args.specs, args.settings, lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(report.document(result))
    print(tables.goals_table(result))
    print(tables.closing(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        print(f"wrote {args.json}")
    return 1 if any(row["error"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
