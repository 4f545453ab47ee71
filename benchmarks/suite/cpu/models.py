"""The families "prefill", "train" and "model": decoders that differ in their plan and in nothing else.

Weights are random: times do not depend on them. Each plan's rows are timed in the same rounds, so that ratios
to vanilla are those of neighbors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fusedkv_ext as fkv
from fusedkv_ext.ops import call, fuse
from suite import machine
from suite.cpu.decode import fill
from suite.cpu.settings import DTYPES, FULL, QUICK, Settings, Shape
from suite.decoders import PLANS, build, check_gradients, check_logits
from suite.measure import Cell, Entry

TTFT, STEP, TPOT = "time to first token", "training step", "time per output token"
TINY_STEP, TINY_ATTENTION = "decode step, tiny model", "attention layer, tiny model"
OPERATIONS = "the operations in it"
ROOM = 48  # tokens that a cache may grow by


def sizes(shape: Shape) -> str:
    """layers x hidden size, query heads / KV heads."""
    return (
        f"{shape['num_hidden_layers']}x{shape['hidden_size']},"
        f"{shape['num_attention_heads']}/{shape['num_key_value_heads']}"
    )


def prefill_cell(tokens: int, name: str, s: Settings) -> Cell:
    """From a prompt and an empty cache to the first new token."""
    entries = []
    prompt = torch.randint(s.prefill_shape["vocab_size"], (1, tokens))
    for plan in PLANS:
        model = build(s.prefill_shape, plan, DTYPES[name])
        cache = model.make_cache(1, tokens)

        def run(model: fkv.Decoder = model, cache: fkv.KVCache = cache) -> Tensor:
            cache.reset()
            return model(prompt, cache=cache, logits_to_keep=1).argmax(-1)

        params = {"plan": plan, "model": sizes(s.prefill_shape), "prompt": tokens}
        check = partial(check_logits, model)
        entries.append(Entry(TTFT, plan, params, DTYPES[name], run, check))
    return Cell("prefill", entries, cold=False, slow=True, base="vanilla")


def train_cell(s: Settings) -> Cell:
    """Forward, backward and an AdamW step; peak memory of each plan in a process of its own."""
    entries = []
    tokens, batch, dtype = s.train_tokens, s.train_batch, DTYPES[s.host_dtype]
    with torch.inference_mode(False):
        ids = torch.randint(s.train_shape["vocab_size"], (batch, tokens))
        for plan in PLANS:
            model = build(s.train_shape, plan, dtype)
            params = {"plan": plan, "model": sizes(s.train_shape), "batch": batch, "tokens": tokens}
            check = partial(check_gradients, model)
            step = _training_step(model, ids)
            peak = peak_megabytes(plan, s) if s.memory else None
            entries.append(Entry(STEP, plan, params, dtype, step, check, peak_mb=peak))
    return Cell("train", entries, cold=False, slow=True, base="vanilla")


def _training_step(model: fkv.Decoder, ids: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            loss = model.loss(ids, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peak_megabytes(plan: str, s: Settings) -> float:
    """Resident memory at the peak of training steps, less that of the process before it has a model."""
    arguments = (plan, s.name, s.host_dtype, str(torch.get_num_threads()))
    return float(machine.run_with_exact_memory([sys.executable, "-m", "suite.cpu.models", *arguments]))


def _print_peak(plan: str, name: str, s: Settings) -> None:
    ids = torch.randint(s.train_shape["vocab_size"], (s.train_batch, s.train_tokens))
    small = dict(s.train_shape, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    _training_step(build(small, plan, DTYPES[name]), ids[:, :64])()  # libraries and thread pools are there
    before = machine.resident_bytes("VmRSS")
    step = _training_step(build(s.train_shape, plan, DTYPES[name]), ids)
    for _ in range(2):
        step()
    print((machine.resident_bytes("VmHWM") - before) / 1e6)


def decode_cell(what: str, shape: Shape, batch: int, context: int, s: Settings) -> Cell:
    """One decoding step. The cache holds random numbers."""
    entries = []
    dtype = DTYPES[s.dtype]
    token = torch.randint(shape["vocab_size"], (batch, 1))
    for plan in PLANS:
        model = build(shape, plan, dtype)
        run = _step(model, filled_cache(model, batch, context), token)
        params = {"plan": plan, "bound": what, "model": sizes(shape), "batch": batch, "context": context}
        check = partial(check_logits, model)
        entries.append(Entry(TPOT, plan, params, dtype, run, check))
    return Cell("model", entries, base="vanilla")


def filled_cache(model: fkv.Decoder, batch: int, tokens: int) -> fkv.KVCache:
    """Random numbers for that many tokens, and room for a few more."""
    cache, plan, G = model.make_cache(batch, tokens + ROOM), model.plan, model.config.num_key_value_heads
    cache.advance(tokens)
    for layer in plan.storage_layers:
        if plan.stored_key_heads(layer, G):
            fill(cache.keys(layer))
        if plan.stored_value_heads(layer, G):
            fill(cache.values(layer))
    return cache


def _step(model: fkv.Decoder, cache: fkv.KVCache, token: Tensor) -> Callable[[], Tensor]:
    """A decoding step; the cache grows from step to step, and shrinks again when it is full."""
    start = cache.lengths[0]

    def run() -> Tensor:
        if cache.lengths[0] == cache.max_len:
            cache.crop(start)
        return model(token, cache=cache, logits_to_keep=1).argmax(-1)

    return run


def _attend(model: fkv.Decoder, x: Tensor, cache: fkv.KVCache) -> Tensor:
    """The last layer's attention, in a step that the cache has made room for."""
    return model.model.layers[-1].self_attn(x, cache=cache)[0]


def _operations_of(model: fkv.Decoder, x: Tensor, cache: fkv.KVCache) -> Callable[[], Tensor]:
    """What ``_attend`` cannot do without, one after the other: torch's modules and our native operations,
    each with the arguments that it got in one run of ``_attend``."""
    calls: list[Callable[[], Tensor]] = []
    names: set[str] = set()
    parts = [m for m in model.model.layers[-1].self_attn.children() if not isinstance(m, fkv.FusionWeights)]

    def native(name: str, *args: Any) -> Any:
        names.add(name)
        op = getattr(torch.ops.fusedkv, name).default
        calls.append(partial(op, *args))
        return op(*args)

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(partial(module, *args))

    hooks = [part.register_forward_pre_hook(keep) for part in parts]
    with torch.inference_mode(), ExitStack() as patches:
        for module in (call, fuse):
            patches.enter_context(mock.patch.object(module, "run_op", native))
        _attend(model, x, cache)
    for hook in hooks:
        hook.remove()
    if "attn_with_kvcache" not in names:
        raise RuntimeError(f"attn_with_kvcache must be among the native operations, got {sorted(names)}")

    def run() -> Tensor:
        for each in calls:
            out = each()
        return out

    return run


def overhead_cell(op: str, s: Settings) -> Cell:
    """A model so small that its arithmetic is nothing: what a step costs the host. ``op``: the whole step, or
    the attention module of the last layer alone, beside the operations in it."""
    entries, dtype = [], DTYPES[s.host_dtype]
    token = torch.randint(s.tiny_shape["vocab_size"], (1, 1))
    x = torch.randn(1, 1, s.tiny_shape["hidden_size"]).to(dtype)
    calls = 1 if s.name == "tiny" else 50 if op == TINY_STEP else 200
    for plan in PLANS:
        model = build(s.tiny_shape, plan, dtype)
        cache = filled_cache(model, 1, 16)
        run, peers = _step(model, cache, token), {}
        if op == TINY_ATTENTION:
            cache.advance(1)
            run, peers = partial(_attend, model, x, cache), {OPERATIONS: _operations_of(model, x, cache)}
        params = {"plan": plan, "layers": s.tiny_shape["num_hidden_layers"]}
        check = partial(check_logits, model)
        entries.append(Entry(op, plan, params, dtype, run, check, peers=peers, calls=calls))
    return Cell("model", entries, cold=False, base="vanilla")


def prefill_cells(s: Settings) -> Iterator[Callable[[Settings], Cell]]:
    for name in dict.fromkeys((s.host_dtype, s.dtype)):
        for tokens in s.prompts:
            yield partial(prefill_cell, tokens, name)


def train_cells(s: Settings) -> Iterator[Callable[[Settings], Cell]]:
    yield train_cell


def model_cells(s: Settings) -> Iterator[Callable[[Settings], Cell]]:
    yield partial(decode_cell, "cache", s.cache_bound, s.cache_bound_batch, s.decode_tokens)
    # FusedKV's upper layers read two sources where vanilla reads one, and lack projections: in bytes they win
    # where the context is shorter than the hidden size, whatever the number of heads.
    yield partial(decode_cell, "weights", s.weight_bound, 1, s.decode_tokens)
    yield partial(decode_cell, "weights-short", s.weight_bound, 1, s.short_tokens)
    for op in (TINY_STEP, TINY_ATTENTION):
        yield partial(overhead_cell, op)


if __name__ == "__main__":
    _, _plan, _name, _dtype, _threads = sys.argv
    torch.set_num_threads(int(_threads))
    _print_peak(_plan, _dtype, {x.name: x for x in (FULL, QUICK)}[_name])
