"""CacheCodecs: fitted codecs of all tensors of a KVCache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext.cache.codec.codec_plan import CodecPlan
from fusedkv_ext.cache.codec.fit import FIRST_TOKENS, fit
from fusedkv_ext.cache.codec.kernel_codes import check_codes, fold
from fusedkv_ext.cache.codec.rotation import gaussian_grid
from fusedkv_ext.cache.codec.tensor_codec import TensorCodec
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.plan.pieces import SIDES

if TYPE_CHECKING:
    from fusedkv_ext.cache.kv_cache import KVCache

__all__ = ["CacheCodecs", "Folded"]

HeadsOf = tuple[int, slice | None]  # a layer, and which of the heads that it stores; None: all


class Folded(NamedTuple):
    """What one call of attention over codes needs.

    Attributes:
        key_weights: float32 (m_k, g, D), a (.) s, or a with scales of tokens; None if all are ones.
        value_weights: The same of b, (m_v, g, D).
        value_bias: float32 (g, D), sum_j b_j (.) c_j; None without codes.
        key_bias: float32 (g, D), the same of keys. Scores over codes lack q . key_bias.
    """

    key_weights: Tensor | None
    value_weights: Tensor | None
    value_bias: Tensor | None
    key_bias: Tensor | None


class CacheCodecs:
    """Fitted codecs of the tensors that a plan stores.

    Args:
        codecs: The codecs.
        keys: A fitted codec per layer; None where keys are raw.
        values: The same of values.
    """

    def __init__(
        self, codecs: CodecPlan, keys: Sequence[TensorCodec | None], values: Sequence[TensorCodec | None]
    ) -> None:
        self.codecs, self.keys, self.values = codecs, list(keys), list(values)
        self._codebooks: dict[torch.device, Tensor | None] = {}
        self._folded: dict[tuple[int, int], tuple[Tensor | None, Tensor | None, Folded]] = {}

    @classmethod
    def fit(cls, codecs: CodecPlan | str, cache: KVCache) -> CacheCodecs:
        """Codecs that are fitted to what a raw cache holds.

        Args:
            codecs: The codecs, or the label of a scheme (``CodecPlan.named``).
            cache: A cache of keys and values with a typical text in it.

        Raises:
            ValueError: The cache is coded already or has too few tokens, or codecs do not fit its plan.
        """
        if cache.codecs is not None or cache.rope_dim is not None:
            raise ValueError("cache must hold raw keys and values, got codes or latents")
        if isinstance(codecs, str):
            codecs = CodecPlan.named(codecs, cache.plan)
        codecs.check(cache.plan, cache.num_kv_heads, cache.head_dim)
        check_codes(codecs, cache.plan)
        sides = []
        for side in SIDES:
            fitted: list[TensorCodec | None] = []
            for i in range(cache.plan.num_layers):
                codec = codecs.codec(i, side)
                if codec.is_raw:
                    fitted.append(None)
                    continue
                first, sample = _tokens(cache, cache.keys(i) if side == "keys" else cache.values(i))
                own = TensorCodec(codec, sample.shape[1], cache.head_dim).to(cache.device)
                fitted.append(fit(own, sample, first=first))
            sides.append(fitted)
        return cls(codecs, *sides)

    def check(self, plan: CachePlan, num_kv_heads: int, head_dim: int) -> None:
        """Checks that the codecs fit a plan, and that kernels read them (``check_codes``).

        Raises:
            ValueError: They do not; the message names the layer and the side.
        """
        self.codecs.check(plan, num_kv_heads, head_dim)
        check_codes(self.codecs, plan)
        for codec in self._fitted:
            if codec.head_dim != head_dim:
                raise ValueError(f"codecs must be for head dim {head_dim}, got {codec.head_dim}")

    @property
    def _fitted(self) -> list[TensorCodec]:
        return [codec for codec in (*self.keys, *self.values) if codec is not None]

    @property
    def have_token_scales(self) -> bool:
        """Whether any codec has a scale per token."""
        return any(codec.codec.scale == "token" for codec in self._fitted)

    def codebook(self, device: torch.device) -> Tensor | None:
        """float32 (16,), the numbers of 4-bit codes of a grid; None without a grid."""
        if device not in self._codebooks:
            grid = any(codec.codec.kind == "grid" for codec in self._fitted)
            self._codebooks[device] = gaussian_grid(4).float().to(device) if grid else None
        return self._codebooks[device]

    def fold(
        self,
        place: tuple[int, int],
        keys: Sequence[HeadsOf],
        values: Sequence[HeadsOf],
        key_weights: Tensor | None,
        value_weights: Tensor | None,
    ) -> Folded:
        """The weights and the bias of one call of attention, computed when its fusion weights change.

        Args:
            place: The layer and the segment of heads that read.
            keys: What it reads: layers, and which of their stored heads.
            values: The same of values.
            key_weights: Fusion weights, float32 (m_k, g, D); None for ones.
            value_weights: The same of values.
        """
        known = self._folded.get(place)
        if known is not None and known[0] is key_weights and known[1] is value_weights:
            return known[2]
        k, center = fold([(self.keys[layer], heads) for layer, heads in keys], key_weights)
        v, bias = fold([(self.values[layer], heads) for layer, heads in values], value_weights)
        self._folded[place] = key_weights, value_weights, Folded(k, v, bias, center)
        return self._folded[place][2]


def _tokens(cache: KVCache, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The first tokens of all sequences in the cache, and the others, each (N, g, D)."""
    firsts, parts = [], []
    for b, length in enumerate(cache.lengths):
        if cache.block_table is None:
            rows = tensor[b, :length]
        else:
            rows = tensor[cache.block_table[b, : -(-length // tensor.shape[1])].long()].flatten(0, 1)[:length]
        firsts.append(rows[:FIRST_TOKENS])
        parts.append(rows[FIRST_TOKENS:])
    found = torch.cat(parts)
    if len(found) < 2:
        raise ValueError(
            f"cache must hold more than {FIRST_TOKENS + 2} tokens per sequence, got {cache.lengths}"
        )
    return torch.cat(firsts), found
