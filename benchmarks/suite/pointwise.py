"""Mixing, its gradients, and appending to a cache: what both devices time and check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import Outputs, assert_close
from suite.measure import Call, require_same_function

Fuse = Callable[[Sequence[Tensor], Tensor], Tensor]


def eager_fuse(sources: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """The weighted sum as one writes it in torch, in the sources' dtype."""
    if weights is None:
        return sources[0]
    return sum(w.to(x.dtype) * x for x, w in zip(sources, weights, strict=True))


class FuseProblem:
    """m sources and a gradient (1, T, G, D) on each set of buffers, and weights (m, G, D).

    parts: slices of the tokens on which results are compared, where a tensor is too large to be compared
    whole. The gradient of the weights, a sum over all tokens, always is.
    """

    def __init__(
        self,
        sources: list[list[Tensor]],
        grads: list[Tensor],
        weights: Tensor,
        parts: Sequence[slice] = (slice(None),),
    ) -> None:
        self.sources, self.grads, self.weights, self.parts = sources, grads, weights, parts
        for x in (weights, *(x for each in sources for x in each)):
            x.requires_grad_()
        self.m, self.tokens, self.nbytes = len(weights), grads[0].shape[1], grads[0].nbytes

    def bytes_of(self, tensors: int) -> int:
        return tensors * self.nbytes

    def on_sets(self, call: Callable[[list[Tensor], Tensor], Outputs]) -> list[Call]:
        """``call`` of the sources and the gradient of each set."""
        return [partial(call, *each) for each in zip(self.sources, self.grads, strict=True)]

    def forward(self, fuse: Fuse) -> list[Call]:
        @torch.no_grad()
        def call(sources: list[Tensor], grad: Tensor) -> Tensor:
            return fuse(sources, self.weights)

        return self.on_sets(call)

    def backward(self) -> list[Call]:
        """The operation, without autograd."""

        @torch.no_grad()
        def call(sources: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
            grads, grad_weights = fkv.fuse_kv_backward(grad, sources, self.weights)
            return (*grads, grad_weights)

        return self.on_sets(call)

    @torch.enable_grad()
    def by_autograd(self, fuse: Fuse) -> list[Call]:
        """The backward of a graph that is there already."""

        def graph(sources: list[Tensor], grad: Tensor) -> Call:
            out = fuse(sources, self.weights)
            return lambda: torch.autograd.grad(out, [*sources, self.weights], grad, retain_graph=True)

        return [graph(*each) for each in zip(self.sources, self.grads, strict=True)]

    def both(self, fuse: Fuse) -> list[Call]:
        @torch.enable_grad()
        def call(sources: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(fuse(sources, self.weights), [*sources, self.weights], grad)

        return self.on_sets(call)

    def check_forward(self, result: Tensor) -> None:
        for part in self.parts:
            sources = [x.detach()[:, part] for x in self.sources[0]]
            oracle = partial(reference.fuse_kv, sources, self.weights.detach())
            exact, same = oracle(dtype=torch.float64), oracle()
            assert_close(result[:, part], exact, same, f"fuse_kv {result.dtype}")

    def check_backward(self, result: Sequence[Tensor]) -> None:
        """result: m gradients of sources, then that of the weights."""
        exact, same = self._exact
        assert_close(self._cut(result[:-1]), exact[:-1], same[:-1], f"backward {result[0].dtype}")
        self.check_weights(result[-1:])

    def check_weights(self, result: Sequence[Tensor]) -> None:
        exact, same = self._exact
        name = f"backward {self.grads[0].dtype}, weights"
        assert_close(result[0], exact[-1], same[-1], name, terms=self.tokens)

    def _cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([x[:, part] for part in self.parts], dim=1) for x in tensors]

    @cached_property
    def _exact(self) -> list[list[Tensor]]:
        """Gradients in float64 and from the same math in the working dtype."""
        found = []
        for wide in (torch.float64, self.grads[0].dtype):
            with torch.enable_grad():
                leaves = [x.detach().to(wide).requires_grad_() for x in (*self.sources[0], self.weights)]
                out = reference.fuse_kv(leaves[:-1], leaves[-1])
                *grads, weights = torch.autograd.grad(out, leaves, self.grads[0].to(wide))
            found.append([*self._cut(grads), weights])
        return found


@dataclass
class AppendProblem:
    """New keys and values (B, S, G, D) on each set of buffers, and the caches in which they are stored.

    Caches are full of NaN before, so that a token in a wrong place shows. options: arguments of
    ``append_kvcache`` that all sets share. queries: (B, S, H, D), rotated too; empty: none.
    """

    keys: list[Tensor]
    values: list[Tensor]
    caches: list[list[Tensor]]
    options: dict[str, Any]
    queries: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for x in (x for pair in self.caches for x in pair):
            x.fill_(float("nan"))

    @property
    def nbytes(self) -> int:
        """Queries, keys and values of a set are read and written once."""
        return 2 * sum(x[0].nbytes for x in (self.keys, self.values, self.queries) if x)

    def ours(self) -> list[Call]:
        return [partial(self._append, fkv, i, caches) for i, caches in enumerate(self.caches)]

    def _append(self, module: Any, i: int, caches: list[Tensor], **extra: Any) -> list[Tensor]:
        inputs, options = (self.keys[i], self.values[i], *caches), {**self.options, **extra}
        if self.queries:
            return [*caches, module.rope_append_kvcache(self.queries[i], *inputs, **options)]
        module.append_kvcache(*inputs, **options)
        return caches

    @cached_property
    def _exact(self) -> list[list[Tensor]]:
        """In float64 and from the same math in the working dtype."""
        found = []
        for wide in (torch.float64, self.keys[0].dtype):
            caches = [torch.full_like(x, float("nan"), dtype=wide) for x in self.caches[0]]
            found.append(self._append(reference, 0, caches, dtype=wide))
        return found

    def check(self, result: Sequence[Tensor]) -> None:
        assert_close(result, *self._exact, f"append_kvcache {self.keys[0].dtype}")

    def check_peer(self, result: Sequence[Tensor]) -> None:
        sides = ([x.nan_to_num() for x in side] for side in (result, self._exact[0]))
        require_same_function("append_kvcache", *sides)
