"""Results of the formulas as rows of numbers and as tables that compare plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.memory import memory
from fusedkv_ext.lab.planner.serving import Server
from fusedkv_ext.lab.planner.traffic import traffic
from fusedkv_ext.lab.planner.weights import all_shapes, count
from fusedkv_ext.lab.reporting import aligned

__all__ = [
    "Row",
    "number",
    "parse_tokens",
    "serving_row",
    "serving_table",
    "tokens",
    "training_row",
    "training_table",
]

Row = dict[str, Any]
GB = 1e9
_UNITS = {"k": 2**10, "m": 2**20}


def tokens(number: int) -> str:
    """Formats a number of tokens: 8192 as 8k, 1048576 as 1M."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def parse_tokens(text: str) -> int:
    """The inverse of `tokens`.

    Raises:
        ValueError: The text is not a positive number.
    """
    unit = _UNITS.get(text[-1:].lower(), 1)
    number = int(text[:-1] if unit > 1 else text) * unit
    if number < 1:
        raise ValueError
    return number


def training_row(label: str, job: Job, gpu_memory: float, bandwidth: float | None = None) -> Row:
    """The row of one GPU of a training job.

    Args:
        label: Name of the plan.
        job: The training job.
        gpu_memory: Bytes of memory per GPU.
        bandwidth: Network bandwidth in byte/s, or None. With it, the row has the seconds of the traffic.
    """
    size, received = memory(job), traffic(job)
    row: Row = {"plan": label, "context": job.context, "kv_heads": job.config.num_key_value_heads}
    row |= {"num_parameters": count(all_shapes(job.config)), "tokens_per_step": job.tokens_per_step}
    row |= {"memory": {**size._asdict(), "state": size.state}, "fits": size.peak <= gpu_memory}
    row["traffic"] = {**received._asdict(), "total": received.total}
    return row if bandwidth is None else {**row, "traffic_seconds": received.total / bandwidth}


def training_table(rows: Sequence[Row]) -> str:
    """Aligned table in GB = 1e9 bytes. Dimensions of the layout without traffic have no column."""
    messages = [d for d in ("dp_shard", "dp_replicate", "cp", "tp") if any(row["traffic"][d] for row in rows)]
    parts = ("state", "gathered", "activations", "loss", "peak")
    timed = ["seconds"] if "traffic_seconds" in rows[0] else []
    cells = [["plan", "context", "G par.", "KV heads", *parts, "fits", *messages, *timed]]
    for row in rows:
        start = [
            row["plan"],
            tokens(row["context"]),
            f"{row['num_parameters'] / 1e9:.2f}",
            str(row["kv_heads"]),
        ]
        size = [number(row["memory"][name] / GB) for name in parts]
        received = [number(row["traffic"][name] / GB) for name in messages]
        seconds = [number(row["traffic_seconds"])] if timed else []
        cells.append([*start, *size, "yes" if row["fits"] else "NO", *received, *seconds])
    return aligned(cells)


def serving_row(label: str, server: Server, gpu_memory: float, bandwidth: float | None = None) -> Row:
    """The row of one GPU of a server.

    Args:
        label: Name of the plan.
        server: The server.
        gpu_memory: Bytes of memory per GPU.
        bandwidth: Memory bandwidth in byte/s, or None. With it, the row has the read time of a step in
            seconds, for one sequence and for all that fit.
    """
    fit = server.sequences(gpu_memory)
    row: Row = {"plan": label, "context": server.context, "kv_heads": server.config.num_key_value_heads}
    row |= {"num_parameters": count(all_shapes(server.config)), "sequences": fit, "fits": fit > 0}
    sizes = ("weights", "prefill", "cache", "cache_per_token", "cache_read", "weights_read", "messages")
    row["bytes"] = {name: getattr(server, name) for name in sizes}
    products = ("prefill_products", "prefill_attention", "decode_products", "decode_attention")
    row["flops"] = {name: getattr(server, name) for name in products}
    if bandwidth is not None:
        steps = {n: (server.weights_read + n * server.cache_read) / bandwidth for n in (1, fit)}
        row["step_seconds"] = {"one": steps[1], "all": steps[fit] if fit else None}
    return row


def serving_table(rows: Sequence[Row]) -> str:
    """Aligned table in GB = 1e9 bytes."""
    timed = ["ms/step, 1", "ms/step, all"] if "step_seconds" in rows[0] else []
    sizes = ("weights", "prefill", "cache")
    titles = ["plan", "context", "G par.", "KV heads", *sizes, "sequences", "cache read", "weights read"]
    cells = [[*titles, "MB received", "prefill TFLOP", "decode GFLOP", *timed]]
    for row in rows:
        size, flops = row["bytes"], row["flops"]
        start = [
            row["plan"],
            tokens(row["context"]),
            f"{row['num_parameters'] / 1e9:.2f}",
            str(row["kv_heads"]),
        ]
        line = [*start, *(number(size[name] / GB) for name in sizes), str(row["sequences"])]
        line += [number(size["cache_read"] / GB), number(size["weights_read"] / GB)]
        line += [number(size["messages"] / 1e6)]
        line += [number((flops["prefill_products"] + flops["prefill_attention"]) / 1e12)]
        line += [number((flops["decode_products"] + flops["decode_attention"]) / 1e9)]
        if timed:
            line += ["-" if s is None else number(1e3 * s) for s in row["step_seconds"].values()]
        cells.append(line)
    return aligned(cells)


def number(value: float) -> str:
    """Formats a number with three significant digits, and as an integer from 100 on."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
