"""CodecPlan: the codecs of all stored tensors of a cache plan."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from fusedkv_ext.cache.codec.codec import RAW, Codec
from fusedkv_ext.cache.codec.schemes import SCHEMES, Coding, Scheme
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.plan.labels import split_label
from fusedkv_ext.plan.pieces import SIDES, Side, whole_number

__all__ = ["CodecPlan"]

FORMAT = 1
# Options of CodecPlan.named that every scheme has.
COMMON = ("sinks", "tail", "source_factor")
MOST_SOURCE_BITS = 8


@dataclass(frozen=True)
class CodecPlan:
    """How the stored tensors of every layer are written. Immutable, hashable, validated on construction.

    The first ``sinks`` and the last ``tail`` tokens of a sequence stay raw, in all layers alike.

    Args:
        name: A non-empty name.
        layers: The codecs of keys and values, one ``Coding`` per layer. A side that the layer does not store
            has the raw codec.
        sinks: First tokens that stay raw.
        tail: Last tokens that stay raw. At least the largest group of tokens.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The tail is shorter than a group.
    """

    name: str
    layers: tuple[Coding, ...]
    sinks: int = 0
    tail: int = 0

    if TYPE_CHECKING:  # the constructor converts what the fields then hold

        def __init__(
            self, name: str, layers: Sequence[tuple[Codec, Codec]], sinks: int = 0, tail: int = 0
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a non-empty str, got {self.name!r}")
        if not isinstance(self.layers, (tuple, list)):
            raise TypeError(f"layers must be a tuple of (keys, values), got {type(self.layers).__name__}")
        for i, layer in enumerate(self.layers):
            pair = isinstance(layer, (tuple, list)) and len(layer) == 2
            if not pair or not all(isinstance(codec, Codec) for codec in layer):
                raise TypeError(f"layer {i} must be two codecs, of keys and values, got {layer!r}")
        object.__setattr__(self, "layers", tuple(Coding(*layer) for layer in self.layers))
        whole_number(self.sinks, "sinks")
        whole_number(self.tail, "tail")
        if self.tail < self.token_group - (self.token_group == 1):
            raise ValueError(
                f"tail must be at least the largest group of {self.token_group} tokens, got {self.tail}: "
                "tokens stay raw until their group is full"
            )

    # Queries

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def token_group(self) -> int:
        """The tokens that are coded together: 1 where codes are local to a token."""
        groups = {codec.group for layer in self.layers for codec in layer if not codec.local}
        return max(groups, default=1)

    @property
    def local(self) -> bool:
        """Whether the codes of a token depend on that token alone."""
        return all(codec.local for layer in self.layers for codec in layer)

    @property
    def is_raw(self) -> bool:
        """Whether nothing is coded."""
        return all(codec.is_raw for layer in self.layers for codec in layer)

    def coded_tokens(self, length: int) -> range:
        """The tokens of a sequence of ``length`` that attention reads as codes; the others are raw."""
        count = max(0, length - self.sinks - self.tail)
        return range(self.sinks, self.sinks + count // self.token_group * self.token_group)

    def codec(self, layer: int, side: Side) -> Codec:
        """The codec of "keys" or "values" of a layer."""
        return getattr(self.layers[layer], side)

    def check(self, plan: CachePlan, num_kv_heads: int, head_dim: int) -> None:
        """Checks that the codecs fit the tensors that a plan stores.

        Raises:
            ValueError: The plan has another depth or does not store a coded tensor, or a codec does not fit
                the head dim; the message names the layer and the side.
        """
        if self.num_layers != plan.num_layers:
            raise ValueError(
                f"codecs must be for the {plan.num_layers} layers of plan {plan.name!r}, got "
                f"{self.num_layers}"
            )
        for i, layer in enumerate(self.layers):
            for side, codec in zip(SIDES, layer, strict=True):
                if not codec.is_raw and not _heads(plan, i, side, num_kv_heads):
                    raise ValueError(
                        f"layer {i} {side}: the codec must be raw, got {codec}: plan {plan.name!r} stores no "
                        f"{side} there"
                    )
                try:
                    codec.channels(head_dim)
                except ValueError as error:
                    raise ValueError(f"layer {i} {side}: {error}") from error

    def bytes_per_token(
        self, plan: CachePlan, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Fraction:
        """Cache bytes of one token of one sequence in all layers, scales included, raw rows not.

        Whole bytes unless groups of tokens share scales.
        """
        total = Fraction(0)
        for i, layer in enumerate(self.layers):
            for side, codec in zip(SIDES, layer, strict=True):
                own = codec.code_bytes(head_dim, dtype.itemsize) + codec.scale_bytes(head_dim)
                total += _heads(plan, i, side, num_kv_heads) * own
        return total

    def raw_bytes(self, plan: CachePlan, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the raw sinks and tail of one sequence, in all tensors that are coded."""
        heads = sum(
            _heads(plan, i, side, num_kv_heads)
            for i, layer in enumerate(self.layers)
            for side, codec in zip(SIDES, layer, strict=True)
            if not codec.is_raw
        )
        return (self.sinks + self.tail) * heads * head_dim * dtype.itemsize

    # Construction

    @classmethod
    def named(cls, label: str, plan: CachePlan) -> CodecPlan:
        """The codecs of a scheme for a cache plan.

        Args:
            label: ``name`` or ``name:option=value,option=value``, such as "int8" or "kivi:bits=2,group=32".
                ``SCHEMES`` has the names and their options. All schemes take ``sinks`` and ``tail``, and
                ``source_factor``: tensors that several layers read have that many times the bits, at most 8
                (default 2: their errors enter all of these layers).
            plan: The plan whose stored tensors are coded.

        Raises:
            ValueError: The name or an option is unknown, or a value is out of range.
        """
        found, options = _parse(label)
        sinks, tail = options.pop("sinks", found.sinks), options.pop("tail", None)
        factor = whole_number(options.pop("source_factor", 2), "source_factor", minimum=1)
        if "bits" in options and "bits" not in found.options:
            bits = options.pop("bits")
            options = {"key_bits": bits, "value_bits": bits, **options}
        try:
            coding = found.build(**options)
            wider = {
                name: min(factor * bits, max(bits, MOST_SOURCE_BITS))
                for name, bits in {**found.options, **options}.items()
                if name in ("key_bits", "value_bits")
            }
            source = _widest(found, {**options, **wider}) if wider else coding
        except TypeError as error:
            raise ValueError(f"codecs {label!r}: {error}") from error
        readers = _readers(plan)
        layers = []
        for i in range(plan.num_layers):
            pair = (
                RAW
                if not plan.stored_shares(i, side)
                else getattr(source if readers[i, side] > 1 else coding, side)
                for side in SIDES
            )
            layers.append(Coding(*pair))
        if tail is None:
            tail = max(found.tail, *(codec.group for codec in coding if not codec.local), 0)
        return cls(label, tuple(layers), sinks, tail)

    def to_dict(self) -> dict[str, Any]:
        """The codecs as lists, dicts, numbers and strings, ready for JSON."""
        layers = [[codec.to_dict() for codec in layer] for layer in self.layers]
        return {"format": FORMAT, "name": self.name, "sinks": self.sinks, "tail": self.tail, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CodecPlan:
        """The inverse of ``to_dict``.

        Raises:
            TypeError: A part has the wrong type.
            ValueError: The mapping has unknown fields, a newer format, or inconsistent codecs.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"codecs must be a mapping, got {type(data).__name__}")
        if data.get("format") is None:
            raise ValueError(f'codecs must have "format", got the keys {sorted(map(str, data))}')
        if whole_number(data["format"], "format of the codecs", minimum=1) > FORMAT:
            raise ValueError(
                f"format of the codecs must be at most {FORMAT}, got {data['format']}; upgrade fusedkv_ext"
            )
        if unknown := sorted(set(data) - {"format", "name", "sinks", "tail", "layers"}):
            raise ValueError(f"codecs have no field {', '.join(map(repr, unknown))}")
        layers = data.get("layers")
        if not isinstance(layers, (list, tuple)) or not all(
            isinstance(x, (list, tuple)) and len(x) == 2 for x in layers
        ):
            raise TypeError(f"layers must be a list of [keys, values], got {layers!r}")
        pairs = tuple(Coding(*(Codec.from_dict(side) for side in layer)) for layer in layers)
        name: Any = data.get("name")  # validated by the constructor
        return cls(name, pairs, data.get("sinks", 0), data.get("tail", 0))

    def to_json(self, indent: int | None = None) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> CodecPlan:
        """The inverse of ``to_json``.

        Raises:
            ValueError: The text is not JSON; otherwise as ``from_dict``.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"codecs must be JSON, got text with an error: {error}") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        raw = f"; {self.sinks} first and {self.tail} last tokens raw" if self.sinks or self.tail else ""
        lines = [f"{self.name}{raw}"]
        for i, layer in enumerate(self.layers):
            lines.append(f"  layer {i}: keys {layer.keys}; values {layer.values}")
        return "\n".join(lines)


def _heads(plan: CachePlan, i: int, side: Side, num_kv_heads: int) -> int:
    stored = plan.stored_key_heads if side == "keys" else plan.stored_value_heads
    return len(stored(i, num_kv_heads))


def _readers(plan: CachePlan) -> dict[tuple[int, Side], int]:
    """How many layers read the stored tensor of each layer and side."""
    found = dict.fromkeys(((i, side) for i in range(plan.num_layers) for side in SIDES), 0)
    for i in range(plan.num_layers):
        for j in plan.key_sources(i):
            found[j, "keys"] += 1
        for j in plan.value_sources(i):
            found[j, "values"] += 1
    return found


def _widest(scheme: Scheme, options: dict[str, Any]) -> Coding:
    """The coding with so many bits, or the most that the scheme has below."""
    while True:
        try:
            return scheme.build(**options)
        except ValueError:
            bits = {name: options[name] for name in ("key_bits", "value_bits") if name in options}
            most = max(bits.values())
            if most <= 1:
                raise
            options = {**options, **{name: n - 1 for name, n in bits.items() if n == most}}


def _parse(label: str) -> tuple[Scheme, dict[str, Any]]:
    """The scheme of a label and its options."""
    name, pairs = split_label(label.replace(",", ":"))
    found = SCHEMES.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), SCHEMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"codecs must be one of {', '.join(SCHEMES)}, got {name!r}{hint}")
    options: dict[str, Any] = {}
    known = {*found.options, *COMMON, *(["bits"] if "key_bits" in found.options else [])}
    for key, text in pairs:
        if key not in known:
            raise ValueError(
                f"codecs {found.name!r} have no option {key!r}; their options: {', '.join(sorted(known))}"
            )
        if key in options:
            raise ValueError(f"{label!r}: option {key!r} must be given once, got it twice")
        try:
            options[key] = json.loads(text.lower())
        except ValueError:
            message = f"{label!r}: option {key!r} must be a number, true or false, got {text!r}"
            raise ValueError(message) from None
    return found, options
