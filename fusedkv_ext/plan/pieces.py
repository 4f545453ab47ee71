"""The pieces of a cache plan: fusion weights, head segments, and the row of one layer. Each checks itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

GRANULARITIES = ("channel", "shared_channel", "head", "scalar")
Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")


def whole_number(value: Any, what: str, minimum: int = 0) -> int:
    """``value`` as an int; TypeError or ValueError names it as ``what``. A bool is no number here."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an int, got {value!r} ({type(value).__name__})")
    number = value.__index__()
    if number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {number}")
    return number


def share(value: Any) -> Fraction:
    """A bound of a head range: Fraction, int, "1/2" or a decimal (0.1 is one tenth, not its binary value)."""
    try:
        return value if isinstance(value, Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'a bound of heads must be a fraction such as "1/2", got {value!r}') from None


def real_number(value: Any, what: str) -> float:
    """``value`` as a finite float; TypeError or ValueError names it as ``what``. A bool is no number here."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
        raise TypeError(f"{what} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Fusion:
    """What the fusion weights of one segment look like; ``fusion.FusionWeights`` makes the parameters.

    granularity: "channel": one vector of D per KV head; "shared_channel": one vector of D for all heads of
        the segment; "head": one number per KV head; "scalar": one number. Each source has its own.
    init: one number per source, or "normal" for N(0, 1). These are the weights *as used* when training
        starts: the parameter starts at init / multiplier.
    tied: one weight per RoPE pair. Keys with a channel granularity are always tied (a LayerPlan sets it for
        them): with two different weights in a pair the score of two tokens would depend on their absolute
        positions (FusedKV, equation 7). For values a choice.
    multiplier: constant s > 0, weights used = s * parameter: a learning-rate multiplier (YOCO++ uses 35).
    learnable: False keeps the weights at their initial values.
    """

    granularity: str = "channel"
    init: tuple[float, ...] | str = "normal"
    tied: bool = False
    multiplier: float = 1.0
    learnable: bool = True

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise ValueError(f"granularity must be one of {known}, got {self.granularity!r}")
        if isinstance(self.init, str):
            if self.init != "normal":
                raise ValueError(f'init must be "normal" or one number per source, got {self.init!r}')
        elif isinstance(self.init, (tuple, list)):
            object.__setattr__(self, "init", tuple(real_number(x, "a number of init") for x in self.init))
        else:
            raise TypeError(f'init must be "normal" or one number per source, got {self.init!r}')
        object.__setattr__(self, "multiplier", real_number(self.multiplier, "multiplier"))
        if self.multiplier <= 0:
            raise ValueError(f"multiplier must be positive, got {self.multiplier}")
        for name in ("tied", "learnable"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Segment:
    """A range of KV heads of one layer and the layers that it comes from: K = sum_j weight_j (.) K_j.

    sources: layer indices from 0, no duplicates; the layer itself may be among them.
    heads: the half-open share of the KV heads, so that one plan serves every number of heads: (0, 1/2) is
        the first half. A segment reads the heads of the same index in its sources.
    fusion: None for weights that are all one (a lone source is then returned as it is).
    """

    sources: tuple[int, ...]
    heads: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))
    fusion: Fusion | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sources, (tuple, list)):
            raise TypeError(f"sources must be a tuple of layer indices, got {self.sources!r}")
        sources = tuple(whole_number(j, "a source layer") for j in self.sources)
        object.__setattr__(self, "sources", sources)
        if not sources:
            raise ValueError("sources must name at least one layer, got none")
        if len(set(sources)) < len(sources):
            raise ValueError(f"sources must name each layer once, got {sources}; add up the weights instead")
        if not isinstance(self.heads, (tuple, list)) or len(self.heads) != 2:
            raise TypeError(f"heads must be a pair (start, stop), got {self.heads!r}")
        start, stop = (share(bound) for bound in self.heads)
        object.__setattr__(self, "heads", (start, stop))
        if not 0 <= start < stop <= 1:
            raise ValueError(f"heads must be a range with 0 <= start < stop <= 1, got {start}..{stop}")
        if self.fusion is None:
            return
        if not isinstance(self.fusion, Fusion):
            raise TypeError(f"fusion must be a Fusion or None, got {type(self.fusion).__name__}")
        init = self.fusion.init
        if not isinstance(init, str) and len(init) != len(sources):
            raise ValueError(f"init must have one number per source, got {len(init)} for sources {sources}")


@dataclass(frozen=True)
class LayerPlan:
    """Key and value segments of one layer, in the order of their heads. A lone Segment is taken as (it,)."""

    keys: tuple[Segment, ...]
    values: tuple[Segment, ...]

    def __post_init__(self) -> None:
        for side in SIDES:
            segments = getattr(self, side)
            segments = (segments,) if isinstance(segments, Segment) else segments
            if not isinstance(segments, (tuple, list)) or not all(isinstance(s, Segment) for s in segments):
                raise TypeError(f"{side} must be a tuple of Segment, got {segments!r}")
            if side == "keys":
                segments = [_tie_pairs(segment) for segment in segments]
            object.__setattr__(self, side, tuple(sorted(segments, key=lambda segment: segment.heads)))

    @property
    def has_fusion(self) -> bool:
        """Whether any segment has fusion weights."""
        return any(segment.fusion is not None for segment in self.keys + self.values)


def _tie_pairs(segment: Segment) -> Segment:
    fusion = segment.fusion
    if fusion is None or fusion.tied or fusion.granularity not in ("channel", "shared_channel"):
        return segment
    return replace(segment, fusion=replace(fusion, tied=True))


class ResolvedSegment(NamedTuple):
    """KV heads start..stop-1 of a layer, within one key and one value segment: one call of attention."""

    start: int
    stop: int
    key: Segment
    value: Segment
