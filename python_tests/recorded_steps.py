"""A recording of operations that stands in for a CUDA graph on the CPU.

Like a graph it repeats what happened once, on the same tensors, so that a number from the host is as wrong in
it as it would be there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fusedkv_ext.generation.cuda_graph import Step


class Recording(TorchDispatchMode):
    """Every operation that runs, with its arguments and results; fails where the host reads a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            pytest.fail(f"the host reads a tensor: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self, result: Tensor) -> Tensor:
        """Runs all again, on results of this time where there were results then; returns this ``result``."""
        now: dict[int, Tensor] = {}

        def current(x: object) -> object:
            return now.get(id(x), x)

        for func, args, kwargs, out in self.calls:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            now.update((id(then), x) for then, x in zip(tree_leaves(out), tree_leaves(again), strict=True))
        return now[id(result)]


class RecordedSteps:
    """Captures steps as recordings, and counts."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Step, ids: Tensor) -> Callable[[], Tensor]:
        self.captures += 1
        step(ids)  # warm-up, as for a CUDA graph
        with pytest.MonkeyPatch.context() as patch, Recording() as recording:
            for name in ("tolist", "cpu", "numpy"):
                patch.setattr(Tensor, name, lambda *args: pytest.fail("the host reads a tensor"))
            out = step(ids)

        def replay() -> Tensor:
            self.replays += 1
            return recording.replay(out)

        return replay
