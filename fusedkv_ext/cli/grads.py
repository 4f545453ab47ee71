"""fusedkv grads: gradient norms of the q, k and v projections per layer while methods train.

Methods are names from `fusedkv plan`, with options as in cla:factor=3, or JSON files of plans. The defaults
take minutes: 12 layers, 96 wide, 300 steps of 1024 tokens. Writes grads.json, grads.png and the runs into
--out.
"""

from __future__ import annotations

import argparse

from fusedkv_ext.cli import experiment
from fusedkv_ext.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        default="vanilla,fusedkv",
        metavar="A,B,C",
        help="the first is the baseline (default: %(default)s)",
    )
    experiment.add_arguments(parser, out="grads")
    parser.add_argument(
        "--every", type=int, default=5, metavar="K", help="record every K steps (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if args.every < 1:
        raise ConfigError(f"--every must be at least 1, got {args.every}")
    from fusedkv_ext.lab import gradients, run_figures, runs
    from fusedkv_ext.lab.entries import parse_all
    from fusedkv_ext.lab.figures import save
    from fusedkv_ext.lab.reporting import write

    config = experiment.configuration(args, gradients.DEFAULTS)
    entries = parse_all(args.methods.split(","))
    try:
        with experiment.session(args, config) as (progress, should_stop):
            found = gradients.run_gradients(
                config, entries, args.seeds, args.every, args.out, progress, should_stop
            )
    except runs.Stopped:
        return experiment.stopped(args)
    text = runs.dumps(found.to_dict())
    write(args.out / "grads.json", text)
    save(run_figures.gradient_norms(found), args.out / "grads.png")
    if args.json:
        print(text, end="")
    else:
        print(f"\n{gradients.table(found)}\nwrote {args.out}/grads.json and grads.png")
    return 0
