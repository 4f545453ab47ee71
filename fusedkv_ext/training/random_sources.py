"""Random sources (R-CLA, arXiv:2604.22782): one training run for cache plans of any size.

In each step every layer but the first attends, with probability p, to the keys and values of an earlier layer
instead of its own. All layers keep their projections. Afterwards any of them may store nothing and read the
nearest storing layer below.
"""

from __future__ import annotations

import torch

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.training.data.tokens import generator_of

__all__ = ["check_probability", "draw_sources"]


def check_probability(name: str, probability: float) -> None:
    """Raises ConfigError unless ``probability`` is from 0 to 1."""
    if not 0 <= probability <= 1:
        raise ConfigError(f"{name} must be a probability from 0 to 1, got {probability}")


def draw_sources(num_layers: int, probability: float, seed: int, step: int) -> list[int] | None:
    """The layer whose keys and values each layer attends to in a step, its own or an earlier one's.

    A pure function of its arguments, so that a resumed run draws the same.

    Args:
        num_layers: L.
        probability: p. An earlier layer is drawn uniformly from 0 .. i - 1.
        seed: Seed of the run.
        step: Optimizer step.

    Returns:
        L layers; None if p is 0, which leaves training as it is without random sources.
    """
    if probability == 0:
        return None
    generator = generator_of(f"sources:{seed}:{step}")
    coins, places = torch.rand(2, num_layers, generator=generator).tolist()
    return [
        int(place * i) if i and coin < probability else i
        for i, (coin, place) in enumerate(zip(coins, places, strict=True))
    ]
