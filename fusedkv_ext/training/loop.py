"""A whole run: start or resume, train with logging, validation and checkpoints, and say how it ended."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
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
from fusedkv_ext.training.metrics import MetricsLog, NoMetricsLog, Record
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.saver import Saver, collect, restore
from fusedkv_ext.training.trainer import StepResult, Trainer, build_model, resolve_device


@dataclass(frozen=True)
class RunResult:
    """The end of a run. Losses in nats per token; the last validation covers the final weights."""

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


@dataclass
class Run:
    """A trainer together with where it writes; under torchrun all processes make one."""

    trainer: Trainer
    tokenizer: Tokenizer
    folder: Path
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.checkpoint_root, self.trainer.config.run.keep)

    @property
    def checkpoint_root(self) -> Path:
        return self.folder / "checkpoints"

    def save(self) -> Path:
        """Begins to write the checkpoint of this step, which is there after `saver.wait()`; together on all
        processes.
        """
        trainer, tokenizer = self.trainer, self.tokenizer
        config = json.dumps(trainer.model.config.to_dict(), indent=2) + "\n"
        facts = {
            "step": trainer.step,
            "seconds": trainer.seconds,
            "config": trainer.config.to_dict(),
            "data_key": trainer.data.info.key,
            "threads": torch.get_num_threads(),
            "processes": session.world_size(),
            "torch": str(torch.__version__),
        }

        def fill(folder: Path) -> None:
            (folder / CONFIG).write_text(config, encoding="utf-8")
            run_folder.write_trainer(folder, facts)
            tokenizer.save(folder)

        return self.saver.save(trainer.step, collect(trainer), fill)


def load_data(config: TrainConfig, tokenizer: Tokenizer) -> TokenData:
    """The token files of a configuration; rank 0 makes them, the others find them.

    Raises ConfigError when the tokenizer is not of the size that `data.vocab_size` expects, or does not end
    documents when `data.document_masks` needs that.
    """
    data, size = config.data, tokenizer.vocab_size
    if data.vocab_size and abs(size - data.vocab_size) > data.vocab_size / 10:
        raise ConfigError(
            f"this configuration is for a vocabulary of about {data.vocab_size:,} (data.vocab_size), but "
            f"{data.tokenizer or 'without data.tokenizer the vocabulary is bytes and'} has {size:,}; give "
            "another one with --tokenizer, or train with this one by --set data.vocab_size=0"
        )
    if data.document_masks and tokenizer.separator is None:
        raise ConfigError(
            f"data.document_masks: {data.tokenizer} has no token that ends documents, such as <|endoftext|>; "
            "give another one with --tokenizer, or train with data.document_masks=false"
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
    """CUDA has faster kernels whose sums run in any order; resuming bit for bit needs the others."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration with paths that mean the same from any folder: a run may be resumed elsewhere."""

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


def start(config: TrainConfig, folder: Path) -> Run:
    """A new run in `folder`. Raises ConfigError when there are checkpoints of another one already."""
    if run_folder.latest(folder / "checkpoints") is not None:
        raise ConfigError(
            f"{folder} already holds a run; add --resume to go on with it, or choose another --out"
        )
    session.check_batch(config)  # now, not after hours of encoding
    config = absolute_paths(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = load_data(config, tokenizer)
    model = build_model(config, tokenizer.vocab_size)
    if session.rank() == 0:  # of a run that was killed before its first checkpoint
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        run_folder.clean(folder / "checkpoints")
    _check_alike(0, config, data, _sums(model) if session.world_size() > 1 else [])
    return Run(Trainer(model, data, config, resolve_device(config.run.device)), tokenizer, folder)


def _check_alike(step: int, config: TrainConfig, data: TokenData, weights: list[int]) -> None:
    """Raises ConfigError when the processes of torchrun do not begin with the same state; before they share
    a model, where those that differ would wait for each other.
    """
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
    """Of the bits of each weight, as integers: the same whatever the order in which a machine adds."""
    return [int(weight.detach().flatten().view(torch.uint8).sum()) for weight in model.parameters()]


def resume(
    folder: Path, change: Callable[[TrainConfig], TrainConfig] = lambda config: config
) -> tuple[Run, list[str]]:
    """The newest checkpoint of `folder`, ready to go on, and warnings.

    change: applied to the saved configuration (more steps, say). The model and the text must stay what they
    were: ConfigError otherwise.
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
            "the training text is not what this run began with (files, their content or the split changed); "
            "restore it, or start a new run in another --out"
        )
    _check_alike(state["step"], config, data, [])  # weights are read from the same files
    trainer = Trainer(allocate(newest), data, config, resolve_device(config.run.device))
    restore(newest, trainer)
    trainer.step, trainer.seconds = state["step"], state["seconds"]
    if session.rank() == 0:
        log = MetricsLog(folder / "metrics.jsonl")
        log.forget_after(trainer.step)
        log.close()
    return Run(trainer, tokenizer, folder), _differences(state, saved, config)


def _differences(state: dict[str, Any], saved: TrainConfig, config: TrainConfig) -> list[str]:
    """What keeps a resumed run from repeating the uninterrupted one bit for bit."""
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
    """The configuration without the keys that only say when to report and to save."""
    reporting = {"log_every": 1, "valid_every": 1, "valid_batches": 1, "save_every": 1, "keep": 1}
    return replace(config, run=replace(config.run, **reporting))


def run(
    this: Run,
    progress: Progress,
    *,
    stop_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Trains to the configured number of steps, or stops early with a checkpoint.

    stop_after: number of steps (counted from the run's beginning) after which to stop. should_stop: asked
    after each step; what one process of torchrun answers stops them all after the same step. Raises
    TrainingDiverged naming the checkpoint to go back to.
    """
    trainer, config = this.trainer, this.trainer.config.run
    end = min(config.steps, stop_after or config.steps)
    log = NoMetricsLog() if session.rank() else MetricsLog(this.folder / "metrics.jsonl")
    log.write(_describe(this))
    progress.task("train", config.steps, trainer.step)
    pending: list[float] = []
    stopped = False
    started, train_loss, valid_loss = (trainer.step, trainer.seconds), None, None
    try:
        while trainer.step < end and not (stopped := _asked(this, should_stop)):
            result = trainer.train_step()
            pending.append(result.loss)
            if result.observed is not None:
                log.write({**result.observed, "step": result.step})
            text = ""
            if result.step % config.log_every == 0 or result.step == end:
                train_loss = sum(pending) / len(pending)
                speed = (trainer.step - started[0]) * trainer.tokens_per_step / (trainer.seconds - started[1])
                record = train_record(trainer, train_loss, result)
                record["tokens_per_s"] = speed
                log.write(record)
                pending, text = [], _text(record)
            progress.advance("train", result.step, text)
            valid_loss = None
            if result.step % config.valid_every == 0 and result.step < end:
                valid_loss = _validate(trainer, log, progress)
            if result.step % config.save_every == 0:
                this.save()
        if stopped:
            this.save()
            this.saver.wait()  # before the validation: whoever sent the signal may not wait for that
        valid_loss = _validate(trainer, log, progress) if valid_loss is None else valid_loss
        saved = this.save()
        this.saver.wait()
    except TrainingDiverged as error:
        this.saver.close()
        newest = run_folder.latest(this.checkpoint_root)
        where = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise TrainingDiverged(f"{error}; {where}") from error
    finally:
        this.saver.close()  # whatever ends the run, a checkpoint that is being written gets to its end
        log.close()
    return RunResult(
        steps=trainer.step,
        tokens=trainer.step * trainer.tokens_per_step,
        parameters=trainer.num_parameters,
        seconds=trainer.seconds,
        train_loss=train_loss,
        valid_loss=valid_loss,
        valid_bits_per_byte=trainer.bits_per_byte(valid_loss),
        checkpoint=str(saved),
        finished=trainer.step >= config.steps,
    )


def _asked(this: Run, should_stop: Callable[[], bool]) -> bool:
    """Whether any process is to stop. Raises CheckpointError on all of them when one could not write."""
    stop, failed = session.any_ranks(should_stop(), this.saver.failed)
    if failed:
        this.saver.wait()
        raise CheckpointError("another process could not write its part of a checkpoint")
    return stop


def _describe(this: Run) -> dict[str, Any]:
    trainer = this.trainer
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


def train_record(trainer: Trainer, loss: float, last: StepResult) -> Record:
    """The record of the steps since the previous one: their mean loss, and the last step's other numbers."""
    return {
        "kind": "train",
        "step": trainer.step,
        "tokens": trainer.step * trainer.tokens_per_step,
        "loss": loss,
        "bits_per_byte": trainer.bits_per_byte(loss),
        "grad_norm": last.grad_norm,
        "lr": last.lr,
        "seconds": trainer.seconds,
    }


def _text(record: dict[str, Any]) -> str:
    return (
        f"loss {record['loss']:.4f}  {record['bits_per_byte']:.3f} bits/byte  "
        f"norm {record['grad_norm']:.2f}  lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tokens/s"
    )


def valid_record(trainer: Trainer, loss: float) -> Record:
    """The record of a validation; raises TrainingDiverged for a loss that is no number."""
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the validation loss at step {trainer.step} is {loss}; try a lower optim.lr")
    return {
        "kind": "valid",
        "step": trainer.step,
        "tokens": trainer.step * trainer.tokens_per_step,
        "loss": loss,
        "bits_per_byte": trainer.bits_per_byte(loss),
        "seconds": trainer.seconds,
    }


def _validate(trainer: Trainer, log: MetricsLog | NoMetricsLog, progress: Progress) -> float:
    record = valid_record(trainer, trainer.evaluate())
    log.write(record)
    progress.line(
        f"validation at step {trainer.step}: loss {record['loss']:.4f}, "
        f"{record['bits_per_byte']:.3f} bits/byte"
    )
    return record["loss"]
