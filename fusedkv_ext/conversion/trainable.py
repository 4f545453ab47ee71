"""Which parameters uptraining changes: all, those that the conversion touched, or low-rank updates (LoRA)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fusedkv_ext.extras import need
from fusedkv_ext.hf.loading import CONVERSION
from fusedkv_ext.layers.fusion import FusionWeights, param_groups
from fusedkv_ext.training import session

TRAIN = ("all", "changed", "lora")


def read_conversion(folder: Path) -> dict[str, Any] | None:
    """conversion.json of a folder; None where there is none. Raises ValueError when it is damaged."""
    path = folder / CONVERSION
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def fusion_names(model: nn.Module) -> set[str]:
    """Names of all fusion weights, without those that a plan does not learn."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, FusionWeights)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


class Trainable:
    """Sets ``requires_grad`` of the model's parameters; with LoRA, adds adapters to all linear layers but the
    head.

    model: a causal language model of transformers with fp32 weights, changed in place. train: "all",
    "changed" or "lora". changed: names of parameters, for train="changed"; None where nobody knows them.
    rank: of the adapters, whose first half is drawn from `seed`; torch's generator stays as it was.

    names: of the parameters of the saved model that training changes.

    Raises ValueError when `changed` is missing, names parameters that the model has not, or nothing would be
    trained; MissingExtra without peft.
    """

    def __init__(
        self, model: Any, train: str, *, changed: Iterable[str] | None = None, rank: int = 16, seed: int = 0
    ) -> None:
        self.model = model
        self._choice: dict[str, Any] = {"train": train, "changed": changed, "rank": rank, "seed": seed}
        self._adapted: Any = None
        fusion = fusion_names(model)
        if train == "all":
            self.names = {name for name, p in model.named_parameters() if p.requires_grad}
        elif train == "changed":
            self.names = self._changed(changed) | fusion
        else:
            self.names = fusion | self._adapt(rank, seed)
        trained = fusion if train == "lora" else self.names
        chosen = {
            id(parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)  # tied weights have two
            if name in trained or (self._adapted is not None and ".lora_" in name)
        }
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"train={train!r} leaves nothing to train in this model; take 'all' or 'lora'")

    def _changed(self, changed: Iterable[str] | None) -> set[str]:
        if changed is None:
            raise ValueError(
                f"train='changed' needs {CONVERSION} in the model's folder, saying what was changed; "
                "there is none: take 'all' or 'lora'"
            )
        names = set(changed)
        unknown = sorted(names - {name for name, _ in self.model.named_parameters(remove_duplicate=False)})
        if unknown:
            raise ValueError(
                f"{CONVERSION} lists {unknown[0]!r} as changed, which the model has not ({len(unknown)} such "
                "names); it belongs to another model"
            )
        return names

    def _adapt(self, rank: int, seed: int) -> set[str]:
        peft = need("peft", "Training with LoRA", "hf")
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._adapted = peft.get_peft_model(self.model, config)
        modules = (name for name, module in self.model.named_modules() if hasattr(module, "lora_A"))
        return {f"{name}.weight" for name in modules}

    def of(self, model: Any) -> Trainable:
        """The same choice of parameters in another copy of the model."""
        return Trainable(model, **self._choice)

    def state(self) -> dict[str, torch.Tensor]:
        """The values of what is trained, by name, not copied."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def whole_state(self) -> dict[str, torch.Tensor]:
        """`state` of a model that FSDP2 shards, on the CPU of the first process and empty on the others; all
        processes call it together.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is gathered may be in bf16
        whole = {}
        for name, shard in self.state().items():
            tensor = cast(DTensor, shard).full_tensor()
            if session.rank() == 0:
                whole[name] = tensor.cpu()
        return whole

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what ``state`` gave. Raises ValueError for other names or shapes."""
        own = self.state()
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in state.items()}:
            raise ValueError("the checkpoint's parameters are not those of this model; it is of another run")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def merge(self) -> Any:
        """The model with the adapters added into its weights; without LoRA the model as it is."""
        return self.model if self._adapted is None else self._adapted.merge_and_unload()

    def groups(self, weight_decay: float, fusion_lr: float) -> list[dict[str, Any]]:
        """As ``fusedkv_ext.param_groups``, with the fusion weights in a group of their own and a field
        "scale" in each, by which its learning rate is multiplied: `fusion_lr` for fusion weights, else 1.
        """
        modules = (module for module in self.model.modules() if isinstance(module, FusionWeights))
        fusion = {id(p) for module in modules for p in module.parameters()}
        groups = []
        for group in param_groups(self.model, weight_decay):
            sides = [[p for p in group["params"] if (id(p) in fusion) == side] for side in (False, True)]
            if sides[0]:
                groups.append({**group, "params": sides[0], "scale": 1.0})
            if sides[1]:
                groups.append({**group, "params": sides[1], "scale": fusion_lr, "name": "fusion"})
        return groups
