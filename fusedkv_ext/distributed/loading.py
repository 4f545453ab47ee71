"""Sharded loading of a decoder under tensor parallelism: each process reads its own part of every tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fusedkv_ext.checkpoint.pretrained import (
    PREFIX,
    STATE,
    allocate,
    filled,
    open_weights,
    stored_tensors,
    verify_weights,
)
from fusedkv_ext.distributed.tensor import apply_tp, check_shares, head_orders
from fusedkv_ext.errors import CannotShare
from fusedkv_ext.layers.decoder import Decoder

__all__ = ["CannotShare", "load_sharded"]


def load_sharded(
    folder: str | os.PathLike[str],
    tp: DeviceMesh,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """``load_pretrained`` and ``apply_tp`` in one, without the whole model on any process.

    A process reads the rows (columns, vocabulary entries) of its shard. If the plan treats KV heads of a
    layer differently, it reads the same amount of others, and heads then move between the processes.

    Args:
        folder: the checkpoint.
        tp: a 1-D mesh of the processes that shard the heads; all of them call this function.
        dtype: None keeps the stored dtypes; otherwise the dtype of all but the fusion weights, which stay
            fp32.
        device: of this process; None means the current one of the mesh's type.

    Raises:
        CannotShare: heads, widths or the vocabulary do not divide; otherwise as ``load_pretrained``.
    """
    folder, device = Path(folder), torch.device(device or tp.device_type)
    model = allocate(folder, "meta")
    try:
        check_shares(model.config, tp.size())
    except ValueError as error:
        raise CannotShare(
            f"{tp.size()} processes (tp) cannot share the heads of the model in {folder}: {error}"
        ) from error
    apply_tp(model, tp)
    parts = {name: torch.empty_like(part, device=device) for name, part in stored_tensors(model).items()}
    if (folder / STATE).is_dir():
        from fusedkv_ext.checkpoint import dcp

        dcp.read(folder / STATE, {PREFIX + name: part for name, part in parts.items()})
    else:
        verify_weights(folder)
        with open_weights(folder, device) as file, torch.no_grad():
            for name, part in parts.items():
                shard = cast(DTensor, part)
                shard.to_local().copy_(file.get_slice(name)[_place(shard)])
    for name, order in head_orders(model, tp.size()).items():
        parts[name] = order.shared(parts[name])
    model = filled(model, parts)
    return model if dtype is None else model.to(dtype)


def _place(part: DTensor) -> tuple[slice, ...]:
    """The slices of this process's part in the whole tensor."""
    (placement,), mesh = part.placements, part.device_mesh
    place = [slice(None)] * part.dim()
    if isinstance(placement, Shard):
        length = -(-part.shape[placement.dim] // mesh.size())  # the last part may be shorter
        start = mesh.get_local_rank() * length
        place[placement.dim] = slice(start, start + part.to_local().shape[placement.dim])
    return tuple(place)
