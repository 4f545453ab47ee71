"""Cache layers for keys and values with different numbers of heads, which the caches of transformers lack.

A cache of transformers has one layer per layer of the model; layers that store nothing hold nothing. Here
some layers store only keys, only values, or fewer heads of one than of the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from fusedkv_ext.hf.versions import TESTED

__all__ = [
    "HAS_DUMMY_LAYER",
    "KVSharingDict",
    "EmptyDynamicLayer",
    "UnevenDynamicLayer",
    "UnevenStaticLayer",
    "UnevenStaticSlidingWindowLayer",
    "LayerCache",
    "cached_tokens",
    "check_growth",
    "window_start",
]

try:  # transformers 5.23 and later
    from transformers.cache_utils import KVSharingDict
except ImportError:
    from collections import UserDict

    class KVSharingDict(UserDict):  # FSDP2 would rebuild a dict and lose what layers put in it
        """Keys and values by layer, which accelerate can move between devices."""

        def to(self, device: torch.device, non_blocking: bool = False) -> KVSharingDict:
            for name in list(self):
                self[name] = tuple(x.to(device, non_blocking=non_blocking) for x in self[name])
            return self


_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)  # the base came with 5.23

# Without it every layer that stores nothing has an empty layer in the cache, except those at the end.
HAS_DUMMY_LAYER = hasattr(cache_utils, "DummyLayer")


class UnevenDynamicLayer(DynamicLayer):
    """A DynamicLayer whose keys (B, Gk, T, D) or values (B, Gv, T, D) may have zero heads."""

    def get_seq_length(self) -> int:
        """The number of tokens in the cache. The stock layer returns 0 if keys have no heads."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0


class _UnevenStatic:
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates (B, heads, max_cache_len, D) for keys and values, each with its own number of heads."""
        super().lazy_initialization(key_states, value_states[..., :0])  # values of the keys' heads: no bytes
        self.v_head_dim = value_states.shape[-1]
        shape = (*value_states.shape[:2], self.max_cache_len, value_states.shape[-1])
        self.values = value_states.new_zeros(shape)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)


class UnevenStaticLayer(_UnevenStatic, StaticLayer):
    """A StaticLayer whose values have a number of heads of their own."""


class UnevenStaticSlidingWindowLayer(_UnevenStatic, StaticSlidingWindowLayer):
    """A StaticSlidingWindowLayer whose values have a number of heads of their own."""


class EmptyDynamicLayer(DynamicLayer):
    """The layer of a model layer that stores nothing, for transformers without DummyLayer (before 5.23)."""

    def crop(self, tokens_to_remove: int) -> None:
        """Removes nothing. The stock layer fails here."""


class LayerCache(NamedTuple):
    """The operations of one model layer on a cache of transformers; the cache need not know the plan.

    Attributes:
        keywords: the keywords that attention received; the cache of continuous batching needs some of them.
        coded: makes the layer of the cache for a model layer with codecs; None without.
    """

    cache: Any
    layer: int
    plan: str
    keywords: dict[str, Any]
    coded: Callable[[], DynamicLayer] | None = None

    def store(self, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Adds new tokens, key (B, Gk, S, D) and value (B, Gv, S, D), and returns all that attention reads.

        Args:
            heads: KV heads of the layer on this rank, stored or not.

        Raises:
            ValueError: the cache already has tokens with other numbers of heads.
        """
        if self.coded is not None:
            self._make_coded(self.coded)
            return self.cache.update(key, value, self.layer)
        if not isinstance(self.cache, Cache):  # that of continuous batching, which has blocks of all heads
            if self.keywords.get("block_table") is not None:
                raise ValueError(
                    "continuous batching with block tables lets flash attention read the cache of one layer, "
                    f'but layers of plan {self.plan!r} read several; use attn_implementation="sdpa"'
                )
            return self._store_padded(key, value, (heads, heads), kwargs=self.keywords)
        held = self._prepared(key.shape[1], value.shape[1])
        if held is None or not held.is_initialized or held.keys is None or held.keys.dim() != 4:
            return self.cache.update(key, value, self.layer)
        allocated, stored = (held.keys.shape[1], held.values.shape[1]), (key.shape[1], value.shape[1])
        if allocated == stored or isinstance(held, _QUANTIZED):
            return self.cache.update(key, value, self.layer)
        if not isinstance(held, StaticLayer) or min(allocated) < max(stored):
            raise ValueError(
                f"the cache holds {allocated[0]} heads of keys and {allocated[1]} of values for layer "
                f"{self.layer}, but plan {self.plan!r} stores {stored[0]} and {stored[1]} there: another "
                "model filled it, or PEFT's prefix tuning, which does not know such plans; pass a cache made "
                "for this config"
            )
        # Allocated before anything was stored (early_initialization), for as many heads on either side.
        return self._store_padded(key, value, allocated)

    def _make_coded(self, make: Callable[[], DynamicLayer]) -> None:
        """Makes the layer of the cache one that stores codes, when the first tokens come.

        Raises:
            ValueError: the cache is not one that grows, or has tokens that are not coded.
        """
        layers = self.cache.layers if isinstance(self.cache, Cache) else []
        if self.cache.__class__ is DynamicCache and self.cache.layer_class_to_replicate is not None:
            while len(layers) <= self.layer:
                layers.append(self.cache.layer_class_to_replicate())
        held = layers[self.layer] if self.layer < len(layers) else None
        if type(held) is DynamicLayer and not held.is_initialized:
            held = layers[self.layer] = make()
        if not getattr(held, "stores_codes", False):
            what = type(self.cache).__name__ if held is None else f"a {type(held).__name__}"
            raise ValueError(
                f"the cache must be a DynamicCache, empty or filled by this model, for layer {self.layer} "
                f"with codecs, got {what}; pass no cache, or DynamicCache(config=model.config)"
            )

    def _store_padded(
        self, key: Tensor, value: Tensor, heads: tuple[int, int], **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values as the first of ``heads`` heads."""
        missing = heads[0] - key.shape[1], heads[1] - value.shape[1]
        padded = (F.pad(x, (0, 0, 0, 0, 0, n)) for x, n in zip((key, value), missing, strict=True))
        keys, values = self.cache.update(*padded, self.layer, **keywords)
        return keys[:, : key.shape[1]], values[:, : value.shape[1]]

    def store_nothing(self) -> None:
        """For a layer that stores nothing. Warns if the cache has tokens for it anyway."""
        held = self._prepared(0, 0) if isinstance(self.cache, Cache) else None
        if isinstance(held, DynamicLayer) and held.is_initialized and held.get_seq_length():
            warnings.warn(
                f"the cache holds {held.get_seq_length()} tokens for layer {self.layer}, which stores "
                f"nothing under plan {self.plan!r}: no layer reads them, so PEFT's prefix tuning has no "
                "effect there",
                UserWarning,
                stacklevel=2,
            )

    def _prepared(self, key_heads: int, value_heads: int) -> Any:
        """The cache layer, replaced by one for these numbers of key and value heads unless it has tokens.

        None if the cache does not have this layer.
        """
        cache, layer = self.cache, self.layer
        if key_heads == value_heads and (key_heads or HAS_DUMMY_LAYER):
            return cache.layers[layer] if layer < len(cache.layers) else None
        if cache.layer_class_to_replicate is not None:
            while len(cache.layers) <= layer:
                cache.layers.append(cache.layer_class_to_replicate())
        old = cache.layers[layer] if layer < len(cache.layers) else None
        if old is None or old.is_initialized:
            return old
        if type(old) is DynamicLayer:
            cache.layers[layer] = EmptyDynamicLayer() if key_heads == value_heads else UnevenDynamicLayer()
        elif key_heads == value_heads:
            return old
        elif type(old) is StaticLayer:
            cache.layers[layer] = UnevenStaticLayer(old.max_cache_len)
        elif type(old) is StaticSlidingWindowLayer:
            cache.layers[layer] = UnevenStaticSlidingWindowLayer(old.max_cache_len, old.max_cache_len)
        return cache.layers[layer]


def window_start(cache: Cache, steps: int) -> int:
    """The position of the first column of window masks, before ``steps`` tokens are added.

    transformers creates these masks for the first such layer of the cache.
    """
    sliding = getattr(cache, "is_sliding", ())
    if True not in sliding:
        return 0
    return cache.get_mask_sizes(steps, sliding.index(True))[1]


def cached_tokens(cache: Any) -> int | None:
    """The number of tokens of each sequence in a cache; None without a cache that counts them."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else None


def check_growth(cache: Any, stored: bool, expected: int | None) -> None:
    """Checks that a forward pass stored its tokens in ``cache``, which then holds ``expected``.

    If transformers passed its cache to the layers under an unknown name, all earlier tokens would be lost
    without an error.

    Raises:
        RuntimeError: the cache has another number of tokens.
    """
    found = None if expected is None else cached_tokens(cache)
    if not stored or found != expected:
        what = f"it holds {found} tokens, not {expected}" if stored else "no layer was handed it"
        raise RuntimeError(
            f"the cache did not grow: {what}. transformers {transformers.__version__} passes caches on in a "
            "way that fusedkv_ext does not know; install "
            f"{' to '.join(map(str, TESTED['transformers']))}, or pass use_cache=False"
        )
