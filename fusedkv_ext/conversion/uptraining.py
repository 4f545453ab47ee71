"""Uptraining: a converted model learns on, so that its changed attention and the rest fit each other again.

SkipV1Former's recipe (arXiv:2510.16807): continue for 10 to 15 % of the original compute, at 1.5 times the
rate at which pre-training ended, without dropout. The original can be the teacher (distill.py).

Which windows of the text a step sees is a pure function of (seed, step), and nothing else is random, so the
state of a run is what is trained, AdamW's moments, the number of steps and the seconds in them. While it
runs, everything lies in OUT.partial; OUT appears when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.checkpoint import checked_files
from fusedkv_ext.conversion.uptrain_run import Run, UptrainResult, load, partial_folder
from fusedkv_ext.conversion.uptrain_settings import UptrainSettings
from fusedkv_ext.conversion.uptrainer import StepLosses, Uptrainer, held_out_loss
from fusedkv_ext.errors import ConfigError, TrainingDiverged
from fusedkv_ext.hf.loading import CONVERSION, save_like
from fusedkv_ext.training import run_folder
from fusedkv_ext.training.metrics import MetricsLog, Record, bits_per_byte
from fusedkv_ext.training.progress import Progress, SilentProgress

LOG_SECONDS = 5.0  # between lines of progress and records of metrics.jsonl; the first steps come one by one


def uptrain(
    folder: str | Path,
    text: Sequence[str | Path] = (),
    out: str | Path = "uptrained",
    *,
    resume: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    stop_after: int | None = None,
    **settings: Any,
) -> UptrainResult:
    """Continues the training of the causal language model in `folder` on `text` and writes the folder `out`.

    folder: a Hugging Face folder, converted or not. text: UTF-8 files or folders of them. settings: fields of
    ``UptrainSettings``; one of minutes, steps and tokens has to be given. should_stop is asked after each
    step; stop_after counts steps from the run's beginning: either way the run ends early with a checkpoint.
    resume: go on from the checkpoint of such a run, if there is one; text and settings may then be left out
    and cannot be others. With a budget of steps or tokens the result is bit for bit that of an uninterrupted
    run, on the same machine with the same number of threads.

    `out` has what `folder` has, the new weights in the dtype of the old, metrics.jsonl and, in
    conversion.json where there is one, a section "uptraining".

    Raises ConfigError for settings and for an `out` that exists, FileNotFoundError and ValueError for a
    folder, text, tokenizer or teacher that cannot be used, TrainingDiverged. `out` is never half written.
    """
    folder, out, progress = Path(folder), Path(out), progress or SilentProgress()
    settings, text = _absolute(settings), [_path(path) for path in text]
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder to write")
    newest = run_folder.latest(partial_folder(out) / "checkpoints")
    state = None
    if resume and newest is not None:
        state = run_folder.read_state(newest)
        chosen = UptrainSettings.from_dict(state["settings"]).resumed(settings)
        text = text or state["text"]
    else:
        if newest is not None:
            raise ConfigError(
                f"{partial_folder(out)} holds a run that was not finished; resume it, or delete that folder"
            )
        chosen = UptrainSettings.from_dict(settings)
        shutil.rmtree(partial_folder(out), ignore_errors=True)  # of a run without a checkpoint
    if not text:
        raise ConfigError("text: name at least one text file")
    run = load(folder, text, out, chosen, progress, state)
    return _train(run, progress, should_stop, stop_after)


def _path(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with paths that mean the same from any folder: a run may be resumed elsewhere."""
    changed = {name: _path(settings[name]) for name in ("teacher", "tokenizer") if settings.get(name)}
    if settings.get("valid_text"):
        changed["valid_text"] = tuple(_path(path) for path in settings["valid_text"])
    return {**settings, **changed}


def _train(
    run: Run, progress: Progress, should_stop: Callable[[], bool], stop_after: int | None
) -> UptrainResult:
    trainer, settings = run.trainer, run.trainer.settings
    log = MetricsLog(run.partial / "metrics.jsonl")
    log.forget_after(trainer.step)
    log.write(_describe(run))
    if trainer.step == 0:
        _validated(run, run.loss_before, log, progress)
    progress.task("uptrain", 1000, round(1000 * trainer.share))
    last_log = last_save = time.monotonic()
    pending: list[StepLosses] = []
    mark = (trainer.tokens, trainer.seconds)
    try:
        while not trainer.finished and not should_stop() and trainer.step != stop_after:
            before = trainer.share
            pending.append(trainer.train_step())
            now, text = time.monotonic(), ""
            if trainer.step <= 3 or now - last_log >= LOG_SECONDS or trainer.finished:
                record = _record(trainer, pending, mark)
                log.write(record)
                text, last_log, mark = _text(record), now, (trainer.tokens, trainer.seconds)
                pending = []
            progress.advance("uptrain", min(1000, round(1000 * trainer.share)), text)
            part = settings.validations + 1
            if int(trainer.share * part) > int(before * part) and not trainer.finished:
                _validated(run, trainer.validate(), log, progress)
            if now - last_save >= 60.0 * settings.save_minutes and not trainer.finished:
                run.save()
                last_save = time.monotonic()
        if not trainer.finished:
            run.save()
            return run.result(None)
        return _finish(run, log, progress)
    except TrainingDiverged as error:
        newest = run_folder.latest(run.checkpoint_root)
        where = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise TrainingDiverged(f"{error}; {where}") from error
    finally:
        log.close()


def _describe(run: Run) -> Record:
    trainer = run.trainer
    return {
        "kind": "run",
        "step": trainer.step,
        "name": str(run.folder),
        "settings": trainer.settings.to_dict(),
        "lr": trainer.settings.peak_lr,
        "data": asdict(trainer.data.info),
        "original_loss": run.original_loss,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _record(trainer: Uptrainer, steps: list[StepLosses], mark: tuple[int, float]) -> Record:
    """Means of some steps, the last one's other numbers, and the speed since `mark`, (tokens, seconds)."""
    each = [asdict(step) for step in steps]
    losses = {name: [step[name] for step in each] for name in ("objective", "loss", "kl", "layers")}
    means = {name: sum(values) / len(values) for name, values in losses.items() if values[0] is not None}
    return {
        "kind": "train",
        "step": trainer.step,
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        **means,
        "bits_per_byte": bits_per_byte(means["loss"], trainer.data.tokens_per_byte),
        "grad_norm": steps[-1].grad_norm,
        "lr": steps[-1].lr,
        "tokens_per_s": (trainer.tokens - mark[0]) / (trainer.seconds - mark[1]),
    }


def _text(record: Record) -> str:
    parts = "  ".join(f"{name} {record[name]:.4f}" for name in ("loss", "kl", "layers") if name in record)
    return (
        f"step {record['step']}  {parts}  norm {record['grad_norm']:.2f}  lr {record['lr']:.2e}  "
        f"{record['tokens_per_s']:,.0f} tokens/s"
    )


def _validated(run: Run, loss: float, log: MetricsLog, progress: Progress) -> None:
    trainer = run.trainer
    if run.reached is None and run.original_loss is not None and loss <= run.original_loss:
        run.reached = trainer.tokens
    log.write(
        {
            "kind": "valid",
            "step": trainer.step,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": bits_per_byte(loss, trainer.data.tokens_per_byte),
        }
    )
    original = "" if run.original_loss is None else f" (original {math.exp(run.original_loss):.3f})"
    progress.line(
        f"held-out text at step {trainer.step}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}{original}"
    )


def _finish(run: Run, log: MetricsLog, progress: Progress) -> UptrainResult:
    """Measures the model as it is going to be stored, and puts the finished folder into place."""
    trainer = run.trainer
    run.save()  # whatever fails below can be done again
    result_parameters = run.result(None).trained_parameters
    model = trainer.trainable.merge().to(run.dtype)
    loss = held_out_loss(model, trainer.data.valid, trainer.settings, trainer.device)
    _validated(run, loss, log, progress)
    result = UptrainResult(**{**run.result(loss).to_dict(), "trained_parameters": result_parameters})
    log.write({"kind": "result", "step": trainer.step, **result.to_dict()})
    scratch = run.partial / "model"
    shutil.rmtree(scratch, ignore_errors=True)
    with checked_files.naming(run.out):
        save_like(model, run.folder, scratch)
        if trainer.settings.tokenizer is not None:
            run.tokenizer.save(scratch)
        if run.conversion is not None:
            text = json.dumps(_conversion(run, result), indent=2) + "\n"
            (scratch / CONVERSION).write_text(text, encoding="utf-8")
        shutil.copyfile(log.path, scratch / "metrics.jsonl")
        run_folder.sync(scratch)
    scratch.rename(run.out)
    shutil.rmtree(run.partial)
    return result


def _conversion(run: Run, result: UptrainResult) -> dict[str, Any]:
    """conversion.json of the trained model: what is in it now differs from the original's in more names."""
    before, settings = run.conversion or {}, run.trainer.settings
    section = {**result.to_dict(), "settings": settings.to_dict(), "lr": settings.peak_lr}
    del section["folder"], section["finished"]
    if "uptraining" in before:
        section["previous"] = before["uptraining"]
    changed = sorted({*before.get("changed", ()), *run.trainer.trainable.names})
    return {**before, "changed": changed, "uptraining": section}
