"""A run of uptraining: what it reads, what is checked before the first step, and its state on disk."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.conversion.trainable import Trainable, read_conversion
from fusedkv_ext.conversion.uptrain_settings import UptrainSettings
from fusedkv_ext.conversion.uptrainer import Uptrainer, held_out_loss
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer
from fusedkv_ext.training import run_folder
from fusedkv_ext.training.data.tokenizer import FileTokenizer
from fusedkv_ext.training.data.tokens import prepare
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.trainer import resolve_device


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


@dataclass
class Run:
    """A run, where it comes from and where it goes."""

    trainer: Uptrainer
    tokenizer: FileTokenizer
    folder: Path
    out: Path
    dtype: torch.dtype  # of the weights in `folder`
    conversion: dict[str, Any] | None
    text: list[str]
    identity: dict[str, str | None]
    loss_before: float = math.nan
    original_loss: float | None = None
    reached: int | None = None

    @property
    def partial(self) -> Path:
        return partial_folder(self.out)

    @property
    def checkpoint_root(self) -> Path:
        return self.partial / "checkpoints"

    def save(self) -> Path:
        state = {
            **self.trainer.state_dict(),
            "settings": self.trainer.settings.to_dict(),
            "text": self.text,
            "identity": self.identity,
            "loss_before": self.loss_before,
            "original_loss": self.original_loss,
            "reached": self.reached,
        }
        return run_folder.write(
            self.checkpoint_root,
            self.trainer.step,
            lambda folder: run_folder.write_state(folder, state),
            keep=1,
        )

    def result(self, loss_after: float | None) -> UptrainResult:
        trainer = self.trainer
        return UptrainResult(
            folder=str(self.out if loss_after is not None else self.partial),
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


def partial_folder(out: Path) -> Path:
    """Where a run that writes `out` keeps its checkpoints and metrics until it has ended."""
    return out.with_name(f"{out.name}.partial")


def load(
    folder: Path,
    text: list[str],
    out: Path,
    settings: UptrainSettings,
    progress: Progress,
    state: dict[str, Any] | None,
) -> Run:
    """Reads everything, checks it, and measures what stands before the first step."""
    device = resolve_device(settings.device)
    conversion = read_conversion(folder)
    teacher_folder = _teacher_folder(settings, folder, conversion)
    model = load_causal_lm(folder)
    dtype = model.dtype
    model = _exact(model, device)
    tokenizer = _tokenizer(folder, settings, model)
    data = prepare(tokenizer, text, settings.valid_text, valid_fraction=settings.valid_fraction)
    _check_text(data.train, data.valid, settings)
    identity = {
        "folder": _digest(folder),
        "teacher": _digest(teacher_folder) if teacher_folder and settings.distill else None,
        "text": data.info.key,
    }
    if state is not None:
        _check_identity(state["identity"], identity)
    teacher, original_loss = None, None
    if teacher_folder is not None and (settings.distill or state is None):
        teacher = _exact(load_causal_lm(teacher_folder), device)
        if state is None:
            original_loss = held_out_loss(teacher, data.valid, settings, device)
        if settings.precision == "bf16":
            teacher = teacher.to(torch.bfloat16)  # nobody updates its weights
    changed = None if conversion is None else conversion.get("changed")
    trainable = Trainable(model, settings.train, changed=changed, rank=settings.rank, seed=settings.seed)
    trainer = Uptrainer(trainable, teacher if settings.distill else None, data, settings, device)
    progress.line(f"text: {data.info}")
    run = Run(trainer, tokenizer, folder, out, dtype, conversion, text, identity)
    if state is None:
        run.loss_before, run.original_loss = trainer.validate(), original_loss
    else:
        trainer.load_state_dict(state)
        run.loss_before, run.original_loss = state["loss_before"], state["original_loss"]
        run.reached = state["reached"]
        progress.line(f"resuming {run.partial} at step {trainer.step}")
    return run


def _exact(model: Any, device: torch.device) -> Any:
    """fp32 on `device`, every parameter in memory of its own: matrix products may round differently on
    addresses of another alignment, and a resumed run is to repeat the uninterrupted one bit for bit.
    """
    model = model.to(device, torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


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


def _tokenizer(folder: Path, settings: UptrainSettings, model: Any) -> FileTokenizer:
    size = model.get_input_embeddings().weight.shape[0]
    return load_tokenizer(folder, size, settings.tokenizer)


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
