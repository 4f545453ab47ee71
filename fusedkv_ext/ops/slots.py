"""Packed tokens that go to slots of a cache, vLLM's ``slot_mapping``.

Each token becomes a sequence of its own for the native append, with one page and a length that ends at its
offset. A token that is skipped is one at position -1, which the operation leaves out. Nothing waits for a
device, and no slot is written that was not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.ops import checks, debug
from fusedkv_ext.ops.call import AppendCall, append_call
from fusedkv_ext.ops.sizes import host_reads

__all__ = ["slots_append_call"]


def slots_append_call(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: object,
    others: Mapping[str, object],
    encode: Mapping[str, Any] | None = None,
) -> AppendCall:
    """The checked append of packed tokens.

    Args:
        key, value: (total, G, D) and (total, Gv, Dv).
        key_cache, value_cache: As in ``append_kvcache``.
        slot_mapping: (total,) int64.
        others: The arguments that must be None, by name.
        encode: Those of ``EncodeOptions``.

    Raises:
        ValueError: Another argument is given, or a shape, device or slot is wrong.
        TypeError: A type or dtype is wrong.
    """
    for name, x in others.items():
        if x is not None:
            remedy = (
                "rotate key before the call" if name.startswith("rotary") else "slots say where tokens go"
            )
            raise ValueError(f"{name} must be None with a slot_mapping, got {type(x).__name__}; {remedy}")
    slots = checks.check_tensor("slot_mapping", slot_mapping)
    if slots.dtype != torch.int64:
        raise TypeError(f"slot_mapping must be int64, got {str(slots.dtype).removeprefix('torch.')}")
    for name, x in (("key", key), ("value", value)):
        if checks.check_tensor(name, x).dim() != 3:
            raise ValueError(
                f"{name} must have 3 dims (total, G, D) with a slot_mapping, got {tuple(x.shape)}"
            )
    if slots.shape != key.shape[:1]:
        raise ValueError(
            f"slot_mapping must have shape ({len(key)},), one slot for each token of key, got "
            f"{tuple(slots.shape)}"
        )
    cache = checks.check_tensor("key_cache", key_cache)
    if cache.dim() != 4:
        raise ValueError(f"key_cache must have 4 dims, got {tuple(cache.shape)}")
    checks.check_same_device({"key": key, "slot_mapping": slots})
    rows, size = cache.shape[:2]
    if (slots.is_cpu or debug.active) and host_reads(slots):
        _check_slots(slots, rows * size)
    skipped = slots < 0
    lengths = (slots % max(size, 1) + 1).masked_fill(skipped, 0).int()
    # Pages that do not exist stay out of range: the operation writes none of them.
    pages = (slots // max(size, 1)).clamp(-1, 2**31 - 1).int()[:, None]
    tables = (lengths, pages, None, None, False, None)
    return append_call(key[:, None], value[:, None], key_cache, value_cache, *tables, encode)


def _check_slots(slots: Tensor, count: int) -> None:
    """That each slot is -1 or exists. The host reads them."""
    wrong = ((slots < -1) | (slots >= count)).nonzero()
    if len(wrong):
        i = int(wrong[0, 0])
        raise ValueError(f"slot_mapping[{i}] must be from 0 to {count - 1}, or -1, got {int(slots[i])}")
