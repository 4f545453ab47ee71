"""The optimizer step, and the state that makes a run resumable bit for bit.

Everything random is a pure function of the seed: the initial weights of (seed), a step's windows of (seed,
step). The state of a run is therefore the weights, AdamW's moments and the number of steps done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedkv_ext.distributed import parallelize, synchronize
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


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss in nats per token, norm of the gradient before clipping."""

    step: int  # number of steps done, this one included
    loss: float
    grad_norm: float
    lr: float
    observed: Record | None = None  # what `Trainer.observe` returned


def learning_rate(step: int, optim: OptimSection, steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up to `lr`, then half a cosine down to `lr * final_lr`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    share = min((step - optim.warmup_steps) / max(steps - 1 - optim.warmup_steps, 1), 1.0)
    low = optim.lr * optim.final_lr
    return low + (optim.lr - low) * 0.5 * (1.0 + math.cos(math.pi * share))


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


class Trainer:
    """Trains a module by its method `loss(ids, labels)`; labels are the ids, shifted inside the module. With
    `data.document_masks` it also gets `document_ids` and `num_target_tokens`, as `Decoder.loss` does.

    model: fp32 weights, moved to `device`; under torchrun a Decoder, the same on all processes, which is then
    shared among them as `config.parallel` says: parameters become DTensors, and each data rank runs its rows
    of every batch. Raises ConfigError for a layout or a batch size that does not fit the processes, and
    ValueError when the text is shorter than one window.
    """

    def __init__(self, model: nn.Module, data: TokenData, config: TrainConfig, device: torch.device) -> None:
        session.check_batch(config)
        self.data, self.config, self.device = data, config, device
        self.mesh = session.mesh(config, device)
        check_length(data.train, config.data.seq_len, "training")
        check_length(data.valid, config.data.seq_len, "validation")
        self.model = model
        self._share()  # moves each layer's part to the device, so the whole need not fit there
        self.model.to(device)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # spent in them, over all starts
        # Called with a step's number and the model, its gradients not yet clipped; what it returns goes to
        # the metrics. No part of the run's state: whoever resumes a run sets it again.
        self.observe: Callable[[int, nn.Module], Record | None] | None = None

    def _share(self) -> None:
        parallel, precision = self.config.parallel, self.config.run.precision
        how = None if parallel.activation_checkpointing == "none" else parallel.activation_checkpointing
        if self.mesh is None and how is None and not parallel.compile:
            return
        try:
            parallelize(
                self.model,
                self.mesh,
                precision=precision,
                activation_checkpointing=how,
                compile=parallel.compile,
            )
        except ValueError as error:
            raise ConfigError(f"parallel: {error}") from error

    @property
    def data_ranks(self) -> int:
        """Processes, or groups of them, that run sequences of their own."""
        return 1 if self.mesh is None else self.mesh.data_ranks

    @property
    def data_rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.data_rank

    @property
    def tokens_per_step(self) -> int:
        return self.config.run.batch_size * self.config.data.seq_len

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def bits_per_byte(self, loss: float) -> float:
        return bits_per_byte(loss, self.data.tokens_per_byte)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.run.precision == "bf16" and self.mesh is None:  # a mesh gathers weights in bf16
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def _separator(self) -> int | None:
        """The id that ends a document, where the model is to keep documents apart."""
        return self.data.separator if self.config.data.document_masks else None

    def _windows(self) -> Tensor:
        """This data rank's windows of the coming step: all data ranks together have the same ones however
        many they are.
        """
        run, data = self.config.run, self.config.data
        rows = rows_of(self.data_rank, self.data_ranks, run.batch_size)
        return training_batch(self.data.train, run.seed, self.step, run.batch_size, data.seq_len, rows)

    def _num_target_tokens(self, windows: Tensor) -> float | None:
        """By what each part divides its sum of losses: the target tokens of the whole batch over the number
        of all parts. The mean over parts is then the mean over tokens, whichever parts these are in. None:
        all parts have equally many.
        """
        if self._separator is None:
            return None
        targets = self._total(num_target_tokens(windows, self._separator))
        return max(targets, 1.0) / (self.config.run.accumulate * self.data_ranks)

    def _loss(self, ids: Tensor, num_target_tokens: float | None = None) -> Tensor:
        ids, options = ids.to(self.device), {}
        if self._separator is not None:
            document_ids = document_ids_of(ids, self._separator)
            options = {"document_ids": document_ids, "num_target_tokens": num_target_tokens}
        with self._autocast():
            return self.model.loss(ids, ids, **options)

    def train_step(self) -> StepResult:
        """One optimizer step. Raises TrainingDiverged, before the weights change, when something is not
        finite.
        """
        started = time.perf_counter()
        run, optim = self.config.run, self.config.optim
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = 0.0, run.accumulate * self.data_ranks
        windows = self._windows()
        num_target_tokens = self._num_target_tokens(windows)
        for part, ids in enumerate(windows.chunk(run.accumulate), 1):
            synchronize(self.model, part == run.accumulate)
            part_loss = self._loss(ids, num_target_tokens) / parts
            part_loss.backward()
            loss += part_loss.item()
        loss = self._total(loss)
        observed = self.observe(self.step + 1, self.model) if self.observe else None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip or math.inf)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        rate = learning_rate(self.step, optim, run.steps)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"training diverged at step {self.step + 1}: loss {loss}, gradient norm {norm}, learning "
                f"rate {rate:.3g}; the weights are those before this step. Try a lower "
                f"optim.lr, more optim.warmup_steps or a smaller optim.grad_clip"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return StepResult(self.step, loss, norm, rate, observed)

    def _total(self, value: float) -> float:
        """Added up over the data ranks; the processes of one have the same value."""
        return session.total(value)[0] * self.data_ranks / session.world_size()

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
                tokens = num_target_tokens(ids, self._separator)
                total += loss.item() * tokens
                targets += tokens
        self.model.train(was_training)
        return self._total(total) / max(self._total(targets), 1.0)
