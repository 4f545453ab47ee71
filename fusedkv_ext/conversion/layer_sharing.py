"""Attention of plain transformers models in which layers attend to the keys and values of earlier layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["LayerSharing", "layers_share"]

ATTENTION = "fusedkv_layer_sharing"


class LayerSharing:
    """The layer that each layer attends to in one forward pass, and the caches of that pass.

    It travels through the model as the argument ``kv_sharing``.

    Attributes:
        sources: For each layer itself or an earlier one.
        caches: Keys and values of each layer, (B, G, S, D), as the pass fills them in.
    """

    def __init__(self, sources: list[int]) -> None:
        self.sources = sources
        self.caches: list[tuple[Tensor, Tensor]] = []


def _sharing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kv_sharing: LayerSharing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA in which a layer attends to the keys and values of another."""
    if kv_sharing is not None:
        kv_sharing.caches.append((key, value))
        key, value = kv_sharing.caches[kv_sharing.sources[cast(int, module.layer_idx)]]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _sharing_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def layers_share(model: Any) -> Iterator[None]:
    """Within it, passes of ``model`` take ``kv_sharing``; without one they compute SDPA as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
