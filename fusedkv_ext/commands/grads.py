"""fusedkv grads: gradient norms of the q, k and v projections per layer while plans train side by side.

Writes grads.json, grads.png and the runs into --out.
"""

from __future__ import annotations

import argparse

from fusedkv_ext.commands import experiment
from fusedkv_ext.train.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser, out="grads")
    parser.add_argument(
        "--plans", default="vanilla,fusedkv", metavar="A,B",
        help="cache plans, the first of which is the baseline (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--every", type=int, default=5, metavar="K", help="record every K steps (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if args.every < 1:
        raise ConfigError(f"--every must be at least 1, got {args.every}")
    from fusedkv_ext.demo.report import write
    from fusedkv_ext.experiments import figures, gradients, runs
    from fusedkv_ext.figures import save

    config = experiment.configuration(args, gradients.DEFAULTS)
    plans = [plan.strip() for plan in args.plans.split(",") if plan.strip()]
    try:
        with experiment.session(args, config) as (progress, should_stop):
            found = gradients.run_gradients(
                config, plans, args.seeds, args.every, args.out, progress, should_stop
            )
    except runs.Stopped:
        return experiment.stopped(args)
    text = runs.dumps(found.to_dict())
    write(args.out / "grads.json", text)
    save(figures.gradient_norms(found), args.out / "grads.png")
    if args.json:
        print(text, end="")
    else:
        print(f"\n{gradients.table(found)}\nwrote {args.out}/grads.json and grads.png")
    return 0
