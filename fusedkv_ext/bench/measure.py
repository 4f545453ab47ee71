"""Clock, cold caches, the memory roofs of the run, and what a row of a result is.

A cell is a few calls that are timed together: a round takes the roofs and then every call and every peer of
every call, one after the other, in an order that turns. Ratios between any two of them are medians over the
rounds of the ratio within a round, which a slow drift of the machine does not move; times are medians with
quartiles. GB = 1e9 bytes.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.bench.criterion import Outputs, require_same_maths
from fusedkv_ext.ops import native

Clock = Callable[[], float]
Peer = Callable[[], Outputs] | str  # or the reason why there is none


@dataclass
class Entry:
    """One call that gets a row.

    op, params: what it is, unique within the family. label: its name within the cell. num_bytes: what must be
    moved at least (0: not bound by memory). roof: "read" or "copy" (None: no share of a roof is reported).
    peers: name -> call that returns the same, or the reason why there is none. calls: per sample, for short
    ones. check: raises WrongResult; it is called once, before anything is timed. peak_mb: measured before.
    """

    op: str
    label: str
    params: dict[str, Any]
    dtype: torch.dtype
    run: Callable[[], Outputs]
    check: Callable[[], None]
    num_bytes: int = 0
    roof: str | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    calls: int = 1
    peak_mb: float | None = None


@dataclass
class Cell:
    """Entries that are timed in the same rounds.

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
    """

    family: str
    op: str
    label: str
    shape: str
    params: dict[str, Any]
    dtype: str
    us: float
    us_low: float
    us_high: float
    num_bytes: int
    gb_per_s: float | None
    roof: str | None
    roof_gb_per_s: float | None
    percent_of_roof: float | None
    peers: dict[str, dict[str, Any]]
    best_peer: str | None
    x_best: float | None
    versus: dict[str, Any] | None
    peak_mb: float | None = None


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of samples taken in the same rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


class Bench:
    """Times cells. roof_bytes: of the tensor that is read or copied; cold_bytes: of what displaces caches."""

    def __init__(self, rounds: int, roof_bytes: int, cold_bytes: int) -> None:
        self.rounds = rounds
        self._cold = torch.ones(max(cold_bytes // 4, 1))
        self._source = torch.ones(roof_bytes // 4)
        self._target = torch.ones(roof_bytes // 4)

    def seconds(
        self,
        call: Callable[[], object],
        *,
        calls: int = 1,
        cold: bool = True,
        rehearse: Callable[[], object] | None = None,
    ) -> float:
        """Per call. rehearse: called before the clock starts."""
        if cold:
            self._cold.sum()
        if rehearse is not None:
            rehearse()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    def roof_seconds_per_byte(self, roof: str, cold: bool = True) -> float:
        """read: the faster of a sum and a dot product over a large float32 tensor. copy: copy_ into a warm
        one, bytes read and bytes written."""
        source, target = self._source, self._target
        if roof == "copy":
            return self.seconds(lambda: target.copy_(source), cold=cold) / (2 * source.nbytes)
        times = [self.seconds(call, cold=cold) for call in (source.sum, lambda: torch.dot(source, source))]
        return min(times) / source.nbytes

    def roofs(self) -> dict[str, dict[str, float]]:
        """Both roofs of this machine, in GB/s."""
        found = {}
        for roof in ("read", "copy"):
            self.roof_seconds_per_byte(roof)
            samples = [1e-9 / self.roof_seconds_per_byte(roof) for _ in range(self.rounds)]
            low, middle, high = quartiles(samples)
            found[roof] = {"gb_per_s": middle, "low": low, "high": high}
        return found

    def rows(self, cell: Cell) -> list[Row]:
        """Checks every entry and its peers, then times them. Raises WrongResult."""
        reasons: list[dict[str, str]] = []  # per entry, why peers are missing
        clocks: list[tuple[str, Clock]] = []
        for roof in sorted({entry.roof for entry in cell.entries if entry.roof}):
            clocks.append((roof, lambda roof=roof: self.roof_seconds_per_byte(roof, cell.cold)))
        for i, entry in enumerate(cell.entries):
            entry.check()
            small = cell.twin.entries[i] if cell.twin else None
            clock = partial(self.seconds, calls=entry.calls, cold=cell.cold)
            clocks.append((f"{i}", partial(clock, entry.run, rehearse=small and small.run)))
            reasons.append({})
            for name, peer in entry.peers.items():
                rehearse = small and small.peers[name]
                reason = _cannot(name, entry, peer, rehearse)
                if reason is None:
                    clocks.append((f"{i}/{name}", partial(clock, peer, rehearse=rehearse)))
                else:
                    reasons[-1][name] = reason
        samples = self._samples(clocks, max(3, self.rounds // 3) if cell.slow else self.rounds)
        return [_row(cell, i, samples, missing) for i, missing in enumerate(reasons)]

    def _samples(self, clocks: list[tuple[str, Clock]], rounds: int) -> dict[str, list[float]]:
        for _, clock in clocks:  # warm up
            clock()
        samples: dict[str, list[float]] = {key: [] for key, _ in clocks}
        for turn in range(rounds):
            first = turn % len(clocks)
            for key, clock in clocks[first:] + clocks[:first]:
                samples[key].append(clock())
        return samples


def _cannot(name: str, entry: Entry, peer: Peer, rehearse: Peer | None) -> str | None:
    """Why a peer does not run here; None if it does. WrongResult where it runs and is wrong."""
    try:
        for call in (rehearse, peer):
            if isinstance(call, str):
                return call
            got = call() if call else None
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    require_same_maths(f"{entry.op}, {shape_text(entry.params)}: {name}", got, entry.run())
    return None


def shape_text(params: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in params.items())


def _row(cell: Cell, index: int, samples: dict[str, list[float]], missing: dict[str, str]) -> Row:
    entry, mine = cell.entries[index], samples[f"{index}"]
    low, middle, high = (x * 1e6 for x in quartiles(mine))
    peers: dict[str, dict[str, Any]] = {}
    for name in entry.peers:
        if name in missing:
            peers[name] = {"reason": missing[name]}
            continue
        times = samples[f"{index}/{name}"]
        peer_low, peer_middle, peer_high = (x * 1e6 for x in quartiles(times))
        ratio = median_ratio(times, mine)
        peers[name] = {"us": peer_middle, "us_low": peer_low, "us_high": peer_high, "x": ratio}
    timed = {name: peer for name, peer in peers.items() if "x" in peer}
    best = min(timed, key=lambda name: timed[name]["us"]) if timed else None
    roof_gb = share = None
    if entry.roof:
        per_byte = samples[entry.roof]
        roof_gb = 1e-9 / statistics.median(per_byte)
        share = 100 * entry.num_bytes * median_ratio(per_byte, mine)
    return Row(
        family=cell.family,
        op=entry.op,
        label=entry.label,
        shape=shape_text(entry.params),
        params=entry.params,
        dtype=str(entry.dtype).removeprefix("torch."),
        us=middle,
        us_low=low,
        us_high=high,
        num_bytes=entry.num_bytes,
        gb_per_s=entry.num_bytes / middle / 1e3 if entry.num_bytes else None,
        roof=entry.roof,
        roof_gb_per_s=roof_gb,
        percent_of_roof=share,
        peers=peers,
        best_peer=best,
        x_best=timed[best]["x"] if best else None,
        versus=_versus(cell, index, samples),
        peak_mb=entry.peak_mb,
    )


def _versus(cell: Cell, index: int, samples: dict[str, list[float]]) -> dict[str, Any] | None:
    labels = [entry.label for entry in cell.entries]
    if cell.base is None or labels[index] == cell.base:
        return None
    base, entry = labels.index(cell.base), cell.entries[index]
    ratio = median_ratio(samples[f"{index}"], samples[f"{base}"])
    per_byte = ratio * cell.entries[base].num_bytes / entry.num_bytes if entry.num_bytes else None
    return {"to": cell.base, "x": ratio, "per_byte": per_byte}


def geomeans(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per family, of the share of the roof and of the ratio to the best peer, over the rows that have it."""
    found: dict[str, dict[str, float]] = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        found[family] = {}
        for name in ("percent_of_roof", "x_best"):
            values = [row[name] for row in rows if row["family"] == family and row[name]]
            if values:
                found[family][name] = math.exp(statistics.fmean(map(math.log, values)))
    return found


def keep_freed_memory() -> None:
    """Has glibc's malloc give freed memory to the next tensor rather than back to the system.

    Otherwise a large new tensor may or may not bring thousands of page faults, as the heap happens to look:
    the same call then takes one time or three. No effect with another C library. Process-wide.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def commit() -> str:
    """Of the tree that this file is tracked in, "-dirty" where it was changed; "unknown" without one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        for command in (
            ["ls-files", "--error-unmatch", Path(__file__).name],
            ["describe", "--always", "--dirty", "--exclude", "*"],
        ):
            done = subprocess.run([*git, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Where the numbers come from. Caches: bytes of each level as the system tells them, per instance."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "level": native.cpu_level(),
        "cache_bytes": _cache_bytes(),
    }


def _cache_bytes() -> dict[str, int]:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[-1:] in units:
            found[f"L{level}"] = int(size[:-1]) * units[size[-1]]
    return found


def busy_seconds() -> float:
    """CPU seconds that all processes but this one and its children have used so far; 0 where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    # user, nice, system, (idle, iowait,) irq, softirq, steal; guest time is part of user.
    total = sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return total - own.user - own.system - own.children_user - own.children_system
