"""Fused keys and values that the backward makes again instead of keeping them.

Attention saves K and V for its backward. Where they are fused, that is as much memory per layer as their own
cache would take, for tensors that a pass over the sources brings back. Hooks on what autograd saves replace
each view of a fused tensor by its geometry; the first view that the backward asks for fuses again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

Fuse = Callable[[], Sequence[Tensor]]


class _View(NamedTuple):
    """What remains of a saved view of a fused tensor."""

    index: int  # of the fused tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Refuse:
    """Packs views of fused tensors, and makes those tensors again when the first of them is unpacked.

    They are freed when as many views have been unpacked as were packed: once a backward, however many views
    and calls share them.
    """

    def __init__(self, fuse: Fuse, fused: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._fuse = fuse
        kept = {x.untyped_storage()._cdata for x in inputs}
        storages = [x.untyped_storage()._cdata for x in fused]
        self._index = {storage: i for i, storage in enumerate(storages) if storage not in kept}
        self._inputs = [(x, x._version) for x in inputs if not x.is_inference()]
        self._packed = self._unpacked = 0
        self._fused: Sequence[Tensor] = ()

    def pack(self, x: Tensor) -> Tensor | _View:
        index = self._index.get(x.untyped_storage()._cdata)
        if index is None:
            return x
        self._packed += 1
        return _View(index, tuple(x.shape), x.stride(), x.storage_offset())

    def unpack(self, x: Tensor | _View) -> Tensor:
        if isinstance(x, Tensor):
            return x
        fused = self._fused
        if not fused:
            # The check that autograd makes of tensors that it saves.
            if any(tensor._version != version for tensor, version in self._inputs):
                raise RuntimeError(
                    "a source or weight of fused_kv_attn_func(..., recompute_fusion=True) was modified by an "
                    "inplace operation between forward and backward"
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

    Nothing happens within other saved-tensor hooks, such as those of activation checkpointing: they drop or
    move all that is saved, and the inner hooks would hide it from them.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield
        return
    refuse = _Refuse(fuse, fused, inputs)
    with torch.autograd.graph.saved_tensors_hooks(refuse.pack, refuse.unpack):
        yield
