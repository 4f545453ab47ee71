"""CUDA graph capture and replay of the decode step.

A decode step of a small batch is hundreds of kernels of a few microseconds each, less than the host needs to
launch them. Replaying a graph is one launch (CUDA C++ Programming Guide, "CUDA Graphs").

A replay runs the kernels again, but not the Python code. So a captured step reads lengths, pages and
positions from tensors that stay in place, never from numbers on the host, and it waits for nothing.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["CAPTURES", "graphed", "pays_off"]

Step = Callable[[Tensor], Tensor]

# A capture takes as long as a few steps: the warm-up, the capture itself, and the instantiation.
MIN_STEPS = 16

_one_at_a_time = threading.Lock()


def pays_off(model: nn.Module, device: torch.device, steps: int) -> bool:
    """Whether ``steps`` steps of ``model`` are faster captured than launched one by one.

    False if modules have forward hooks, because a replayed graph calls none.
    """
    return (
        device.type in CAPTURES
        and steps >= MIN_STEPS
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    )


def graphed(step: Step, ids: Tensor, required: bool = False) -> Step:
    """``step`` as a graph for tensors like ``ids``; its result is overwritten by the next call.

    Args:
        step: Running it twice on the same ids must have the effect of running it once.
        ids: The input to capture with.
        required: Whether RuntimeError passes if the capture fails. If not, a warning is given, and the step
            itself is returned.
    """
    static = ids.clone()
    try:
        with _one_at_a_time:
            replay = CAPTURES[ids.device.type](step, static)
    except RuntimeError as error:
        if required:
            raise
        warnings.warn(f"decoding without a CUDA graph, because capturing failed: {error}", stacklevel=2)
        return step

    def run(ids: Tensor) -> Tensor:
        static.copy_(ids)
        return replay()

    return run


class Inputs(TorchDispatchMode):
    """Keeps the tensors alive that operations read or write without having created them.

    A graph knows addresses only. A table that its owner replaces by a longer one would be freed under it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}
        self._made = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x not in self._made:
                self.kept[id(x)] = x
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x) not in self.kept:
                self._made[x] = None
        return out


def _capture_cuda(step: Step, ids: Tensor) -> Callable[[], Tensor]:
    """Captures ``step(ids)``; returns a function that replays it and returns its result."""
    current, side = torch.cuda.current_stream(ids.device), _side_stream(ids.device)
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(current)
    try:
        # Around all of it: a capture that fails would leave its stream the current one.
        with torch.cuda.stream(side):
            step(ids)  # creates what is created on first use: handles, workspaces, tables
            # Other threads may allocate meanwhile.
            capture = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
            with capture, Inputs() as inputs:
                out = step(ids)
    finally:
        current.wait_stream(side)

    return functools.partial(_replay, graph, out, inputs.kept)


def _replay(graph: torch.cuda.CUDAGraph, out: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """Runs the graph on the current stream. It owns the memory of ``out`` and reads ``kept``."""
    graph.replay()
    return out


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device, kept: cuBLAS has a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


# Device types that can capture a step, and how: (step, ids) -> a function that replays it on ids.
CAPTURES: dict[str, Callable[[Step, Tensor], Callable[[], Tensor]]] = {"cuda": _capture_cuda}
