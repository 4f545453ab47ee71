"""Tensors that the backward makes again instead of keeping them: fused keys and values, whole layers.

Attention saves K and V for its backward. Where they are fused, that is as much memory per layer as their own
cache would take, for tensors that a pass over the sources brings back. Hooks on what autograd saves replace
each view of a fused tensor by its geometry; the first view that the backward asks for fuses again.
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
    """What remains of a saved view of a fused tensor."""

    owner: _Refuse
    index: int  # of the fused tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Refuse:
    """Packs views of fused tensors, and makes those tensors again when the first of them is unpacked.

    They are freed when as many views have been unpacked as were packed: once a backward, however many views
    and calls share them.
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
        return x if isinstance(x, Tensor) else x.owner.made(x)

    def made(self, x: _View) -> Tensor:
        fused = self._fused
        if not fused:
            # The check that autograd makes of tensors that it saves.
            if any(tensor._version != version for tensor, version in self._inputs):
                raise RuntimeError(
                    "a source, a weight or the document_ids of fused_kv_attn_func, from which the backward "
                    "makes tensors again, was modified by an inplace operation between forward and backward"
                )
            with torch.no_grad():
                fused = self._fused = self._fuse()
        self._unpacked += 1
        if self._unpacked == self._packed:
            self._unpacked, self._fused = 0, ()
        return fused[x.index].as_strided(x.size, x.stride, x.offset)


@contextmanager
def recomputed(fuse: Fuse, fused: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[None]:
    """Within it, what autograd saves of the tensors ``fused`` is dropped, and ``fuse()`` makes them again.

    Args:
        fuse: returns tensors with the values, shapes and strides of ``fused``.
        fused: one that is itself an input, or a view of one, is saved as ever.
        inputs: what ``fuse`` reads, detached, so that it holds no graph. Modifying one before the backward
            makes the backward raise RuntimeError.

    These contexts nest. Within other saved-tensor hooks nothing happens: those of activation checkpointing
    drop or move all that is saved, and the inner hooks would hide it from them. Nor in forward mode: what is
    made again would have lost its tangents.
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
    """``function(*inputs)``, of which autograd keeps the inputs only: the backward runs it again.

    Inputs may be tensors within tuples, results may not: reentrant checkpointing sees to the gradients of
    lone tensors alone, so inputs travel flat.
    """
    from torch.utils import _pytree as pytree  # torch imports it with its compiler; not at start-up
    from torch.utils.checkpoint import checkpoint

    leaves, structure = pytree.tree_flatten(inputs)

    def flat(*leaves: Any) -> tuple[Tensor | None, ...]:
        return function(*pytree.tree_unflatten(list(leaves), structure))

    return checkpoint(flat, *leaves, use_reentrant=how == "reentrant", preserve_rng_state=False)
