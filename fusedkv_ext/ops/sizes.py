"""What a graph of torch.compile or torch.export leaves open: sizes, and the contents of tensors.

A comparison of an open size becomes a guard: another answer compiles again, and an export refuses it. The
functions here add no guard. Outside of graphs all sizes are plain ints.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["always", "chunks", "host_reads", "is_open"]


def always(condition: bool | torch.SymBool) -> bool:
    """Whether the condition holds for every size that the graph serves."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports torch's compiler

    return statically_known_true(condition)


def is_open(size: int | torch.SymInt) -> bool:
    """Whether the graph serves several values of this size."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(size)


def chunks(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """Rows begin..end - 1 in chunks of ``size``; in one chunk where a graph serves any number of rows."""
    if is_open(end):
        return [(begin, end)]
    return [(i, min(i + size, end)) for i in range(begin, end, max(size, 1))]


def host_reads(x: Tensor) -> bool:
    """Whether the host can read the contents of x now, be it after waiting for the device.

    It cannot in graphs, of torch.compile or of CUDA, and not of tensors without data or of torch.func.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
