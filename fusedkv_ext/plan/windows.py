"""Sliding windows and shared caches: whether every layer finds what it sees in the caches that it reads."""

from __future__ import annotations

from collections.abc import Sequence

from fusedkv_ext.plan.cache_plan import CachePlan
from fusedkv_ext.plan.latent import latent_layers

__all__ = ["check_windows"]

FULL, SLIDING = "full_attention", "sliding_attention"


def check_windows(plan: CachePlan, layer_types: Sequence[str], latent: bool = False) -> None:
    """No layer with full attention reads the cache of a layer with a window, which keeps the window only.

    A layer may mix with a sliding one before it stores, because that takes the new tokens alone.

    Args:
        plan: The cache plan.
        layer_types: "full_attention" or "sliding_attention" for each layer.
        latent: Whether the layers have multi-head latent attention.

    Raises:
        ValueError: A layer with full attention reads the cache of a sliding one.
    """
    latents = latent_layers(plan) if latent else None
    for i, layer in enumerate(plan.layers):
        # A segment that names the layer itself mixes new tokens with new tokens; the others read caches.
        read = {j for part in (*layer.keys, *layer.values) if i not in part.sources for j in part.sources}
        for j in sorted(read if latents is None else latents[i].read_layers - {i}):
            if (layer_types[i], layer_types[j]) == (FULL, SLIDING):
                raise ValueError(
                    f"layer_types: layer {i} has full attention but reads the cache of layer {j}, which "
                    f"keeps a sliding window (plan {plan.name!r}); make layer {j} full_attention or layer "
                    f"{i} sliding_attention"
                )
