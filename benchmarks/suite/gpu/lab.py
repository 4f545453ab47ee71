"""Device, dtype, buffers and roofs of a run of the GPU suite."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusedkv_ext.testing import Outputs
from suite.clocks import Clock, GraphClock
from suite.measure import Bench, Cell, Entry, Row

COLD_FACTOR = 3  # bytes of all sets of buffers, in L2 caches
MAX_SETS = 96


class Lab:
    """On the host everything is a dry run: two sets of buffers, so that they take turns, and one round."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, compile_peers: bool = True) -> None:
        self.device, self.dtype, self.compile_peers = device, dtype, compile_peers
        self.cuda = device.type == "cuda"
        self.clock = GraphClock(device) if self.cuda else Clock()
        self.bench = Bench(self.clock)
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0
        self.sm_count = torch.cuda.get_device_properties(device).multi_processor_count if self.cuda else 2

    def row(self, family: str, entry: Entry) -> Row:
        """Errors of ours are raised; those of a peer are written down."""
        return self.rows(family, entry)[0]

    def rows(self, family: str, *entries: Entry) -> list[Row]:
        """Of entries that take turns; the later ones are compared with the first."""
        return self.bench.rows(Cell(family, list(entries), base=entries[0].label))

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
        """So many sets of buffers that every call finds its data in memory, not in L2."""
        if not self.cuda:
            return 2
        return max(1, min(-(-COLD_FACTOR * self.l2 // max(num_bytes, 1)), MAX_SETS))

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else 1 << 40

    def measure_roofs(self) -> dict[str, dict[str, float]]:
        """The best of several forms of each; all of them are returned, GB/s or TFLOP/s."""
        found: dict[str, dict[str, float]] = {}
        rates: dict[str, float] = {}
        for roof, name, run, amount in self._roof_forms():
            flops = amount if roof == "matmul" else 0
            entry = Entry(name, name, {}, self.dtype, run, _unchecked, amount - flops, None, flops=flops)
            cell = Cell("roof", [entry])
            try:
                timed = self.clock.ready(entry.ours, _unchecked, entry, cell, None)
                self.clock.sample([timed], 10 if self.cuda else 1)
            except Exception:
                self.clock.recover()
                continue
            rate = amount / statistics.median(timed.samples)
            found.setdefault(roof, {})[name] = rate / (1e12 if roof == "matmul" else 1e9)
            rates[roof] = max(rates.get(roof, 0.0), rate)
        self.clock.rates = rates
        self.clock.recover()
        return found

    def _roof_forms(self) -> Iterator[tuple[str, str, Callable[[], Outputs], int]]:
        size = 1 << (31 if self.cuda else 20)
        source = torch.ones(size // 4, dtype=torch.float32, device=self.device).normal_()
        yield "read", "sum of float32", source.sum, size
        yield "read", "largest of float32", source.amax, size
        yield "read", "sum of bfloat16", source.view(torch.bfloat16).sum, size
        yield "read", "sum of int32", source.view(torch.int32).sum, size
        matrix, vector = source.view(-1, 4096), torch.ones(4096, device=self.device)
        yield "read", "matrix times vector", lambda: matrix @ vector, size
        from suite.gpu import triton_fused

        if triton_fused.usable(self.device) is None:
            yield "read", "Triton sum", lambda: triton_fused.read_all(source, self.sm_count), size
        half, target = source[: size // 8], torch.empty(size // 8, device=self.device)
        yield "copy", "copy_", lambda: target.copy_(half), size
        yield "copy", "negation", lambda: torch.neg(half, out=target), size
        n = 8192 if self.cuda else 64
        a, b = (self.random(n, n) for _ in range(2))
        yield "matmul", f"{n} x {n} x {n}", lambda: a @ b, 2 * n**3


def _unchecked(result: Outputs) -> None:
    """Roofs have no oracle."""
