"""Interleaved timing of several calls, so that noise affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

_Item = TypeVar("_Item")


@dataclass
class Timed:
    """A timed call and its samples.

    Args:
        launch: Executes the call ``calls`` times.
        calls: Calls per launch.
        before: Called before each launch, untimed.
        samples: Seconds per call, one entry per launch.
    """

    launch: Callable[[], object]
    calls: int = 1
    before: Callable[[], object] | None = None
    samples: list[float] = field(default_factory=list)


def turns(items: Sequence[_Item], rounds: int) -> Iterator[_Item]:
    """Yields every item once per round, in an order that rotates between rounds."""
    for turn in range(rounds):
        first = turn % max(len(items), 1)
        yield from items[first:]
        yield from items[:first]


def sample(timed: Sequence[Timed], rounds: int, device: torch.device | None = None) -> None:
    """Takes ``rounds`` samples of each call. CUDA devices are synchronized before and after each launch."""
    wait = device is not None and device.type == "cuda"
    for each in turns(timed, rounds):
        if each.before is not None:
            each.before()
        if wait:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        each.launch()
        if wait:
            torch.cuda.synchronize(device)
        each.samples.append((time.perf_counter() - began) / each.calls)


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each call.

    Args:
        calls: Name -> call.
        repeats: Timed rounds.
        device: Device of the calls.
        warm_up: Rounds before, whose samples are dropped.
    """
    timed = {name: Timed(call) for name, call in calls.items()}
    sample(list(timed.values()), warm_up + repeats, device)
    return {name: statistics.median(each.samples[warm_up:]) for name, each in timed.items()}


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of samples from the same rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
