"""Parallelism of a decoder over the processes of torchrun, with torch's own FSDP2 and DTensor."""

from __future__ import annotations

import torch

from fusedkv_ext.distributed.context import apply_cp
from fusedkv_ext.distributed.fsdp import Precision, shard_weights, synchronize
from fusedkv_ext.distributed.mesh import DIMS, Layout, Mesh, make_mesh
from fusedkv_ext.distributed.tensor import apply_tp
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.ops import sharding_rules  # noqa: F401  (operations take DTensors)
from fusedkv_ext.ops.recompute import Checkpointing

__all__ = ["DIMS", "Layout", "Mesh", "make_mesh", "parallelize", "shard_weights", "synchronize"]


def parallelize(
    model: Decoder,
    mesh: Mesh | None,
    *,
    precision: Precision = "fp32",
    activation_checkpointing: Checkpointing | None = None,
    compile: bool = False,
) -> None:
    """Parallelizes a decoder over the processes of a mesh, in place.

    Every process must hold the same weights before. Afterwards the parameters are DTensors: heads and widths
    are sharded over tp, all parameters over the data and cp ranks (FSDP2). ``forward`` takes the whole
    sequences of this process's data rank. Gradients are sums over all processes.

    Args:
        model: the decoder.
        mesh: None leaves the model on one process.
        precision: see ``shard_weights``.
        activation_checkpointing: saves only the inputs of each layer and recomputes the layer in the
            backward.
        compile: compiles each layer with torch.compile.

    Raises:
        ValueError: the mesh cannot shard the model; the message names the size.
    """
    if mesh is not None and mesh.tp is not None:
        apply_tp(model, mesh.tp)
    if mesh is not None and mesh.cp is not None:
        apply_cp(model, mesh.cp)
    for layer in model.model.layers:
        layer.activation_checkpointing = activation_checkpointing
        if compile:
            # The checkpoint stays outside of the graph. Within, it would save DTensors' DeviceMesh, which
            # AOTAutograd rejects (tp). It would also need a single graph, which attention breaks (cp).
            layer._run = torch.compile(layer._run)  # type: ignore[method-assign]
    if mesh is not None:
        shard_weights(model, model.model.layers, mesh.fsdp, precision)
