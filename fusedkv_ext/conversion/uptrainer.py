"""One optimizer step of uptraining, and what is measured between steps."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedkv_ext.conversion.distill import LanguageModelParts, layer_loss
from fusedkv_ext.conversion.trainable import Trainable
from fusedkv_ext.conversion.uptrain_settings import UptrainSettings
from fusedkv_ext.errors import ConfigError, TrainingDiverged
from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.ops.head_loss import Workspace, head_losses
from fusedkv_ext.ops.packing import next_tokens
from fusedkv_ext.training.data.tokens import TokenData, training_batch


@dataclass(frozen=True)
class StepLosses:
    """Means over one step. objective: what was minimized; loss: its cross entropy, and kl, in nats per token;
    layers: `layer_loss`. kl and layers are None where they were not asked for. grad_norm: before clipping.
    lr: of all but the fusion weights.
    """

    objective: float
    loss: float
    kl: float | None
    layers: float | None
    grad_norm: float
    lr: float


def autocast(settings: UptrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of a run's forward passes."""
    if settings.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def held_out_loss(model: Any, ids: Tensor, settings: UptrainSettings, device: torch.device) -> float:
    """Mean loss in nats per token on the held-out text, with the run's precision."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or settings.valid_window
    with autocast(settings, device):
        window = min(settings.valid_window, limit)
        return perplexity(model, ids, context=window, max_tokens=settings.valid_tokens).loss


class Uptrainer:
    """trainable: the model, on `device`, and which of its parameters learn. teacher: a causal language model
    of transformers whose parameters are left alone, or None. data: ids of the text.

    The model stays in evaluation mode, also when it learns: that is what "without dropout" takes.

    Raises ConfigError where distillation lacks a teacher, ValueError for a teacher that does not fit.
    """

    def __init__(
        self,
        trainable: Trainable,
        teacher: Any,
        data: TokenData,
        settings: UptrainSettings,
        device: torch.device,
    ) -> None:
        self.trainable, self.data, self.settings, self.device = trainable, data, settings, device
        trainable.model.eval()
        match = settings.match if "layers" in settings.distill else None
        self.student = LanguageModelParts(trainable.model, match)
        self.teacher = self._teacher(teacher, match) if settings.distill else None
        self.optimizer = torch.optim.AdamW(
            trainable.groups(settings.weight_decay, settings.fusion_lr),
            lr=settings.peak_lr,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )
        self._workspace = Workspace()
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # spent in them, over all starts

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
    def tokens(self) -> int:
        """Seen so far."""
        return self.step * self.settings.tokens_per_step

    @property
    def share(self) -> float:
        """Of the budget that is used."""
        total = self.settings.total_steps
        if total is not None:
            return self.step / total
        return self.seconds / (60.0 * (self.settings.minutes or math.inf))

    @property
    def finished(self) -> bool:
        return self.share >= 1.0

    def _rate(self) -> float:
        total = self.settings.total_steps
        return self.settings.rate(self.share if total is None else (self.step + 1) / total)

    def _losses(self, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of rows of ids (B, S), and its parts."""
        settings, theirs, extra = self.settings, None, {}
        with autocast(settings, self.device):
            if self.teacher is not None:
                with torch.no_grad():
                    theirs = self.teacher(ids)
                if "logits" in settings.distill:
                    extra = {"teacher_hidden": theirs.hidden, "teacher_head": self.teacher.head}
            ours = self.student(ids)
            head = head_losses(
                ours.hidden,
                self.student.head,
                next_tokens(ids),
                ce_weight=settings.ce_weight,
                kl_weight=settings.kl_weight,
                temperature=settings.temperature,
                chunk=settings.chunk,
                workspace=self._workspace,
                **extra,
            )
        loss, parts = head.loss, {"loss": head.ce.item()}
        if head.kl is not None:
            parts["kl"] = head.kl.item()
        if theirs is not None and "layers" in settings.distill:
            layers = layer_loss(ours.layers, theirs.layers)
            loss = loss + settings.layer_weight * layers
            parts["layers"] = layers.item()
        return loss, {"objective": loss.item(), **parts}

    def train_step(self) -> StepLosses:
        """One optimizer step. Raises TrainingDiverged, before the weights change, when something is not
        finite.
        """
        started = time.perf_counter()
        settings = self.settings
        self.optimizer.zero_grad(set_to_none=True)
        batch = training_batch(
            self.data.train, settings.seed, self.step, settings.batch_size, settings.seq_len
        )
        means: dict[str, float] = {}
        for ids in batch.chunk(settings.accumulate):
            loss, parts = self._losses(ids.to(self.device))
            (loss / settings.accumulate).backward()
            for name, value in parts.items():
                means[name] = means.get(name, 0.0) + value / settings.accumulate
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(learning, settings.grad_clip or math.inf).item()
        rate = self._rate()
        if not (math.isfinite(means["objective"]) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"uptraining diverged at step {self.step + 1}: loss {means['objective']}, gradient norm "
                f"{norm}, learning rate {rate:.3g}; try a lower lr"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return StepLosses(means["objective"], means["loss"], means.get("kl"), means.get("layers"), norm, rate)

    def validate(self) -> float:
        """Loss in nats per token on the held-out text."""
        self.trainable.model.eval()  # fused optimizers count no version: fusion weights forget what they kept
        loss = held_out_loss(self.trainable.model, self.data.valid, self.settings, self.device)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the held-out loss at step {self.step} is {loss}; try a lower lr")
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "trained": self.trainable.state(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainable.load_state(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
