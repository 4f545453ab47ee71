"""The pieces of a cache plan: fusion weights, head segments, and the row of one layer. Each checks itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

GRANULARITIES = ("channel", "shared_channel", "head", "scalar")
Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")


def whole_number(value: Any, what: str, minimum: int = 0) -> int:
    """Converts ``value`` to an int.

    Args:
        value: anything with ``__index__`` except a bool.
        what: the name of the value in error messages.
        minimum: the smallest value allowed.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: it is below ``minimum``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an int, got {value!r} ({type(value).__name__})")
    number = int(value.__index__())
    if number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {number}")
    return number


def share(value: Any) -> Fraction:
    """Converts a bound of a head range to a Fraction.

    Args:
        value: a Fraction, an int, a string such as "1/2", or a decimal (0.1 is one tenth, not its binary
            value).

    Raises:
        ValueError: ``value`` is not a fraction.
    """
    try:
        return value if isinstance(value, Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'a bound of heads must be a fraction such as "1/2", got {value!r}') from None


def real_number(value: Any, what: str) -> float:
    """Converts ``value`` to a finite float.

    Args:
        value: an int, a float or a Fraction, not a bool.
        what: the name of the value in error messages.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: it is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
        raise TypeError(f"{what} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Fusion:
    """Shape and initial values of the fusion weights of one segment.

    ``FusionWeights`` creates the parameters.

    Args:
        granularity: "channel": one vector of D per KV head; "shared_channel": one vector of D for all heads
            of the segment; "head": one number per KV head; "scalar": one number. Each source has its own
            weights.
        init: one number per source, or "normal" for N(0, 1). These are the effective weights when training
            starts: the parameter starts at init / multiplier.
        tied: one weight per RoPE pair. A LayerPlan always ties keys with a channel granularity. With two
            different weights in a pair, the score of two tokens would depend on their absolute positions
            (FusedKV, equation 7). For values it is a choice.
        multiplier: a constant s > 0; the effective weight is s * parameter. It multiplies the learning rate
            (YOCO++ uses 35).
        learnable: False keeps the weights at their initial values.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
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
    """A range of KV heads of one layer and its source layers: K = sum_j weight_j (.) K_j.

    Args:
        sources: layer indices from 0, without duplicates; the layer itself may be among them.
        heads: a half-open share of the KV heads, such as (0, "1/2") for the first half, so that one plan
            serves every number of heads. A segment reads the heads of the same index in its sources.
        fusion: None for weights of one (a single source is then used unchanged).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: sources or heads are empty, duplicated or out of range.
    """

    sources: tuple[int, ...]
    heads: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))
    fusion: Fusion | None = None

    if TYPE_CHECKING:  # the constructor converts what the fields then hold

        def __init__(
            self, sources: Sequence[int], heads: Sequence[Any] = (0, 1), fusion: Fusion | None = None
        ) -> None: ...

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
    """Key and value segments of one layer, in the order of their heads.

    Args:
        keys: the segments of the keys; a single Segment stands for a tuple of one.
        values: the segments of the values, likewise.

    Raises:
        TypeError: a side is not a tuple of Segment.
    """

    keys: tuple[Segment, ...]
    values: tuple[Segment, ...]

    if TYPE_CHECKING:  # the constructor converts what the fields then hold

        def __init__(
            self, keys: Segment | Sequence[Segment], values: Segment | Sequence[Segment]
        ) -> None: ...

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
        """True if any segment has fusion weights."""
        return any(segment.fusion is not None for segment in self.keys + self.values)


def _tie_pairs(segment: Segment) -> Segment:
    fusion = segment.fusion
    if fusion is None or fusion.tied or fusion.granularity not in ("channel", "shared_channel"):
        return segment
    return replace(segment, fusion=replace(fusion, tied=True))


class ResolvedSegment(NamedTuple):
    """KV heads start to stop - 1 of a layer, within one key and one value segment.

    One attention call computes these heads.
    """

    start: int
    stop: int
    key: Segment
    value: Segment
