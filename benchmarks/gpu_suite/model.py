"""Family model: time to first token (TTFT) and time per output token (TPOT) of whole decoders, end to end.

Random weights: time does not depend on them. TTFT and TPOT are those of ``Decoder.generate`` as a user calls
it; each new token leaves a time stamp through its ``stream`` callback.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import fusedkv_ext as fkv
from gpu_suite.cells import Cell, Model, Sizes
from gpu_suite.measure import Lab, Row, assert_near, brief, choose_peer, quartiles

PLANS = ("vanilla", "fusedkv-lite", "fusedkv")
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
        max_position_embeddings=max_len,
    )
    # Made without memory and initialised on the device, in its dtype: the host would take a minute.
    with torch.device("meta"):
        decoder = fkv.Decoder(config)
    decoder = decoder.to(lab.dtype).to_empty(device=lab.device).eval()
    decoder.reset_parameters()
    return decoder


class Stamps:
    """Time stamps on the device's own clock; ``seconds`` are those between neighbours."""

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


@torch.inference_mode()
def check(lab: Lab, decoder: fkv.Decoder, vocab: int) -> None:
    """Logits through the cache, a prompt and then token by token, are those without a cache."""
    ids = torch.randint(vocab, (2, 24), device=lab.device)
    exact = decoder(ids)
    cache = decoder.make_cache(2, 24)
    parts = [decoder(ids[:, :20], cache=cache)]
    parts += [decoder(ids[:, i : i + 1], cache=cache) for i in range(20, 24)]
    # Two ways through many layers in bfloat16.
    assert_near("logits through the cache", torch.cat(parts, dim=1), exact, limit=0.1)


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
            check(lab, decoders[plan], model.vocab)
            generate(lab, decoders[plan], ids, new_tokens)
        except Exception as error:
            decoders.pop(plan, None)
            errors[plan] = brief(error)
            error.__traceback__ = None
            lab.alive()
            lab.clean()
    first: dict[str, list[float]] = {plan: [] for plan in decoders}
    later: dict[str, list[float]] = {plan: [] for plan in decoders}
    for _ in range(ROUNDS if lab.cuda else 1):
        for plan, decoder in decoders.items():
            ttft, steps = generate(lab, decoder, ids, new_tokens)
            first[plan].append(ttft)
            later[plan] += steps
    shape = f"{model.name} B={B} T={T}"
    for plan in PLANS:
        for op, samples in (("TTFT", first), ("TPOT", later)):
            row = Row("model", f"{op}, {plan}", shape, str(lab.dtype).removeprefix("torch."))
            if plan in errors:
                row.error = errors[plan]
                yield row
                continue
            seconds = statistics.median(samples[plan])
            row.us, row.spread = seconds * 1e6, tuple(1e6 * x for x in quartiles(samples[plan]))
            row.timing, row.rounds = "stream" if lab.cuda else "host", len(samples[plan])
            if op == "TPOT":
                moved = step_bytes(decoders[plan], B, T + new_tokens // 2, model)
                row.gb_per_s, row.roof = moved / seconds / 1e9, "read"
                if "read" in lab.roofs:
                    row.percent_of_roof = 100 * moved / seconds / lab.roofs["read"]
            if plan != "vanilla":
                if "vanilla" in errors:
                    row.peers["vanilla"] = {"us": None, "reason": f"n/a ({errors['vanilla']})"}
                else:
                    row.peers["vanilla"] = {"us": statistics.median(samples["vanilla"]) * 1e6}
                choose_peer(row)
            yield row


def model_cells(sizes: Sizes) -> Iterator[Cell]:
    for i, model in enumerate(sizes.models):
        for j, (B, T) in enumerate(sizes.prompts):
            kv = 4 * B * T * model.layers * model.kv_heads * model.head_dim
            activations = B * T * (6 * model.intermediate + 16 * model.hidden)
            weights = 3 * 2 * model.layers * model.hidden * (3 * model.intermediate + 4 * model.hidden)
            embeddings = 3 * 4 * model.vocab * model.hidden
            size = kv + activations + weights + embeddings

            def measure(lab: Lab, model: Model = model, B: int = B, T: int = T) -> Iterator[Row]:
                yield from _rows(lab, model, B, T, sizes.new_tokens)

            yield Cell("model", f"{model.name} B={B} T={T}", 1 if i + j == 0 else 2 + (j > 1), size, measure)
