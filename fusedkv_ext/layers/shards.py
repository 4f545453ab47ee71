"""Local shards of DTensor parameters under tensor parallelism, and their gradients.

Importing torch.distributed is slow, so it is imported only if a parameter is a DTensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["common_seed", "for_all_ranks", "local"]


def local(parameter: Any, summed: bool = False) -> Tensor:
    """This rank's shard of a DTensor parameter; any other parameter is returned unchanged.

    Args:
        parameter: The parameter.
        summed: Whether the rank uses it for its own heads only. The gradient of a replicated parameter is
            then summed over the ranks.
    """
    if not _is_shared(parameter):
        return parameter
    part = parameter.to_local()
    return for_all_ranks(part, parameter.device_mesh) if summed else part


def _is_shared(parameter: Any) -> bool:
    if torch.compiler.is_compiling():  # hasattr does not work on a traced DTensor
        from torch.distributed.tensor import DTensor

        return isinstance(parameter, DTensor)
    return hasattr(parameter, "to_local")


def for_all_ranks(weights: Tensor, mesh: Any) -> Tensor:
    """Returns ``weights``, which are replicated over ``mesh``, with gradients summed over its ranks."""
    if not weights.requires_grad:
        return weights
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole = DTensor.from_local(weights, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.to_local(grad_placements=[Partial()] * mesh.ndim)


def common_seed(mesh: Any) -> int:
    """A common seed of all ranks of the DeviceMesh ``mesh``; collective.

    The first rank draws it from torch's global generator.
    """
    import torch.distributed as dist

    seed = torch.randint(2**63 - 1, (1,)).to(mesh.device_type)
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)
    return int(seed)
