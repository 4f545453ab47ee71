"""Generator of the tables of docs/scale.md from the planner's formulas.

python -m fusedkv_ext.lab.pages.planner ROOT
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from fusedkv_ext.lab.planner import choose, shapes
from fusedkv_ext.lab.planner.activations import loss
from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.memory import memory
from fusedkv_ext.lab.planner.recipes import RECIPES
from fusedkv_ext.lab.planner.report import GB, number, tokens
from fusedkv_ext.lab.planner.serving import Server
from fusedkv_ext.lab.planner.traffic import traffic
from fusedkv_ext.lab.planner.weights import all_shapes, count
from fusedkv_ext.lab.reporting import filled, table
from fusedkv_ext.layers.decoder_config import DecoderConfig
from fusedkv_ext.ops.head_loss import chunk_rows

DOCUMENT = "docs/scale.md"
METHODS = ("vanilla", "gqa", "fusedkv", "fusedkv-lite")
CONTEXTS = (2**13, 2**15, 2**17, 2**19, 2**20)
CLUSTERS = (8, 64)
MEMORY = 80 * GB
CHUNK = 8192  # prompt tokens per prefill step of a server


@cache
def _shape(name: str, method: str) -> DecoderConfig:
    return shapes.shape(shapes.load(name), method)


def _columns(what: str) -> tuple[str, ...]:
    """Column titles, one per method."""
    return (f"{what}: {METHODS[0]}", *METHODS[1:])


@cache
def _training(name: str, context: int, gpus: int) -> tuple[dict[str, Job], bool]:
    """The job of each method on the layout that is chosen for vanilla, and whether vanilla fits."""
    chosen, fits = choose.training(_shape(name, "vanilla"), gpus, context, MEMORY)
    return {method: replace(chosen, config=_shape(name, method)) for method in METHODS}, fits


def _layout(job: Job) -> str:
    layout = job.layout
    sizes = {"shard": layout.dp_shard, "cp": layout.cp, "tp": layout.tp, "batch": job.batch}
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return ", ".join(parts + ["AC"] * (job.checkpointing != "none"))


def shapes_table(_: str = "") -> str:
    """One row per shape, with its number of parameters for each method."""
    titles = ("", "layers", "width", "FFN", "heads", "KV heads", "head dim", "vocabulary")
    rows = []
    for name in ("332m", "1.5b", "4b", "70b"):
        c = _shape(name, "vanilla")
        sizes = [c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads]
        sizes += [c.num_key_value_heads, c.head_dim, c.vocab_size]
        parameters = (f"{count(all_shapes(_shape(name, method))) / 1e9:.3f}" for method in METHODS)
        rows.append((f"`{name}`", *(f"{size:,}" for size in sizes), *parameters))
    return table((*titles, *_columns("G parameters")), rows, numbers=True)


def training_table(name: str) -> str:
    """Peak memory and traffic of the four methods, per context and cluster."""
    rows = []
    for context in CONTEXTS:
        for gpus in CLUSTERS:
            jobs, fits = _training(name, context, gpus)
            layout = _layout(jobs["vanilla"])
            row = [tokens(context), str(gpus), layout if fits else f"none fits; smallest: {layout}"]
            peaks = [memory(job).peak for job in jobs.values()]
            row += [number(peak / GB) if peak <= MEMORY else f"**{number(peak / GB)}**" for peak in peaks]
            rows.append([*row, *(number(traffic(job).total / GB) for job in jobs.values())])
    return table(
        ("context", "GPUs", "layout", *_columns("peak GB"), *_columns("GB received")), rows, numbers=True
    )


def traffic_table(name: str) -> str:
    """The traffic of the training table by kind, on 64 GPUs."""
    rows = []
    for context in CONTEXTS:
        jobs, _ = _training(name, context, CLUSTERS[-1])
        for method in ("vanilla", "fusedkv"):
            received = traffic(jobs[method])
            parts = (received.dp_shard, received.cp, received.tp)
            rows.append([tokens(context), _layout(jobs[method]), method, *(number(x / GB) for x in parts)])
    titles = (
        "context",
        "layout",
        "plan",
        "weights and gradients",
        "keys and values (cp)",
        "all-reduces (tp)",
    )
    return table(titles, rows, numbers=True)


def serving_table(name: str) -> str:
    """Cache size, sequences and cache reads of the four methods, on the fewest GPUs that serve vanilla."""
    rows = []
    for context in CONTEXTS:
        tp = choose.server(_shape(name, "vanilla"), context, MEMORY, CHUNK).tp
        servers = [Server(_shape(name, method), tp, context, chunk=CHUNK) for method in METHODS]
        fit = [8 // tp * server.sequences(MEMORY) for server in servers]
        row = [tokens(context), str(tp), *(number(server.cache / GB) for server in servers)]
        row += [f"{n:,} / {8 * n:,}" if n else "**none**" for n in fit]
        rows.append([*row, *(number(server.cache_read / GB) for server in servers)])
    titles = ("context", "GPUs per server", *_columns("cache GB"))
    titles += (*_columns("sequences on 8 / 64 GPUs"), *_columns("cache GB read per token"))
    return table(titles, rows, numbers=True)


def servers_table(_: str = "") -> str:
    """Weights, traffic and FLOPs at a context of 8192 tokens."""
    titles = ["", "GPUs per server", "plan", "weights GB", "GB read per step", "MB received per token"]
    titles += ["TFLOP per 8k prompt", "GFLOP per token at 8k"]
    rows = []
    for name in ("1.5b", "4b", "70b"):
        tp = choose.server(_shape(name, "vanilla"), CHUNK, MEMORY, CHUNK).tp
        for method in METHODS:
            server = Server(_shape(name, method), tp, CHUNK)
            prompt = (server.prefill_products + server.prefill_attention) / 1e12
            token = (server.decode_products + server.decode_attention) / 1e9
            sizes = (server.weights / GB, server.weights_read / GB, server.messages / 1e6, prompt, token)
            rows.append((f"`{name}`", str(tp), method, *map(number, sizes)))
    return table(titles, rows, numbers=True)


_FINDINGS = (
    "**Logits do not limit the context of a GPU.** With a vocabulary of 128,000 the loss computes the logits "
    "of {rows:,} tokens at a time. It needs {loss} GB for 8192 tokens, mostly for the gradient of the head. "
    "A loss on all logits would need {logits} GB, and as much again for every further 8192 tokens.",
    "**FusedKV saves fused keys and values for the backward.** The peak of 1.5b at 8k on 8 GPUs is "
    "{peak[fusedkv]} GB, vanilla's is {peak[vanilla]} GB. With recomputation (`model.recompute_fusion`) it "
    "is {refused} GB, like FusedKV-Lite.",
    "**With activation checkpointing and cp, cross-layer plans need more memory, not less.** The gathered "
    "keys and values of source layers stay on every GPU until the backward has passed their consumers. "
    "Vanilla frees them after each layer. 1.5b at 1M on 64 GPUs: {far[fusedkv]} GB, vanilla {far[vanilla]} "
    "GB.",
    "**cp traffic halves**, because half of the layers store: {moved[fusedkv]} GB instead of "
    "{moved[vanilla]} GB in the same case.",
    "**A server holds at least twice the sequences**: {fit[fusedkv]} instead of {fit[vanilla]} on a GPU, "
    "1.5b at 128k. The weights are smaller too, and only whole sequences count. Per token, FusedKV reads "
    "{read[fusedkv]:.1f} times vanilla's cache, FusedKV-Lite {read[fusedkv-lite]:.1f} times, GQA "
    "{read[gqa]:.1f} times.",
    "**Prefill costs half**, because layers without storage run for the last token only: {prompt[fusedkv]} "
    "TFLOP instead of {prompt[vanilla]}, 1.5b at 8k.",
    "**GQA's saving is limited by the number of KV heads.** The 4 KV heads of 70b's gqa are replicated on 8 "
    "GPUs. So its cache per GPU equals vanilla's, {copied[gqa]} GB at 1M. FusedKV's is {copied[fusedkv]} GB.",
)


def findings(_: str = "") -> str:
    """Findings from the tables, with their numbers."""
    near, far = _training("1.5b", 2**13, 8)[0], _training("1.5b", 2**20, 64)[0]
    refusing = replace(near["fusedkv"], config=replace(_shape("1.5b", "fusedkv"), recompute_fusion=True))
    alone = replace(near["vanilla"], batch=1)
    logits = 12 * alone.tokens * alone.config.vocab_size  # log-probabilities and two gradients in fp32
    long = {method: Server(_shape("1.5b", method), 1, 2**17, chunk=CHUNK) for method in METHODS}
    short = {method: Server(_shape("1.5b", method), 1, 2**13) for method in METHODS}
    large = {method: Server(_shape("70b", method), 8, 2**20) for method in METHODS}
    flops = {method: server.prefill_products + server.prefill_attention for method, server in short.items()}
    numbers = {
        "rows": chunk_rows(alone.tokens, alone.config.vocab_size, "cuda"),
        "loss": number(loss(alone) / GB),
        "logits": number(logits / GB),
        "peak": {method: number(memory(job).peak / GB) for method, job in near.items()},
        "refused": number(memory(refusing).peak / GB),
        "far": {method: number(memory(job).peak / GB) for method, job in far.items()},
        "moved": {method: number(traffic(job).cp / GB) for method, job in far.items()},
        "fit": {method: server.sequences(MEMORY) for method, server in long.items()},
        "read": {method: long[method].cache_read / long["vanilla"].cache_read for method in METHODS},
        "prompt": {method: number(total / 1e12) for method, total in flops.items()},
        "copied": {method: number(server.cache / GB) for method, server in large.items()},
    }
    bullets = (textwrap.wrap(text.format(**numbers), 125, subsequent_indent="  ") for text in _FINDINGS)
    return "".join("* " + "\n".join(lines) + "\n" for lines in bullets)


def recipes(_: str = "") -> str:
    """All recipes with their expected memory and traffic."""
    return "\n".join(map(str, RECIPES))


BLOCKS: dict[str, Callable[[str], str]] = {
    "shapes": shapes_table,
    "findings": findings,
    "training": training_table,
    "traffic": traffic_table,
    "serving": serving_table,
    "servers": servers_table,
    "recipes": recipes,
}


def main(root: Path) -> None:
    """Generates the page of the repository at ``root``."""
    path = root / DOCUMENT
    path.write_text(filled(path.read_text(encoding="utf-8"), BLOCKS), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
