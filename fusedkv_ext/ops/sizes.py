"""Sizes that a graph of torch.compile or torch.export leaves open.

A comparison of an open size becomes a guard: another answer compiles again, and an export refuses it. The
functions here add no guard. Outside of graphs all sizes are plain ints.
"""

from __future__ import annotations

import torch

__all__ = ["always", "is_open"]


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
