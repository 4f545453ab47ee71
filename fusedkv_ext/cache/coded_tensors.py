"""How rows get into the tensors of a cache of codes, and out of them, where torch encodes and decodes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedkv_ext.cache.codec.tensor_codec import Encoded
from fusedkv_ext.cache.page_table import slots_of
from fusedkv_ext.ops import cached
from fusedkv_ext.ops.call import AppendCall

if TYPE_CHECKING:
    from fusedkv_ext.cache.kv_cache import KVCache

__all__ = ["append_codes", "decode_tokens"]


def append_codes(cache: KVCache, layer: int, key: Tensor | None, value: Tensor | None) -> None:
    """``KVCache.append`` where a codec has scales of tokens. Each side has its own call.

    Args:
        cache: A cache with ``scales``.
        layer: The layer.
        key: (B, S, g, D) after RoPE; None if the layer stores no keys.
        value: (B, S, g, D); None if the layer stores no values.
    """
    codecs: Any = cache.codecs
    scales: Any = cache.scales
    lengths, table = cache.stored_lens, cache.block_table
    for new, stored, codec, own in (
        (key, cache._keys[layer], codecs.keys[layer], scales.keys[layer]),
        (value, cache._values[layer], codecs.values[layer], scales.values[layer]),
    ):
        if new is None or stored is None:
            continue
        static: tuple[Tensor | None, ...] = ()
        none, no_heads = new[:, :, :0], cache._no_heads
        if own is not None:
            new, of_tokens = codec.encode(new)
            steps = of_tokens.shape[1]
            slots = cache._of_step(("slots", steps), partial(scales.slots_of_step, steps, lengths, table))
            scales.store(own, of_tokens, slots)
            none, no_heads = new[:, :, :0], stored[:, :, :0]
        elif codec is not None:
            static = (codec.scale, codec.center)
        cached.append(
            AppendCall(new, none, stored, no_heads, lengths, table, None, None, False, None, *static)
        )


def decode_tokens(cache: KVCache, token: Tensor) -> list[Tensor]:
    """What the codes of some tokens stand for.

    Args:
        cache: A cache with ``codecs``.
        token: (B, N) int64, from 0 at the first that is coded.

    Returns:
        Rows (B, N, g, D) of every tensor: the keys of all layers, then the values.
    """
    codecs: Any = cache.codecs
    none = [None] * cache.plan.num_layers
    of_keys, of_values = (none, none) if cache.scales is None else (cache.scales.keys, cache.scales.values)
    found = []
    for stored, codec, scales in (
        *zip(cache._keys, codecs.keys, of_keys, strict=True),
        *zip(cache._values, codecs.values, of_values, strict=True),
    ):
        if stored is None:
            continue
        slot = slots_of(token, stored.shape[1], cache.block_table)
        if codec is None:
            found.append(stored.flatten(0, 1)[slot])
            continue
        rows = stored.flatten(0, 1).view(torch.uint8)[slot].view(stored.dtype)  # torch indexes no float8
        found.append(codec.decode(Encoded(rows, None if scales is None else scales.flatten(0, 1)[slot])))
    return found
