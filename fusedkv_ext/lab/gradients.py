"""Gradients of the q, k and v projections per layer while models train (FusedKV, arXiv:2512.03870, figure 9).

All plans train with the same seeds and windows. Every few steps, the L2 norm of each projection's weight
gradient is recorded before clipping, as a record of kind "grads" in metrics.jsonl. The first plan is the
baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab.entries import Entry
from fusedkv_ext.lab.reporting import aligned
from fusedkv_ext.lab.runs import (
    FORMAT,
    SMALL,
    Observer,
    Spread,
    check_result,
    finish,
    finite_rows,
    seeds_of,
    significant,
    without_seed,
)
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.metrics import Record, read_metrics
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.trainer import resolve_plan

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
DEFAULTS = {**SMALL, "run.steps": 300}

Norms = dict[str, list[list[float | None]]]  # projection -> [recorded step or seed][layer]


def projection_norms(model: nn.Module) -> dict[str, list[float | None]]:
    """L2 norms of the weight gradients of each layer's q_proj, k_proj and v_proj; None for a missing one.

    Args:
        model: A Decoder after the backward.
    """
    found = {}
    layers: Any = model.model
    for name in PROJECTIONS:
        modules = [getattr(layer.self_attn, name, None) for layer in layers.layers]
        norms = [None if module is None else module.weight.grad.norm() for module in modules]
        there = [norm for norm in norms if norm is not None]
        numbers = iter(torch.stack(there).tolist() if there else [])  # one transfer from the device
        found[name] = [None if norm is None else next(numbers) for norm in norms]
    return found


def every_steps(interval: int) -> Observer:
    """Observer for `Trainer.observe` that records the norms of every `interval`-th step."""

    def observe(step: int, model: nn.Module) -> Record | None:
        return None if step % interval else {"kind": "grads", **projection_norms(model)}

    return observe


@dataclass(frozen=True)
class Gradients:
    """Recorded norms. Layers count from 0, steps from 1."""

    plans: list[str]  # the first is the baseline
    seeds: list[int]
    steps: list[int]  # recorded
    span: list[int]  # first and last recorded step in the means, both after the warm-up
    shallow_layers: list[int]
    series: list[Norms]  # per plan: [recorded step][layer], means over seeds
    means: list[Norms]  # per plan: [seed][layer], means over `span`
    valid_bits_per_byte: list[list[float]]  # [plan][seed]
    conditions: dict[str, Any]
    config: dict[str, Any]

    def ratios(self, plan: int, projection: str) -> list[Spread | None]:
        """Ratio of the plan's mean norm to the baseline's with the same seed, per layer.

        A layer without that projection in one of the plans is None.
        """
        pairs = [
            [None if x is None or y is None else x / y for x, y in zip(own, base, strict=True)]
            for own, base in zip(self.means[plan][projection], self.means[0][projection], strict=True)
        ]
        return [None if None in layer else Spread.of(layer) for layer in zip(*pairs, strict=True)]

    def shallow_ratio(self, plan: int, projection: str) -> Spread | None:
        """Mean ratio of the shallow layers, with its spread over seeds; None if there is no ratio."""
        pairs = zip(self.means[plan][projection], self.means[0][projection], strict=True)
        shallow = self.shallow_layers
        ratios = [[x / y for i in shallow if (x := own[i]) and (y := base[i])] for own, base in pairs]
        return Spread.of([Spread.of(layers).mean for layers in ratios]) if all(ratios) else None

    def to_dict(self) -> dict[str, Any]:
        """All fields and the derived ratios."""
        shallow = {
            plan: {name: _as_dict(self.shallow_ratio(p, name)) for name in PROJECTIONS}
            for p, plan in enumerate(self.plans)
            if p > 0
        }
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": "grads", "format": FORMAT, "ratio_of_shallow_layers": significant(shallow), **own}


def _as_dict(spread: Spread | None) -> dict[str, float | None] | None:
    return None if spread is None else spread._asdict()


def _recorded(folder: Path, steps: Sequence[int]) -> list[Record]:
    """Gradient records of a run, which must be those of the first of `steps`."""
    path = folder / "metrics.jsonl"
    records = [r for r in read_metrics(path) if r["kind"] == "grads"] if path.exists() else []
    found = [record["step"] for record in records]
    if found != list(steps[: len(found)]):
        raise ConfigError(
            f"{path} must have gradients of steps {list(steps[:3])}..., got {found[:3]}...; give the same "
            "--every to continue this run, or choose another --out"
        )
    return records


def _norms(folder: Path, steps: Sequence[int]) -> Norms:
    """Norms of a finished run: projection -> [recorded step][layer]."""
    records = _recorded(folder, steps)
    if len(records) < len(steps):
        raise ValueError(
            f"{folder}/metrics.jsonl must have gradients of {len(steps)} steps, got {len(records)}: another "
            "command wrote a part of it; choose another --out"
        )
    return {name: [record[name] for record in records] for name in PROJECTIONS}


def _mean(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Elementwise mean of rows; None stays None."""
    return [None if None in column else Spread.of(column).mean for column in zip(*rows, strict=True)]


def _means(runs: Iterable[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """Elementwise mean of tables."""
    return [_mean(rows) for rows in zip(*runs, strict=True)]


def run_gradients(
    config: TrainConfig,
    entries: Sequence[Entry],
    num_seeds: int,
    every: int,
    out: Path,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> Gradients:
    """Trains each method with each seed in out/METHOD/seed-N, and records gradient norms.

    A stopped run is resumed.

    Args:
        config: The configuration that all runs share.
        entries: Two or more methods; the first is the baseline.
        num_seeds: Number of seeds, starting with `run.seed`.
        every: Steps between two records.
        out: Output folder.
        progress: Progress display.
        should_stop: Returns True to interrupt the run.

    Raises:
        Stopped: The run was interrupted.
        ConfigError: Settings are invalid, or differ from those of `out`.
    """
    if len(entries) < 2:
        raise ConfigError(f"--methods needs at least two, got {', '.join(entry.label for entry in entries)}")
    configs = [entry.config(config) for entry in entries]
    depths = [resolve_plan(each.model).prefill_layers for each in configs]
    seeds, steps = seeds_of(config, num_seeds), list(range(every, config.run.steps + 1, every))
    late = [index for index, step in enumerate(steps) if step > config.optim.warmup_steps]
    if not late:
        raise ConfigError(
            f"a step after the warm-up must be recorded, got run.steps {config.run.steps}, --every {every}, "
            f"optim.warmup_steps {config.optim.warmup_steps}; train longer or record more often"
        )
    series, means = [], []
    bits: list[list[float]] = []
    conditions: dict[str, Any] = {}
    shown = without_seed(config)
    del shown["model"]["plan"]
    for entry, own in zip(entries, configs, strict=True):
        runs = []
        bits.append([])
        for seed in seeds:
            folder = out / entry.folder / f"seed-{seed}"
            _recorded(folder, steps)  # checks the interval before training
            seeded = own.updated([("run.seed", seed)])
            done = finish(seeded, folder, progress, should_stop, every_steps(every))
            runs.append(_norms(folder, steps))
            bits[-1].append(significant(done.valid_bits_per_byte))
            conditions = done.conditions
        means.append({name: [_mean([run[name][i] for i in late]) for run in runs] for name in PROJECTIONS})
        series.append({name: _means(run[name] for run in runs) for name in PROJECTIONS})
    return Gradients(
        plans=[entry.label for entry in entries],
        seeds=seeds,
        steps=steps,
        span=[steps[late[0]], steps[-1]],
        shallow_layers=list(range(min(depths))),
        series=significant(series),
        means=significant(means),
        valid_bits_per_byte=bits,
        conditions=conditions,
        config=shown,
    )


def read_gradients(path: Path, result: Any) -> Gradients:
    """Validates the content of a grads.json.

    Raises:
        ValueError: The content is not complete or is another kind of result. The message names the file.
    """
    kinds = {"conditions": dict, "config": dict}
    names = [field.name for field in fields(Gradients)]
    result = check_result(result, path, "grads", {name: kinds.get(name, list) for name in names})
    found = Gradients(**{name: result[name] for name in names})
    try:
        layers = int(found.config["model"]["num_hidden_layers"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: 'config' must have model.num_hidden_layers") from None
    if not found.shallow_layers or not set(found.shallow_layers) <= set(range(layers)):
        raise ValueError(
            f"{path}: 'shallow_layers' must be layers below {layers}, got {found.shallow_layers}"
        )
    for what, length in (("series", len(found.steps)), ("means", len(found.seeds))):
        entries = getattr(found, what)
        for entry in entries if len(entries) == len(found.plans) else [None]:
            rows = [entry.get(name) if isinstance(entry, dict) else None for name in PROJECTIONS]
            if not all(row and finite_rows(row, layers, holes=True) and len(row) == length for row in rows):
                raise ValueError(
                    f"{path}: {what!r} must have {length} rows of {layers} norms for each projection of the "
                    f"{len(found.plans)} plans {', '.join(map(str, found.plans))}"
                )
    return found


def table(found: Gradients) -> str:
    """Table of the ratios to the baseline, per layer and as mean over the shallow layers."""
    blocks = []
    for p, plan in enumerate(found.plans[1:], start=1):
        rows = [[f"{plan} / {found.plans[0]}", *PROJECTIONS]]
        ratios = [found.ratios(p, name) for name in PROJECTIONS]
        for layer in range(len(ratios[0])):
            cells = [_cell(column[layer]) for column in ratios]
            rows.append([f"layer {layer}", *cells])
        shallow = [_cell(found.shallow_ratio(p, name)) for name in PROJECTIONS]
        rows.append([f"mean of layers 0..{found.shallow_layers[-1]}", *shallow])
        blocks.append(aligned(rows))
    losses = ", ".join(
        f"{plan} {Spread.of(bits):.4f}"
        for plan, bits in zip(found.plans, found.valid_bits_per_byte, strict=True)
    )
    spread = f"; ± standard deviation over {len(found.seeds)} seeds" if len(found.seeds) > 1 else ""
    return (
        "\n\n".join(blocks) + "\n\nL2 norm of the gradient of the projection's weight, before clipping: mean "
        f"of steps {found.span[0]}..{found.span[1]}\nas a ratio to that of {found.plans[0]} with the same "
        f"seed{spread}.\nLayers count from 0; -: a layer without that projection.\n"
        f"Validation loss, bits per byte: {losses}."
    )


def _cell(ratio: Spread | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
