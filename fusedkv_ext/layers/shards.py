"""Parameters that ranks share under tensor parallelism: this rank's part, and its gradient.

Importing torch.distributed takes a while, so nothing here does before a parameter is a DTensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["common_seed", "for_all_ranks", "local"]


def local(parameter: Any, summed: bool = False) -> Tensor:
    """This rank's part of a parameter that is a DTensor; any other parameter as it is.

    Args:
        parameter: The parameter.
        summed: Whether the rank uses it for its own heads only. The gradient of a parameter that every rank
            has whole is then the sum over the ranks.
    """
    if not _is_shared(parameter):
        return parameter
    part = parameter.to_local()
    return for_all_ranks(part, parameter.device_mesh) if summed else part


def _is_shared(parameter: Any) -> bool:
    if torch.compiler.is_compiling():  # a traced DTensor does not tell which attributes it has
        from torch.distributed.tensor import DTensor

        return isinstance(parameter, DTensor)
    return hasattr(parameter, "to_local")


def for_all_ranks(weights: Tensor, mesh: Any) -> Tensor:
    """``weights``, equal on all ranks of the DeviceMesh ``mesh``, with the sum of their gradients."""
    if not weights.requires_grad:
        return weights
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole = DTensor.from_local(weights, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.to_local(grad_placements=[Partial()] * mesh.ndim)


def common_seed(mesh: Any) -> int:
    """A seed for all ranks of the DeviceMesh ``mesh``, which call this together.

    The first rank draws it from torch's global generator.
    """
    import torch.distributed as dist

    seed = torch.randint(2**63 - 1, (1,)).to(mesh.device_type)
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)
    return int(seed)
