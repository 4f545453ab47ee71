"""Settings of an uptraining run, and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fusedkv_ext.conversion.distill import MATCHED
from fusedkv_ext.conversion.trainable import TRAIN
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.training.random_sources import check_probability
from fusedkv_ext.training.trainer import decayed

DISTILL = ("logits", "layers")
SCHEDULES = ("cosine", "linear")
# Learning rates where no rule gives one: docs/uptraining.md says where they come from.
DEFAULT_LR = {"all": 3e-4, "changed": 1e-3, "lora": 1e-3}
# SkipV1Former (arXiv:2510.16807): uptraining starts at 1.5 times the rate at which pre-training ended.
LR_FACTOR = 1.5
# These say how often to look and to save; a resumed run may change them.
_REPORTING = ("validations", "save_minutes")


@dataclass(frozen=True)
class UptrainSettings:
    """What `uptrain` takes as keyword arguments. Raises ConfigError for values that cannot be."""

    train: str = "all"  # what is trained: "all", "changed" (what conversion.json lists), "lora"
    rank: int = 16  # of LoRA's updates
    distill: tuple[str, ...] = ()  # from the teacher: "logits", "layers", both
    teacher: str | None = None  # its folder; None: the "original" of conversion.json
    match: str = "attention"  # what "layers" compares: "attention" (after o_proj) or "hidden"
    ce_weight: float = 1.0
    kl_weight: float = 1.0
    layer_weight: float = 1.0
    temperature: float = 1.0
    minutes: float | None = None  # the budget, exactly one of three: minutes of training,
    steps: int | None = None  # optimizer steps,
    tokens: int | None = None  # or tokens, rounded up to whole steps
    lr: float | None = None  # None: 1.5 * original_lr if that is given, else DEFAULT_LR
    original_lr: float | None = None  # at the end of the original's training
    fusion_lr: float = 1.0  # fusion weights learn at lr times this
    # Probability that a layer attends to an earlier layer's keys and values in a step; plain models only.
    random_sources: float = 0.0
    schedule: str = "cosine"  # or "linear": constant, then down in a straight line
    warmup: float = 0.05  # share of the budget
    decay: float = 0.5  # "linear": share of the budget in which the rate falls
    final_lr: float = 0.1  # last rate as a share of the highest
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    batch_size: int = 4  # sequences per step
    accumulate: int = 1  # parts in which they are run
    seq_len: int = 512
    chunk: int = 2048  # tokens whose logits exist at a time
    precision: str = "bf16"  # autocast around fp32 weights; or "fp32"
    device: str = "auto"
    seed: int = 0
    tokenizer: str | None = None  # a tokenizer.json; None: that of the folder
    valid_text: tuple[str, ...] = ()
    valid_fraction: float = 0.02  # of `text`, held out where valid_text is empty
    valid_tokens: int = 16384  # scored at each validation
    valid_window: int = 2048  # tokens of context when scoring
    validations: int = 10  # during the run, beside the first and the last
    save_minutes: float = 10.0  # between checkpoints

    def __post_init__(self) -> None:
        for name, known in (("train", TRAIN), ("match", MATCHED), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"precision must be bf16 or fp32, got {self.precision!r}")
        if unknown := set(self.distill) - set(DISTILL):
            raise ConfigError(f"distill takes {' and '.join(DISTILL)}, got {', '.join(sorted(unknown))}")
        if sum(budget is not None for budget in (self.minutes, self.steps, self.tokens)) != 1:
            raise ConfigError("give exactly one budget: minutes, steps or tokens")
        positive = (
            "minutes",
            "steps",
            "tokens",
            "lr",
            "original_lr",
            "fusion_lr",
            "temperature",
            "rank",
            "batch_size",
            "accumulate",
            "seq_len",
            "chunk",
            "valid_tokens",
            "valid_window",
            "save_minutes",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be > 0, got {value}")
        for name in ("ce_weight", "kl_weight", "layer_weight", "weight_decay", "grad_clip", "validations"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")
        check_probability("random_sources", self.random_sources)
        for name in ("warmup", "decay", "final_lr", "valid_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share: expected 0 to 1, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise ConfigError("seq_len must be at least 2: a lone token predicts nothing")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size must be a multiple of accumulate={self.accumulate}, got {self.batch_size}"
            )
        if self.ce_weight == 0 and not self.distill:
            raise ConfigError("ce_weight is 0 and nothing is distilled: there is no loss to train with")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def total_steps(self) -> int | None:
        """None where the budget is in minutes."""
        if self.tokens is not None:
            return math.ceil(self.tokens / self.tokens_per_step)
        return self.steps

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return LR_FACTOR * self.original_lr if self.original_lr is not None else DEFAULT_LR[self.train]

    def rate(self, done: float) -> float:
        """Learning rate when the share `done`, 0 to 1, of the budget is used."""
        if done < self.warmup:
            return self.peak_lr * done / self.warmup
        begin = self.warmup if self.schedule == "cosine" else max(1.0 - self.decay, self.warmup)
        share = max(done - begin, 0.0) / (1.0 - begin) if begin < 1 else float(self.schedule == "cosine")
        return decayed(self.peak_lr, self.final_lr, share, self.schedule)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UptrainSettings:
        """Raises ConfigError for unknown names."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"uptrain has no setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        chosen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**chosen)

    def resumed(self, given: Mapping[str, Any]) -> UptrainSettings:
        """These settings of a run that goes on, with those of `given` that only say how often to report.
        Raises ConfigError when `given` has another value for any other.
        """
        wanted = UptrainSettings.from_dict({**self.to_dict(), **given})
        now = replace(self, **{name: getattr(wanted, name) for name in _REPORTING})
        was, values = asdict(now), asdict(wanted)
        if other := [f"{name} {values[name]} (was {was[name]})" for name in was if values[name] != was[name]]:
            raise ConfigError(
                f"a resumed run keeps its settings, got {', '.join(other)}; leave them out, or start anew"
            )
        return now
