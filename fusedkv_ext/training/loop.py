"""The loop of `train` and `uptrain`: training with logging, validation and checkpoints.

`run` is the loop of both commands. `Run` defines what differs between them: when to log, validate and save,
what a checkpoint contains in addition to tensors, and the end of a run. `TrainRun` is the run of `fusedkv
train`, which `start` creates and `resume` continues.
"""

from __future__ import annotations

import json
import math
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedkv_ext.checkpoint.pretrained import CONFIG, allocate
from fusedkv_ext.errors import CheckpointError, ConfigError, TrainingDiverged
from fusedkv_ext.training import run_folder, session
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer
from fusedkv_ext.training.data.tokens import TokenData, prepare
from fusedkv_ext.training.metrics import Log, MetricsLog, NoMetricsLog, Record
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.saver import Saver, collect, restore
from fusedkv_ext.training.trainer import (
    DecoderTrainer,
    StepResult,
    Trainer,
    build_model,
    resolve_device,
)

Mark = tuple[int, float]  # tokens and seconds at the start of a speed measurement


class Run(ABC):
    """A trainer with its output folder. Under torchrun every rank has one.

    Args:
        trainer: Performs the optimizer steps.
        folder: Folder of metrics.jsonl and of the checkpoints.
        keep: Number of checkpoints to keep.
    """

    task = "train"  # name in the progress display

    def __init__(self, trainer: Trainer, folder: Path, keep: int) -> None:
        self.trainer, self.folder = trainer, folder
        self.saver = Saver(self.checkpoint_root, keep)

    @property
    def checkpoint_root(self) -> Path:
        return self.folder / "checkpoints"

    def open_log(self) -> Log:
        """Opens the metrics log. Only rank 0 writes to it."""
        return NoMetricsLog() if session.rank() else MetricsLog(self.folder / "metrics.jsonl")

    def save(self) -> Path:
        """Starts to write the checkpoint of this step; `saver.wait()` waits for it. Collective over ranks."""
        facts = {
            "step": self.trainer.step,
            "seconds": self.trainer.seconds,
            "threads": torch.get_num_threads(),
            "processes": session.world_size(),
            "torch": str(torch.__version__),
            **self.facts(),
        }

        def fill(folder: Path) -> None:
            run_folder.write_trainer(folder, facts)
            self.write_files(folder)

        return self.saver.save(self.trainer.step, collect(self.trainer), fill)

    def restore(self, checkpoint: Path, facts: dict[str, Any]) -> None:
        """Restores trainer and metrics from a checkpoint and from its `facts`. Collective over ranks."""
        with session.quiet():
            restore(checkpoint, self.trainer)
        self.trainer.step, self.trainer.seconds = facts["step"], facts["seconds"]
        if session.rank() == 0:
            log = MetricsLog(self.folder / "metrics.jsonl")
            log.forget_after(self.trainer.step)
            log.close()

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Further entries of the checkpoint's trainer.json, as plain values."""

    def write_files(self, folder: Path) -> None:
        """Writes further files into the checkpoint folder. Runs on rank 0, in the saver's thread."""
        return

    @abstractmethod
    def describe(self) -> Record:
        """The record of kind "run", written once per start."""

    def begin(self, log: Log, progress: Progress) -> None:
        """Called before the first step of this start."""
        return

    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Progress of the run: (done, total)."""

    @abstractmethod
    def due(self, before: float, last: bool) -> tuple[bool, bool, bool]:
        """Decides whether to log, validate and save after a step.

        Args:
            before: Fraction of the budget that was used before the step.
            last: The step was the last one of this start.

        Returns:
            (log, validate, save).
        """

    def speed_from(self, start: Mark, last_record: Mark) -> Mark:
        """The start of the speed measurement: that of this process, or the previous record."""
        return start

    @abstractmethod
    def text(self, record: Record) -> str:
        """Formats a record of kind "train" for the progress display."""

    def validated(self, loss: float) -> tuple[Record, str]:
        """The record of a validation and its line in the progress display."""
        record = valid_record(self.trainer, loss)
        return record, (
            f"validation at step {self.trainer.step}: loss {loss:.4f}, "
            f"{record['bits_per_byte']:.3f} bits/byte"
        )

    @abstractmethod
    def end(self, log: Log, progress: Progress, stopped: bool, state: Progressed) -> Any:
        """Called after the last step of this start: saves, and returns the result of the run.

        Args:
            log: The metrics log.
            progress: The progress display.
            stopped: The run was interrupted.
            state: Losses at the end of the loop.
        """


@dataclass
class Progressed:
    """Losses at the end of the loop.

    Attributes:
        train_loss: Mean loss of the last record.
        valid_loss: Loss of a validation after the last step; None if there was none.
    """

    train_loss: float | None = None
    valid_loss: float | None = None


def run(
    this: Run,
    progress: Progress,
    *,
    stop_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Any:
    """Trains until the budget is used, or stops early with a checkpoint.

    Args:
        this: The run.
        progress: The progress display.
        stop_after: Step after which to stop, counted from the beginning of the run.
        should_stop: Called after each step. If it returns True on one rank, all ranks stop after that step.

    Returns:
        The result of `Run.end`.

    Raises:
        TrainingDiverged: A loss is not finite. The message names the last checkpoint.
        CheckpointError: A rank could not write its part of a checkpoint.
    """
    with session.quiet():
        return _run(this, progress, stop_after, should_stop)


def _run(this: Run, progress: Progress, stop_after: int | None, should_stop: Callable[[], bool]) -> Any:
    trainer, log = this.trainer, this.open_log()
    state, pending, stopped = Progressed(), list[StepResult](), False
    start = last_record = (trainer.tokens, trainer.seconds)
    try:
        log.write(this.describe())
        this.begin(log, progress)
        done, total = this.progress()
        progress.task(this.task, total, done)
        while not _ends(trainer, stop_after) and not (stopped := _asked(this, should_stop)):
            before = trainer.share
            pending.append(trainer.train_step())
            state.valid_loss = None
            if pending[-1].observed is not None:
                log.write({**pending[-1].observed, "step": trainer.step})
            last, text = _ends(trainer, stop_after), ""
            log_now, validate_now, save_now = this.due(before, last)
            if log_now:
                record = train_record(trainer, pending, this.speed_from(start, last_record))
                log.write(record)
                state.train_loss, text, pending = record["loss"], this.text(record), []
                last_record = (trainer.tokens, trainer.seconds)
            progress.advance(this.task, this.progress()[0], text)
            if validate_now:
                state.valid_loss = validate(this, log, progress)
            if save_now:
                this.save()
        return this.end(log, progress, stopped, state)
    except TrainingDiverged as error:
        this.saver.close()
        newest = run_folder.latest(this.checkpoint_root)
        where = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise TrainingDiverged(f"{error}; {where}") from error
    finally:
        this.saver.close()  # also after an error: completes a checkpoint that is being written
        log.close()


def _ends(trainer: Trainer, stop_after: int | None) -> bool:
    return trainer.finished or (stop_after is not None and trainer.step >= stop_after)


def _asked(this: Run, should_stop: Callable[[], bool]) -> bool:
    """Whether any rank is to stop. Raises CheckpointError on all ranks if one could not write."""
    stop, failed = session.any_ranks(should_stop(), this.saver.failed)
    if failed:
        this.saver.wait()
        raise CheckpointError(
            "every rank must write its part of a checkpoint, got a failure on another rank; see its log"
        )
    return stop


def validate(this: Run, log: Log, progress: Progress, loss: float | None = None) -> float:
    """Reports the validation loss, and computes it first unless `loss` is given."""
    loss = this.trainer.evaluate() if loss is None else loss
    record, line = this.validated(loss)
    log.write(record)
    progress.line(line)
    return loss


def train_record(trainer: Trainer, steps: Sequence[StepResult], since: Mark | None = None) -> Record:
    """The record of some steps: mean losses, and the other numbers of the last step.

    Args:
        trainer: The trainer after the last step.
        steps: The results of the steps.
        since: Start of the speed measurement. If None, the record has no speed.
    """

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    loss, last = mean([step.loss for step in steps]), steps[-1]
    record = {
        "kind": "train",
        "step": trainer.step,
        "tokens": trainer.tokens,
        "loss": loss,
        **{name: mean([step.parts[name] for step in steps]) for name in last.parts},
        "bits_per_byte": trainer.bits_per_byte(loss),
        "grad_norm": last.grad_norm,
        "lr": last.lr,
        "seconds": trainer.seconds,
    }
    if since is not None:
        record["tokens_per_s"] = (trainer.tokens - since[0]) / (trainer.seconds - since[1])
    return record


def valid_record(trainer: Trainer, loss: float) -> Record:
    """The record of a validation.

    Raises:
        TrainingDiverged: The loss is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"the validation loss at step {trainer.step} is {loss}. {trainer.settings.advice}"
        )
    return {
        "kind": "valid",
        "step": trainer.step,
        "tokens": trainer.tokens,
        "loss": loss,
        "bits_per_byte": trainer.bits_per_byte(loss),
        "seconds": trainer.seconds,
    }


# fusedkv train


@dataclass(frozen=True)
class RunResult:
    """The result of a run. Losses are in nats per token; `valid_loss` is that of the final weights."""

    steps: int
    tokens: int
    parameters: int
    seconds: float
    train_loss: float | None
    valid_loss: float
    valid_bits_per_byte: float
    checkpoint: str
    finished: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TrainRun(Run):
    """A run of `fusedkv train`. Its checkpoints are models that every command reads."""

    trainer: DecoderTrainer

    def __init__(self, trainer: DecoderTrainer, tokenizer: Tokenizer, folder: Path) -> None:
        super().__init__(trainer, folder, trainer.config.run.keep)
        self.tokenizer = tokenizer

    def facts(self) -> dict[str, Any]:
        return {"config": self.trainer.config.to_dict(), "data_key": self.trainer.data.info.key}

    def write_files(self, folder: Path) -> None:
        config = json.dumps(self.trainer.model.config.to_dict(), indent=2) + "\n"
        (folder / CONFIG).write_text(config, encoding="utf-8")
        self.tokenizer.save(folder)

    def describe(self) -> Record:
        trainer = self.trainer
        return {
            "kind": "run",
            "step": trainer.step,
            "name": trainer.config.model.plan,
            "parameters": trainer.num_parameters,
            "device": str(trainer.device),
            "threads": torch.get_num_threads(),
            "processes": session.world_size(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "data": asdict(trainer.data.info),
            "config": trainer.config.to_dict(),
        }

    def progress(self) -> tuple[int, int]:
        return self.trainer.step, self.trainer.config.run.steps

    def due(self, before: float, last: bool) -> tuple[bool, bool, bool]:
        step, run = self.trainer.step, self.trainer.config.run
        validate_now = step % run.valid_every == 0 and not last
        return step % run.log_every == 0 or last, validate_now, step % run.save_every == 0

    def text(self, record: Record) -> str:
        return (
            f"loss {record['loss']:.4f}  {record['bits_per_byte']:.3f} bits/byte  "
            f"norm {record['grad_norm']:.2f}  lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tokens/s"
        )

    def end(self, log: Log, progress: Progress, stopped: bool, state: Progressed) -> RunResult:
        trainer, valid_loss = self.trainer, state.valid_loss
        if stopped:
            self.save()
            self.saver.wait()  # before the validation, since the sender of the signal may not wait for it
        valid_loss = validate(self, log, progress) if valid_loss is None else valid_loss
        saved = self.save()
        self.saver.wait()
        return RunResult(
            steps=trainer.step,
            tokens=trainer.tokens,
            parameters=trainer.num_parameters,
            seconds=trainer.seconds,
            train_loss=state.train_loss,
            valid_loss=valid_loss,
            valid_bits_per_byte=trainer.bits_per_byte(valid_loss),
            checkpoint=str(saved),
            finished=trainer.finished,
        )


def load_data(config: TrainConfig, tokenizer: Tokenizer) -> TokenData:
    """Opens the token files of a configuration. Rank 0 creates them, the others wait for it.

    Raises:
        ConfigError: The vocabulary size differs from `data.vocab_size`, or `data.document_masks` is set and
            the tokenizer has no token that ends documents.
    """
    data, size = config.data, tokenizer.vocab_size
    if data.vocab_size and abs(size - data.vocab_size) > data.vocab_size / 10:
        raise ConfigError(
            f"the tokenizer must have about {data.vocab_size:,} tokens (data.vocab_size), got {size:,} from "
            f"{data.tokenizer or 'the byte vocabulary, as data.tokenizer is not set'}; give another one with "
            "--tokenizer, or accept this one with --set data.vocab_size=0"
        )
    if data.document_masks and tokenizer.separator is None:
        raise ConfigError(
            "data.document_masks needs a tokenizer with a token that ends documents, such as <|endoftext|>, "
            f"got {data.tokenizer} without one; give another one with --tokenizer, or set "
            "data.document_masks=false"
        )
    return session.rank_zero_first(
        lambda: prepare(
            tokenizer,
            data.text,
            data.valid_text,
            valid_fraction=data.valid_fraction,
            cache_dir=data.cache_dir,
        )
    )


def deterministic(device: torch.device) -> None:
    """Selects deterministic kernels on CUDA. Bit-exact resumption needs them."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """Makes the paths of a configuration absolute, so that a run can be resumed from any folder."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    data = config.data
    changed: list[tuple[str, Any]] = [
        ("data.text", [absolute(path) for path in data.text]),
        ("data.valid_text", [absolute(path) for path in data.valid_text]),
    ]
    if data.tokenizer:
        changed.append(("data.tokenizer", absolute(data.tokenizer)))
    if config.model.plan.endswith(".json"):
        changed.append(("model.plan", absolute(config.model.plan)))
    return config.updated(changed)


def start(config: TrainConfig, folder: Path) -> TrainRun:
    """Starts a new run in `folder`.

    Raises:
        ConfigError: The folder already has checkpoints, or the settings are invalid.
    """
    if run_folder.latest(folder / "checkpoints") is not None:
        raise ConfigError(
            f"{folder} already holds a run; add --resume to continue it, or choose another --out"
        )
    session.check_batch(config)  # before the encoding, which may take hours
    config = absolute_paths(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = load_data(config, tokenizer)
    model = build_model(config, tokenizer.vocab_size)
    if session.rank() == 0:  # files of a run that was killed before its first checkpoint
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        run_folder.clean(folder / "checkpoints")
    _check_alike(0, config, data, _sums(model) if session.world_size() > 1 else [])
    trainer = DecoderTrainer(model, data, config, resolve_device(config.run.device))
    return TrainRun(trainer, tokenizer, folder)


def _check_alike(step: int, config: TrainConfig, data: TokenData, weights: list[int]) -> None:
    """Raises ConfigError if ranks start from different states, before collectives could deadlock."""
    session.check_alike(
        {
            "step": step,
            "configuration": config,
            "text": data.info.key,
            "weights": weights,
            "version of torch": torch.__version__,
        }
    )


def _sums(model: nn.Module) -> list[int]:
    """Integer sums over the bytes of each weight, which do not depend on the order of summation."""
    return [int(weight.detach().flatten().view(torch.uint8).sum()) for weight in model.parameters()]


def resume(
    folder: Path, change: Callable[[TrainConfig], TrainConfig] = lambda config: config
) -> tuple[TrainRun, list[str]]:
    """Resumes from the newest checkpoint of `folder`.

    Args:
        folder: The output folder of the run.
        change: Applied to the saved configuration, for example to add steps. Model and text must not change.

    Returns:
        The run, and warnings about differences that prevent bit-exact resumption.

    Raises:
        FileNotFoundError: The folder has no checkpoint.
        ConfigError: The model, the tokenizer or the text changed.
    """
    newest = run_folder.latest(folder / "checkpoints")
    session.check_alike({"newest checkpoint": newest and newest.name})
    if newest is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint to resume")
    if session.rank() == 0:
        run_folder.clean(folder / "checkpoints")
    state = run_folder.read_trainer(newest)
    saved = TrainConfig.from_dict(state["config"])
    config = absolute_paths(change(saved))
    if config.model != saved.model or config.data.tokenizer != saved.data.tokenizer:
        raise ConfigError(
            "a resumed run cannot change its model or tokenizer; leave them out, or start a new run"
        )
    tokenizer = saved_tokenizer(newest)
    data = load_data(config, tokenizer)
    if data.info.key != state["data_key"]:
        raise ConfigError(
            "a resumed run must have the same training text, got another one (files, their content or the "
            "split changed); restore it, or start a new run in another --out"
        )
    _check_alike(state["step"], config, data, [])  # weights are read from the same files
    trainer = DecoderTrainer(allocate(newest), data, config, resolve_device(config.run.device))
    this = TrainRun(trainer, tokenizer, folder)
    this.restore(newest, state)
    return this, _differences(state, saved, config)


def _differences(state: dict[str, Any], saved: TrainConfig, config: TrainConfig) -> list[str]:
    """Warnings about differences that prevent bit-exact resumption."""
    notes = []
    if state["threads"] != torch.get_num_threads():
        notes.append(f"{torch.get_num_threads()} threads, {state['threads']} before")
    processes = state.get("processes", 1)
    if processes != session.world_size():
        notes.append(f"{session.world_size()} processes, {processes} before")
    if state["torch"] != torch.__version__:
        notes.append(f"torch {torch.__version__}, {state['torch']} before")
    if _what_matters(config) != _what_matters(saved):
        notes.append("the configuration changed")
    return [f"not bit for bit what an uninterrupted run gives: {note}" for note in notes]


def _what_matters(config: TrainConfig) -> TrainConfig:
    """The configuration with fixed values for the keys of reporting and saving."""
    reporting = {"log_every": 1, "valid_every": 1, "valid_batches": 1, "save_every": 1, "keep": 1}
    return replace(config, run=replace(config.run, **reporting))
