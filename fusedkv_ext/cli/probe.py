"""fusedkv probe: train the dense-fusion probe and plot the source layers of its keys and values.

The defaults take minutes: 12 layers, 96 wide, 600 steps of 1024 tokens. Writes probe.json, probe.png and the
runs into --out.
"""

from __future__ import annotations

import argparse

from fusedkv_ext.cli import experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser, out="probe")


def run(args: argparse.Namespace) -> int:
    from fusedkv_ext.lab import probe, run_figures, runs
    from fusedkv_ext.lab.figures import save
    from fusedkv_ext.lab.reporting import write

    config = experiment.configuration(args, probe.DEFAULTS)
    try:
        with experiment.session(args, config) as (progress, should_stop):
            found = probe.run_probe(config, args.seeds, args.out, progress, should_stop)
    except runs.Stopped:
        return experiment.stopped(args)
    text = runs.dumps(found.to_dict())
    write(args.out / "probe.json", text)
    save(run_figures.probe_maps(found), args.out / "probe.png")
    if args.json:
        print(text, end="")
    else:
        print(f"\n{probe.table(found)}\nwrote {args.out}/probe.json and probe.png")
    return 0
