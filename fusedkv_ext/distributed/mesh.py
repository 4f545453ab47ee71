"""The device mesh of a run: which process holds which shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["DIMS", "Layout", "Mesh", "make_mesh"]

DIMS = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """Processes along each dimension; their product is the number of processes.

    Args:
        dp_replicate: groups of processes with one whole copy of the weights each (data parallel).
        dp_shard: processes that shard one copy (FSDP2, data parallel); 0 takes the processes that the other
            dimensions leave.
        cp: processes that shard the tokens of a sequence (context parallelism).
        tp: processes that shard the heads (tensor parallelism).

    Raises:
        ValueError: a number is out of range.
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
        """The number of processes along ``DIMS``.

        Raises:
            ValueError: their product is not ``processes``.
        """
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
    """The processes of a run by the kind of shard.

    Attributes:
        tokens: the mesh with the dimensions ``DIMS``.
        weights: (dp_replicate, dp_shard x cp, tp), the same processes in the same order. To the weights cp
            ranks are further data ranks, because they process other tokens.
    """

    tokens: DeviceMesh
    weights: DeviceMesh

    def size(self, dim: str) -> int:
        """The number of processes along a dimension of ``DIMS``."""
        return self.tokens.size(DIMS.index(dim))

    @property
    def data_ranks(self) -> int:
        """The number of groups of processes with different sequences."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def data_rank(self) -> int:
        """The index of this process's group."""
        replica, shard = (self.tokens.get_local_rank(dim) for dim in DIMS[:2])
        return replica * self.size("dp_shard") + shard

    @property
    def cp(self) -> DeviceMesh | None:
        """The processes with the same sequences as this one; None if there are no others."""
        return self.tokens["cp"] if self.size("cp") > 1 else None

    @property
    def tp(self) -> DeviceMesh | None:
        """The processes that shard the heads with this one; None if there are no others."""
        return self.weights["tp"] if self.size("tp") > 1 else None

    @property
    def fsdp(self) -> DeviceMesh:
        """The processes that shard the weights with this one: 1-D, or 2-D (replicas, shards of a replica)."""
        copies = self.size("dp_replicate") > 1
        return self.weights["dp_replicate", "dp_shard_cp"] if copies else self.weights["dp_shard_cp"]


def make_mesh(layout: Layout, device_type: str) -> Mesh:
    """The mesh of all processes of the default group, tp innermost, so that it stays within a machine.

    Raises:
        ValueError: the layout does not match the number of processes.
    """
    replicas, shards, cp, tp = layout.sizes(dist.get_world_size())
    return Mesh(
        init_device_mesh(device_type, (replicas, shards, cp, tp), mesh_dim_names=DIMS),
        init_device_mesh(
            device_type, (replicas, shards * cp, tp), mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp")
        ),
    )
