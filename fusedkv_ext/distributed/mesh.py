"""Which process holds what: the device mesh of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["DIMS", "Layout", "Mesh", "make_mesh"]

DIMS = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """Processes along each dimension; their product is the number of processes.

    dp_replicate: groups of processes with a whole copy of the weights each. dp_shard: processes that share
    one copy (FSDP2); 0: those that the other dimensions leave. Both get sequences of their own. cp: processes
    that share the tokens of a sequence (context parallelism). tp: processes that share the heads (tensor
    parallelism).

    Raises ValueError for a number that cannot be.
    """

    dp_replicate: int = 1
    dp_shard: int = 0
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for name in DIMS:
            least = 0 if name == "dp_shard" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")

    def sizes(self, processes: int) -> tuple[int, int, int, int]:
        """Processes along ``DIMS``. Raises ValueError unless their product is ``processes``."""
        others = self.dp_replicate * self.cp * self.tp
        dp_shard = self.dp_shard or max(processes // others, 1)
        if others * dp_shard != processes:
            given = f"{self.dp_replicate} x {self.dp_shard or 'any'} x {self.cp} x {self.tp}"
            raise ValueError(
                f"dp_replicate x dp_shard x cp x tp is {given}, but there are {processes} processes; "
                "make the product equal to what torchrun starts (dp_shard = 0 takes what remains)"
            )
        return self.dp_replicate, dp_shard, self.cp, self.tp


@dataclass(frozen=True)
class Mesh:
    """The processes of a run by what they share.

    tokens: of dimensions ``DIMS``. weights: (dp_replicate, dp_shard x cp, tp), the same processes in the same
    order: cp ranks see other tokens, so to the weights they are like further data ranks.
    """

    tokens: DeviceMesh
    weights: DeviceMesh

    def size(self, dim: str) -> int:
        """Processes along a dimension of ``DIMS``."""
        return self.tokens.size(DIMS.index(dim))

    @property
    def data_ranks(self) -> int:
        """Groups of processes that get sequences of their own."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def data_rank(self) -> int:
        """Which of them this process belongs to."""
        replica, shard = (self.tokens.get_local_rank(dim) for dim in DIMS[:2])
        return replica * self.size("dp_shard") + shard

    @property
    def cp(self) -> DeviceMesh | None:
        """The processes that share this one's sequences; None: it is alone."""
        return self.tokens["cp"] if self.size("cp") > 1 else None

    @property
    def tp(self) -> DeviceMesh | None:
        """The processes that share this one's heads; None: it is alone."""
        return self.weights["tp"] if self.size("tp") > 1 else None

    @property
    def fsdp(self) -> DeviceMesh:
        """The processes that share this one's weights: 1-D, or 2-D (copies, parts of a copy)."""
        copies = self.size("dp_replicate") > 1
        return self.weights["dp_replicate", "dp_shard_cp"] if copies else self.weights["dp_shard_cp"]


def make_mesh(layout: Layout, device_type: str) -> Mesh:
    """The mesh of all processes of the default group, tp innermost, so that it stays within a machine.

    Raises ValueError if the layout does not fit their number.
    """
    replicas, shards, cp, tp = layout.sizes(dist.get_world_size())
    return Mesh(
        init_device_mesh(device_type, (replicas, shards, cp, tp), mesh_dim_names=DIMS),
        init_device_mesh(
            device_type, (replicas, shards * cp, tp), mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp")
        ),
    )
