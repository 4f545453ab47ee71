"""Cache plans for multi-head latent attention (MLA, DeepSeek-V2, arXiv:2405.04434).

Per token MLA caches one latent c of r channels and one rotated key k_pe of d channels. All heads share k_pe,
and each layer computes the keys and values of all heads from c. So a layer stores one tensor instead of keys
and values. The sources of a plan translate as follows:

* A layer that stores keys or values stores its c. A layer that stores keys also stores its k_pe.
  The key of a layer is sum_j a_j (.) [k_pe_j ; c_j] over its key sources.
  Its value is sum_j b_j (.) c_j over its value sources.
* c is stored once, so keys and values cannot be mixed differently before they are stored.
  A layer that mixes both over the same sources (YOCO++) mixes [k_pe ; c] once, with the weights of the keys.
  A layer that mixes one side (ResFormer) stores c unmixed and mixes when it reads. That is equivalent if no
  other layer reads the mix.
* A plan that splits values into shares of the heads (SkipV1Former, arXiv:2510.16807, section 5.2) splits the
  latent. Heads a..b of H become channels a..b of c, for keys and values, and a layer stores its own shares.
  If a layer stores whole values of which others read a part, its c consists of that part alone. So layer 1 of
  SkipV1 has half of a latent like all others, as in table 2 of the paper.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from fusedkv_ext.plan.pieces import LayerPlan, Segment

if TYPE_CHECKING:
    from fusedkv_ext.plan.cache_plan import CachePlan

Share = tuple[Fraction, Fraction]
WHOLE: Share = (Fraction(0), Fraction(1))


class LatentLayer(NamedTuple):
    """One layer of a plan for latents. ``heads`` of its segments are shares of the r channels of c.

    Attributes:
        stores: the disjoint shares of its own c that the layer stores, in ascending order.
        stores_rope: True if it stores its k_pe.
        keys: the sources of the c of its keys, share by share.
        values: the sources of the c of its values, share by share.
        rope: the source of the rotated key.
        mix: the mix that is stored instead of its own [k_pe ; c]; None stores that unmixed.
    """

    stores: tuple[Share, ...]
    stores_rope: bool
    keys: tuple[Segment, ...]
    values: tuple[Segment, ...]
    rope: Segment
    mix: Segment | None = None

    @property
    def cut(self) -> bool:
        """True if c is concatenated from shares, instead of summed over whole latents."""
        return any(segment.heads != WHOLE for segment in self.keys + self.values)

    @property
    def read_layers(self) -> frozenset[int]:
        """Layers whose stored tensors attention reads, including the layer itself."""
        segments = (*self.keys, *self.values, self.rope)
        return frozenset(j for segment in segments for j in segment.sources)

    @property
    def sources(self) -> frozenset[int]:
        """Layers whose new tokens attention or the mix needs, including the layer itself."""
        return self.read_layers if self.mix is None else self.read_layers | set(self.mix.sources)

    def stored_channels(self, kv_lora_rank: int) -> int:
        """Number of channels of c that the layer stores; raises as ``channels`` does."""
        return sum(stop - start for start, stop in (channels(share, kv_lora_rank) for share in self.stores))

    def read_channels(self, kv_lora_rank: int) -> int:
        """Number of channels of the latent of the keys (and of the values); raises as ``channels`` does."""
        spans = [channels(segment.heads, kv_lora_rank) for segment in self.keys]
        return sum(stop - start for start, stop in spans)

    def weights_plan(self, name: str, layer: int, num_layers: int) -> CachePlan:
        """A plan whose layer ``layer`` has the fusion weights of this layer, for ``FusionWeights``."""
        from fusedkv_ext.plan.cache_plan import CachePlan

        own = [LayerPlan(Segment((i,)), Segment((i,))) for i in range(num_layers)]
        key = self.keys[0] if self.mix is None else self.mix
        own[layer] = LayerPlan(key, self.values)
        return CachePlan(name, tuple(own))


def channels(share: Share, kv_lora_rank: int) -> tuple[int, int]:
    """The range of channels of a share of the latent.

    Raises:
        ValueError: the share is not a whole number of channels.
    """
    start, stop = (bound * kv_lora_rank for bound in share)
    if start.denominator > 1 or stop.denominator > 1:
        denominator = max(bound.denominator for bound in share)
        raise ValueError(
            f"kv_lora_rank must be a multiple of {denominator}, got {kv_lora_rank}; the share "
            f"{share[0]}..{share[1]} of the latent is not a whole number of channels"
        )
    return int(start), int(stop)


def latent_layers(plan: CachePlan) -> tuple[LatentLayer, ...]:
    """The layers of ``plan`` for latents.

    Raises:
        ValueError: latent attention does not support the plan; the message has its name and the reason.
    """
    rows = [layer.keys + layer.values for layer in plan.layers]
    cut = any(segment.heads != WHOLE for row in rows for segment in row)
    build = _cut_layer if cut else _whole_layer
    try:
        if cut:
            _check_cut(plan)
        return tuple(build(plan, i) for i in range(plan.num_layers))
    except ValueError as error:
        raise ValueError(f"latent attention does not support plan {plan.name!r}: {error}") from error


# ---- whole latents -------------------------------------------------------------------------------------


def _whole_layer(plan: CachePlan, i: int) -> LatentLayer:
    (key,), (value,) = plan.layers[i].keys, plan.layers[i].values
    stores_rope = i in key.sources
    stores = (WHOLE,) if stores_rope or i in value.sources else ()
    own = Segment((i,))
    mixed = [_mixes(segment, i) for segment in (key, value)]
    if not all(mixed):
        for side, mixes in zip(("keys", "values"), mixed, strict=True):
            reader = _reader(plan, i, side) if mixes else None
            if reader is not None:
                raise ValueError(
                    f"layer {i} mixes its {side} before it stores them and layer {reader} reads the mix, but "
                    "keys and values are one latent; mix both over the same sources, or neither"
                )
        return LatentLayer(stores, stores_rope, (key,), (value,), key)
    if set(key.sources) != set(value.sources):
        raise ValueError(
            f"layer {i} stores keys mixed of layers {key.sources} and values mixed of {value.sources}, but "
            "keys and values are one latent; mix both over the same sources"
        )
    return LatentLayer(stores, stores_rope, (own,), (own,), own, mix=key)


def _mixes(segment: Segment, i: int) -> bool:
    return i in segment.sources and (len(segment.sources) > 1 or segment.fusion is not None)


def _reader(plan: CachePlan, i: int, side: str) -> int | None:
    """The first layer after i that reads ``side`` of layer i."""
    for k in range(i + 1, plan.num_layers):
        if any(i in segment.sources for segment in getattr(plan.layers[k], side)):
            return k
    return None


# ---- latents cut into shares ---------------------------------------------------------------------------


def _check_cut(plan: CachePlan) -> None:
    for i, layer in enumerate(plan.layers):
        if len(layer.keys) > 1:
            raise ValueError(
                f"layer {i} splits its keys by heads, but all heads share one rotated key; split the values "
                "alone, which for latents splits the source of the keys too"
            )
        if any(len(part.sources) > 1 or part.fusion is not None for part in layer.keys + layer.values):
            raise ValueError(
                f"layer {i} sums over sources or has fusion weights, while the plan splits values by heads; "
                "a latent can be split or fused, not both"
            )


def _cut_layer(plan: CachePlan, i: int) -> LatentLayer:
    key = plan.layers[i].keys[0]
    keys, values = _latent_of(plan, key.sources[0]), _latent_of(plan, i)
    widths = [sum(stop - start for start, stop in (s.heads for s in side)) for side in (keys, values)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"layer {i} must have keys and values of the same share of a latent, got {widths[0]} and "
            f"{widths[1]}"
        )
    own = {segment.heads for segment in keys + values if i in segment.sources}
    return LatentLayer(_joined(own), i in key.sources, keys, values, key)


def _latent_of(plan: CachePlan, i: int) -> tuple[Segment, ...]:
    """Sources of the latent that layer i attends with, share by share."""
    values = plan.layers[i].values
    if values[0].heads != WHOLE or values[0].sources != (i,) or _reader(plan, i, "keys") is not None:
        return values
    later = [segment for layer in plan.layers[i + 1 :] for segment in layer.values]
    parts = {segment.heads for segment in later if i in segment.sources}
    return tuple(Segment((i,), share) for share in _joined(parts or {WHOLE}))


def _joined(shares: set[Share]) -> tuple[Share, ...]:
    """The union of some shares, merged where they touch, in ascending order."""
    joined: list[Share] = []
    for start, stop in sorted(shares):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)
