"""Weights, gradients and optimizer states shared by the processes: torch's FSDP2, layer by layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fusedkv_ext.layers.decoder import Decoder

__all__ = ["Precision", "shard_weights", "synchronize"]

Precision = Literal["fp32", "bf16"]


def shard_weights(model: Decoder, mesh: DeviceMesh, precision: Precision = "fp32") -> None:
    """Each process keeps a part of every parameter, fp32; a layer's are gathered while it runs.

    mesh: of the processes that share the weights, 1-D, or 2-D (copies, parts of a copy). precision: "bf16"
    gathers and computes in bf16 and adds gradients up in fp32. Gradients are the sums over the processes, not
    means: a loss has to be divided by what all of them see.

    Fusion weights are fp32 throughout, as bf16 cannot hold their updates. FSDP2 wants one dtype per group, so
    those of all layers together are a group of their own: one small all-gather at the start of a pass and one
    reduce-scatter at its end.
    """
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)  # cos and sin stay fp32
    policy = whole
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    fusions = [
        layer.self_attn.kv_fusion for layer in model.model.layers if layer.self_attn.kv_fusion is not None
    ]
    if fusions:
        fully_shard(fusions, mesh=mesh, mp_policy=whole, reshard_after_forward=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a scaled sum is for NCCL alone


def synchronize(model: Decoder, last: bool) -> None:
    """Whether the next backward adds gradients up over the processes: the last part of a batch alone does, so
    accumulating costs no further messages. No effect on a model that is not sharded.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
