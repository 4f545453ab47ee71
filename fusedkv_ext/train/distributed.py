"""Data parallel training under torchrun: each process has the whole model and its share of every batch.

`session` joins the processes; without torchrun it does nothing, and everything else here is then a no-op.
Gradients are added up by one all-reduce after the last part of a batch, in buckets that depend on the model
alone. DistributedDataParallel overlaps that with the backward, but orders its buckets by what the first
backward of a process did: a resumed run would add in another order than an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedkv_ext.train.config import ConfigError, TrainConfig

T = TypeVar("T")

_BUCKET_BYTES = 64 * 2**20
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_store: dist.Store | None = None
_turns = itertools.count()


class LostContact(RuntimeError):
    """Another process is gone; what it said, if it could say anything, is the reason."""


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; 0 without torchrun. Rank 0 prints and writes."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _active() else 1


@contextmanager
def session() -> Iterator[None]:
    """Joins the processes of torchrun (gloo for CPU tensors, nccl for CUDA tensors) and leaves them.

    An error that rank 0 has said already ends the other ranks without a word. Raises ConfigError for an
    environment that names several processes but is not torchrun's.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing or not dist.is_available():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but "
            f"{' and '.join(missing) + ' not set' if missing else 'this torch has no torch.distributed'}; "
            "start with torchrun, or unset WORLD_SIZE to train in one process"
        )
    # Its functions have the default group as a default argument, whatever that is on import. Imported later,
    # as torch.optim does, it would hold the group for good, and with it gloo's threads: one that is still
    # tidying up when Python ends aborts the process ("terminate called without an active exception").
    import torch.distributed.nn.functional

    store, number, world = next(dist.rendezvous("env://"))
    # torchrun may keep the store when it restarts the processes: what they left there is not to be read.
    _store = dist.PrefixStore(f"fusedkv {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    group = dist.PrefixStore("group", _store)
    dist.init_process_group(backend, store=group, rank=number, world_size=world)
    try:
        yield
    except Exception as error:
        if _said_by_rank_zero(error):
            raise SystemExit(2 if isinstance(error, ConfigError) else 1) from error
        raise
    total(0.0)  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    _store = None


def _said_by_rank_zero(error: Exception) -> bool:
    """Whether rank 0 ends with the same words or, for lost contact, with any; waits a moment for it."""
    if rank() == 0:
        _store.set("error", str(error))
        return False
    try:
        _store.wait(["error"], timedelta(seconds=5))
        return isinstance(error, LostContact) or _store.get("error") == str(error).encode()
    except RuntimeError:  # rank 0 did not fail, or the store has gone with it
        return False


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, made the current one, for "cuda" without a number; any other device as it
    is. Raises ConfigError when there are fewer GPUs than processes on this machine.
    """
    if world_size() == 1 or device.type != "cuda" or device.index is not None:
        return device
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"device is cuda, but process {local} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}; give torchrun at most that many as --nproc-per-node"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def check_batch(config: TrainConfig) -> None:
    """Raises ConfigError unless every process gets equally many sequences in every part of a batch."""
    run, world = config.run, world_size()
    if run.batch_size % (world * run.accumulate):
        raise ConfigError(
            f"run.batch_size ({run.batch_size}) must be a multiple of processes x run.accumulate "
            f"({world} x {run.accumulate} = {world * run.accumulate})"
        )


def _all_reduce(tensor: Tensor, *, maximum: bool = False) -> None:
    """In place: the sum, or the maximum, over the processes."""
    try:
        dist.all_reduce(tensor, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    except RuntimeError as error:
        raise LostContact(
            "lost contact with the other processes of this run. If one of them ended, its own message, if "
            f"it left any, says why; go on from the last checkpoint with --resume ({error})"
        ) from error


def total(*values: float) -> list[float]:
    """Each value added up over the processes, in float64; equal on all of them."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    _all_reduce(sums)
    return sums.tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process; equal on all of them, which have to ask together."""
    return total(float(flag))[0] > 0


def sum_gradients(model: nn.Module) -> None:
    """Replaces each parameter's gradient by its sum over the processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        _all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors together, each bucket closed by the one that fills it."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.nbytes for each in bucket) >= _BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def rank_zero_first(work: Callable[[], T]) -> T:
    """The result of `work`, which rank 0 does first: what it leaves on disk is then there for the others.

    They wait as long as it takes, not only until a collective would time out.
    """
    if world_size() == 1:
        return work()
    done = f"turn {next(_turns)}"
    if rank():
        _store.wait([done], timedelta(days=7))
    try:
        return work()
    finally:
        if rank() == 0:
            _store.set(done, "")


def check_alike(facts: Mapping[str, object]) -> None:
    """Raises ConfigError, on all processes, naming the facts whose text differs between them."""
    if world_size() == 1:
        return
    numbers = [
        float(int.from_bytes(hashlib.sha256(str(fact).encode()).digest()[:6], "big"))
        for fact in facts.values()
    ]
    largest = torch.tensor([numbers, [-number for number in numbers]], dtype=torch.float64)
    _all_reduce(largest, maximum=True)
    differing = [name for name, high, low in zip(facts, *largest.tolist(), strict=True) if high != -low]
    if differing:
        raise ConfigError(
            f"the processes differ in their {', '.join(differing)}; all have to see the same --out folder "
            "and the same text, and to run the same versions"
        )
