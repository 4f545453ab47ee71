"""What a row is and how it comes about, on the host and on a GPU alike.

A cell is a few calls that are timed together: a round takes every call and every peer of every call, one
after the other, in an order that rotates. Ratios are medians over the rounds of the ratio within a round,
which a slow drift of the machine does not move; times are medians with quartiles. GB = 1e9 bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fusedkv_ext.lab.timing import Timed, median_ratio, quartiles
from fusedkv_ext.testing import Outputs, WrongResult

if TYPE_CHECKING:
    from suite.clocks import Clock

Call = Callable[[], Outputs]
Check = Callable[[Outputs], None]


@dataclass
class Contestant:
    """One way to do an operation.

    Args:
        calls: The operation on each of the sets of buffers that take turns.
        check: Raises WrongResult if the result on the first set is wrong. None: a peer on the same data as
            ours, compared with our result.
        group: Of the contestants of one group only the fastest takes part in the rounds.
        prepare: Called once before everything else, for plans made on the host.
        bound: Does only a part of the work: shown, but no peer.
    """

    calls: Sequence[Call]
    check: Check | None = None
    group: str | None = None
    prepare: Callable[[], None] | None = None
    bound: bool = False


Peer = Contestant | Call | Sequence[Call] | str  # or the reason why there is none


@dataclass
class Entry:
    """One operation that gets a row.

    Args:
        op: What it is; with ``params`` unique within the family.
        label: Its name within the cell.
        params: Its sizes.
        dtype: Of its inputs.
        run: It, on each set of buffers where there are several.
        check: Raises WrongResult if its result is wrong; called once, before anything is timed.
        num_bytes: What must be moved at least; 0: not bound by memory.
        roof: "read", "copy" or "matmul"; None: no share of a roof is reported.
        peers: Name -> what returns the same, or the reason why there is none.
        calls: Per sample, for short ones.
        peak_mb: Measured before.
        flops: Of the operation; 0: not counted.
        captured: A GPU times replays of a CUDA graph; False: calls as they are, with what the host does.
        products: The same products on data that stays in the first cache. With it the row has a share of the
            limit: the longer of the time of these and of reading ``num_bytes`` at the read roof.
    """

    op: str
    label: str
    params: dict[str, Any]
    dtype: torch.dtype
    run: Call | Sequence[Call]
    check: Check
    num_bytes: int = 0
    roof: str | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    calls: int = 1
    peak_mb: float | None = None
    flops: float = 0.0
    captured: bool = True
    products: Call | None = None

    @property
    def ours(self) -> Contestant:
        return _contestant(self.run, self.check)

    def peer(self, name: str) -> Contestant | str:
        peer = self.peers[name]
        return peer if isinstance(peer, (str, Contestant)) else _contestant(peer)


def _contestant(run: Call | Sequence[Call], check: Check | None = None) -> Contestant:
    return Contestant([run] if callable(run) else run, check)


@dataclass
class Cell:
    """Entries that are timed in the same rounds. Entries with one and the same dictionary of peers share
    their times.

    cold: caches are displaced before each call. slow: a round takes seconds, so there are fewer. base: label
    of the entry that the others are compared with. twin: the same entries and peers at a small size; each of
    its calls is made, untimed, right before its counterpart. So the data of a timed call is cold and its code
    is warm, as in a model, whose layers call the same thing one after the other.
    """

    family: str
    entries: list[Entry]
    cold: bool = True
    slow: bool = False
    base: str | None = None
    twin: Cell | None = None


@dataclass
class Row:
    """What was measured of one entry; see ``Entry``. us: median, us_low and us_high: quartiles.

    peers: name -> {us, us_low, us_high, x} with x = how many times our time it takes, or {reason}.
    versus: {to: label of the cell's base, x: our time / its time, per_byte: both divided by their bytes}.
    timing: "host", "graph" or "stream". error: why the row is not complete. products_gb_per_s: of the
    products alone. percent_of_limit: of the slower of reading and products.
    """

    family: str
    op: str
    label: str = ""
    shape: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    us: float | None = None
    us_low: float | None = None
    us_high: float | None = None
    num_bytes: int = 0
    gb_per_s: float | None = None
    roof: str | None = None
    roof_gb_per_s: float | None = None
    percent_of_roof: float | None = None
    products_gb_per_s: float | None = None
    percent_of_limit: float | None = None
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_peer: str | None = None
    x_best: float | None = None
    versus: dict[str, Any] | None = None
    peak_mb: float | None = None
    tflop_per_s: float | None = None
    timing: str = "host"
    rounds: int = 0
    error: str | None = None


@dataclass
class Ready(Timed):
    """A contestant that is ready to be timed. keep: what has to live as long."""

    timing: str = "host"
    group: str | None = None
    bound: bool = False
    keep: object = None


@dataclass
class _Place:
    """An entry, what is timed of it, and why peers are missing."""

    entry: Entry
    mine: Ready
    products: Ready | None = None
    rivals: dict[str, Ready] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def own(self) -> list[Ready]:
        return [self.mine] if self.products is None else [self.mine, self.products]


class Bench:
    """Times cells. partial: receives each row before its peers are tried; trying: the name of each peer."""

    def __init__(self, clock: Clock, partial: Callable[[Row], None] = lambda row: None) -> None:
        self.clock, self.partial = clock, partial
        self.trying: Callable[[str], None] = lambda name: None

    def rows(self, cell: Cell) -> list[Row]:
        """Checks every entry and its peers, then times them. Raises WrongResult."""
        places: list[_Place] = []
        for i in range(len(cell.entries)):
            places.append(self._place(cell, i, places))
        names = sorted({entry.roof for entry in cell.entries if entry.roof})
        roofs = {name: self.clock.roof(name, cell.cold) for name in names}
        running = [timed for group, _ in roofs.values() for timed in group]
        self.clock.sample(running, 1)  # warms up
        timed_here = [timed for place in places for timed in (*place.own, *_fastest(place.rivals))]
        running += {id(timed): timed for timed in timed_here}.values()
        rounds = self.clock.rounds(running, cell.slow)
        for timed in running:
            timed.samples.clear()
        self.clock.sample(running, rounds)
        # Per round, the fastest form of a roof.
        per_unit = {
            name: [min(x) / size for x in zip(*(timed.samples for timed in group), strict=True)]
            for name, (group, size) in roofs.items()
            if group
        }
        return [self._row(cell, places, place, per_unit) for place in places]

    def _place(self, cell: Cell, index: int, earlier: Sequence[_Place]) -> _Place:
        entry, clock = cell.entries[index], self.clock
        small = cell.twin.entries[index] if cell.twin else None
        mine = clock.ready(entry.ours, entry.check, entry, cell, small and small.ours)
        clock.sample([mine], clock.estimates)
        place = _Place(entry, mine)
        if entry.products is not None:
            contestant = _contestant(entry.products)
            place.products = clock.ready(contestant, lambda result: None, entry, cell, small and small.ours)
        self.partial(self._row(cell, [place], place, {}))
        for other in earlier:
            if other.entry.peers is entry.peers:
                place.rivals, place.missing = other.rivals, other.missing
                return place
        for name in entry.peers:
            peer, rehearsal = entry.peer(name), small and small.peer(name)
            reasons = [each for each in (rehearsal, peer) if isinstance(each, str)]
            if reasons:
                place.missing[name] = reasons[0]
                continue
            self.trying(name)
            try:
                check = peer.check or _like_ours(f"{entry.op}, {shape_text(entry.params)}: {name}", entry)
                ready = clock.ready(peer, check, entry, cell, rehearsal)
                clock.sample([ready], clock.estimates)
            except Exception as error:
                if clock.strict and isinstance(error, WrongResult):
                    raise
                place.missing[name] = brief(error)
                error.__traceback__ = None  # its frames hold the peer's tensors
                del error
                clock.recover()
            else:
                place.rivals[name] = ready
        return place

    def _row(self, cell: Cell, places: list[_Place], place: _Place, per_unit: dict[str, list[float]]) -> Row:
        """per_unit: seconds per byte, or per operation, of the roofs that were measured in the rounds."""
        entry, samples = place.entry, place.mine.samples
        row = timed_row(cell.family, entry.op, entry.params, entry.dtype, samples)
        row.label, row.num_bytes, row.peak_mb = entry.label, entry.num_bytes, entry.peak_mb
        row.timing, row.roof = place.mine.timing, entry.roof
        row.gb_per_s = entry.num_bytes / row.us / 1e3 if entry.num_bytes else None
        row.tflop_per_s = entry.flops / row.us / 1e6 if entry.flops else None
        roof = per_unit.get(entry.roof or "")
        share_of_roof(row, roof or self.clock.rates, samples, entry.flops)
        if place.products is not None and roof:
            share_of_limit(row, roof, place.products.samples, samples)
        for name in entry.peers:
            if name in place.missing:
                row.peers[name] = {"reason": place.missing[name]}
            elif name in place.rivals:
                row.peers[name] = beside(place.rivals[name], samples)
        choose_peer(row)
        labels = [each.entry.label for each in places]
        if cell.base in labels and entry.label != cell.base:
            base = places[labels.index(cell.base)]
            ratio = median_ratio(samples, base.mine.samples)
            per_byte = ratio * base.entry.num_bytes / entry.num_bytes if entry.num_bytes else None
            row.versus = {"to": cell.base, "x": ratio, "per_byte": per_byte}
        return row


def timed_row(
    family: str, op: str, params: dict[str, Any], dtype: torch.dtype, samples: Sequence[float]
) -> Row:
    """A row with its times."""
    row = Row(family, op, shape=shape_text(params), params=params, dtype=str(dtype).removeprefix("torch."))
    row.us_low, row.us, row.us_high = (1e6 * x for x in quartiles(samples))
    row.rounds = len(samples)
    return row


def share_of_roof(
    row: Row, roof: list[float] | dict[str, float], samples: Sequence[float], flops: float = 0.0
) -> None:
    """roof: seconds per unit in the rounds of ``samples``, or the rates that were measured before."""
    amount = flops if row.roof == "matmul" else row.num_bytes
    if isinstance(roof, dict):
        if row.roof not in roof:
            return
        roof = [1 / roof[row.roof]] * len(samples)
    if row.roof != "matmul":
        row.roof_gb_per_s = 1e-9 / statistics.median(roof)
    if amount:
        row.percent_of_roof = 100 * amount * median_ratio(roof, samples)


def share_of_limit(
    row: Row, roof: Sequence[float], products: Sequence[float], samples: Sequence[float]
) -> None:
    """roof: seconds per byte in each round; products: seconds of the products alone."""
    row.products_gb_per_s = 1e-9 * row.num_bytes / statistics.median(products)
    slower = [max(row.num_bytes * x, y) for x, y in zip(roof, products, strict=True)]
    row.percent_of_limit = 100 * median_ratio(slower, samples)


def beside(timed: Timed, samples: Sequence[float]) -> dict[str, Any]:
    """What a row says of a peer; one that was in fewer rounds is shown but not chosen."""
    low, middle, high = (1e6 * x for x in quartiles(timed.samples))
    if len(timed.samples) == len(samples):
        ratio = median_ratio(timed.samples, samples)
    else:
        ratio = middle / (1e6 * statistics.median(samples))
    found = {"us": middle, "us_low": low, "us_high": high, "x": ratio}
    if isinstance(timed, Ready):
        found |= {"bound": True} if timed.bound else {}
        found |= {"timing": timed.timing} if timed.timing != "host" else {}
    return found | ({} if len(timed.samples) == len(samples) else {"rounds": len(timed.samples)})


def choose_peer(row: Row) -> None:
    """The fastest peer counts, of those that do all the work and were in all rounds."""
    times = {name: x["us"] for name, x in row.peers.items() if "us" in x and not {"bound", "rounds"} & {*x}}
    if times:
        row.best_peer = min(times, key=times.__getitem__)
        row.x_best = row.peers[row.best_peer]["x"]


def _fastest(rivals: dict[str, Ready]) -> list[Ready]:
    """Of every group."""
    kept: dict[str, Ready] = {}
    for name, timed in rivals.items():
        group = timed.group or name
        if group not in kept or min(timed.samples) < min(kept[group].samples):
            kept[group] = timed
    return list(kept.values())


def _like_ours(name: str, entry: Entry) -> Check:
    return lambda result: require_same_function(name, result, entry.ours.calls[0]())


def require_same_function(name: str, got: Outputs, expected: Outputs, limit: float = 0.1) -> None:
    """Raises WrongResult where a peer computes something else.

    A peer may round more often than torch does in the oracle's formula, so the criterion of ours is not for
    it. Every vector along the last dim has to be within ``limit`` of the expected one, relative to its
    length; vectors much shorter than the typical one are judged by that. Roundings of 16-bit peers reach
    a third of the limit; NaN and anything misplaced are far beyond it.
    """
    sides = [[x] if isinstance(x, torch.Tensor) else list(x) for x in (got, expected)]
    for mine, right in zip(*sides, strict=True):
        if mine.shape != right.shape:
            raise WrongResult(f"{name}: shape must be {tuple(right.shape)}, got {tuple(mine.shape)}")
        mine, right = mine.detach().double(), right.detach().double()
        length = right.norm(dim=-1)
        typical = length.square().mean().sqrt()
        distance = ((mine - right).norm(dim=-1) / length.clamp_min(0.1 * typical).clamp_min(1e-30)).max()
        if not float(distance) < limit:
            raise WrongResult(
                f"{name} computes something else: relative distance must be below {limit}, got {distance:.3g}"
            )


def shape_text(params: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in params.items())


def brief(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
