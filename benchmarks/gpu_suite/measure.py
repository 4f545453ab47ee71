"""Clock, cold caches, roofs and rows of the GPU suite.

What is timed is the replay of a CUDA graph that holds the whole operation many times, planning and combine
included, over sets of buffers that together exceed three times the L2 cache: every call finds its data in
memory, not in L2. Rivals take turns (A B A B ...); a row is the median. Before anything is timed each result
is checked, and after capture the graph's own output is overwritten with NaN, replayed and checked again.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

Result = Tensor | Sequence[Tensor]

COLD_FACTOR = 3  # bytes of all sets, in L2 caches
MAX_SETS, MAX_CALLS_PER_GRAPH = 96, 256
# A graph lasts a millisecond on a device of these rates: launching the graph itself then weighs little.
GRAPH_SECONDS, USUAL_BYTES_PER_S, USUAL_FLOPS = 1e-3, 3e12, 6e14
ROUNDS, ESTIMATE_ROUNDS = (5, 40), 2


class DeadDevice(RuntimeError):
    """The device no longer answers: nothing more can be measured in this process."""


@dataclass
class Contestant:
    """``run(i)`` does the operation on buffer set i; ``check(result of set 0)`` raises if it is wrong.

    group: of several contestants of one group only the fastest takes part in the rounds. prepare: called once
    before everything else (host-side plans). bound: does only a part of the work; shown, but no peer.
    """

    name: str
    run: Callable[[int], Result]
    check: Callable[[Result], None]
    group: str | None = None
    prepare: Callable[[], None] | None = None
    bound: bool = False


@dataclass
class Case:
    """Ours against its peers. num_bytes: what one call must move at least, 0 where that says nothing."""

    family: str
    op: str
    shape: str
    ours: Contestant
    peers: list[Contestant]
    num_bytes: int
    flops: float
    roof: str  # "read", "copy" or "matmul"
    sets: int = 1
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def least_seconds(self) -> float:
        """What one call takes at least, roughly: it sizes the graphs."""
        return max(self.num_bytes / USUAL_BYTES_PER_S, self.flops / USUAL_FLOPS)


@dataclass
class Row:
    """One line of the result. us: median per call, spread: quartiles, timing: "graph", "stream" or "host"."""

    family: str
    op: str
    shape: str
    dtype: str
    us: float | None = None
    spread: tuple[float, float] | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    roof: str | None = None
    percent_of_roof: float | None = None
    peer: str | None = None
    x_peer: float | None = None
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    timing: str = ""
    rounds: int = 0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Timed:
    """A contestant that is ready to be launched; its graph and its result live as long as this."""

    name: str
    group: str | None
    launch: Callable[[], object]
    calls: int
    timing: str
    result: Result
    keep: object = None
    samples: list[float] = field(default_factory=list)  # seconds per call


class Lab:
    """Device, dtype, roofs and clock of a run. ``partial`` receives a row before its peers are tried."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, compile_peers: bool = True) -> None:
        self.device, self.dtype, self.compile_peers = device, dtype, compile_peers
        self.cuda = device.type == "cuda"
        self.roofs: dict[str, float] = {}  # bytes/s, or flop/s for "matmul"
        self.partial: Callable[[Row], None] = lambda row: None
        # On the host everything is a dry run: two sets, so that rotation happens, and one round.
        self.seconds_per_row = 0.3 if self.cuda else 0.0
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0
        self.sm_count = torch.cuda.get_device_properties(device).multi_processor_count if self.cuda else 2

    # ---- memory ------------------------------------------------------------------------------------------

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """N(0, scale^2); filled in pieces, because some tensors here have more than 2^31 elements."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for piece in out.view(-1).split(1 << 28):
            piece.normal_(std=scale)
        return out

    def weights(self, sources: int, *shape: int) -> Tensor:
        """Fusion weights in float32, all far from 0 and 1."""
        return torch.rand(sources, *shape, device=self.device) * 0.6 + 0.2

    def sets_for(self, num_bytes: int) -> int:
        if not self.cuda:
            return 2
        return max(1, min(-(-COLD_FACTOR * self.l2 // max(num_bytes, 1)), MAX_SETS))

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else 1 << 40

    def clean(self) -> None:
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def alive(self) -> None:
        """Raises DeadDevice after an error that the CUDA context does not survive."""
        if not self.cuda:
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeadDevice(brief(error)) from error

    # ---- clock -------------------------------------------------------------------------------------------

    def ready(self, contestant: Contestant, sets: int, least_seconds: float) -> Timed:
        """Checks it, captures it, checks the capture."""
        if contestant.prepare is not None:
            contestant.prepare()
        contestant.check(contestant.run(0))
        # Set 0 is the last of every graph: its result is the one that stays and is checked.
        order = list(range(sets))[::-1]
        if not self.cuda:
            return self._host(contestant, order)
        repeats = int(GRAPH_SECONDS / max(least_seconds * sets, 1e-9))
        order = order * max(1, min(repeats, MAX_CALLS_PER_GRAPH // sets))
        try:
            return self._graph(contestant, order)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.alive()
            self.clean()
            return self._stream(contestant, order[-sets:], brief(error))

    def _host(self, contestant: Contestant, order: list[int]) -> Timed:
        def launch() -> Result:
            return [contestant.run(i) for i in order][-1]

        return Timed(contestant.name, contestant.group, launch, len(order), "host", launch())

    def _graph(self, contestant: Contestant, order: list[int]) -> Timed:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for i in order[-2:]:
                contestant.run(i)
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for i in order:
                result = contestant.run(i)
        for x in tensors(result):
            x.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize(self.device)
        contestant.check(result)
        return Timed(contestant.name, contestant.group, graph.replay, len(order), "graph", result, graph)

    def _stream(self, contestant: Contestant, order: list[int], why: str) -> Timed:
        """Without a graph: launches are part of the time wherever they cannot run ahead."""

        def launch() -> None:
            for i in order:
                contestant.run(i)

        launch()
        note = f"stream (no graph: {why})"
        return Timed(contestant.name, contestant.group, launch, len(order), note, contestant.run(0))

    def sample(self, timed: Sequence[Timed], rounds: int) -> None:
        """Everybody in turns, ``rounds`` times."""
        if not self.cuda:
            for _ in range(rounds):
                for t in timed:
                    began = time.perf_counter()
                    t.launch()
                    t.samples.append((time.perf_counter() - began) / t.calls)
            return
        events = []
        for _ in range(rounds):
            for t in timed:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # The stream sleeps while the host submits: no launch latency between the two events.
                torch.cuda._sleep(200_000)
                start.record()
                t.launch()
                stop.record()
                events.append((t, start, stop))
        torch.cuda.synchronize(self.device)
        for t, start, stop in events:
            t.samples.append(start.elapsed_time(stop) / 1e3 / t.calls)

    # ---- rows --------------------------------------------------------------------------------------------

    def row(self, case: Case) -> Row:
        """Measures one case. Errors of ours are raised; those of a peer are written down."""
        mine = self.ready(case.ours, case.sets, case.least_seconds)
        self.sample([mine], ESTIMATE_ROUNDS)
        self.partial(self._row(case, mine, {}, {}))
        unavailable, rivals = dict(case.unavailable), []
        for peer in case.peers:
            try:
                timed = self.ready(peer, case.sets, case.least_seconds)
                self.sample([timed], ESTIMATE_ROUNDS)
            except Exception as error:
                unavailable[peer.name] = f"n/a ({brief(error)})"
                # Frames of the traceback hold the peer's tensors.
                error.__traceback__ = None
                del error
                self.alive()
                self.clean()
            else:
                rivals.append(timed)
        running = [mine, *fastest_of_groups(rivals)]
        one_round = sum(min(t.samples) * t.calls for t in running)
        low, high = ROUNDS if self.cuda else (1, 1)
        rounds = max(low, min(high, int(self.seconds_per_row * len(running) / max(one_round, 1e-9))))
        for t in running:
            t.samples.clear()
        self.sample(running, rounds)
        return self._row(case, mine, {t.name: t for t in rivals}, unavailable)

    def _row(self, case: Case, mine: Timed, rivals: dict[str, Timed], unavailable: dict[str, str]) -> Row:
        seconds = statistics.median(mine.samples)
        row = Row(case.family, case.op, case.shape, str(self.dtype).removeprefix("torch."), us=seconds * 1e6)
        row.spread = tuple(1e6 * x for x in quartiles(mine.samples))
        row.gb_per_s = case.num_bytes / seconds / 1e9 if case.num_bytes else None
        row.tflop_per_s = case.flops / seconds / 1e12 if case.flops else None
        row.roof, amount = case.roof, case.flops if case.roof == "matmul" else case.num_bytes
        if amount and case.roof in self.roofs:
            row.percent_of_roof = 100 * amount / seconds / self.roofs[case.roof]
        row.timing, row.rounds = mine.timing, len(mine.samples)
        for name, t in rivals.items():
            us = statistics.median(t.samples) * 1e6
            row.peers[name] = {"us": us, "rounds": len(t.samples), "timing": t.timing}
            if any(peer.bound for peer in case.peers if peer.name == name):
                row.peers[name]["bound"] = True
        row.peers |= {name: {"us": None, "reason": why} for name, why in unavailable.items()}
        choose_peer(row)
        return row

    # ---- roofs -------------------------------------------------------------------------------------------

    def measure_roofs(self) -> dict[str, dict[str, float]]:
        """The best of several forms of each; all of them are returned, GB/s or TFLOP/s."""
        found: dict[str, dict[str, float]] = {}
        for roof, name, run, amount in self._roof_forms():
            try:
                usual = USUAL_FLOPS if roof == "matmul" else USUAL_BYTES_PER_S
                timed = self.ready(Contestant(name, run, lambda result: None), 1, amount / usual)
                self.sample([timed], 10 if self.cuda else 1)
            except Exception:
                self.alive()
                continue
            rate = amount / statistics.median(timed.samples)
            found.setdefault(roof, {})[name] = rate / (1e12 if roof == "matmul" else 1e9)
            self.roofs[roof] = max(self.roofs.get(roof, 0.0), rate)
        self.clean()
        return found

    def _roof_forms(self) -> Iterator[tuple[str, str, Callable[[int], Result], float]]:
        size = 1 << (31 if self.cuda else 20)
        source = torch.ones(size // 4, dtype=torch.float32, device=self.device).normal_()
        yield "read", "sum of float32", lambda i: source.sum(), size
        yield "read", "largest of float32", lambda i: source.amax(), size
        yield "read", "sum of bfloat16", lambda i: source.view(torch.bfloat16).sum(), size
        yield "read", "sum of int32", lambda i: source.view(torch.int32).sum(), size
        matrix, vector = source.view(-1, 4096), torch.ones(4096, device=self.device)
        yield "read", "matrix times vector", lambda i: matrix @ vector, size
        from gpu_suite import triton_fused

        if triton_fused.usable(self.device) is None:
            yield "read", "Triton sum", lambda i: triton_fused.read_all(source, self.sm_count), size
        half, target = source[: size // 8], torch.empty(size // 8, device=self.device)
        yield "copy", "copy_", lambda i: target.copy_(half), size
        yield "copy", "negation", lambda i: torch.neg(half, out=target), size
        n = 8192 if self.cuda else 64
        a, b = (self.random(n, n) for _ in range(2))
        yield "matmul", f"{n} x {n} x {n}", lambda i: a @ b, 2.0 * n**3


def fastest_of_groups(timed: Sequence[Timed]) -> list[Timed]:
    kept: dict[str, Timed] = {}
    for t in timed:
        name = t.group or t.name
        if name not in kept or min(t.samples) < min(kept[name].samples):
            kept[name] = t
    return list(kept.values())


def choose_peer(row: Row) -> None:
    """The fastest peer counts, of those that were in all rounds."""
    times = {
        name: peer["us"]
        for name, peer in row.peers.items()
        if peer["us"] and "bound" not in peer and peer.get("rounds", row.rounds) >= row.rounds
    }
    if times and row.us:
        row.peer = min(times, key=times.__getitem__)
        row.x_peer = times[row.peer] / row.us


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def tensors(result: Result) -> list[Tensor]:
    found = [result] if isinstance(result, Tensor) else list(result)
    return [x for x in found if x.is_floating_point()]


def brief(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def assert_near(name: str, got: Tensor, exact: Tensor, limit: float = 0.02) -> None:
    """Every vector along the last dim is within ``limit`` of the exact one, relative to its length.

    Roundings of bfloat16 stay below a quarter of the default; NaN and anything misplaced do not. Vectors much
    shorter than the typical one are judged by that.
    """
    got, exact = got.detach().double(), exact.detach().double()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    length = exact.norm(dim=-1)
    distance = (got - exact).norm(dim=-1) / torch.maximum(length, 0.1 * length.mean()).clamp_min(1e-30)
    worst = float(distance.max())
    assert worst <= limit, f"{name} is wrong: relative distance {worst:.3g}, allowed {limit}"
