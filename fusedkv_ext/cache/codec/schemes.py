"""The registry of coding schemes: how keys and values are coded, and the paper that does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fusedkv_ext.cache.codec.codec import RAW, Codec

__all__ = ["SCHEMES", "Coding", "Scheme"]


class Coding(NamedTuple):
    """The codecs of a layer's keys and values."""

    keys: Codec
    values: Codec


SCHEMES: dict[str, Scheme] = {}


@dataclass(frozen=True)
class Scheme:
    """A coding scheme.

    Attributes:
        name: The name that ``CodecPlan.named`` takes.
        build: ``(*, options) -> Coding``. The option ``bits`` stands for ``key_bits`` and ``value_bits``.
        paper: Its source.
        sinks: First tokens of a sequence that stay raw.
        tail: Last tokens of a sequence that stay raw.
    """

    name: str
    build: Callable[..., Coding]
    paper: str
    sinks: int
    tail: int

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options of the builder, with their defaults."""
        return {p.name: p.default for p in inspect.signature(self.build).parameters.values()}

    @property
    def summary(self) -> str:
        """The docstring of the builder."""
        return inspect.getdoc(self.build) or ""


def scheme(
    name: str, *, paper: str, sinks: int = 0, tail: int = 0
) -> Callable[[Callable[..., Coding]], Callable[..., Coding]]:
    """Registers a builder as ``CodecPlan.named(name, ...)``; see ``Scheme`` for the arguments."""

    def register(build: Callable[..., Coding]) -> Callable[..., Coding]:
        SCHEMES[name] = Scheme(name, build, paper, sinks, tail)
        return build

    return register


@scheme("int8", paper="static scales per channel, as KVQuant's keys (arXiv:2401.18079)")
def _int8() -> Coding:
    """8-bit integers, one static scale per channel: everything folds into the query and the output."""
    return Coding(Codec("int", 8, "channel"), Codec("int", 8, "channel"))


@scheme("fp8", paper="e4m3 (arXiv:2209.05433), static scales per channel")
def _fp8() -> Coding:
    """float8 e4m3, one static scale per channel."""
    return Coding(Codec("e4m3", 0, "channel"), Codec("e4m3", 0, "channel"))


@scheme("int4", paper="static scales per channel, as KVQuant's keys (arXiv:2401.18079)", sinks=4)
def _int4(*, key_bits: int = 4, value_bits: int = 4) -> Coding:
    """4-bit integers, one static scale per channel."""
    return Coding(Codec("int", key_bits, "channel"), Codec("int", value_bits, "channel"))


@scheme("token", paper="scales per token, the usual choice for values (KIVI, arXiv:2402.02750)", sinks=4)
def _token(*, key_bits: int = 8, value_bits: int = 8) -> Coding:
    """Integers with one scale per token and head, for comparison with scales per channel."""
    return Coding(Codec("int", key_bits, "token"), Codec("int", value_bits, "token"))


@scheme("kivi", paper="KIVI (arXiv:2402.02750)", tail=128)
def _kivi(*, key_bits: int = 2, value_bits: int = 2, group: int = 32) -> Coding:
    """Minimum and step of groups: of tokens per channel for keys, of channels per token for values."""
    return Coding(
        Codec("int", key_bits, "token-group", group), Codec("int", value_bits, "channel-group", group)
    )


@scheme("turboquant", paper="TurboQuant (arXiv:2504.19874), without its 1-bit residual", sinks=4, tail=128)
def _turboquant(*, key_bits: int = 4, value_bits: int = 4, balance: bool = False) -> Coding:
    """A rotation, a scale per token and head, and the grid of a normal distribution."""
    keys = Codec("grid", key_bits, "token", rotate=True, balance=balance)
    return Coding(keys, Codec("grid", value_bits, "token", rotate=True))


@scheme("rotate-keys", paper="keys as TurboQuant (arXiv:2504.19874), values as KIVI", sinks=4, tail=128)
def _rotate_keys(*, key_bits: int = 4, value_bits: int = 4, group: int = 32, balance: bool = False) -> Coding:
    """Rotated keys on a grid; values with minimum and step of every group of channels."""
    keys = Codec("grid", key_bits, "token", rotate=True, balance=balance)
    return Coding(keys, Codec("int", value_bits, "channel-group", group))


@scheme("pca", paper="Eigen attention (arXiv:2408.05646), weighted with queries and output weights", sinks=4)
def _pca(*, rank: int = 48, bits: int = 0) -> Coding:
    """A basis of ``rank`` directions per head. ``bits`` of static codes for its coefficients; 0: raw."""
    codec = Codec("int", bits, "channel", rank=rank) if bits else Codec(rank=rank)
    return Coding(codec, codec)


@scheme("think", paper="ThinK (arXiv:2407.21018), with the same channels for all prompts", sinks=4, tail=32)
def _think(*, rank: int = 40, bits: int = 0) -> Coding:
    """``rank`` channels of keys, in pairs; values stay raw. ``bits`` of static codes of them; 0: raw."""
    if bits:
        return Coding(Codec("int", bits, "channel", rank=rank, basis="pairs"), RAW)
    return Coding(Codec(rank=rank, basis="pairs"), RAW)
