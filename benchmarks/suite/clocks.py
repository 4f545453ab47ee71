"""The clocks: the host's, that of dry runs, and the GPU's."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext.lab import timing
from fusedkv_ext.lab.timing import Timed, quartiles
from fusedkv_ext.testing import Outputs
from suite.measure import Cell, Check, Contestant, Entry, Ready, brief

MAX_CALLS_PER_GRAPH = 256
# A graph lasts a millisecond on a device of these rates: launching the graph itself then weighs little.
GRAPH_SECONDS, USUAL_BYTES_PER_S, USUAL_FLOPS = 1e-3, 3e12, 6e14
ROUNDS, SECONDS_PER_ROW = (5, 40), 0.3
# Cycles that the stream sleeps while the host submits: 0.1 ms, and 0.5 ms for graphs of many nodes.
SLEEP, LONG_SLEEP, MANY_CALLS = 200_000, 1_000_000, 100


class DeadDevice(RuntimeError):
    """The device no longer answers: nothing more can be measured in this process."""


class Clock:
    """Of dry runs on the host: one round. The other clocks build on it.

    rates: roofs of the run, bytes/s or flop/s. estimates: samples of a contestant before the rounds. strict:
    a peer with a wrong result ends the run.
    """

    estimates, strict = 1, False

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def ready(
        self, contestant: Contestant, check: Check, entry: Entry, cell: Cell, small: Contestant | None
    ) -> Ready:
        """Checks a contestant and makes it ready to be launched. small: its small twin."""
        if contestant.prepare is not None:
            contestant.prepare()
        check(contestant.calls[0]())
        if small is not None:
            small.calls[0]()
        return self._launcher(contestant, check, entry, cell, small)

    def _launcher(
        self, contestant: Contestant, check: Check, entry: Entry, cell: Cell, small: Contestant | None
    ) -> Ready:
        # The first set comes last: its result is the one that stays.
        order = list(contestant.calls)[::-1] * entry.calls

        def launch() -> None:
            for call in order:
                call()

        return Ready(launch, len(order), group=contestant.group, bound=contestant.bound)

    def roof(self, name: str, cold: bool) -> tuple[list[Timed], int]:
        """Forms of a roof to be timed in the rounds, and the bytes of each; none: ``rates`` counts."""
        return [], 1

    def rounds(self, running: Sequence[Timed], slow: bool) -> int:
        return 1

    def sample(self, running: Sequence[Timed], rounds: int) -> None:
        timing.sample(running, rounds)

    def recover(self) -> None:
        """After an error of a peer. Raises DeadDevice where nothing can go on."""


class HostClock(Clock):
    """Caches are displaced before cold calls, and roofs are timed in the rounds.

    roof_bytes: of the tensor that is read or copied. cold_bytes: of what displaces caches.
    """

    strict = True

    def __init__(self, rounds: int, roof_bytes: int, cold_bytes: int) -> None:
        super().__init__()
        self._rounds = rounds
        self._cold = torch.ones(max(cold_bytes // 4, 1))
        self._source = torch.ones(roof_bytes // 4)
        self._target = torch.ones(roof_bytes // 4)

    def _launcher(
        self, contestant: Contestant, check: Check, entry: Entry, cell: Cell, small: Contestant | None
    ) -> Ready:
        ready = super()._launcher(contestant, check, entry, cell, small)

        def before() -> None:
            if cell.cold:
                self._cold.sum()
            if small is not None:
                small.calls[0]()

        ready.before = before
        return ready

    def roof(self, name: str, cold: bool) -> tuple[list[Timed], int]:
        """read: a sum and a dot product over a large float32 tensor. copy: copy_ into a warm one, bytes read
        and bytes written."""
        source, target = self._source, self._target
        before = self._cold.sum if cold else None
        if name == "copy":
            return [Timed(lambda: target.copy_(source), before=before)], 2 * source.nbytes
        forms = (source.sum, lambda: torch.dot(source, source))
        return [Timed(form, before=before) for form in forms], source.nbytes

    def roofs(self) -> dict[str, dict[str, float]]:
        """Both roofs of this machine, in GB/s."""
        found = {}
        for name in ("read", "copy"):
            forms, size = self.roof(name, cold=True)
            self.sample(forms, 1 + self._rounds)
            best = (min(x) for x in zip(*(form.samples[1:] for form in forms), strict=True))
            low, middle, high = quartiles([1e-9 * size / seconds for seconds in best])
            found[name] = {"gb_per_s": middle, "low": low, "high": high}
        return found

    def rounds(self, running: Sequence[Timed], slow: bool) -> int:
        return max(3, self._rounds // 3) if slow else self._rounds


class GraphClock(Clock):
    """Replays of a CUDA graph that holds the whole operation many times, over all sets of buffers.

    Planning and combine are included. After capture the graph's own output is overwritten with NaN, replayed
    and checked again.
    """

    estimates = 2

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def recover(self) -> None:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeadDevice(brief(error)) from error
        gc.collect()
        torch.cuda.empty_cache()

    def _launcher(
        self, contestant: Contestant, check: Check, entry: Entry, cell: Cell, small: Contestant | None
    ) -> Ready:
        if not entry.captured:
            ready = super()._launcher(contestant, check, entry, cell, small)
            ready.timing = "stream"
            return ready
        sets = list(contestant.calls)[::-1]
        least = max(entry.num_bytes / USUAL_BYTES_PER_S, entry.flops / USUAL_FLOPS)
        repeats = int(GRAPH_SECONDS / max(least * len(sets), 1e-9))
        order = sets * max(1, min(repeats, MAX_CALLS_PER_GRAPH // len(sets)))
        side = torch.cuda.Stream(self.device)
        try:
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for call in order[-2:]:
                    call()
            torch.cuda.current_stream(self.device).wait_stream(side)
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for call in order:
                    result = call()
            for x in floating(result):
                x.detach().fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize(self.device)
            check(result)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Without a graph: launches are part of the time wherever they cannot run ahead.
            self.recover()
            ready = super()._launcher(contestant, check, entry, cell, small)
            ready.launch()
            ready.timing = f"stream (no graph: {brief(error)})"
            return ready
        kept = (graph, result)
        return Ready(graph.replay, len(order), None, [], "graph", contestant.group, contestant.bound, kept)

    def rounds(self, running: Sequence[Timed], slow: bool) -> int:
        one_round = sum(min(timed.samples) * timed.calls for timed in running)
        low, high = ROUNDS
        return max(low, min(high, int(SECONDS_PER_ROW * len(running) / max(one_round, 1e-9))))

    def sample(self, running: Sequence[Timed], rounds: int) -> None:
        events = []
        for timed in timing.turns(running, rounds):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The stream sleeps while the host submits: no launch latency between the two events.
            torch.cuda._sleep(LONG_SLEEP if timed.calls > MANY_CALLS else SLEEP)
            start.record()
            timed.launch()
            stop.record()
            events.append((timed, start, stop))
        torch.cuda.synchronize(self.device)
        for timed, start, stop in events:
            timed.samples.append(start.elapsed_time(stop) / 1e3 / timed.calls)


def floating(result: Outputs) -> list[Tensor]:
    found = [result] if isinstance(result, Tensor) else list(result)
    return [x for x in found if x.is_floating_point()]
