"""Instructions of one cached attention on each SIMD target of this CPU, next to ``instruction_counts.json``.

``make instructions`` prints both per 64-byte line of the caches. ``ARGS=--record`` updates the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNTER = Path(os.environ.get("FUSEDKV_COUNTER") or ROOT / "build" / "count_instructions")
RECORD = Path(__file__).with_suffix(".json")
TOLERANCE = 0.10

Counts = dict[str, Any]


class CannotCountError(Exception):
    """This system does not let a program count its instructions; the message says why."""


def measure() -> Counts:
    """What the counter prints: compiler, tokens, lines per case, instructions per level and case."""
    done = subprocess.run([str(COUNTER)], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        raise CannotCountError(done.stdout.strip())
    if done.returncode != 0:
        raise RuntimeError(f"{COUNTER} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def other_compiler(measured: Counts, recorded: Counts) -> str | None:
    """Why the two say nothing about each other, if so: another compiler makes other instructions."""
    if measured["compiler"] == recorded["compiler"]:
        return None
    return f"recorded with {recorded['compiler']!r}, counted with {measured['compiler']!r}"


def deviations(measured: dict[str, int], recorded: dict[str, int]) -> list[str]:
    """The cases of one level whose counts are not the recorded ones, or that only one side has."""
    wrong = [f"{case}: counted or recorded, not both" for case in measured.keys() ^ recorded.keys()]
    for case in measured.keys() & recorded.keys():
        now, before = measured[case], recorded[case]
        if abs(now - before) > TOLERANCE * before:
            wrong.append(f"{case}: counted {now}, recorded {before} ({now / before:.3f}x)")
    return sorted(wrong)


def table(measured: Counts, recorded: Counts | None) -> str:
    """One line per level and case: instructions, those per line of cache, the ratio to the record."""
    known = recorded["instructions"] if recorded else {}
    rows = [f"{'level':12s} {'case':34s} {'count':>8s} {'per line':>9s} {'recorded':>9s}"]
    for level, cases in measured["instructions"].items():
        for case, count in cases.items():
            per_line, before = count / measured["lines"][case], known.get(level, {}).get(case)
            ratio = f"{count / before:.3f}x" if before else "-"
            rows.append(f"{level:12s} {case:34s} {count:8d} {per_line:9.1f} {ratio:>9s}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help=f"write the counts to {RECORD.name}")
    args = parser.parse_args()
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else None
    try:
        measured = measure()
    except CannotCountError as error:
        print(f"nothing counted: {error}", file=sys.stderr)
        return 1
    print(table(measured, recorded))
    reason = other_compiler(measured, recorded) if recorded else None
    if reason:
        print(f"the ratios mean little: {reason}")
    if args.record:
        before = (recorded or measured)["instructions"]
        lost = sorted(set(before) - set(measured["instructions"]))
        if lost and reason:
            print(f"not recorded: this CPU does not run {', '.join(lost)}", file=sys.stderr)
            return 1
        if lost:
            print(f"kept as they are: this CPU does not run {', '.join(lost)}")
        measured["instructions"] = {**before, **measured["instructions"]}
        RECORD.write_text(json.dumps(measured, indent=2) + "\n")
        print(f"recorded in {RECORD}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
