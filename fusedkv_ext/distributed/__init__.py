"""Beyond one process: a decoder shared by the processes of torchrun, with torch's own means."""

from __future__ import annotations

import torch

from fusedkv_ext.distributed.context import apply_cp
from fusedkv_ext.distributed.fsdp import Precision, shard_weights, synchronize
from fusedkv_ext.distributed.mesh import DIMS, Layout, Mesh, make_mesh
from fusedkv_ext.distributed.tensor import apply_tp
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.ops import sharding_rules  # noqa: F401  (operations take DTensors)
from fusedkv_ext.ops.recompute import Checkpointing

__all__ = ["DIMS", "Layout", "Mesh", "make_mesh", "parallelize", "synchronize"]


def parallelize(
    model: Decoder,
    mesh: Mesh | None,
    *,
    precision: Precision = "fp32",
    activation_checkpointing: Checkpointing | None = None,
    compile: bool = False,
) -> None:
    """Shares a decoder among the processes of a mesh, in place; every process holds the same weights before.

    Afterwards parameters are DTensors: heads and widths over tp, all of them over the data and cp ranks
    (FSDP2). ``forward`` takes the whole sequences of this process's data rank and gradients are sums over all
    processes. mesh: None: one process, nothing is shared. precision: see ``shard_weights``.
    activation_checkpointing: layers keep their inputs only and run again in the backward. compile: each layer
    by torch.compile.

    Raises ValueError for a model that the mesh cannot share, naming the size.
    """
    if mesh is not None and mesh.tp is not None:
        apply_tp(model, mesh.tp)
    if mesh is not None and mesh.cp is not None:
        apply_cp(model, mesh.cp)
    for layer in model.model.layers:
        layer.activation_checkpointing = activation_checkpointing
        if compile:
            # What a checkpoint is around. One within a graph would keep the DeviceMesh of DTensors, which
            # AOTAutograd refuses (tp), and has to be one graph, which attention outside of it is not (cp).
            layer._run = torch.compile(layer._run)
    if mesh is not None:
        shard_weights(model, mesh.fsdp, precision)
