"""The processes of torchrun as one run: they start together, agree, take turns and end together.

`session` joins them; without torchrun it does nothing, and everything else here is then a no-op. How they
share the model is told in `fusedkv_ext.distributed`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusedkv_ext.distributed import Layout, Mesh, make_mesh
from fusedkv_ext.errors import ConfigError, LostContact
from fusedkv_ext.training.config import TrainConfig

T = TypeVar("T")

_LOST = (
    "lost contact with the other processes of this run. If one of them ended, its own message, if it left "
    "any, says why; training goes on from its last checkpoint with --resume ({})"
)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_store: dist.Store | None = None
_files: dist.ProcessGroup | None = None
_turns = itertools.count()


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; 0 without torchrun. Rank 0 prints and writes."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if _active() else 1


@contextmanager
def session() -> Iterator[None]:
    """Joins the processes of torchrun (gloo for CPU tensors, nccl for CUDA tensors) and leaves them.

    An error that another process has said already ends this one without a word. Raises ConfigError for an
    environment that names several processes but is not torchrun's, and LostContact when any collective fails.
    """
    global _store, _files
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing or not dist.is_available():
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but "
            f"{' and '.join(missing) + ' not set' if missing else 'this torch has no torch.distributed'}; "
            "start with torchrun, or unset WORLD_SIZE for one process"
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
        total(0.0)  # nobody leaves while another still talks to it
    except KeyboardInterrupt:
        if number:  # rank 0 says it
            raise SystemExit(130) from None
        raise
    except Exception as error:
        known = _as_lost_contact(error)
        if _said_elsewhere(known):
            raise SystemExit(2 if isinstance(error, ConfigError) else 1) from error
        if known is not error:
            raise known from error
        raise
    dist.destroy_process_group()
    _store = _files = None


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, three remarks of torch that a run cannot act upon are not shown; then all is as before.

    It acts on the whole process, because filters of warnings are not those of a thread.
    """
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the norm of the gradient, one number, is summed dimension by dimension
    try:
        with warnings.catch_warnings():
            # Values that a layer returns are views of its projection. Nobody changes them in place.
            warnings.filterwarnings("ignore", message=".* returned a view tensor")
            # Said of one process on the thread that writes checkpoints.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        logger.setLevel(level)


def _as_lost_contact(error: Exception) -> Exception:
    """Collectives fail inside of models too, those of gloo with errors of no type of their own."""
    failed = isinstance(error, dist.DistError) or "/gloo/" in str(error)
    return LostContact(_LOST.format(error)) if failed and not isinstance(error, LostContact) else error


def _said_elsewhere(error: Exception) -> bool:
    """Whether another process says why: rank 0 the same, for which this waits a moment, or, where contact is
    lost, any that was faster."""
    lost = isinstance(error, LostContact)
    try:
        if rank() == 0:
            _store.set("error", str(error))
        else:
            with suppress(dist.DistStoreError):  # rank 0 did not fail
                _store.wait(["error"], timedelta(seconds=5))
                if lost or _store.get("error") == str(error).encode():
                    return True
        return _store.add("said", 1) > 1 and lost
    except RuntimeError:  # the store has gone with rank 0
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


def layout(config: TrainConfig) -> tuple[int, int, int, int]:
    """Processes along `parallel.DIMS`. Raises ConfigError when they are not those that there are."""
    section = config.parallel
    try:
        return Layout(section.dp_replicate, section.dp_shard, section.cp, section.tp).sizes(world_size())
    except ValueError as error:
        raise ConfigError(f"parallel: {error}") from error


def mesh(config: TrainConfig, device: torch.device) -> Mesh | None:
    """How the processes share this run; None without torchrun."""
    sizes = layout(config)
    return make_mesh(Layout(*sizes), device.type) if world_size() > 1 else None


def data_parallel_mesh(device: torch.device) -> Mesh | None:
    """All processes as shards of one copy of the weights; None without torchrun."""
    return make_mesh(Layout(), device.type) if world_size() > 1 else None


def check_batch(config: TrainConfig) -> None:
    """`check_parts` of a configuration."""
    replicas, shards, *_ = layout(config)
    check_parts(config.run.batch_size, config.run.accumulate, replicas * shards, "run.")


def check_parts(batch_size: int, accumulate: int, data_ranks: int, section: str = "") -> None:
    """Raises ConfigError unless every data rank gets equally many sequences in every part of a batch."""
    if batch_size % (data_ranks * accumulate):
        raise ConfigError(
            f"{section}batch_size ({batch_size}) must be a multiple of data ranks x {section}accumulate "
            f"({data_ranks} x {accumulate} = {data_ranks * accumulate})"
        )


def _all_reduce(tensor: Tensor, *, maximum: bool = False) -> None:
    """In place: the sum, or the maximum, over the processes."""
    dist.all_reduce(tensor, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)


def total(*values: float) -> list[float]:
    """Each value added up over the processes, in float64; equal on all of them."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    _all_reduce(sums)
    return sums.tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process; equal on all of them, which have to ask together."""
    return any_ranks(flag)[0]


def any_ranks(*flags: bool) -> list[bool]:
    """`any_rank` of several flags in one message."""
    return [count > 0 for count in total(*map(float, flags))]


def from_rank_zero(value: T) -> T:
    """What rank 0 gives; the processes have to ask together."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def files_group() -> dist.ProcessGroup | None:
    """All processes, for reading and writing checkpoints; made by the first call, which they make together.

    A group of its own: these collectives run on another thread than those of the training, and of two threads
    on one group nobody could say whose message comes first. Through gloo, since files are written from host
    memory. None without torchrun.
    """
    global _files
    if _active() and _files is None:
        _files = dist.new_group(backend="gloo")
    return _files


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
