"""CUDA graph capture and replay of the decode step.

A decode step of a small batch consists of hundreds of kernels of a few microseconds each. Launching them
takes longer than running them. A graph replay is one launch (CUDA C++ Programming Guide, "CUDA Graphs").

A replay runs the kernels, but not the Python code. So a captured step reads lengths, pages and positions from
tensors with fixed addresses, never from the host, and it does not synchronize.
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

# A capture costs as much as a few steps: warm-up, capture and instantiation.
MIN_STEPS = 16

_one_at_a_time = threading.Lock()


def pays_off(model: nn.Module, device: torch.device, steps: int) -> bool:
    """Whether capturing ``steps`` decode steps of ``model`` is worthwhile.

    False if modules have forward hooks, because a replay does not call them.
    """
    return (
        device.type in CAPTURES
        and steps >= MIN_STEPS
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    )


def graphed(step: Step, ids: Tensor, required: bool = False) -> Step:
    """Captures ``step`` as a graph for tensors like ``ids``. Each call overwrites the previous result.

    Args:
        step: The step. It must be idempotent: the warm-up runs it an additional time.
        ids: Input of the capture.
        required: Whether a failed capture raises RuntimeError. If False, it warns and returns ``step``.
    """
    static = ids.clone()
    try:
        with _one_at_a_time:
            replay = CAPTURES[ids.device.type](step, static)
    except RuntimeError as error:
        if required:
            raise
        warnings.warn(f"decoding without a CUDA graph, because the capture failed: {error}", stacklevel=2)
        return step

    def run(ids: Tensor) -> Tensor:
        static.copy_(ids)
        return replay()

    return run


class Inputs(TorchDispatchMode):
    """Keeps the inputs of a captured step alive: tensors that operations use but did not create.

    A graph holds addresses only. Without this, a table that its owner replaces would be freed.
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
        # Around the capture, because a failed capture leaves its stream as the current one.
        with torch.cuda.stream(side):
            step(ids)  # warm-up: creates handles, workspaces and tables
            # thread_local: other threads may allocate during the capture.
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
    """One stream per device, cached because cuBLAS allocates a workspace for every new stream."""
    return torch.cuda.Stream(device)


# Device type -> capture function: (step, ids) -> function that replays the step on ids.
CAPTURES: dict[str, Callable[[Step, Tensor], Callable[[], Tensor]]] = {"cuda": _capture_cuda}
