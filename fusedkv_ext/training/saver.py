"""Writing a run's checkpoints beside the training, and putting one back into a model and its optimizer.

torch.distributed.checkpoint does both: each process writes and reads its own part of every tensor, under the
name that it has in the model, so any number of processes goes on from what any other has written.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fusedkv_ext.checkpoint import dcp as dcp_files
from fusedkv_ext.checkpoint.pretrained import PREFIX, STATE
from fusedkv_ext.distributed.tensor import HeadOrder, head_orders
from fusedkv_ext.errors import CheckpointError
from fusedkv_ext.training import run_folder, session
from fusedkv_ext.training.trainer import Trainer

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_MOMENTS = "optimizer."  # before names of the optimizer's tensors in a checkpoint
_FLAT_STATE = "state."  # before the same names in torch's flat form
_OF_EACH_ELEMENT = ("exp_avg", "exp_avg_sq")  # what AdamW keeps in the shape of a weight


class _Writer(dcp_files.Writer):
    """Commits what all processes have written, on the first of them; they all hear of an error."""

    def __init__(self, folder: Path, commit: Callable[[], None]) -> None:
        super().__init__(folder)
        self._commit = commit

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        try:
            dcp_files.stored(Path(self.path))
        except ValueError as error:
            what = str(error).partition("; ")[0]
            raise OSError(f"{what}; all processes have to see the same --out folder") from error
        self._commit()


class Saver:
    """Writes checkpoints below `root`, one at a time, on a thread of its own; all processes of a run make one
    and call it together.

    A folder `step-N` appears when the parts of all processes and what belongs beside them are on the disk,
    and the oldest go until `keep` are left.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root, self._keep = root, keep
        self._group = session.files_group()
        # Killed runs leave hidden folders behind, perhaps while a writer of theirs is still at work.
        self._token = session.from_rank_zero(secrets.token_hex(4))
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], fill: Callable[[Path], None]) -> Path:
        """Begins to write `root/step-N`, its path; waits for the one before. A checkpoint that is there
        already stays.

        tensors: of `collect`; they are copied before this returns. fill: puts what is no tensor into the
        folder that it gets, on rank 0 and on the writer's thread. Raises CheckpointError of the one before.
        """
        self.wait()
        target = run_folder.folder_of(self._root, step)
        if session.from_rank_zero(target.exists()):
            if session.rank() == 0:
                run_folder.prune(self._root, self._keep)
            return target
        scratch = self._root / f".partial-{target.name}-{self._token}"

        def commit() -> None:
            fill(scratch)
            run_folder.publish(scratch, target)
            run_folder.prune(self._root, self._keep)

        parts: dict[str, dict[str, Tensor]] = {}  # the writer joins the names again
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        future = dcp.async_save(
            parts,
            storage_writer=_Writer(scratch / STATE, commit),
            process_group=self._group,
            no_dist=self._group is None,
        )
        self._pending = target, future
        return target

    @property
    def failed(self) -> bool:
        """Whether writing has ended with an error, which `wait` raises. Does not wait."""
        future = self._pending[1] if self._pending else None
        return future is not None and future.done() and future.exception() is not None

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError, naming the folder, if it failed."""
        if self._pending is None:
            return
        (target, future), self._pending = self._pending, None
        error = future.exception()
        if error is not None:
            cause = dcp_files.first_cause(error)
            newest = run_folder.latest(self._root)
            raise CheckpointError(
                f"{target} could not be written ({type(cause).__name__}: {cause}); "
                + (f"{newest.name} is whole: go on from it with --resume" if newest else "there is none yet")
            ) from error

    def close(self) -> None:
        """`wait` for ends by another error, which this one's own must not hide: it becomes a warning."""
        try:
            self.wait()
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)


def collect(trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: weights, a tied head once, and what the optimizer keeps for each
    of them. Of DTensors each process has its part; most are those of the trainer, not copies. Frozen weights
    are left out where the trainer does not save them.

    An optimizer's settings (rates, decay) are none of them: they come from the configuration.
    """
    model, optimizer = trainer.model, trainer.optimizer
    fresh = not optimizer.state
    weights = get_model_state_dict(
        model, options=StateDictOptions(ignore_frozen_params=not trainer.saves_frozen)
    )
    for name in _tied(model):
        weights.pop(name, None)
    moments = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    if fresh:  # torch has made the state by a step with gradients and rates of zero, and counted it
        for state in optimizer.state.values():
            state["step"].zero_()
    found = {PREFIX + name: tensor for name, tensor in weights.items()}
    for name, tensor in moments.items():
        if name.startswith(_FLAT_STATE):
            found[_MOMENTS + name.removeprefix(_FLAT_STATE)] = tensor
    for name, order in _orders(trainer).items():
        found[name] = order.canonical(found[name])
    return found


def restore(folder: Path, trainer: Trainer) -> None:
    """Puts the tensors of a checkpoint into a trainer's model and optimizer, however many processes wrote it
    and share them now; all processes call it together.

    Raises ValueError, on all of them, for a folder that is damaged or does not fit.
    """
    model, optimizer = trainer.model, trainer.optimizer
    tensors = collect(trainer)
    dcp_files.read(folder / STATE, tensors, session.files_group())
    for name, order in _orders(trainer).items():
        tensors[name] = order.shared(tensors[name])
    weights = {
        name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)
    }
    for name, first in _tied(model).items():
        if first in weights:
            weights[name] = weights[first]
    set_model_state_dict(model, weights, options=StateDictOptions(strict=trainer.saves_frozen))
    moments = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    for name, tensor in tensors.items():
        if name.startswith(_MOMENTS):
            moments[_FLAT_STATE + name.removeprefix(_MOMENTS)] = tensor
    set_optimizer_state_dict(model, optimizer, moments, options=_FLAT)


def _orders(trainer: Trainer) -> dict[str, HeadOrder]:
    """Of tensors whose heads tensor parallelism has reordered: files have the order of one process."""
    if trainer.mesh is None or trainer.mesh.tp is None:
        return {}
    found = {}
    for name, order in head_orders(trainer.model, trainer.mesh.size("tp")).items():
        found[PREFIX + name] = order
        if trainer.model.get_parameter(name).requires_grad:  # of constants the optimizer keeps nothing
            found |= {f"{_MOMENTS}{name}.{kind}": order for kind in _OF_EACH_ELEMENT}
    return found


def _tied(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several, and the first name of each."""
    first: dict[int, str] = {}
    names = [
        (name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return {name: known for name, known in names if name != known}
