"""Uptraining: a converted model learns on, so that its changed attention and the rest fit each other again.

SkipV1Former's recipe (arXiv:2510.16807): continue for 10 to 15 % of the original compute, at 1.5 times the
rate at which pre-training ended, without dropout. The original can be the teacher (distill.py).

Steps, checkpoints and the loop are those of `fusedkv train` (training/trainer.py, training/loop.py). Nothing
is random but windows and random sources, pure functions of (seed, step). So the state of a run is what is
trained, AdamW's moments, the number of steps and the seconds in them. While it runs, everything lies in
OUT.partial; OUT appears when it is whole.

Under torchrun FSDP2 shards the model, the teacher and the optimizer state over all processes. Each process
runs its rows of every batch. The first process merges the trained weights into the whole model and writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fusedkv_ext.checkpoint import checked_files
from fusedkv_ext.conversion.distill import LanguageModelParts, Outputs, layer_loss
from fusedkv_ext.conversion.layer_sharing import layers_share
from fusedkv_ext.conversion.trainable import Trainable, read_conversion
from fusedkv_ext.conversion.uptrain_settings import UptrainSettings
from fusedkv_ext.distributed import Mesh, shard_weights
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.hf.loading import CONVERSION, load_causal_lm, load_tokenizer, save_like
from fusedkv_ext.ops.head_loss import Workspace, head_losses
from fusedkv_ext.ops.packing import next_tokens
from fusedkv_ext.training import loop, run_folder, session
from fusedkv_ext.training.data.tokenizer import FileTokenizer
from fusedkv_ext.training.data.tokens import TokenData, prepare
from fusedkv_ext.training.metrics import Log, Record
from fusedkv_ext.training.progress import Progress, SilentProgress
from fusedkv_ext.training.random_sources import draw_sources
from fusedkv_ext.training.trainer import StepSettings, Trainer, resolve_device

LOG_SECONDS = 5.0  # between lines of progress and records of metrics.jsonl; the first steps come one by one


@dataclass(frozen=True)
class UptrainResult:
    """How a run ended. Losses in nats per token on the held-out text, perplexities their exponentials.

    loss_after, perplexity_after: None when the run was stopped early. original_loss: of the original on the
    same text; None where it was not found. tokens_to_original: seen when the held-out loss was first at or
    below it; None: not reached. seconds: in training steps; validation and saving are not counted.
    """

    folder: str
    finished: bool
    steps: int
    tokens: int
    seconds: float
    trained_parameters: int
    loss_before: float
    perplexity_before: float
    loss_after: float | None
    perplexity_after: float | None
    original_loss: float | None
    tokens_to_original: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Uptrainer(Trainer):
    """Trains a causal language model of transformers, with or without a teacher.

    The model stays in evaluation mode, also when it learns: that is what "without dropout" takes.

    Args:
        trainable: the model, on `device`, and which of its parameters learn. With a mesh, FSDP2 shards it.
        teacher: a causal language model of transformers whose parameters are left alone, or None.
        data: ids of the text.
        options: the settings of the run.
        device: of the model.
        mesh: the data ranks; None for one process.

    Raises:
        ConfigError: distillation lacks a teacher.
        ValueError: for a teacher that does not fit, and for a text that is too short.
    """

    saves_frozen = False

    def __init__(
        self,
        trainable: Trainable,
        teacher: Any,
        data: TokenData,
        options: UptrainSettings,
        device: torch.device,
        mesh: Mesh | None = None,
    ) -> None:
        self.trainable, self.options = trainable, options
        trainable.model.eval()
        # Groups of shards: no weight is gathered before the first forward pass.
        groups = trainable.groups(options.weight_decay, options.fusion_lr)
        match = options.match if "layers" in options.distill else None
        self.student = LanguageModelParts(trainable.model, match)
        self.teacher = self._teacher(teacher, match) if options.distill else None
        self._workspace = Workspace()
        if options.random_sources:
            _check_plain(trainable.model)
        settings = StepSettings(
            seed=options.seed,
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            seq_len=options.seq_len,
            precision=options.precision,
            lr=options.peak_lr,
            betas=(options.beta1, options.beta2),
            grad_clip=options.grad_clip,
            random_sources=options.random_sources,
            name="uptraining",
        )
        super().__init__(trainable.model, groups, data, settings, device, mesh)

    def _teacher(self, model: Any, match: str | None) -> LanguageModelParts:
        if model is None:
            raise ConfigError("distillation needs a teacher: name the folder of the original model")
        parts = LanguageModelParts(model.eval().requires_grad_(False), match)
        ours, theirs = self.student.head.weight.shape[0], parts.head.weight.shape[0]
        if ours != theirs:
            raise ConfigError(
                f"teacher: its vocabulary has {theirs} entries, this model's {ours}; it is not the original"
            )
        return parts

    @property
    def share(self) -> float:
        total = self.options.total_steps
        if total is not None:
            return self.step / total
        return self.seconds / (60.0 * (self.options.minutes or math.inf))

    def rate(self) -> float:
        total = self.options.total_steps
        return self.options.rate(self.share if total is None else (self.step + 1) / total)

    def begin_step(self) -> None:
        """Leaves the model in evaluation mode."""

    def losses(self, ids: Tensor, num_target_tokens: float | None) -> tuple[Tensor, dict[str, float]]:
        options, theirs = self.options, None
        extra: dict[str, Any] = {}
        with self.autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    theirs = self.teacher(ids)
                if "logits" in options.distill:
                    extra = {"teacher_hidden": theirs.hidden, "teacher_head": self.teacher.head}
            ours = self._student(ids)
            head = head_losses(
                ours.hidden,
                self.student.head,
                next_tokens(ids),
                ce_weight=options.ce_weight,
                kl_weight=options.kl_weight,
                temperature=options.temperature,
                chunk=options.chunk,
                workspace=self._workspace,
                **extra,
            )
        loss, parts = head.loss, {"loss": head.ce.item()}
        if head.kl is not None:
            parts["kl"] = head.kl.item()
        if theirs is not None and "layers" in options.distill:
            layers = layer_loss(ours.layers, theirs.layers)
            loss = loss + options.layer_weight * layers
            parts["layers"] = layers.item()
        return loss, {"objective": loss.item(), **parts}

    def _student(self, ids: Tensor) -> Outputs:
        """The student's pass, with the step's random sources."""
        options = self.options
        layers = self.model.config.get_text_config().num_hidden_layers
        sources = draw_sources(layers, options.random_sources, options.seed, self.step)
        if sources is None:
            return self.student(ids)
        with layers_share(self.model):
            return self.student(ids, sources)

    def evaluate(self) -> float:
        return self.held_out_loss(self.model)

    def held_out_loss(self, model: Any) -> float:
        """Mean loss of a model in nats per token on the held-out text, with the run's precision."""
        model.eval()  # fused optimizers count no version: fusion weights forget what they kept
        window = self.options.valid_window
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or window
        with self.autocast(model):
            found = perplexity(
                model, self.data.valid, context=min(window, limit), max_tokens=self.options.valid_tokens
            )
        return found.loss


def _check_plain(model: Any) -> None:
    """Raises ConfigError for a model with a cache plan: random sources are drawn among layers that store."""
    if getattr(model.config, "cache_plan", None) is not None:
        raise ConfigError(
            f"random_sources must be 0 for a model with a cache plan, got plan {model.config.plan.name!r}; "
            "train the plain model, then convert it"
        )


class UptrainRun(loop.Run):
    """A run, where it comes from and where it goes.

    Args:
        source: the folder of the model.
        out: the folder to write.
        dtype: of the weights in `source`.
        conversion: what `source` says of its conversion.
        text: paths.
        identity: digests of what a resumed run has to find again.
    """

    task = "uptrain"
    trainer: Uptrainer

    def __init__(
        self,
        trainer: Uptrainer,
        tokenizer: FileTokenizer,
        source: Path,
        out: Path,
        dtype: torch.dtype,
        conversion: dict[str, Any] | None,
        text: list[str],
        identity: dict[str, str | None],
    ) -> None:
        super().__init__(trainer, partial_folder(out), keep=1)
        self.tokenizer, self.source, self.out, self.dtype = tokenizer, source, out, dtype
        self.conversion, self.text_paths, self.identity = conversion, text, identity
        self.loss_before = math.nan
        self.original_loss: float | None = None
        self.reached: int | None = None
        self._logged = self._saved = time.monotonic()

    def facts(self) -> dict[str, Any]:
        return {
            "settings": self.trainer.options.to_dict(),
            "text": self.text_paths,
            "identity": self.identity,
            "loss_before": self.loss_before,
            "original_loss": self.original_loss,
            "reached": self.reached,
        }

    def describe(self) -> Record:
        trainer = self.trainer
        return {
            "kind": "run",
            "step": trainer.step,
            "name": str(self.source),
            "settings": trainer.options.to_dict(),
            "lr": trainer.options.peak_lr,
            "data": asdict(trainer.data.info),
            "original_loss": self.original_loss,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def begin(self, log: Log, progress: Progress) -> None:
        if self.trainer.step == 0:
            loop.validate(self, log, progress, self.loss_before)
        self._logged = self._saved = time.monotonic()

    def progress(self) -> tuple[int, int]:
        total = self.trainer.options.total_steps
        return (self.trainer.step, total) if total else (min(1000, round(1000 * self.trainer.share)), 1000)

    def due(self, before: float, last: bool) -> tuple[bool, bool, bool]:
        trainer, options, now = self.trainer, self.trainer.options, time.monotonic()
        log = trainer.step <= 3 or now - self._logged >= LOG_SECONDS or trainer.finished
        part = options.validations + 1
        validate = int(trainer.share * part) > int(before * part) and not trainer.finished
        save = now - self._saved >= 60.0 * options.save_minutes and not trainer.finished
        save = session.from_rank_zero(save)  # by its clock
        self._logged = now if log else self._logged
        self._saved = now if save else self._saved
        return log, validate, save

    def speed_from(self, start: loop.Mark, last_record: loop.Mark) -> loop.Mark:
        return last_record

    def text(self, record: Record) -> str:
        names = ("loss", "kl", "layers")
        parts = "  ".join(f"{name} {record[name]:.4f}" for name in names if name in record)
        return (
            f"step {record['step']}  {parts}  norm {record['grad_norm']:.2f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_s']:,.0f} tokens/s"
        )

    def validated(self, loss: float) -> tuple[Record, str]:
        trainer = self.trainer
        record = {**loop.valid_record(trainer, loss), "perplexity": math.exp(loss)}
        if self.reached is None and self.original_loss is not None and loss <= self.original_loss:
            self.reached = trainer.tokens
        line = f"held-out text at step {trainer.step}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}"
        if self.original_loss is not None:
            line += f" (original {math.exp(self.original_loss):.3f})"
        return record, line

    def end(self, log: Log, progress: Progress, stopped: bool, state: loop.Progressed) -> UptrainResult:
        self.save()  # whatever fails below can be done again
        self.saver.wait()
        return self._finish(log, progress) if self.trainer.finished else self.result(None)

    def result(self, loss_after: float | None) -> UptrainResult:
        trainer = self.trainer
        return UptrainResult(
            folder=str(self.out if loss_after is not None else self.folder),
            finished=loss_after is not None,
            steps=trainer.step,
            tokens=trainer.tokens,
            seconds=trainer.seconds,
            trained_parameters=sum(tensor.numel() for tensor in trainer.trainable.state().values()),
            loss_before=self.loss_before,
            perplexity_before=math.exp(self.loss_before),
            loss_after=loss_after,
            perplexity_after=None if loss_after is None else math.exp(loss_after),
            original_loss=self.original_loss,
            tokens_to_original=self.reached,
        )

    def _finish(self, log: Log, progress: Progress) -> UptrainResult:
        """The finished folder, which the first process writes."""
        trainable = self.trainer.trainable
        if self.trainer.mesh is None:
            return self._write(trainable, log, progress)
        state = trainable.whole_state()

        def write() -> UptrainResult | None:
            if session.rank():
                return None
            whole = trainable.of(_exact(load_causal_lm(self.source), torch.device("cpu")))
            whole.load_state(state)
            return self._write(whole, log, progress)

        return cast(UptrainResult, session.from_rank_zero(session.rank_zero_first(write)))

    def _write(self, trainable: Trainable, log: Log, progress: Progress) -> UptrainResult:
        """Measures the model as it is going to be stored, and puts the finished folder into place."""
        trainer = self.trainer
        trained_parameters = self.result(None).trained_parameters
        model = trainable.merge().to(trainer.device, self.dtype)
        loss = loop.validate(self, log, progress, trainer.held_out_loss(model))
        result = UptrainResult(**{**self.result(loss).to_dict(), "trained_parameters": trained_parameters})
        log.write({"kind": "result", "step": trainer.step, **result.to_dict()})
        scratch = self.folder / "model"
        shutil.rmtree(scratch, ignore_errors=True)
        with checked_files.naming(self.out):
            save_like(model, self.source, scratch)
            if trainer.options.tokenizer is not None:
                self.tokenizer.save(scratch)
            if self.conversion is not None:
                text = json.dumps(self._conversion(result), indent=2) + "\n"
                (scratch / CONVERSION).write_text(text, encoding="utf-8")
            shutil.copyfile(self.folder / "metrics.jsonl", scratch / "metrics.jsonl")
            run_folder.sync(scratch)
        scratch.rename(self.out)
        shutil.rmtree(self.folder)
        return result

    def _conversion(self, result: UptrainResult) -> dict[str, Any]:
        """conversion.json of the trained model: its parameters differ from the original's in more names."""
        before, options = self.conversion or {}, self.trainer.options
        section = {**result.to_dict(), "settings": options.to_dict(), "lr": options.peak_lr}
        del section["folder"], section["finished"]
        if "uptraining" in before:
            section["previous"] = before["uptraining"]
        changed = sorted({*before.get("changed", ()), *self.trainer.trainable.names})
        return {**before, "changed": changed, "uptraining": section}


def partial_folder(out: Path) -> Path:
    """Where a run that writes `out` keeps its checkpoints and metrics until it has ended."""
    return out.with_name(f"{out.name}.partial")


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

    `out` has what `folder` has, the new weights in the dtype of the old, metrics.jsonl and, in
    conversion.json where there is one, a section "uptraining". Under torchrun, within
    ``fusedkv_ext.training.session.session()``, all processes call this together.

    Args:
        folder: a Hugging Face folder, converted or not.
        text: UTF-8 files or folders of them.
        out: is never half written.
        resume: go on from the checkpoint of such a run, if there is one. Text and settings may then be left
            out and cannot be others. With a budget of steps or tokens the result is bit for bit that of an
            uninterrupted run, on the same machine with the same number of threads and processes.
        progress: where the run reports to.
        should_stop: asked after each step; True ends the run early, with a checkpoint.
        stop_after: so does this number of steps, counted from the run's beginning.
        settings: fields of ``UptrainSettings``; one of minutes, steps and tokens has to be given.

    Raises:
        ConfigError: for settings and for an `out` that exists.
        FileNotFoundError, ValueError: for a folder, text, tokenizer or teacher that cannot be used.
        TrainingDiverged: when a loss or a gradient is not finite.
    """
    folder, out, progress = Path(folder), Path(out), progress or SilentProgress()
    settings, text = _absolute(settings), [_path(path) for path in text]
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder to write")
    root = partial_folder(out) / "checkpoints"
    newest, facts = run_folder.latest(root), None
    session.check_alike({"newest checkpoint": newest and newest.name})
    if resume and newest is not None:
        if session.rank() == 0:
            run_folder.clean(root)
        facts = run_folder.read_trainer(newest)
        chosen = UptrainSettings.from_dict(facts["settings"]).resumed(settings)
        text = text or facts["text"]
    else:
        if newest is not None:
            raise ConfigError(
                f"{partial_folder(out)} holds a run that was not finished; resume it, or delete that folder"
            )
        chosen = UptrainSettings.from_dict(settings)
        if session.rank() == 0:
            shutil.rmtree(partial_folder(out), ignore_errors=True)  # of a run without a checkpoint
    if not text:
        raise ConfigError("text: name at least one text file")
    this = load(folder, [str(path) for path in text], out, chosen, progress, facts)
    if facts is not None and newest is not None:
        this.restore(newest, facts)
        progress.line(f"resuming {this.folder} at step {this.trainer.step}")
    return loop.run(this, progress, stop_after=stop_after, should_stop=should_stop)


def _path(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with paths that mean the same from any folder: a run may be resumed elsewhere."""
    changed: dict[str, Any] = {
        name: _path(settings[name]) for name in ("teacher", "tokenizer") if settings.get(name)
    }
    if settings.get("valid_text"):
        changed["valid_text"] = tuple(_path(path) for path in settings["valid_text"])
    return {**settings, **changed}


def load(
    folder: Path,
    text: list[str],
    out: Path,
    settings: UptrainSettings,
    progress: Progress,
    facts: dict[str, Any] | None,
) -> UptrainRun:
    """Reads everything, checks it, and measures the losses before the first step. facts: of the checkpoint
    that the run goes on from.
    """
    session.check_parts(settings.batch_size, settings.accumulate, session.world_size())
    device = resolve_device(settings.device)
    mesh = session.data_parallel_mesh(device)
    place = device if mesh is None else torch.device("cpu")  # FSDP2 moves each process's shard to its device
    conversion = read_conversion(folder)
    teacher_folder = _teacher_folder(settings, folder, conversion)
    model = load_causal_lm(folder)
    if getattr(model.config, "cache_codecs", None) is not None:
        raise ConfigError(
            f"the model must have no codecs, got {folder} with {model.config.codecs.name!r}, fitted to the "
            "weights before training; uptrain the folder before compression, then run fusedkv compress"
        )
    dtype = model.dtype
    model = _exact(model, place)
    size = model.get_input_embeddings().weight.shape[0]
    tokenizer = load_tokenizer(folder, size, settings.tokenizer)
    data = session.rank_zero_first(
        lambda: prepare(tokenizer, text, settings.valid_text, valid_fraction=settings.valid_fraction)
    )
    _check_text(data.train, data.valid, settings)
    identity = {
        "folder": _digest(folder),
        "teacher": _digest(teacher_folder) if teacher_folder and settings.distill else None,
        "text": data.info.key,
    }
    if facts is not None:
        _check_identity(facts["identity"], identity)
    session.check_alike({**identity, "settings": settings, "version of torch": torch.__version__})
    teacher: Any = None
    if teacher_folder is not None and (settings.distill or facts is None):
        teacher = _exact(load_causal_lm(teacher_folder), place)
    changed = None if conversion is None else conversion.get("changed")
    trainable = Trainable(model, settings.train, changed=changed, rank=settings.rank, seed=settings.seed)
    if mesh is not None:
        for shared in (model, teacher):
            if shared is not None:
                _shard(shared, mesh, settings, device)
    trainer = Uptrainer(trainable, teacher if settings.distill else None, data, settings, device, mesh)
    progress.line(f"text: {data.info}")
    this = UptrainRun(trainer, tokenizer, folder, out, dtype, conversion, text, identity)
    if facts is None:
        this.original_loss = None if teacher is None else trainer.held_out_loss(teacher)
        this.loss_before = trainer.evaluate()
    else:
        this.loss_before, this.original_loss = facts["loss_before"], facts["original_loss"]
        this.reached = facts["reached"]
    if trainer.teacher is not None and settings.precision == "bf16" and mesh is None:
        teacher.to(torch.bfloat16)  # nobody updates its weights
    return this


def _exact(model: Any, device: torch.device) -> Any:
    """fp32 on `device`, every parameter in memory of its own: matrix products may round differently on
    addresses of another alignment, and a resumed run is to repeat the uninterrupted one bit for bit.
    """
    model = model.to(device, torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _shard(model: Any, mesh: Mesh, settings: UptrainSettings, device: torch.device) -> None:
    """Shards a model of transformers over the data ranks. Its decoder layers are the modules that
    transformers does not split either.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    shard_weights(model, layers, mesh.fsdp, "bf16" if settings.precision == "bf16" else "fp32")
    model.to(device)  # constants that are no parameters


def _teacher_folder(
    settings: UptrainSettings, folder: Path, conversion: dict[str, Any] | None
) -> Path | None:
    """The teacher's, or, without distillation, that of the original if it is still there."""
    named = settings.teacher or (conversion or {}).get("original")
    path = None if named is None else Path(named).expanduser()
    if path is not None and not path.is_absolute() and settings.teacher is None and not path.is_dir():
        path = folder / path
    if path is not None and (path / "config.json").is_file():
        return path
    if settings.teacher is not None or settings.distill:
        if named is None:
            raise ConfigError(f"{folder} names no original to distil from; name it: --teacher FOLDER")
        raise FileNotFoundError(
            f"teacher: {named} is no Hugging Face folder; name that of the original: --teacher FOLDER"
        )
    return None


def _check_text(train: Tensor, valid: Tensor, settings: UptrainSettings) -> None:
    if len(train) < settings.seq_len:
        raise ValueError(
            f"text: {len(train)} tokens are left for training, which is less than one window of "
            f"{settings.seq_len}; give more text or a smaller --seq-len"
        )
    if len(valid) < 2:
        raise ValueError(
            f"text: the held-out part has {len(valid)} tokens; give more text, or a text with --valid-text"
        )


def _digest(folder: Path) -> str:
    """Of the config and the weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _check_identity(was: dict[str, str | None], now: dict[str, str | None]) -> None:
    other = [name for name in was if was[name] != now.get(name)]
    if other:
        raise ConfigError(
            f"a resumed run goes on with what it began with, but the content of its {' and '.join(other)} is "
            "another now; restore it, or start anew in another --out"
        )
