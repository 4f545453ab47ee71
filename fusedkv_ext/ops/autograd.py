"""The derivatives of fuse_kv: dx_j = w_j (.) dout and dw_j = sum over tokens of dout (.) x_j, twice.

Autograd saves the weights. It saves the sources, which the model keeps alive anyway, only if the weights need
a gradient. It never saves a fused tensor.

Forward mode (torch.func.jvp, torch.autograd.forward_ad) works too. The operations are linear in each
argument, so tangents are sums of the operation itself. torch.library.register_autograd does not support
tangents: it gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.autograd.function import _SingleLevelFunction

from fusedkv_ext.ops import native  # noqa: F401  (defines torch.ops.fusedkv)
from fusedkv_ext.ops.checks import in_forward_mode

Gradients = tuple[list[Tensor | None], Tensor | None]
Arguments = Sequence[Any]  # of an operation: tensors, lists of tensors, flags


class _Derivative(NamedTuple):
    """The derivative of one operation. ``tangents``: those of its results, from its arguments and theirs."""

    save: Callable[[Any, Arguments, object], None]
    backward: Callable[..., Sequence[Any]]
    tangents: Callable[[Arguments, Arguments], Sequence[Tensor | None]]


class _FuseKV(_SingleLevelFunction):
    """One call in autograd's graph.

    It is created within the operation's kernel. torch.func calls that once for each of its levels, as it
    calls torch's own formulas; a torch.autograd.Function would look for the levels itself.
    """

    @staticmethod
    def forward(
        ctx: Any, derivative: _Derivative, call: Callable[[], Any], arguments: Arguments, *flat: Any
    ) -> Any:
        output = call()
        ctx.derivative = derivative
        ctx.like = [len(x) if isinstance(x, list) else None for x in arguments]
        derivative.save(ctx, arguments, output)
        if _may_have_tangents():
            ctx.save_for_forward(*(x for x in flat if isinstance(x, Tensor)))
            ctx.flags = [None if isinstance(x, Tensor) else x for x in flat]
            ctx.results = [(x.shape, x.dtype) for x in (output if isinstance(output, tuple) else (output,))]
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = _nested(ctx.needs_input_grad[3:], ctx.like)
        return None, None, None, *_flat(ctx.derivative.backward(ctx, needs, *grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        flat = [unpack_dual(next(saved), level=0).primal if flag is None else flag for flag in ctx.flags]
        like = ctx.like
        # torch turns forward mode off here, but tangents may have tangents, of another level of torch.func.
        with _set_fwd_grad_enabled(True):
            found = ctx.derivative.tangents(_nested(flat, like), _nested(tangents[3:], like))
        # Either no result has a tangent or all have.
        of_results = tuple(
            ctx.saved_tensors[0].new_zeros(shape, dtype=dtype) if x is None else x
            for x, (shape, dtype) in zip(found, ctx.results, strict=True)
        )
        return of_results[0] if len(of_results) == 1 else of_results


def _may_have_tangents() -> bool:
    # A graph of torch.compile enters forward mode without forward_ad, but always by torch.func.
    return in_forward_mode() or torch._C._are_functorch_transforms_active()


def _flat(arguments: Arguments) -> list[Any]:
    return [x for argument in arguments for x in (argument if isinstance(argument, list) else [argument])]


def _nested(flat: Iterable[Any], like: Sequence[int | None]) -> list[Any]:
    """The inverse of ``_flat``; like: the lengths of the lists, None for other arguments."""
    rest = iter(flat)
    return [next(rest) if length is None else [next(rest) for _ in range(length)] for length in like]


def _kernel(op: Any, derivative: _Derivative) -> Callable[..., Any]:
    """The kernel of ``op`` before any backend: it records a node if there is something to record."""

    def kernel(keys: Any, *arguments: Any) -> Any:
        def below() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

        grad_mode, forward_mode = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

        def from_node() -> Any:
            # A node turns both modes off, but the next level of torch.func may differentiate too.
            with torch.set_grad_enabled(grad_mode), _set_fwd_grad_enabled(forward_mode):
                return below()

        if not (grad_mode and torch._C._any_requires_grad(*arguments) or _may_have_tangents()):
            return below()
        with enable_single_level_autograd_function():
            apply: Callable[..., Any] = _FuseKV.apply  # type: ignore[attr-defined]
            return apply(derivative, from_node, arguments, *_flat(arguments))

    return kernel


def _save(ctx: Any, inputs: Arguments, output: object) -> None:
    """inputs: sources and weights of one sum, or of two."""
    sides = [(inputs[i], inputs[i + 1]) for i in range(0, len(inputs), 2)]
    kept = [sources if weights.requires_grad else [] for sources, weights in sides]
    ctx.counts = [len(sources) for sources in kept]
    ctx.save_for_backward(*(weights for _, weights in sides), *(x for sources in kept for x in sources))
    ctx.set_materialize_grads(False)


def _gradients(
    op: Callable[..., tuple[Tensor, Tensor]],
    grad: Tensor | None,
    sources: Sequence[Tensor],
    weights: Tensor,
    needs_sources: Sequence[bool],
    needs_weights: bool,
) -> Gradients:
    m = len(needs_sources)
    of_sources: list[Tensor | None] = [None] * m
    of_weights: list[Tensor] = [weights] * m
    if grad is None or not (any(needs_sources) or needs_weights):
        return of_sources, None
    grad = grad.contiguous()
    # Sources with and without a gradient of their own apart: memory for gradients is for the former alone.
    for needed in (True, False):
        chosen = [j for j in range(m) if bool(needs_sources[j]) == needed]
        if not chosen or not (needed or needs_weights):
            continue
        # Only the weights' gradient is made of the sources: without it, any of their shape and dtype will do.
        own_sources = [sources[j] if needs_weights else grad for j in chosen]
        own_weights = weights if len(chosen) == m else torch.stack([weights[j] for j in chosen])
        grads, sums = op(grad, own_sources, own_weights, needed, needs_weights)
        if len(chosen) == m:
            return list(grads.unbind(0)) if needed else of_sources, sums if needs_weights else None
        for i, j in enumerate(chosen):
            of_sources[j] = grads[i] if needed else None
            of_weights[j] = sums[i] if needs_weights else weights
    return of_sources, torch.stack(of_weights) if needs_weights else None


def _tangent(
    fuse: Callable[..., Tensor],
    sources: Sequence[Tensor],
    weights: Tensor,
    of_sources: Sequence[Tensor | None],
    of_weights: Tensor | None,
) -> Tensor | None:
    """The tangent of one sum: fuse(dx, w) + fuse(x, dw)."""
    moving = [j for j, x in enumerate(of_sources) if x is not None]
    parts = []
    if moving:
        own = weights if len(moving) == len(sources) else torch.stack([weights[j] for j in moving])
        parts.append(fuse([_vectors(x) for x in of_sources if x is not None], own))
    if of_weights is not None:
        parts.append(fuse(sources, of_weights.contiguous()))
    return sum(parts[1:], parts[0]) if parts else None


def _vectors(x: Tensor) -> Tensor:
    """A tensor with stride 1 in its last dim, as tangents may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _save_backward(ctx: Any, inputs: Arguments, output: object) -> None:
    grad, sources, weights, *_ = inputs
    ctx.save_for_backward(grad, weights, *sources)
    ctx.set_materialize_grads(False)


_libraries: list[torch.library.Library] = []  # registrations end with their library


def register(namespace: str) -> None:
    """Registers derivatives in both modes, and loops for torch.func.vmap.

    They are those of fuse_kv, fuse_kv_pair and fuse_kv_backward of a namespace: "fusedkv", or another one
        with
    the same schemas.
    """
    operations = getattr(torch.ops, namespace)
    fuse, fuse_pair, fuse_backward = (
        getattr(operations, name).default for name in ("fuse_kv", "fuse_kv_pair", "fuse_kv_backward")
    )

    def backward(ctx: Any, needs: Arguments, *grads: Tensor | None) -> list[Any]:
        saved = list(ctx.saved_tensors)  # read once: activation checkpointing gives them out once
        weights, saved = saved[: len(grads)], saved[len(grads) :]
        results: list[Any] = []
        for i, grad in enumerate(grads):
            sources = [saved.pop(0) for _ in range(ctx.counts[i])]
            results += _gradients(fuse_backward, grad, sources, weights[i], *needs[2 * i : 2 * i + 2])
        return results

    def tangents(inputs: Arguments, of_inputs: Arguments) -> list[Tensor | None]:
        sides = range(0, len(inputs), 2)
        return [_tangent(fuse, *inputs[i : i + 2], *of_inputs[i : i + 2]) for i in sides]

    def double_backward(ctx: Any, needs: Arguments, c: Tensor | None, d: Tensor | None) -> tuple[Any, ...]:
        """c (m, B, T, G, D) and d (m, G, D) arrive for w_j (.) dout and for the sums of dout (.) x_j."""
        grad, weights, *sources = ctx.saved_tensors
        needs_grad, needs_sources, needs_weights, *_ = needs
        of_grad, of_sources, of_weights = [], [None] * len(sources), None
        if c is not None:
            of_grad.append(fuse(list(c.unbind(0)), weights))
            if needs_weights:
                of_weights = fuse_backward(grad, list(c.unbind(0)), weights, False, True)[1]
        if d is not None:
            of_grad.append(fuse(sources, d.contiguous()))
            if any(needs_sources):
                of_sources = [fuse([grad], x) for x in d.contiguous().split(1)]
        return sum(of_grad) if needs_grad and of_grad else None, of_sources, of_weights, None, None

    def double_tangents(inputs: Arguments, of_inputs: Arguments) -> list[Tensor | None]:
        grad, sources, weights, needs_sources, needs_weights = inputs
        of_grad, of_sources, of_weights, *_ = of_inputs
        first: list[Tensor] = []
        second: list[Tensor] = []

        def add(of_first: bool, of_second: bool, *arguments: Any) -> None:
            of_first, of_second = of_first and needs_sources, of_second and needs_weights
            if of_first or of_second:
                results = fuse_backward(*arguments, of_first, of_second)
                first.extend(results[:1] if of_first else ())
                second.extend(results[1:] if of_second else ())

        if of_grad is not None:
            add(True, True, of_grad.contiguous(), sources, weights)
        if of_weights is not None:
            add(True, False, grad, sources, of_weights.contiguous())
        if any(x is not None for x in of_sources):
            moved = zip(of_sources, sources, strict=True)
            filled = [torch.zeros_like(x) if dx is None else _vectors(dx) for dx, x in moved]
            add(False, True, grad, filled, weights)
        return [sum(x[1:], x[0]) if x else None for x in (first, second)]

    library = torch.library.Library(namespace, "IMPL")
    _libraries.append(library)
    once = _Derivative(_save, backward, tangents)
    twice = _Derivative(_save_backward, double_backward, double_tangents)
    for op, derivative in ((fuse, once), (fuse_pair, once), (fuse_backward, twice)):
        name = op._schema.name.split("::")[1]
        library.impl(name, _kernel(op, derivative), "Autograd", with_keyset=True)
        torch.library.register_vmap(f"{namespace}::{name}", _loop(op), lib=library)


def _loop(op: Any) -> Callable[..., Any]:
    """The rule of torch.func.vmap, jacfwd and jacrev: one call per element of the batch."""

    def rule(info: Any, dims: Arguments, *arguments: Any) -> tuple[Any, Any]:
        def of(i: int, x: Any, dim: Any) -> Any:
            if isinstance(x, list):
                return [of(i, *pair) for pair in zip(x, dim, strict=True)]
            return x if dim is None else x.select(dim, i)

        outs = [
            op(*(of(i, *pair) for pair in zip(arguments, dims, strict=True))) for i in range(info.batch_size)
        ]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(x) for x in zip(*outs, strict=True)), (0,) * len(outs[0])

    return rule


register("fusedkv")
