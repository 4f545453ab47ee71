"""Interleaved training of several models with equal seeds and windows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedkv_ext.lab import timing
from fusedkv_ext.lab.demo.settings import PLANS
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data.tokens import TokenData
from fusedkv_ext.training.loop import train_record, valid_record
from fusedkv_ext.training.metrics import MetricsLog
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.trainer import DecoderTrainer, StepResult, build_model, resolve_device


def make_trainers(config: TrainConfig, data: TokenData) -> dict[str, DecoderTrainer]:
    """Creates one trainer per plan. Equal seeds give all of them the same windows in the same order."""
    device = resolve_device(config.run.device)
    trainers = {}
    for plan in PLANS:
        own = config.updated([("model.plan", plan)])
        trainers[plan] = DecoderTrainer(build_model(own, data.info.vocab_size), data, own, device)
    return trainers


def choose_threads(config: TrainConfig, data: TokenData) -> int:
    """Measures the number of CPU threads with the shortest training step.

    For small models on large or busy machines this is less than the number of cores.
    """
    most = torch.get_num_threads()
    trainer = make_trainers(config, data)[PLANS[0]]
    if trainer.device.type != "cpu":
        return most
    seconds = {}
    try:
        for threads in sorted({most, *(min(most, count) for count in (1, 2, 4, 8, 16))}):
            torch.set_num_threads(threads)
            seconds[threads] = timing.in_turns({"step": trainer.train_step}, 3, trainer.device)["step"]
    finally:
        torch.set_num_threads(most)
    return min(seconds, key=seconds.__getitem__)


def calibrate(config: TrainConfig, data: TokenData) -> dict[str, float]:
    """Median seconds of one training step of each plan, measured on temporary models."""
    trainers = make_trainers(config, data)
    device = next(iter(trainers.values())).device
    return timing.in_turns({name: t.train_step for name, t in trainers.items()}, 5, device, warm_up=2)


@dataclass(frozen=True)
class TrainingDone:
    """Number of steps of every model, and the median seconds per step of each."""

    steps: int
    step_seconds: Mapping[str, float]


def train(
    trainers: Mapping[str, DecoderTrainer], folders: Mapping[str, Path], progress: Progress, deadline: float
) -> TrainingDone:
    """Trains all models, one step of each in turn.

    Args:
        trainers: The trainer of each model.
        folders: The output folder of each model.
        progress: Progress display.
        deadline: Time of `time.monotonic` after which no step starts, except the first.
    """
    planned = next(iter(trainers.values())).config.run.steps
    log_every, valid_every = max(1, planned // 200), max(1, planned // 8)
    results: dict[str, list[StepResult]] = {name: [] for name in trainers}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    done = 0
    with ExitStack() as stack:
        logs = {}
        for name, folder in folders.items():
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            logs[name] = MetricsLog(folder / "metrics.jsonl")
            stack.callback(logs[name].close)
            progress.task(name, planned)
        while done < planned and (done == 0 or time.monotonic() < deadline):
            done += 1
            for name, trainer in trainers.items():
                before = trainer.seconds
                result, text = trainer.train_step(), ""
                seconds[name].append(trainer.seconds - before)
                results[name].append(result)
                if done % log_every == 0 or done == planned:
                    record = train_record(trainer, results[name][-log_every:])
                    logs[name].write(record)
                    median = 1e3 * statistics.median(seconds[name][-50:])
                    text = f"{record['bits_per_byte']:.3f} bits/byte  {median:.0f} ms/step"
                if done % valid_every == 0 or done == planned:
                    logs[name].write(valid_record(trainer, trainer.evaluate(8)))
                progress.advance(name, done, text)
    return TrainingDone(done, {name: statistics.median(values) for name, values in seconds.items()})
