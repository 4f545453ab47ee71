"""What transformers' caches lack: layers whose keys and values have different numbers of heads.

A cache of transformers has one layer per layer of the model, and layers that store nothing hold nothing. What
differs here: some layers store keys only, values only, or fewer heads of one than of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

__all__ = [
    "HAS_DUMMY_LAYER",
    "KVSharingDict",
    "EmptyDynamicLayer",
    "UnevenDynamicLayer",
    "UnevenStaticLayer",
    "UnevenStaticSlidingWindowLayer",
    "prepare",
]

try:  # transformers 5.23 and later
    from transformers.cache_utils import KVSharingDict
except ImportError:
    from collections import UserDict

    class KVSharingDict(UserDict):  # a dict would be rebuilt by FSDP2, and what layers put in it lost
        """Keys and values by layer, which accelerate can move between devices."""

        def to(self, device: torch.device, non_blocking: bool = False) -> KVSharingDict:
            for name in list(self):
                self[name] = tuple(x.to(device, non_blocking=non_blocking) for x in self[name])
            return self


# Without it a layer that stores nothing has a layer in the cache that stays empty, but for those at the end.
HAS_DUMMY_LAYER = hasattr(cache_utils, "DummyLayer")


class UnevenDynamicLayer(DynamicLayer):
    """A DynamicLayer whose keys (B, Gk, T, D) or values (B, Gv, T, D) may have no heads at all."""

    def get_seq_length(self) -> int:
        """Tokens in the cache. The stock layer says 0 where keys have no heads."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0


class _UnevenStatic:
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates (B, heads, max_cache_len, D) for keys and values, each with its own number of heads."""
        super().lazy_initialization(key_states, value_states[..., :0])  # values of the keys' heads: no bytes
        self.v_head_dim = value_states.shape[-1]
        shape = (*value_states.shape[:2], self.max_cache_len, value_states.shape[-1])
        self.values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)


class UnevenStaticLayer(_UnevenStatic, StaticLayer):
    """A StaticLayer whose values have a number of heads of their own."""


class UnevenStaticSlidingWindowLayer(_UnevenStatic, StaticSlidingWindowLayer):
    """A StaticSlidingWindowLayer whose values have a number of heads of their own."""


class EmptyDynamicLayer(DynamicLayer):
    """Of a layer that stores nothing, where transformers (before 5.23) has no DummyLayer."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to remove. The stock layer fails here."""


def prepare(cache: Cache, layer: int, key_heads: int, value_heads: int) -> None:
    """Makes layer ``layer`` of a cache fit for so many heads of keys and values, unless something is stored
    there already. Called before each update; whoever made the cache needs to know nothing of the plan.
    """
    if key_heads == value_heads and (key_heads or HAS_DUMMY_LAYER):
        return
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[layer] if layer < len(cache.layers) else None
    if old is None or old.is_initialized:
        return
    if type(old) is DynamicLayer:
        cache.layers[layer] = EmptyDynamicLayer() if key_heads == value_heads else UnevenDynamicLayer()
    elif key_heads == value_heads:
        return
    elif type(old) is StaticLayer:
        cache.layers[layer] = UnevenStaticLayer(old.max_cache_len)
    elif type(old) is StaticSlidingWindowLayer:
        cache.layers[layer] = UnevenStaticSlidingWindowLayer(old.max_cache_len, old.max_cache_len)
