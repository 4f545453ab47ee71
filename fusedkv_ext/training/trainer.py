"""The optimizer step, of `train` and `uptrain` alike, and the state that makes a run resumable bit for bit.

Everything random is a pure function of the seed: the initial weights of (seed), the windows of a step of
(seed, step). The state of a run is therefore the weights, AdamW's moments, the number of steps done and the
seconds in them.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fusedkv_ext.distributed import Mesh, parallelize, synchronize
from fusedkv_ext.errors import ConfigError, TrainingDiverged
from fusedkv_ext.layers.decoder import Decoder, DecoderConfig
from fusedkv_ext.layers.fusion import param_groups
from fusedkv_ext.ops.packing import document_ids_of
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.training import session
from fusedkv_ext.training.config import ModelSection, OptimSection, TrainConfig
from fusedkv_ext.training.data.tokens import (
    TokenData,
    check_length,
    num_target_tokens,
    rows_of,
    training_batch,
    validation_batches,
)
from fusedkv_ext.training.metrics import Record, bits_per_byte
from fusedkv_ext.training.random_sources import draw_sources


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Args:
        step: number of steps done, this one included.
        loss: mean cross entropy in nats per token, with what the model itself adds (balance of experts).
        grad_norm: of the gradient before clipping.
        lr: of the parameter groups whose scale is 1.
        parts: further losses by name, means over the step.
        observed: what `Trainer.observe` returned.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    parts: dict[str, float] = field(default_factory=dict)
    observed: Record | None = None


@dataclass(frozen=True)
class StepSettings:
    """What the configuration of a run says about its steps; `advice` follows when the loss diverges."""

    seed: int
    batch_size: int
    accumulate: int
    seq_len: int
    precision: str
    lr: float
    betas: tuple[float, float]
    grad_clip: float
    eps: float = 1e-8
    random_sources: float = 0.0
    name: str = "training"
    advice: str = "try a lower lr"


def decayed(peak: float, final: float, share: float, schedule: str = "cosine") -> float:
    """The learning rate when the share 0 to 1 of its fall from `peak` to `peak * final` is done: half a
    cosine, or "linear".
    """
    share = min(share, 1.0)
    height = 0.5 * (1.0 + math.cos(math.pi * share)) if schedule == "cosine" else 1.0 - share
    return peak * (final + (1.0 - final) * height)


def learning_rate(step: int, optim: OptimSection, steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up to `lr`, then half a cosine down to `lr * final_lr`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    share = (step - optim.warmup_steps) / max(steps - 1 - optim.warmup_steps, 1)
    return decayed(optim.lr, optim.final_lr, share)


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where torch has one, and under torchrun a GPU per process. Raises
    ConfigError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here")
    return session.local_device(device)


def resolve_plan(section: ModelSection) -> CachePlan:
    """The plan of a configuration: by name, or read from a JSON file."""
    if section.plan.endswith(".json"):
        if section.plan_options:
            raise ConfigError("model.plan_options belong to a named plan; model.plan is a file")
        try:
            return CachePlan.from_json(Path(section.plan).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"model.plan: {section.plan} does not exist") from error
    try:
        return CachePlan.named(section.plan, section.num_hidden_layers, **section.plan_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.plan: {error}") from error


def ffn_width(section: ModelSection) -> int:
    """`model.intermediate_size`, or what 0 stands for: 8/3 of the width, rounded up to a multiple of 64."""
    return section.intermediate_size or -(-section.hidden_size * 8 // 3 // 64) * 64


def resolve_layer_types(section: ModelSection) -> tuple[str, ...] | None:
    """`model.layer_types`, repeated until every layer has one; None where the list is empty."""
    pattern, layers = section.layer_types, section.num_hidden_layers
    if len(pattern) > layers:
        raise ConfigError(
            f"model.layer_types has {len(pattern)} entries for {layers} layers; give at most one per layer"
        )
    return tuple(pattern[i % len(pattern)] for i in range(layers)) if pattern else None


def decoder_config(config: TrainConfig, vocab_size: int) -> DecoderConfig:
    """The sizes and the plan of a configuration. Raises ConfigError for a section that cannot be."""
    section = config.model
    values = {item.name: getattr(section, item.name) for item in fields(section)}
    del values["plan_options"]
    values["intermediate_size"] = ffn_width(section)
    values["moe_intermediate_size"] = section.moe_intermediate_size or None
    values |= {"plan": resolve_plan(section), "layer_types": resolve_layer_types(section)}
    if section.kv_lora_rank is not None:
        values["head_dim"] = None  # of ordinary attention
    try:
        return DecoderConfig(vocab_size=vocab_size, **values)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def build_model(config: TrainConfig, vocab_size: int) -> Decoder:
    """A decoder with initial weights drawn from `run.seed`; torch's global generator is left as it was.

    Raises ConfigError for sections that `DecoderConfig` does not take.
    """
    sizes = decoder_config(config, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return Decoder(sizes)


class Trainer(ABC):
    """Optimizer steps of a model: windows, accumulated gradients, clipping, AdamW and its rate.

    What is trained, by which losses, at which rate and how it is validated is up to the subclasses.

    Args:
        model: fp32 weights on `device`; under torchrun shared already, its parameters DTensors.
        groups: parameter groups of the optimizer; a group's "scale", 1 by default, multiplies the rate.
        data: ids of the text.
        settings: of the steps.
        device: of the model.
        mesh: how the processes of torchrun share the run; None without it.

    Raises:
        ValueError: for a text that is shorter than one window.
    """

    saves_frozen = True  # whether a checkpoint has weights that are not trained, too

    def __init__(
        self,
        model: Any,
        groups: list[dict[str, Any]],
        data: TokenData,
        settings: StepSettings,
        device: torch.device,
        mesh: Mesh | None = None,
    ) -> None:
        check_length(data.train, settings.seq_len, "training")
        self.model, self.data, self.settings, self.device, self.mesh = model, data, settings, device, mesh
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
        )
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # spent in them, over all starts
        # Called with a step's number and the model, its gradients not yet clipped; what it returns goes to
        # the metrics. No part of the run's state: whoever resumes a run sets it again.
        self.observe: Callable[[int, nn.Module], Record | None] | None = None

    @property
    @abstractmethod
    def share(self) -> float:
        """Of the budget that is used, 0 to 1."""

    @abstractmethod
    def rate(self) -> float:
        """Learning rate of the coming step."""

    @abstractmethod
    def losses(self, ids: Tensor, num_target_tokens: float | None) -> tuple[Tensor, dict[str, float]]:
        """Of one part of a batch, ids (B, S) on the device: the loss to minimize, and the parts of it to
        report, all of them means over tokens. One is called "loss".
        """

    @abstractmethod
    def evaluate(self) -> float:
        """Mean loss in nats per token on the held-out text, equal on all processes."""

    def begin_step(self) -> None:
        """Puts the model into the mode that it learns in."""
        self.model.train()

    @property
    def finished(self) -> bool:
        return self.share >= 1.0

    @property
    def data_ranks(self) -> int:
        """Processes, or groups of them, that run sequences of their own."""
        return 1 if self.mesh is None else self.mesh.data_ranks

    @property
    def data_rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.data_rank

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch_size * self.settings.seq_len

    @property
    def tokens(self) -> int:
        """Seen so far."""
        return self.step * self.tokens_per_step

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def bits_per_byte(self, loss: float) -> float:
        return bits_per_byte(loss, self.data.tokens_per_byte)

    def autocast(self, model: nn.Module | None = None) -> AbstractContextManager[Any]:
        """The precision of a model's forward passes, by default of the trained one. FSDP2 gathers weights in
        bf16 instead.
        """
        sharded = isinstance(self.model if model is None else model, FSDPModule)
        if self.settings.precision == "bf16" and not sharded:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def separator(self) -> int | None:
        """The id that ends a document, where the model is to keep documents apart."""
        return None

    def _windows(self) -> Tensor:
        """This data rank's windows of the coming step: all data ranks together have the same ones however
        many they are.
        """
        rows = rows_of(self.data_rank, self.data_ranks, self.settings.batch_size)
        sizes = self.settings.batch_size, self.settings.seq_len
        return training_batch(self.data.train, self.settings.seed, self.step, *sizes, rows)

    def _num_target_tokens(self, windows: Tensor) -> float | None:
        """By what each part divides its sum of losses: the target tokens of the whole batch over the number
        of all parts. The mean over parts is then the mean over tokens, whichever parts these are in. None:
        all parts have equally many.
        """
        if self.separator is None:
            return None
        targets = self.total(num_target_tokens(windows, self.separator))
        return max(targets, 1.0) / (self.settings.accumulate * self.data_ranks)

    def train_step(self) -> StepResult:
        """One optimizer step. Raises TrainingDiverged, before the weights change, when something is not
        finite.
        """
        started = time.perf_counter()
        settings = self.settings
        self.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        parts = settings.accumulate * self.data_ranks
        windows = self._windows()
        targets = self._num_target_tokens(windows)
        objective, means = 0.0, dict[str, float]()
        for part, ids in enumerate(windows.chunk(settings.accumulate), 1):
            synchronize(self.model, part == settings.accumulate)
            loss, found = self.losses(ids.to(self.device), targets)
            loss = loss / parts
            loss.backward()
            objective += loss.item()
            for name, value in found.items():
                means[name] = means.get(name, 0.0) + value / parts
        objective = self.total(objective)
        means = {name: self.total(value) for name, value in means.items()}
        observed = self.observe(self.step + 1, self.model) if self.observe else None
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        if settings.random_sources:  # a layer that nobody read: AdamW has a state for each parameter
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = nn.utils.clip_grad_norm_(learning, settings.grad_clip or math.inf)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        rate = self.rate()
        if not (math.isfinite(objective) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"{settings.name} diverged at step {self.step + 1}: loss {objective}, gradient norm {norm}, "
                f"learning rate {rate:.3g}; the weights are those before this step. {settings.advice}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        self.optimizer.step()
        self.step += 1
        elapsed = time.perf_counter() - started
        self.seconds += session.total(elapsed)[0] / session.world_size()  # alike: a budget may be in seconds
        return StepResult(self.step, means.pop("loss", objective), norm, rate, means, observed)

    def total(self, value: float) -> float:
        """Added up over the data ranks; the processes of one have the same value."""
        return session.total(value)[0] * self.data_ranks / session.world_size()


class DecoderTrainer(Trainer):
    """Trains a module by its method `loss(ids, labels)`; labels are the ids, shifted inside the module. With
    `data.document_masks` it also gets `document_ids` and `num_target_tokens`, as `Decoder.loss` does.

    model: fp32 weights, moved to `device`; under torchrun a Decoder, the same on all processes, which is then
    shared among them as `config.parallel` says: parameters become DTensors, and each data rank runs its rows
    of every batch. Raises ConfigError for a layout or a batch size that does not fit the processes, and
    ValueError when the text is shorter than one window.
    """

    def __init__(self, model: nn.Module, data: TokenData, config: TrainConfig, device: torch.device) -> None:
        session.check_batch(config)
        if config.run.random_sources:
            _check_own_sources(model)
        self.config = config
        mesh = session.mesh(config, device)
        check_length(data.train, config.data.seq_len, "training")
        check_length(data.valid, config.data.seq_len, "validation")
        _share(model, config, mesh)  # moves each layer's part to the device, so the whole need not fit there
        model.to(device)
        run, optim = config.run, config.optim
        settings = StepSettings(
            seed=run.seed,
            batch_size=run.batch_size,
            accumulate=run.accumulate,
            seq_len=config.data.seq_len,
            precision=run.precision,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            grad_clip=optim.grad_clip,
            eps=optim.eps,
            random_sources=run.random_sources,
            advice="Try a lower optim.lr, more optim.warmup_steps or a smaller optim.grad_clip",
        )
        super().__init__(model, param_groups(model, optim.weight_decay), data, settings, device, mesh)

    def begin_step(self) -> None:
        """Training mode, and the step's random sources."""
        super().begin_step()
        settings, layers = self.settings, self.config.model.num_hidden_layers
        if settings.random_sources:
            drawn = draw_sources(layers, settings.random_sources, settings.seed, self.step)
            self.model.model.random_sources = drawn

    @property
    def share(self) -> float:
        return self.step / self.config.run.steps

    def rate(self) -> float:
        return learning_rate(self.step, self.config.optim, self.config.run.steps)

    @property
    def separator(self) -> int | None:
        return self.data.separator if self.config.data.document_masks else None

    def losses(self, ids: Tensor, num_target_tokens: float | None) -> tuple[Tensor, dict[str, float]]:
        return self._loss(ids, num_target_tokens), {}

    def _loss(self, ids: Tensor, num_target_tokens: float | None = None) -> Tensor:
        ids, options = ids.to(self.device), {}
        if self.separator is not None:
            document_ids = document_ids_of(ids, self.separator)
            options = {"document_ids": document_ids, "num_target_tokens": num_target_tokens}
        with self.autocast():
            return self.model.loss(ids, ids, **options)

    @torch.no_grad()
    def evaluate(self, max_batches: int | None = None) -> float:
        """Mean loss, in nats per token, over windows of the validation text that are the same every time,
        however many processes and parts share them.
        """
        run, data = self.config.run, self.config.data
        was_training = self.model.training
        self.model.eval()
        total = targets = 0.0
        limit = max_batches or run.valid_batches
        parts = run.accumulate * self.data_ranks
        batches = validation_batches(self.data.valid, run.batch_size // parts, data.seq_len, limit * parts)
        while turn := list(islice(batches, self.data_ranks)):
            # Who gets none in the last turn runs another's, for nothing: processes gather weights together.
            ids = turn[min(self.data_rank, len(turn) - 1)]
            loss = self._loss(ids)
            if self.data_rank < len(turn):
                tokens = num_target_tokens(ids, self.separator)
                total += loss.item() * tokens
                targets += tokens
        self.model.train(was_training)
        return self.total(total) / max(self.total(targets), 1.0)


def _check_own_sources(model: Any) -> None:
    """Raises ConfigError unless every layer of a decoder reads its own keys and values alone."""
    plan = getattr(model, "plan", None)
    if plan is None or plan.layers != CachePlan.named("vanilla", plan.num_layers).layers:
        raise ConfigError(
            "run.random_sources must be 0 unless model.plan is vanilla, got plan "
            f"{plan and plan.name!r}: sources are drawn among layers that all store"
        )
    if model.config.kv_lora_rank is not None:
        raise ConfigError("run.random_sources must be 0 with latent attention (model.kv_lora_rank)")


def _share(model: nn.Module, config: TrainConfig, mesh: Mesh | None) -> None:
    """Shares a decoder among the processes, or lays it out for one, as `config.parallel` says."""
    parallel = config.parallel
    how = None if parallel.activation_checkpointing == "none" else parallel.activation_checkpointing
    if mesh is None and how is None and not parallel.compile:
        return
    try:
        parallelize(
            model,
            mesh,
            precision=config.run.precision,
            activation_checkpointing=how,
            compile=parallel.compile,
        )
    except ValueError as error:
        raise ConfigError(f"parallel: {error}") from error
