"""Sharding of weights, gradients and optimizer states: torch's FSDP2, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fusedkv_ext.layers.fusion import FusionWeights

__all__ = ["Precision", "shard_weights", "synchronize"]

Precision = Literal["fp32", "bf16"]


def shard_weights(
    model: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh, precision: Precision = "fp32"
) -> None:
    """Shards every parameter over the processes, in fp32; those of a layer are gathered while it runs.

    Gradients are sums over the processes, not means. Divide the loss by the number of target tokens of all
    processes.

    Fusion weights stay in fp32, because bf16 cannot represent their updates. FSDP2 needs one dtype per group,
    so the fusion weights of all layers form one group. It has one small all-gather at the start of a pass and
    one reduce-scatter at its end.

    Args:
        model: a decoder, or a causal language model of transformers.
        layers: its decoder layers, one FSDP group each.
        mesh: the processes that shard the weights, 1-D, or 2-D (replicas, shards of a replica).
        precision: "bf16" gathers and computes in bf16 and sums gradients in fp32.
    """
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)  # cos and sin stay fp32
    policy = whole
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    fusions: list[nn.Module] = [module for module in model.modules() if isinstance(module, FusionWeights)]
    if fusions:
        fully_shard(fusions, mesh=mesh, mp_policy=whole, reshard_after_forward=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a scaled sum is for NCCL alone


def synchronize(model: nn.Module, last: bool) -> None:
    """Sets whether the next backward sums gradients over the processes.

    Only the last micro-batch of a batch needs that, so accumulation has no further messages. It has no effect
    on a model that is not sharded.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
