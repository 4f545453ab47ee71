"""Codec: how one stored tensor, the keys or the values of a layer, is written.

A vector x (D,) of one token and KV head is written as codes u (r,) and perhaps a scale of its token:

    x^ = center + up (scale (.) u)        up = identity, a rotation, or a basis of rank r

``Codec`` is the description, without numbers of a model; ``TensorCodec`` has those. In attention the frame
folds: q . x^ = q . center + (up^T q) . (scale (.) u), and q . center is the same for every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from fusedkv_ext.cache.codec.bits import packed_bytes
from fusedkv_ext.cache.codec.rotation import MAX_GRID_BITS
from fusedkv_ext.plan.pieces import whole_number

__all__ = ["RAW", "SCALE_BYTES", "Codec"]

KINDS = ("raw", "int", "e4m3", "grid")
SCALES = {  # of codes of each kind
    "raw": ("none",),
    "int": ("channel", "token", "channel-group", "token-group"),
    "e4m3": ("channel", "token"),
    "grid": ("token",),
}
BASES = ("components", "pairs")
SCALE_BYTES = 2  # float16


@dataclass(frozen=True)
class Codec:
    """How a stored tensor is written. Immutable, hashable, validated on construction.

    Attributes:
        kind: Of the codes. "raw": numbers in the cache's dtype; "int": ``bits`` of a linear scale; "e4m3":
            float8; "grid": ``bits`` that name a point of the grid of a normal distribution.
        bits: Of an "int" (2 to 8) or "grid" (1 to 4) code.
        scale: "channel": one static scale per head and channel; "token": one per token and head;
            "channel-group": minimum and step of every ``group`` channels of a token and head;
            "token-group": minimum and step of every ``group`` tokens of a channel; "none" for raw codes.
        group: Size of a group.
        rotate: Whether codes are of the rotated vector. Not with scales per channel: the rotation mixes
            channels.
        balance: Whether channels are weighted with the size of the queries before the rotation, so that a
            large channel that queries ignore takes no precision.
        rank: Coefficients of a basis instead of D channels; None for all channels.
        basis: With a rank. "components": weighted principal components; "pairs": the pairs of channels (j, j
            + D / 2), which RoPE turns together, that carry most of the scores.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: Fields contradict each other.
    """

    kind: str = "raw"
    bits: int = 0
    scale: str = "none"
    group: int = 0
    rotate: bool = False
    balance: bool = False
    rank: int | None = None
    basis: str = "components"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.scale not in SCALES[self.kind]:
            known = ", ".join(SCALES[self.kind])
            raise ValueError(f"scale of {self.kind} codes must be one of {known}, got {self.scale!r}")
        whole_number(self.bits, "bits")
        whole_number(self.group, "group")
        low, high = {"int": (2, 8), "grid": (1, MAX_GRID_BITS)}.get(self.kind, (0, 0))
        if not low <= self.bits <= high:
            expected = f"from {low} to {high}" if high else "0"
            raise ValueError(f"bits of {self.kind} codes must be {expected}, got {self.bits}")
        if (self.group > 0) != self.scale.endswith("-group"):
            raise ValueError(
                f"group must be given with scales of groups only, got {self.group} with {self.scale}"
            )
        for name in ("rotate", "balance"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.rotate and self.scale in ("channel", "token-group", "none"):
            raise ValueError(
                f"rotate must be False with scale {self.scale!r}, got True: the rotation mixes the channels "
                "that such scales tell apart; use scale 'token'"
            )
        if self.balance and not self.rotate:
            raise ValueError("balance must be False without rotate, got True")
        if self.rank is not None:
            whole_number(self.rank, "rank", minimum=1)
            if self.rotate:
                raise ValueError(f"rank must be None with rotate, got {self.rank}")
        if self.basis not in BASES:
            raise ValueError(f"basis must be one of {', '.join(BASES)}, got {self.basis!r}")
        if self.basis == "pairs" and (self.rank is None or self.rank % 2):
            raise ValueError(f"rank must be even with a basis of pairs, got {self.rank}")

    @property
    def is_raw(self) -> bool:
        """Whether tensors are stored as they are."""
        return self.kind == "raw" and self.rank is None

    @property
    def local(self) -> bool:
        """Whether the codes of a token depend on that token alone."""
        return self.scale != "token-group"

    @property
    def centered(self) -> bool:
        """Whether there is a static center. Groups have minima instead."""
        return not self.is_raw and not self.scale.endswith("-group")

    def channels(self, head_dim: int) -> int:
        """r, the codes of a vector of D channels.

        Raises:
            ValueError: The rank or a group does not fit D, or codes do not fill whole bytes.
        """
        rank = head_dim if self.rank is None else self.rank
        if rank > head_dim:
            raise ValueError(f"rank must be at most the head dim {head_dim}, got {rank}")
        if self.basis == "pairs" and head_dim % 2:
            raise ValueError(f"basis must be components with an odd head dim, got pairs of {head_dim}")
        if self.scale == "channel-group" and rank % self.group:
            raise ValueError(f"group must divide the {rank} channels of a head, got {self.group}")
        if self.kind in ("int", "grid"):
            packed_bytes(rank, self.bits)
        return rank

    def code_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of the codes of one token and head, without scales.

        Args:
            head_dim: D.
            itemsize: Bytes of a number of the cache's dtype, in which raw codes are.
        """
        rank = self.channels(head_dim)
        if self.kind == "raw":
            return rank * itemsize
        return rank if self.kind == "e4m3" else packed_bytes(rank, self.bits)

    def scale_bytes(self, head_dim: int) -> Fraction:
        """Bytes of the scales of one token and head. Scales of token groups are shared, so it may be less."""
        rank = self.channels(head_dim)
        numbers = {
            "token": Fraction(1),
            "channel-group": Fraction(2 * rank, self.group or 1),
            "token-group": Fraction(2 * rank, self.group or 1),
        }.get(self.scale, Fraction(0))
        return numbers * SCALE_BYTES

    def bits_per_channel(self, head_dim: int, itemsize: int = 2) -> float:
        """Bits per channel of a stored vector, scales included."""
        total = self.code_bytes(head_dim, itemsize) + self.scale_bytes(head_dim)
        return float(8 * total / head_dim)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, ready for JSON."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Codec:
        """The inverse of ``to_dict``.

        Raises:
            TypeError: ``data`` is no mapping, or a field has the wrong type.
            ValueError: A field is unknown, or fields contradict each other.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a codec must be a mapping, got {type(data).__name__}")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(data) - set(known)):
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"a codec has no field {names}; it has {', '.join(known)}")
        return cls(**data)

    def __str__(self) -> str:
        if self.is_raw:
            return "raw"
        name = {"raw": "raw", "e4m3": "e4m3"}.get(self.kind, f"{self.kind}{self.bits}")
        of_pairs = " of pairs" if self.basis == "pairs" else ""
        parts = [name, *([f"rank {self.rank}{of_pairs}"] if self.rank else [])]
        parts += ["rotated"] * self.rotate + ["balanced"] * self.balance
        if self.scale != "none":
            parts.append(f"scale per {self.scale}" + (f" of {self.group}" if self.group else ""))
        return ", ".join(parts)


RAW = Codec()
