"""Memory of a computation on the meta device: which storages live, and the most there ever were."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the storages that were made within it and live: ``now``, and ``peak`` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), inputs)
        return out

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._seen or key in inputs:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _Norm(torch.autograd.Function):
    """RMSNorm that keeps what torch's CUDA kernel keeps: input, weight, one fp32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """RMSNorm and attention keep what the kernels keep that CUDA tensors in bf16 would get; their results
    have the right shapes, not values. For tensors on meta, and on the CPU where there are as many heads as KV
    heads.
    """

    def norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return _Norm.apply(x, weight)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, **_: Any) -> Tensor:
        aten = torch.ops.aten
        flash = aten._scaled_dot_product_flash_attention
        if q.is_cpu:
            flash = aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, is_causal, scale=scale)[0]

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "rms_norm", norm))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        yield
