"""A plan on latents: what its table means for multi-head latent attention (MLA, DeepSeek-V2,
arXiv:2405.04434).

MLA caches, per token, one latent c of r channels, from which each layer makes keys and values of all heads,
and one rotated key k_pe of d channels that all heads share. So a layer stores one tensor where it would store
keys and values, and a plan's sources are taken by latents:

* A layer that stores keys or values stores its c; where it stores keys also its k_pe. The key of a layer is
  sum_j a_j (.) [k_pe_j ; c_j] over its key sources, its value sum_j b_j (.) c_j over its value sources.
* c is stored once, so keys and values cannot be mixed apart before they are stored. A layer that mixes both
  over the same sources (YOCO++) mixes [k_pe ; c] once, with the weights of the keys. A layer that mixes one
  side (ResFormer) stores c as it is and mixes when it reads, which is the same if nobody else reads the mix.
* A plan that cuts values into shares of the heads (SkipV1Former, arXiv:2510.16807, section 5.2) cuts the
  latent: heads a..b of H become channels a..b of c, for keys as for values, and a layer stores its own
  shares. A layer that says its values are whole while others read a part of them makes c of that part alone:
  so layer 1 of SkipV1 has half of a latent like all others, as the paper's table 2 counts them.
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
    """One layer of a plan on latents. ``heads`` of its segments are shares of the r channels of c.

    stores: the shares of its own c that the layer keeps, ascending and apart. stores_rope: whether it keeps
    its k_pe. keys, values: where c of the keys and c of the values come from, share by share. rope: the
    source of the rotated key. mix: what is stored instead of its own [k_pe ; c]; None: that itself.
    """

    stores: tuple[Share, ...]
    stores_rope: bool
    keys: tuple[Segment, ...]
    values: tuple[Segment, ...]
    rope: Segment
    mix: Segment | None = None

    @property
    def cut(self) -> bool:
        """Whether c is put together from shares, rather than summed over whole latents."""
        return any(segment.heads != WHOLE for segment in self.keys + self.values)

    @property
    def read_layers(self) -> frozenset[int]:
        """Layers whose stored tensors attention reads, the layer itself included."""
        segments = (*self.keys, *self.values, self.rope)
        return frozenset(j for segment in segments for j in segment.sources)

    @property
    def sources(self) -> frozenset[int]:
        """Layers whose new tokens attention or the mix takes, the layer itself included."""
        return self.read_layers if self.mix is None else self.read_layers | set(self.mix.sources)

    def stored_channels(self, kv_lora_rank: int) -> int:
        """Channels of c that the layer stores. ValueError as ``channels``."""
        return sum(stop - start for start, stop in (channels(share, kv_lora_rank) for share in self.stores))

    def read_channels(self, kv_lora_rank: int) -> int:
        """Channels of the latent of keys, and of that of values. ValueError as ``channels``."""
        spans = [channels(segment.heads, kv_lora_rank) for segment in self.keys]
        return sum(stop - start for start, stop in spans)

    def weights_plan(self, name: str, layer: int, num_layers: int) -> CachePlan:
        """A plan whose layer ``layer`` has the fusion weights of this one, for ``FusionWeights``."""
        from fusedkv_ext.plan.cache_plan import CachePlan

        own = [LayerPlan(Segment((i,)), Segment((i,))) for i in range(num_layers)]
        key = self.keys[0] if self.mix is None else self.mix
        own[layer] = LayerPlan(key, self.values)
        return CachePlan(name, tuple(own))


def channels(share: Share, kv_lora_rank: int) -> tuple[int, int]:
    """A share of the latent as a range of channels; ValueError unless these are whole."""
    start, stop = (bound * kv_lora_rank for bound in share)
    if start.denominator > 1 or stop.denominator > 1:
        denominator = max(bound.denominator for bound in share)
        raise ValueError(
            f"kv_lora_rank={kv_lora_rank}: the share {share[0]}..{share[1]} of the latent is no whole number "
            f"of channels; kv_lora_rank must be a multiple of {denominator}"
        )
    return int(start), int(stop)


def latent_layers(plan: CachePlan) -> tuple[LatentLayer, ...]:
    """The layers of ``plan`` on latents. ValueError, naming the plan and the reason, if it cannot be said."""
    rows = [layer.keys + layer.values for layer in plan.layers]
    cut = any(segment.heads != WHOLE for row in rows for segment in row)
    build = _cut_layer if cut else _whole_layer
    try:
        if cut:
            _check_cut(plan)
        return tuple(build(plan, i) for i in range(plan.num_layers))
    except ValueError as error:
        raise ValueError(f"plan {plan.name!r} cannot be said on latents: {error}") from error


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
                    "keys and values are one latent; mix both over the same sources, or none"
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
                f"layer {i} cuts its keys by heads, but all heads share one rotated key; cut the values "
                "alone, which on latents cuts what keys are made of too"
            )
        if any(len(part.sources) > 1 or part.fusion is not None for part in layer.keys + layer.values):
            raise ValueError(
                f"layer {i} sums over sources or has fusion weights, while the plan cuts values by heads; a "
                "latent can be cut or fused, not both"
            )


def _cut_layer(plan: CachePlan, i: int) -> LatentLayer:
    key = plan.layers[i].keys[0]
    keys, values = _latent_of(plan, key.sources[0]), _latent_of(plan, i)
    widths = [sum(stop - start for start, stop in (s.heads for s in side)) for side in (keys, values)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"layer {i} makes keys of {widths[0]} and values of {widths[1]} of a latent; both must be as wide"
        )
    own = {segment.heads for segment in keys + values if i in segment.sources}
    return LatentLayer(_joined(own), i in key.sources, keys, values, key)


def _latent_of(plan: CachePlan, i: int) -> tuple[Segment, ...]:
    """Where the latent that layer i attends with comes from, share by share."""
    values = plan.layers[i].values
    if values[0].heads != WHOLE or values[0].sources != (i,) or _reader(plan, i, "keys") is not None:
        return values
    later = [segment for layer in plan.layers[i + 1 :] for segment in layer.values]
    parts = {segment.heads for segment in later if i in segment.sources}
    return tuple(Segment((i,), share) for share in _joined(parts or {WHOLE}))


def _joined(shares: set[Share]) -> tuple[Share, ...]:
    """The union of some shares, as few as possible, ascending."""
    joined: list[Share] = []
    for start, stop in sorted(shares):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)
