"""Times the operations on this machine, beside torch and beside what this machine's memory can do.

    python benchmarks/quick.py [--device cpu] [--dtype bfloat16] [--tokens 16384] [--rounds 15] [--json FILE]

Each row is checked against the oracle, and its peer against it, before anything is timed. A round times the
memory roof, the operation and its peer one after the other, each after a read of a buffer that displaces the
caches; a row shows medians over the rounds. The roof is measured, never looked up: a reduction over a large
tensor for operations that read (its bytes are those read), a copy for those that also write (bytes read and
written). GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext import _native, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))
from compare import assert_matches_oracle, assert_same_bits

Result = Tensor | tuple[Tensor, ...]

KV_HEADS, HEAD_DIM = 8, 128
APPEND_TOKENS = 2048
PAGE_SIZE = 16


@dataclass
class Case:
    """One operation at one size: ``run`` against ``peer``, both returning the result (a tensor or a tuple).

    num_bytes: what must be moved at least. roof: "read" or "copy".
    """

    op: str
    shape: str
    run: Callable[[], Result]
    check: Callable[[], object]
    peer_name: str
    peer: Callable[[], Result]
    num_bytes: int
    roof: str


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    dtype: str
    us: float
    gb_per_s: float
    roof: str
    roof_gb_per_s: float
    percent_of_roof: float
    peer: str
    peer_us: float
    x_peer: float


class Bench:
    """Clock, cold caches and the two roofs of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Twice the last-level cache, and not so large that a round takes long.
        size = min(max(2 * last_level_cache(), 256 << 20), 512 << 20)
        self.cold = torch.ones(size // 4, device=device)
        self.source, self.target = (torch.ones(64 << 20, device=device) for _ in range(2))

    def seconds(self, call: Callable[[], object]) -> float:
        """One cold call. CUDA: between two events of the stream."""
        self.cold.sum()
        if self.device.type == "cpu":
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def roof_seconds_per_byte(self, roof: str) -> float:
        if roof == "read":
            return self.seconds(self.source.sum) / self.source.nbytes
        return self.seconds(lambda: self.target.copy_(self.source)) / (2 * self.source.nbytes)

    def row(self, case: Case, dtype: torch.dtype, rounds: int) -> Row:
        case.check()
        assert_same_maths(case)
        samples = [
            (self.roof_seconds_per_byte(case.roof), self.seconds(case.run), self.seconds(case.peer))
            for _ in range(rounds)
        ]
        roof, mine, peer = (statistics.median(column) for column in zip(*samples, strict=True))
        return Row(
            op=case.op,
            shape=case.shape,
            dtype=str(dtype).removeprefix("torch."),
            us=mine * 1e6,
            gb_per_s=case.num_bytes / mine / 1e9,
            roof=case.roof,
            roof_gb_per_s=1e-9 / roof,
            percent_of_roof=100 * case.num_bytes * roof / mine,
            peer=case.peer_name,
            peer_us=peer * 1e6,
            x_peer=peer / mine,
        )


def assert_same_maths(case: Case) -> None:
    """The peer computes the same thing: a relative distance that rounding explains and a mistake does not."""
    results = [result if isinstance(result, tuple) else (result,) for result in (case.run(), case.peer())]
    mine, peer = (torch.cat([x.detach().flatten().double() for x in result]) for result in results)
    distance = float((mine - peer).norm() / mine.norm())
    assert distance < 0.03, f"{case.op}, {case.shape}: {case.peer_name} is off by {distance:.3f}"


def last_level_cache() -> int:
    """Bytes, 0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0)


def decode_case(
    tokens: int, heads: int, sources: int, dtype: torch.dtype, *, paged: bool = False, fold: bool = False
) -> Case:
    """One query token over a cache. Peer: what torch offers, fusing eagerly first where there are weights.

    fold: the peer folds the weights into query and output by hand and multiplies matrices, once per source.
    """
    G, D = KV_HEADS, HEAD_DIM
    q = torch.randn(1, 1, heads, D).to(dtype)
    keys, values = ([torch.randn(1, tokens, G, D).to(dtype) for _ in range(sources)] for _ in range(2))
    weights = [torch.randn(sources, G, D) for _ in range(2)] if sources > 1 else [None, None]
    options = {"cache_seqlens": torch.tensor([tokens], dtype=torch.int32)}
    key_caches, value_caches = keys, values
    if paged:
        pages = -(-tokens // PAGE_SIZE)
        table = torch.randperm(pages, dtype=torch.int32)

        def scattered(x: Tensor) -> Tensor:
            whole = F.pad(x, (0, 0, 0, 0, 0, pages * PAGE_SIZE - tokens)).view(pages, PAGE_SIZE, G, D)
            return torch.empty_like(whole).index_copy_(0, table.long(), whole)

        options["block_table"] = table[None]
        key_caches, value_caches = [scattered(x) for x in keys], [scattered(x) for x in values]
    arguments = (q, key_caches, value_caches, *weights)

    def sdpa() -> Tensor:
        k, v = (eager_fuse(x, w) for x, w in zip((keys, values), weights, strict=True))
        transposed = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*transposed, enable_gqa=heads != G)

    def folded() -> Tensor:
        rows = q.view(G, heads // G, D)
        a, b = (weight[:, :, None].to(dtype) for weight in weights)
        scores = sum((rows * w) @ k[0].permute(1, 2, 0) for k, w in zip(keys, a, strict=True))
        p = torch.softmax(scores.float() / math.sqrt(D), -1).to(dtype)
        return sum(p @ v[0].transpose(0, 1) * w for v, w in zip(values, b, strict=True))

    return Case(
        op=f"decode, {sources} source{'s' if sources > 1 else ''}{', paged' if paged else ''}",
        shape=f"T={tokens} H={heads} G={G} D={D}" + (f" page={PAGE_SIZE}" if paged else ""),
        run=lambda: fkv.fused_kv_attn_with_kvcache(*arguments, **options),
        check=lambda: assert_matches_oracle(
            fkv.fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache, *arguments, **options
        ),
        peer_name="folded matmuls" if fold else "SDPA" if sources == 1 else "eager fuse + SDPA",
        peer=folded if fold else sdpa,
        num_bytes=sum(x.nbytes for x in (*keys, *values)),
        roof="read",
    )


def eager_fuse(sources: list[Tensor], weights: Tensor | None) -> Tensor:
    """The sum as one writes it in torch, in the sources' dtype."""
    if weights is None:
        return sources[0]
    return sum(w.to(x.dtype) * x for x, w in zip(sources, weights, strict=True))


def fuse_case(
    tokens: int, sources: int, dtype: torch.dtype, device: torch.device, *, backward: bool = False
) -> Case:
    shape = (1, tokens, KV_HEADS, HEAD_DIM)
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_(backward) for _ in range(sources)]
    weights = torch.randn(sources, *shape[2:], device=device, requires_grad=backward)
    gradient = torch.randn(shape, device=device).to(dtype)

    def step(fuse: Callable[[list[Tensor], Tensor], Tensor]) -> Result:
        out = fuse(inputs, weights)
        return torch.autograd.grad(out, [*inputs, weights], gradient) if backward else out

    # Forward: m reads, one write. Backward: the gradient and m sources read, m gradients written.
    passes = (sources + 1) + (2 * sources + 1 if backward else 0)
    return Case(
        op=f"fuse_kv{' forward + backward' if backward else ''}",
        shape=f"m={sources} T={tokens} G={KV_HEADS} D={HEAD_DIM}",
        run=lambda: step(fkv.fuse_kv),
        check=lambda: assert_matches_oracle(fkv.fuse_kv, reference.fuse_kv, inputs, weights),
        peer_name="eager",
        peer=lambda: step(eager_fuse),
        num_bytes=passes * gradient.nbytes,
        roof="copy",
    )


def append_case(dtype: torch.dtype) -> Case:
    """A prompt's keys and values, rotated and stored; peer: the same in torch."""
    steps, G, D = APPEND_TOKENS, KV_HEADS, HEAD_DIM
    key, value = (torch.randn(1, steps, G, D).to(dtype) for _ in range(2))
    angles = torch.outer(torch.arange(steps), 10000.0 ** -(torch.arange(0, D, 2) / D))
    cos, sin = angles.cos(), angles.sin()
    caches = [torch.zeros(1, steps, G, D, dtype=dtype) for _ in range(2)]
    options = {
        "cache_seqlens": torch.tensor([steps], dtype=torch.int32), "rotary_cos": cos, "rotary_sin": sin
    }  # fmt: skip

    def append() -> Result:
        fkv.append_kvcache(key, value, *caches, **options)
        return tuple(caches)

    def torch_append() -> Result:
        x, y = key.float().chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        caches[0].copy_(torch.cat((x * c - y * s, x * s + y * c), dim=-1))
        caches[1].copy_(value)
        return tuple(caches)

    def check() -> None:
        def on_copies(op: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
            def call(dtype: torch.dtype | None = None, **options: Tensor) -> tuple[Tensor, Tensor]:
                copies = [cache.clone() for cache in caches]
                extra = {}
                if dtype is not None:
                    copies, extra = [copy.to(dtype) for copy in copies], {"dtype": dtype}
                op(key, value, *copies, **options, **extra)
                return copies[0], copies[1]

            return call

        got = assert_matches_oracle(
            on_copies(fkv.append_kvcache), on_copies(reference.append_kvcache), **options
        )
        assert_same_bits(got[1], value)

    return Case(
        op="append_kvcache with rotary",
        shape=f"S={steps} G={G} D={D}",
        run=append,
        check=check,
        peer_name="torch rotary + copy_",
        peer=torch_append,
        num_bytes=4 * key.nbytes,
        roof="copy",
    )


def cases(device: torch.device, dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    """One at a time: the tensors of a case are gone before the next."""
    if device.type == "cpu":
        for heads in (KV_HEADS, 4 * KV_HEADS):
            yield decode_case(tokens, heads, 1, dtype)
            yield decode_case(tokens, heads, 2, dtype)
        yield decode_case(tokens, 4 * KV_HEADS, 2, dtype, fold=True)
        yield decode_case(tokens, 4 * KV_HEADS, 2, dtype, paged=True)
    yield fuse_case(tokens, 2, dtype, device)
    if device.type == "cpu":
        yield fuse_case(tokens, 2, dtype, device, backward=True)
        yield append_case(dtype)


def commit() -> str:
    """Of the tree that this file is in; "unknown" where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> dict[str, object]:
    found: dict[str, object] = {"commit": commit(), "torch": torch.__version__}
    found["python"] = platform.python_version()
    if device.type == "cuda":
        return {**found, "gpu": torch.cuda.get_device_name(device)}
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    processor = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return {**found, "cpu": processor, "threads": torch.get_num_threads(), "level": _native.cpu_level()}


def busy_seconds() -> float:
    """CPU seconds that all processes but this one have used so far; 0 where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    # user, nice, system, (idle, iowait,) irq, softirq, steal; guest time is part of user.
    total = sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return total - own.user - own.system


def print_row(row: Row) -> None:
    print(
        f"{row.op:28} {row.shape:28} {row.us:9.0f} {row.gb_per_s:7.1f} {row.roof_gb_per_s:7.1f} {row.roof:4} "
        f"{row.percent_of_roof:6.0f}%  {row.x_peer:7.2f} x {row.peer}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the operations beside torch and the memory roof.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=16384, help="cached tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per row (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file as well")
    args = parser.parse_args()
    if args.tokens < 1 or args.rounds < 1:
        parser.error("--tokens and --rounds must be at least 1")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU here")
    torch.manual_seed(0)
    info = machine(device)
    print(", ".join(f"{name} {value}" for name, value in info.items()), f", {args.dtype}", sep="")
    titles = ("operation", "shape", "us", "GB/s", "roof", "of", "of roof", "x peer")
    print("{:28} {:28} {:>9} {:>7} {:>7} {:4} {:>7}  {:>7}".format(*titles))
    bench, rows = Bench(device), []
    began, others_began = time.monotonic(), busy_seconds()
    for case in cases(device, dtype, args.tokens):
        rows.append(bench.row(case, dtype, args.rounds))
        print_row(rows[-1])
    mean = {
        "percent_of_roof": statistics.geometric_mean(row.percent_of_roof for row in rows),
        "x_peer": statistics.geometric_mean(row.x_peer for row in rows),
    }
    print(f"geometric mean: {mean['percent_of_roof']:.0f}% of roof, {mean['x_peer']:.2f} x peer")
    others = (busy_seconds() - others_began) / (time.monotonic() - began) / (os.cpu_count() or 1)
    info["other_processes_percent"] = round(100 * others, 1)
    print(
        f"other processes used {others:.0%} of the CPUs meanwhile" + (": repeat it" if others > 0.05 else "")
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": info, "rounds": args.rounds, "rows": [asdict(r) for r in rows], "geomean": mean}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
