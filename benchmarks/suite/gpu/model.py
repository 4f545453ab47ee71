"""Family model: time to first token (TTFT) and time per output token (TPOT) of whole decoders, end to end.

Random weights: time does not depend on them. TTFT and TPOT are those of ``Decoder.generate`` as a user calls
it; each new token leaves a time stamp through its ``stream`` callback.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.lab.timing import Timed, turns
from suite.decoders import CHECK_TOKENS, PLANS, check_logits
from suite.gpu.lab import Lab
from suite.gpu.tasks import Model, Sizes, Task
from suite.measure import Row, beside, brief, choose_peer, shape_text, share_of_roof, timed_row

ROUNDS = 3
# The first steps may capture a CUDA graph.
SETTLING_STEPS = 4


def make(lab: Lab, model: Model, plan: str, max_len: int) -> fkv.Decoder:
    config = fkv.DecoderConfig(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        plan=plan,
        max_position_embeddings=max(max_len, CHECK_TOKENS),
    )
    # Made without memory and initialized on the device, in its dtype: the host would take a minute.
    with torch.device("meta"):
        decoder = fkv.Decoder(config)
    decoder = decoder.to(lab.dtype).to_empty(device=lab.device).eval()
    decoder.reset_parameters()
    return decoder


class Stamps:
    """Time stamps on the device's own clock; ``seconds`` are those between neighbors."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.marks = lab, []

    def mark(self, token: Tensor | None = None) -> None:
        if not self.lab.cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.lab.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize(self.lab.device)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def generate(lab: Lab, decoder: fkv.Decoder, ids: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """(TTFT, times of the later tokens) in seconds."""
    stamps = Stamps(lab)
    if lab.cuda:
        torch.cuda.synchronize(lab.device)
    stamps.mark()
    decoder.generate(ids, new_tokens, stream=stamps.mark)
    first, *later = stamps.seconds()
    assert len(later) == new_tokens - 1, f"{len(later) + 1} tokens came, expected {new_tokens}"
    return first, later[min(SETTLING_STEPS, len(later) - 1) :]


def step_bytes(decoder: fkv.Decoder, B: int, T: int, model: Model) -> int:
    """Read by one decoding step: all weights but the embeddings, and the caches that attention reads."""
    weights = sum(p.nbytes for p in decoder.parameters()) - decoder.model.embed_tokens.weight.nbytes
    plan, element = decoder.plan, decoder.lm_head.weight.itemsize
    reads = sum(len(plan.key_sources(i)) + len(plan.value_sources(i)) for i in range(plan.num_layers))
    return weights + reads * B * T * model.kv_heads * model.head_dim * element


def _rows(lab: Lab, model: Model, B: int, T: int, new_tokens: int) -> Iterator[Row]:
    ids = torch.randint(model.vocab, (B, T), device=lab.device)
    decoders: dict[str, fkv.Decoder] = {}
    errors: dict[str, str] = {}
    for plan in PLANS:
        try:
            decoders[plan] = make(lab, model, plan, T + new_tokens)
            check_logits(decoders[plan], steps=4)
            generate(lab, decoders[plan], ids, new_tokens)
        except Exception as error:
            decoders.pop(plan, None)
            errors[plan] = brief(error)
            error.__traceback__ = None
            lab.clock.recover()
    first: dict[str, list[float]] = {plan: [] for plan in decoders}
    later: dict[str, list[float]] = {plan: [] for plan in decoders}
    for plan in turns(list(decoders), ROUNDS if lab.cuda else 1):
        ttft, steps = generate(lab, decoders[plan], ids, new_tokens)
        first[plan].append(ttft)
        later[plan] += steps
    params = {"model": model.name, "B": B, "T": T}
    for plan in PLANS:
        for op, samples in (("TTFT", first), ("TPOT", later)):
            if plan in errors:
                row = Row("model", f"{op}, {plan}", plan, shape_text(params), params, error=errors[plan])
                yield row
                continue
            row = timed_row("model", f"{op}, {plan}", params, lab.dtype, samples[plan])
            row.label, row.timing = plan, "stream" if lab.cuda else "host"
            if op == "TPOT":
                row.num_bytes = step_bytes(decoders[plan], B, T + new_tokens // 2, model)
                row.gb_per_s, row.roof = row.num_bytes / row.us / 1e3, "read"
                share_of_roof(row, lab.clock.rates, samples[plan])
            if plan != "vanilla":
                vanilla = errors.get("vanilla")
                timed = Timed(lambda: None, samples=samples.get("vanilla", []))
                row.peers["vanilla"] = {"reason": vanilla} if vanilla else beside(timed, samples[plan])
                choose_peer(row)
            yield row


def model_tasks(sizes: Sizes) -> Iterator[Task]:
    for i, model in enumerate(sizes.models):
        for j, (B, T) in enumerate(sizes.prompts):
            kv = 4 * B * T * model.layers * model.kv_heads * model.head_dim
            activations = B * T * (6 * model.intermediate + 16 * model.hidden)
            weights = 3 * 2 * model.layers * model.hidden * (3 * model.intermediate + 4 * model.hidden)
            embeddings = 3 * 4 * model.vocab * model.hidden
            oracle = 4 * (weights + embeddings) // 3  # one decoder at a time in float64, before any cache
            size = max(kv + activations, oracle) + weights + embeddings

            def measure(lab: Lab, model: Model = model, B: int = B, T: int = T) -> Iterator[Row]:
                yield from _rows(lab, model, B, T, sizes.new_tokens)

            yield Task("model", f"{model.name} B={B} T={T}", 1 if i + j == 0 else 2 + (j > 1), size, measure)
