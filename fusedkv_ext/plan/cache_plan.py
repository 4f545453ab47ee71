"""CachePlan: the rows of all layers, validated against each other, with the queries that consumers need."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from fusedkv_ext.plan.drawing import draw
from fusedkv_ext.plan.labels import find_method, parse_label
from fusedkv_ext.plan.latent import latent_layers
from fusedkv_ext.plan.methods import METHODS
from fusedkv_ext.plan.pieces import SIDES, Fusion, LayerPlan, ResolvedSegment, Segment, Side, whole_number

FORMAT = 1


def _format_heads(start: Fraction, stop: Fraction) -> str:
    return f"heads {start}..{stop}"


@contextmanager
def _where(place: str) -> Iterator[None]:
    """Prefixes the errors of its body with the place (layer, side)."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{place}: {error}") from error


@dataclass(frozen=True)
class CachePlan:
    """The sources of the keys and values of every layer. Immutable, hashable, validated on construction.

    ``print(plan)`` draws the table.

    Args:
        name: a non-empty name.
        layers: one LayerPlan per layer, from layer 0 on.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the plan is inconsistent; the message names the layer and the side. Every source must be
            the layer itself or an earlier layer that stores the requested heads. The segments of each side
            must cover every head once.
    """

    name: str
    layers: tuple[LayerPlan, ...]

    if TYPE_CHECKING:  # the constructor converts what the fields then hold

        def __init__(self, name: str, layers: Sequence[LayerPlan]) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a non-empty str, got {self.name!r}")
        if not isinstance(self.layers, (tuple, list)):
            raise TypeError(f"layers must be a tuple of LayerPlan, got {type(self.layers).__name__}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers must hold at least one LayerPlan, got none")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, LayerPlan):
                raise TypeError(f"layer {i} must be a LayerPlan, got {type(layer).__name__}")
        for i in range(self.num_layers):
            for side in SIDES:
                with _where(f"layer {i} {side}"):
                    self._check_coverage(i, side)
                    self._check_sources(i, side)

    def _check_coverage(self, i: int, side: Side) -> None:
        reached = Fraction(0)
        for segment in getattr(self.layers[i], side):
            start, stop = segment.heads
            if start < reached:
                raise ValueError(f"{_format_heads(start, min(stop, reached))} are covered twice")
            if start > reached:
                raise ValueError(f"{_format_heads(reached, start)} are covered by no segment")
            reached = stop
        if reached < 1:
            raise ValueError(f"{_format_heads(reached, Fraction(1))} are covered by no segment")

    def _check_sources(self, i: int, side: Side) -> None:
        for segment in getattr(self.layers[i], side):
            start, stop = segment.heads
            for j in segment.sources:
                if j >= self.num_layers:
                    raise ValueError(
                        f"source {j} is out of range for a plan with {self.num_layers} layers "
                        f"(0 to {self.num_layers - 1})"
                    )
                if j > i:
                    raise ValueError(f"a source must be at most {i}, the layer itself, got {j}")
                stored = self.stored_shares(j, side)
                found = sum(max(Fraction(0), min(stop, b) - max(start, a)) for a, b in stored)
                if j < i and found < stop - start:
                    needed = _format_heads(start, stop)
                    what = " and ".join(_format_heads(a, b) for a, b in stored) or "nothing"
                    raise ValueError(f"needs {needed} of layer {j}, which stores {what} of its {side}")

    def stored_shares(self, i: int, side: Side) -> list[tuple[Fraction, Fraction]]:
        """Shares (start, stop) of the heads whose "keys" or "values" layer i stores, in ascending order."""
        return [segment.heads for segment in getattr(self.layers[i], side) if i in segment.sources]

    def _layer(self, i: int) -> LayerPlan:
        if whole_number(i, "layer") >= self.num_layers:
            raise ValueError(f"layer must be below the plan's {self.num_layers} layers, got {i}")
        return self.layers[i]

    # Queries

    @property
    def num_layers(self) -> int:
        """L, the number of storage and reconstruction layers together."""
        return len(self.layers)

    @property
    def storage_layers(self) -> tuple[int, ...]:
        """Layers that store keys or values of at least some heads, in ascending order."""
        return tuple(i for i in range(self.num_layers) if not self.reads_only(i))

    def reads_only(self, i: int) -> bool:
        """True if layer i is a reconstruction layer: it stores nothing and has no k and v projections."""
        layer = self._layer(i)
        return not any(i in segment.sources for segment in layer.keys + layer.values)

    def key_sources(self, i: int) -> tuple[int, ...]:
        """Source layers of the keys of layer i, including i itself, in order of appearance."""
        return tuple(dict.fromkeys(j for segment in self._layer(i).keys for j in segment.sources))

    def value_sources(self, i: int) -> tuple[int, ...]:
        """Source layers of the values of layer i, including i itself, in order of appearance."""
        return tuple(dict.fromkeys(j for segment in self._layer(i).values for j in segment.sources))

    def source_layers(self, i: int) -> tuple[int, ...]:
        """Other layers whose stored keys or values layer i reads, in ascending order."""
        return tuple(sorted({*self.key_sources(i), *self.value_sources(i)} - {i}))

    def stored_key_heads(self, i: int, num_kv_heads: int) -> tuple[int, ...]:
        """Indices of the KV heads whose keys layer i stores; empty if it stores none."""
        return self._stored_heads(i, "keys", num_kv_heads)

    def stored_value_heads(self, i: int, num_kv_heads: int) -> tuple[int, ...]:
        """Indices of the KV heads whose values layer i stores; empty if it stores none."""
        return self._stored_heads(i, "values", num_kv_heads)

    def _stored_heads(self, i: int, side: Side, num_kv_heads: int) -> tuple[int, ...]:
        pieces = self._whole_heads(i, side, num_kv_heads)
        return tuple(h for start, stop, segment in pieces if i in segment.sources for h in range(start, stop))

    def _whole_heads(self, i: int, side: Side, num_kv_heads: int) -> list[tuple[int, int, Segment]]:
        """Segments of one side of layer i with their bounds in heads."""
        whole_number(num_kv_heads, "num_kv_heads", minimum=1)
        pieces = []
        for segment in getattr(self._layer(i), side):
            start, stop = (bound * num_kv_heads for bound in segment.heads)
            if start.denominator != 1 or stop.denominator != 1:
                multiple = math.lcm(*(bound.denominator for bound in segment.heads))
                raise ValueError(
                    f"layer {i} {side}: num_kv_heads must be a multiple of {multiple}, got {num_kv_heads}; "
                    f"{_format_heads(*segment.heads)} of it are not whole heads"
                )
            pieces.append((int(start), int(stop), segment))
        return pieces

    def segments(self, i: int, num_kv_heads: int) -> tuple[ResolvedSegment, ...]:
        """Common refinement of the key and value segments of layer i, in whole heads, in ascending order.

        Attention of layer i is one call per entry, on heads start to stop - 1 of keys, values and q's groups.

        Raises:
            ValueError: a share of ``num_kv_heads`` is not a whole number of heads.
        """
        pieces = []
        for key_start, key_stop, key in self._whole_heads(i, "keys", num_kv_heads):
            for value_start, value_stop, value in self._whole_heads(i, "values", num_kv_heads):
                start, stop = max(key_start, value_start), min(key_stop, value_stop)
                if start < stop:
                    pieces.append(ResolvedSegment(start, stop, key, value))
        return tuple(pieces)

    @property
    def prefill_layers(self) -> int:
        """Number of layers, from layer 0 on, that must process the whole prompt.

        All later layers only read the cache. They run only for the positions whose logits are requested.
        """
        return 1 + max(self.storage_layers)

    @property
    def cache_ratio(self) -> Fraction:
        """Size of the cache relative to vanilla attention with the same KV heads."""
        return (self.stored_tensors("keys") + self.stored_tensors("values")) / (2 * self.num_layers)

    def stored_tensors(self, side: Side) -> Fraction:
        """Number of "keys" or "values" tensors that all layers store, parts of the heads as fractions."""
        shares = (share for i in range(self.num_layers) for share in self.stored_shares(i, side))
        return sum((stop - start for start, stop in shares), Fraction(0))

    def bytes_per_token(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Cache bytes of one token of one sequence in all layers, counted from the stored heads.

        Raises:
            ValueError: a share of ``num_kv_heads`` is not a whole number of heads.
        """
        whole_number(head_dim, "head_dim", minimum=1)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        layers = range(self.num_layers)
        heads = sum(len(self._stored_heads(i, side, num_kv_heads)) for i in layers for side in SIDES)
        return heads * head_dim * dtype.itemsize

    def latent_bytes_per_token(self, kv_lora_rank: int, rope_dim: int, dtype: torch.dtype) -> int:
        """``bytes_per_token`` under multi-head latent attention (arXiv:2405.04434).

        Each layer stores its shares of a latent of ``kv_lora_rank`` channels. A layer that stores keys also
        stores ``rope_dim`` channels of rotated key.

        Raises:
            ValueError: latent attention does not support the plan (plan/latent.py has the rules), or a share
                of ``kv_lora_rank`` is not a whole number of channels.
        """
        for name, size in (("kv_lora_rank", kv_lora_rank), ("rope_dim", rope_dim)):
            whole_number(size, name, minimum=1)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        layers = latent_layers(self)
        channels = sum(layer.stored_channels(kv_lora_rank) + layer.stores_rope * rope_dim for layer in layers)
        return channels * dtype.itemsize

    # Construction, serialization and drawing

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names that ``named`` accepts."""
        return tuple(METHODS)

    @classmethod
    def named(cls, name: str, num_layers: int, **options: Any) -> CachePlan:
        """The plan of a published method.

        ``METHODS[name]`` has the paper, the equation and the options.

        Args:
            name: the method's name; case does not matter, and "_" stands for "-". A label gives options too:
                "cla:factor=3" is ``named("cla", num_layers, factor=3)``.
            num_layers: the number of layers.
            options: the method's options.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the name or an option is unknown (the message lists the known ones), or an option is
                given twice or is out of range.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        found, labeled = parse_label(name)
        if twice := sorted(labeled.keys() & options.keys()):
            raise ValueError(f"option {twice[0]!r} must be given once, got it in {name!r} and as a keyword")
        options = {**labeled, **options}
        find_method(found.name, options)
        num_layers = whole_number(num_layers, "num_layers", minimum=1)
        with _where(f"plan {found.name!r}"):
            return cls(found.name, tuple(found.build(num_layers, **options)))

    def to_dict(self) -> dict[str, Any]:
        """The plan as lists, dicts, numbers and strings, ready for JSON."""
        return {
            "format": FORMAT,
            "name": self.name,
            "layers": [_layer_to_dict(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CachePlan:
        """The inverse of ``to_dict``.

        Raises:
            TypeError: a part has the wrong type.
            ValueError: the mapping has unknown fields, a newer format, or an inconsistent plan.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a cache plan must be a mapping, got {type(data).__name__}")
        version = data.get("format")
        if version is None:
            raise ValueError(f'a cache plan must have "format", got the keys {sorted(map(str, data))}')
        if whole_number(version, "format of the cache plan", minimum=1) > FORMAT:
            raise ValueError(
                f"format of the cache plan must be at most {FORMAT}, got {version}; upgrade fusedkv_ext"
            )
        data = _only_fields(cls, {key: value for key, value in data.items() if key != "format"})
        if not isinstance(data.get("layers"), (list, tuple)):
            raise TypeError(f"layers must be a list, got {data.get('layers')!r}")
        layers = tuple(_layer_from_dict(i, layer) for i, layer in enumerate(data["layers"]))
        name: Any = data.get("name")  # validated by the constructor
        return cls(name, layers)

    def to_json(self, indent: int | None = None) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> CachePlan:
        """The inverse of ``to_json``.

        Raises:
            ValueError: the text is not JSON; otherwise as ``from_dict``.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a cache plan must be JSON, got text with an error: {error}") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        return draw(self)


def _only_fields(kind: type, data: Any) -> dict[str, Any]:
    """A copy of ``data``. It must be a mapping whose keys are fields of the dataclass ``kind``."""
    if not isinstance(data, Mapping):
        raise TypeError(f"{kind.__name__} must be a mapping, got {type(data).__name__}")
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"{kind.__name__} has no field {names}; it has {', '.join(known)}")
    return dict(data)


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    return {side: [_segment_to_dict(segment) for segment in getattr(layer, side)] for side in SIDES}


def _segment_to_dict(segment: Segment) -> dict[str, Any]:
    data = {"sources": list(segment.sources), "heads": [str(bound) for bound in segment.heads]}
    if segment.fusion is None:
        return data
    init = segment.fusion.init
    return {
        **data,
        "fusion": {**asdict(segment.fusion), "init": init if isinstance(init, str) else list(init)},
    }


def _layer_from_dict(i: int, data: Any) -> LayerPlan:
    with _where(f"layer {i}"):
        data = _only_fields(LayerPlan, data)
    sides = {}
    for side in SIDES:
        with _where(f"layer {i} {side}"):
            segments = data.get(side)
            if not isinstance(segments, (list, tuple)):
                raise TypeError(f"must be a list of segments, got {segments!r}")
            sides[side] = tuple(_segment_from_dict(segment) for segment in segments)
    return LayerPlan(**sides)


def _segment_from_dict(data: Any) -> Segment:
    data = _only_fields(Segment, data)
    if "sources" not in data:
        raise ValueError(f"a segment must have sources, got the fields {sorted(data)}")
    if data.get("fusion") is not None:
        data["fusion"] = Fusion(**_only_fields(Fusion, data["fusion"]))
    return Segment(**data)
