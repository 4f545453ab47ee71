"""Times the operations on a GPU beside their rivals and beside what the GPU's memory can do.

    python benchmarks/gpu.py --json FILE [--quick | --headline] [--families decode,fuse,...] [--seconds N]
                             [--no-compile] [--stall N]
    python benchmarks/gpu.py --report FILE.json          markdown tables of a result
    python benchmarks/gpu.py --device cpu                dry run of every cell on tiny shapes

Rows: operation, shape, dtype | us | GB/s | TFLOP/s | % of the roof measured in the same run | times as fast
as the fastest peer (GB = 1e9). The most important cells come first; --seconds ends the run in time. How
things are timed: suite/clocks.py. A cell that fails is a row with an error; one that kills or hangs the
process that measures costs that cell only. Exits with 1 when a row has an error, so that a script can tell.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suite import report
from suite.gpu.supervise import supervise
from suite.gpu.tasks import FAMILIES

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times the operations on a GPU beside their rivals.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: dry run, tiny shapes")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of %(default)s")
    parser.add_argument("--quick", action="store_true", help="representative cells of each family")
    parser.add_argument("--headline", action="store_true", help="the most important cells only")
    parser.add_argument("--seconds", type=float, help="end within this time")
    parser.add_argument("--stall", type=float, default=120, help="give a cell up after that many seconds")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument(
        "--no-compile", action="store_true", help="no torch.compile, no search for the best Triton"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--report", type=Path, help="print markdown tables of this result")
    parser.add_argument("--profile", action="store_true", help="only run the headline, for a profiler")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.families = args.families.split(",")
    unknown = sorted(set(args.families) - set(FAMILIES))
    if unknown:
        parser.error(f"--families: unknown {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    return args


def work(args: argparse.Namespace) -> int:
    """The measuring process."""
    from suite.clocks import DeadDevice
    from suite.gpu import worker

    log = worker.Log(args.worker)
    try:
        worker.run(
            log,
            device=args.device,
            families=args.families,
            only_quick=args.quick,
            only_headline=args.headline,
            compile_peers=not args.no_compile,
            deadline=args.deadline,
            commit=args.commit,
        )
    except DeadDevice as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return worker.DEAD_DEVICE
    return 0


def watch(args: argparse.Namespace) -> int:
    """Starts measuring processes until all cells are done or the time is up."""
    ends = None if args.seconds is None else time.time() + args.seconds
    path = os.environ.get("PYTHONPATH")
    # Threads that spin between tiny parallel regions would keep each other from the cores.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    environment |= {"PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}
    events: list[dict[str, Any]] = []

    def receive(event: dict[str, Any]) -> None:
        events.append(event)
        report.show(event)
        # Whatever ends this process, the rows so far are in the file.
        if args.json and event["event"] == "row":
            save(args.json, report.collect(events))

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(log)]
        command += ["--device", args.device, "--families", ",".join(args.families)]
        flags = {"--quick": args.quick, "--headline": args.headline, "--no-compile": args.no_compile}
        command += [name for name, given in flags.items() if given]
        command += ["--commit", args.commit] if args.commit else []
        if ends is not None:
            # No cell is begun in the last tenth.
            command += ["--deadline", str(ends - min(20.0, 0.1 * args.seconds))]
        supervise(
            command, log, stall_seconds=args.stall, deadline=ends, show=receive, environment=environment
        )
    result = report.collect(events)
    print("\n".join(report.closing(result)))
    if args.json:
        save(args.json, result)
    errors = [row for row in result["rows"] if row["error"]]
    return 1 if errors or not result["rows"] or "workers_lost" in result else 0


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def main() -> int:
    args = arguments()
    if args.report:
        from suite import tables

        result = json.loads(args.report.read_text())
        # scripts/gpu_check.sh puts the results of its steps into a file of its own.
        print(tables.gpu_tables(report.merged(result) if "benchmarks" in result else result), end="")
        return 0
    if args.profile:
        from suite.gpu import decode

        decode.profile(args.device)
        return 0
    if args.worker:
        return work(args)
    # Ends the worker, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return watch(args)


if __name__ == "__main__":
    sys.exit(main())
