"""Activation recomputation: fused K/V, masks or whole layers are recomputed in the backward instead of saved.

Attention saves K and V for its backward. If they are fused, that is as much memory per layer as a cache of
its own, for tensors that one pass over the sources restores. Saved-tensor hooks replace each view of a fused
tensor by its geometry. The first view that the backward asks for fuses again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext.ops.checks import in_forward_mode

Checkpointing = Literal["reentrant", "non_reentrant"]

Fuse = Callable[[], Sequence[Tensor]]


class _View(NamedTuple):
    """The geometry of a saved view of a fused tensor."""

    owner: _Refuse
    index: int  # type: ignore[assignment]  # of the fused tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Refuse:
    """Packs views of fused tensors, and recomputes the tensors when the first view is unpacked.

    They are freed when as many views have been unpacked as were packed. So they are recomputed once per
    backward, however many views and calls share them.
    """

    def __init__(
        self, fuse: Fuse, fused: Sequence[Tensor], inputs: Sequence[Tensor], outer: _Refuse | None
    ) -> None:
        self._fuse, self._outer = fuse, outer
        kept = {x.untyped_storage()._cdata for x in inputs}
        storages = [x.untyped_storage()._cdata for x in fused]
        self._index = {storage: i for i, storage in enumerate(storages) if storage not in kept}
        self._inputs = [(x, x._version) for x in inputs if not x.is_inference()]
        self._packed = self._unpacked = 0
        self._fused: Sequence[Tensor] = ()

    def pack(self, x: Tensor) -> Tensor | _View:
        index = self._index.get(x.untyped_storage()._cdata)
        if index is None:
            return x if self._outer is None else self._outer.pack(x)
        self._packed += 1
        return _View(self, index, tuple(x.shape), x.stride(), x.storage_offset())

    @staticmethod
    def unpack(x: Tensor | _View) -> Tensor:
        return x if isinstance(x, Tensor) else x.owner.recompute(x)

    def recompute(self, x: _View) -> Tensor:
        fused = self._fused
        if not fused:
            # As autograd checks tensors that it saves.
            if any(tensor._version != version for tensor, version in self._inputs):
                raise RuntimeError(
                    "a source, a weight or the document_ids of fused_kv_attn_func, from which the backward "
                    "recomputes tensors, was modified by an inplace operation between forward and backward"
                )
            with torch.no_grad():
                fused = self._fused = self._fuse()
        self._unpacked += 1
        if self._unpacked == self._packed:
            self._unpacked, self._fused = 0, ()
        return fused[x.index].as_strided(x.size, x.stride, x.offset)


@contextmanager
def recomputed(fuse: Fuse, fused: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[None]:
    """A context in which autograd does not save the tensors ``fused``: ``fuse()`` recomputes them.

    Contexts nest. They have no effect within other saved-tensor hooks: those of activation checkpointing drop
    or move everything that is saved, and inner hooks would hide it from them. They have none in forward mode
    either, because recomputed tensors would have lost their tangents.

    Args:
        fuse: Returns tensors with the values, shapes and strides of ``fused``.
        fused: The tensors. One that is an input itself, or a view of one, is saved as usual.
        inputs: What ``fuse`` reads, detached, so that it holds no graph. Modifying one before the backward
            makes the backward raise RuntimeError.
    """
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer = None if top is None else getattr(top[0], "__self__", None)
    if top is not None and not isinstance(outer, _Refuse) or in_forward_mode():
        yield
        return
    refuse = _Refuse(fuse, fused, inputs, outer)
    with torch.autograd.graph.saved_tensors_hooks(refuse.pack, refuse.unpack):
        yield


def run_again(
    function: Callable[..., tuple[Tensor | None, ...]], how: Checkpointing, *inputs: Any
) -> tuple[Tensor | None, ...]:
    """Runs ``function(*inputs)`` so that autograd saves the inputs only; the backward runs it again.

    Inputs may hold tensors within tuples, results may not: reentrant checkpointing gives gradients to
        separate
    tensors only, so inputs are passed flat.
    """
    from torch.utils import _pytree as pytree  # torch imports it with its compiler; not at start-up
    from torch.utils.checkpoint import checkpoint

    leaves, structure = pytree.tree_flatten(inputs)

    def flat(*leaves: Any) -> tuple[Tensor | None, ...]:
        return function(*pytree.tree_unflatten(list(leaves), structure))

    return checkpoint(flat, *leaves, use_reentrant=how == "reentrant", preserve_rng_state=False)
