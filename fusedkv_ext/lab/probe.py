"""The dense-fusion probe: learned weights of all source layers (FusedKV, arXiv:2512.03870, figure 2).

Every layer above the first n fuses the keys and the values of all n storage layers. Each source has one
learnable scalar, which is initialized to 1/n. The learned weights show which source layers are useful. A row
is summarized by its center of mass:

    c_i = sum_j |w_ij| j / sum_j |w_ij|        j: source layers, from 0

The sign of a weight does not matter, because a source with a negative weight is used too. A weight is not a
contribution, because the magnitudes of stored keys and values differ between layers. So there is a second
center, "scaled": each weight is multiplied by the root mean square of what its source stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab.reporting import aligned
from fusedkv_ext.lab.runs import (
    FORMAT,
    SMALL,
    Spread,
    check_result,
    finish,
    finite_rows,
    seeds_of,
    significant,
    without_seed,
)
from fusedkv_ext.layers.attention import KV
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.plan.pieces import SIDES
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data.tokens import validation_batches
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.trainer import resolve_plan

DEFAULTS = {**SMALL, "model.plan": "dense-fusion", "run.steps": 600}

Matrix = list[list[float]]  # [reconstruction layer][source layer]


def center_of_mass(weights: Sequence[float], positions: Sequence[float]) -> float:
    """Mean of the positions, weighted by the absolute weights.

    Raises:
        ValueError: All weights are zero.
    """
    masses = [abs(weight) for weight in weights]
    if not sum(masses):
        raise ValueError("weights must not all be zero: they have no center of mass")
    return sum(m * p for m, p in zip(masses, positions, strict=True)) / sum(masses)


@dataclass(frozen=True)
class Probe:
    """Learned effective weights and training conditions. Layers count from 0."""

    plan: str
    source_layers: list[int]
    reconstruction_layers: list[int]
    seeds: list[int]
    keys: list[Matrix]  # one per seed
    values: list[Matrix]
    rms: dict[str, Matrix]  # root mean square of stored "keys" and "values": [seed][source layer]
    valid_loss: list[float]  # nats per token, one per seed
    valid_bits_per_byte: list[float]
    conditions: dict[str, Any]
    config: dict[str, Any]

    def centers(self, side: str, scaled: bool = False) -> list[list[float]]:
        """Centers of mass as [seed][reconstruction layer].

        Args:
            side: "keys" or "values".
            scaled: Multiplies the weights by `rms`.
        """
        sizes = self.rms[side] if scaled else [[1.0] * len(self.source_layers)] * len(self.seeds)
        return [
            [
                center_of_mass([w * x for w, x in zip(row, size, strict=True)], self.source_layers)
                for row in matrix
            ]
            for matrix, size in zip(getattr(self, side), sizes, strict=True)
        ]

    def center(self, side: str, scaled: bool = False) -> Spread:
        """Mean center over the reconstruction layers, with its spread over seeds."""
        return Spread.of([Spread.of(rows).mean for rows in self.centers(side, scaled)])

    def asymmetry(self, scaled: bool = False) -> Spread:
        """Center of the keys minus center of the values, in layers."""
        pairs = zip(self.centers("keys", scaled), self.centers("values", scaled), strict=True)
        return Spread.of([Spread.of(keys).mean - Spread.of(values).mean for keys, values in pairs])

    def share(self, side: str, layers: Sequence[int]) -> Spread:
        """Fraction of the absolute weight on the given source layers, mean over reconstruction layers."""
        chosen = [j in layers for j in self.source_layers]
        shares = [[center_of_mass(row, chosen) for row in matrix] for matrix in getattr(self, side)]
        return Spread.of([Spread.of(rows).mean for rows in shares])

    def to_dict(self) -> dict[str, Any]:
        """All fields and the derived centers."""
        derived = {
            "centers": {side: self.centers(side) for side in SIDES},
            "center": {side: self.center(side)._asdict() for side in SIDES},
            "center_of_equal_weights": Spread.of(self.source_layers).mean,
            "keys_minus_values": self.asymmetry()._asdict(),
            "scaled_center": {side: self.center(side, scaled=True)._asdict() for side in SIDES},
            "scaled_keys_minus_values": self.asymmetry(scaled=True)._asdict(),
        }
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": "probe", "format": FORMAT, **significant(derived), **own}


def check_plan(plan: CachePlan) -> tuple[list[int], list[int]]:
    """Source layers and reconstruction layers of a plan.

    Raises:
        ConfigError: The layers without storage do not all weigh the same source layers with scalars.
    """
    readers = [i for i in range(plan.num_layers) if plan.reads_only(i)]
    segments = [getattr(plan.layers[i], side) for i in readers for side in SIDES]
    sources = {part[0].sources for part in segments}
    scalar = all(
        len(part) == 1 and part[0].fusion is not None and part[0].fusion.granularity == "scalar"
        for part in segments
    )
    if not scalar or len(sources) != 1:
        raise ConfigError(
            "the probe needs a plan whose upper layers weigh one set of source layers with a scalar each, "
            f"like dense-fusion, got {plan.name!r} with {plan.num_layers} layers; `fusedkv plan` draws it"
        )
    return list(sources.pop()), readers


def learned_weights(model: Decoder, readers: Sequence[int]) -> dict[str, Matrix]:
    """The effective scalars of both sides: [reconstruction layer][source layer]."""
    layers: Any = model.model.layers
    fusions = [layers[i].self_attn.kv_fusion for i in readers]
    return {
        "keys": [fusion.key_weights().detach()[:, 0, 0].tolist() for fusion in fusions],
        "values": [fusion.value_weights().detach()[:, 0, 0].tolist() for fusion in fusions],
    }


@torch.no_grad()
def stored_rms(model: Decoder, ids: Tensor, sources: Sequence[int]) -> dict[str, list[float]]:
    """Root mean square of the stored keys (after RoPE) and values of each source layer, for ids (B, S)."""
    stored: dict[int, KV] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda _module, _args, out: stored.update({layer: out[1]})

    hooks = [model.model.layers[j].register_forward_hook(keep(j)) for j in sources]
    try:
        model(ids.to(model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(SIDES, zip(*(stored[j] for j in sources), strict=True), strict=True)
    return {side: [float(x.square().mean().sqrt()) for x in tensors] for side, tensors in pairs}


def run_probe(
    config: TrainConfig, num_seeds: int, out: Path, progress: Progress, should_stop: Callable[[], bool]
) -> Probe:
    """Trains one model per seed in out/seed-N and reads its fusion weights. A stopped run is resumed.

    Args:
        config: The configuration that all runs share.
        num_seeds: Number of seeds, starting with `run.seed`.
        out: Output folder.
        progress: Progress display.
        should_stop: Returns True to interrupt the run.

    Raises:
        Stopped: The run was interrupted.
        ConfigError: The probe does not support the model, or `out` has runs of another one.
    """
    sources, readers = check_plan(resolve_plan(config.model))
    if config.model.kv_lora_rank is not None:
        raise ConfigError(
            f"model.kv_lora_rank must be none for the probe, got {config.model.kv_lora_rank}: latent "
            "attention stores no keys and values; leave it out"
        )
    seeds = seeds_of(config, num_seeds)
    found: dict[str, list[Any]] = {"keys": [], "values": [], "loss": [], "bits": []}
    rms: dict[str, Matrix] = {"keys": [], "values": []}
    conditions: dict[str, Any] = {}
    for seed in seeds:
        done = finish(config.updated([("run.seed", seed)]), out / f"seed-{seed}", progress, should_stop)
        for side, matrix in learned_weights(done.model, readers).items():
            found[side].append(significant(matrix))
        (ids,) = validation_batches(done.data.valid, config.run.batch_size, config.data.seq_len, 1)
        for side, sizes in stored_rms(done.model, ids, sources).items():
            rms[side].append(significant(sizes))
        found["loss"].append(significant(done.valid_loss))
        found["bits"].append(significant(done.valid_bits_per_byte))
        conditions = done.conditions
    return Probe(
        plan=config.model.plan,
        source_layers=sources,
        reconstruction_layers=readers,
        seeds=seeds,
        keys=found["keys"],
        values=found["values"],
        rms=rms,
        valid_loss=found["loss"],
        valid_bits_per_byte=found["bits"],
        conditions=conditions,
        config=without_seed(config),
    )


def read_probe(path: Path, result: Any) -> Probe:
    """Validates the content of a probe.json.

    Raises:
        ValueError: The content is not complete or is another kind of result. The message names the file.
    """
    kinds = {"plan": str, "rms": dict, "conditions": dict, "config": dict}
    names = [field.name for field in fields(Probe)]
    result = check_result(result, path, "probe", {name: kinds.get(name, list) for name in names})
    probe = Probe(**{name: result[name] for name in names})
    for side in SIDES:
        matrices = getattr(probe, side)
        if len(matrices) != len(probe.seeds) or not all(
            finite_rows(matrix, len(probe.source_layers)) and len(matrix) == len(probe.reconstruction_layers)
            for matrix in matrices
        ):
            raise ValueError(
                f"{path}: {side!r} must have {len(probe.reconstruction_layers)} rows of "
                f"{len(probe.source_layers)} weights for each of {len(probe.seeds)} seeds"
            )
        sizes = probe.rms.get(side)
        if not sizes or not finite_rows(sizes, len(probe.source_layers)) or len(sizes) != len(probe.seeds):
            raise ValueError(
                f"{path}: 'rms' must have {len(probe.source_layers)} numbers for the {side} of each of "
                f"{len(probe.seeds)} seeds"
            )
    return probe


def table(probe: Probe) -> str:
    """Table of the centers per reconstruction layer and overall, and of the weight on outer sources."""
    centers = {side: list(zip(*probe.centers(side), strict=True)) for side in SIDES}  # [layer][seed]
    rows = [["reconstruction layer", "center of keys", "center of values", "keys - values"]]
    for row, layer in enumerate(probe.reconstruction_layers):
        keys, values = (centers[side][row] for side in SIDES)
        difference = [key - value for key, value in zip(keys, values, strict=True)]
        rows.append([str(layer), *(f"{Spread.of(column):.2f}" for column in (keys, values, difference))])
    for name, scaled in (("all", False), ("all, scaled", True)):
        overall = [*(probe.center(side, scaled) for side in SIDES), probe.asymmetry(scaled)]
        rows.append([name, *(f"{spread:.2f}" for spread in overall)])
    low, high = probe.source_layers[:2], probe.source_layers[-2:]
    for name, layers in (("first", low), ("last", high)):
        shares = [f"{probe.share(side, layers):.2f}" for side in SIDES]
        rows.append([f"weight on the {name} {len(layers)} sources", *shares, ""])
    spread = f"; ± standard deviation over {len(probe.seeds)} seeds" if len(probe.seeds) > 1 else ""
    return (
        f"{aligned(rows)}\n\nCenter of mass over source layers {probe.source_layers}, counted from 0, by "
        f"absolute weight{spread}.\nEqual weights: {Spread.of(probe.source_layers).mean:.2f}. Scaled: weight "
        "times root mean square of the source's keys or values.\n"
        f"Validation loss: {Spread.of(probe.valid_bits_per_byte):.4f} bits per byte."
    )
