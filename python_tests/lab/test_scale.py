"""Planning on paper: the formulas against the decoder itself on the meta device, at full size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from meta_memory import Live, as_on_cuda
from torch.torch_version import TorchVersion
from torch.utils.flop_counter import FlopCounterMode

from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.distributed import Layout
from fusedkv_ext.lab.planner import Job, Server, memory, shapes
from fusedkv_ext.lab.planner.activations import ends, kept, kept_by_layer, layer_backward, loss, loss_kept
from fusedkv_ext.lab.planner.weights import all_shapes, count, fusion_shapes, sharded
from fusedkv_ext.layers.decoder import Decoder, DecoderConfig

METHODS = ("vanilla", "gqa", "fusedkv", "fusedkv-lite")
# All that a plan can make of a layer: it reads, mixes before it stores with and without learned weights,
# stores some heads, joins segments, fuses one source.
KINDS = (
    *METHODS,
    "cla",
    "skipv1",
    "skipkv1",
    "yoco++",
    "resformer",
    "resformer:learnable=true",
    "fusedkv-lite-learnable",
    "fusedkv:granularity=scalar",
)
ONE = Layout(dp_shard=1)


def shape(name: str, method: str, **options: Any) -> DecoderConfig:
    return shapes.shape(shapes.load(name), method, **options)


@pytest.fixture(autouse=True)
def bf16() -> Iterator[None]:
    """Of activations and weights, as in training and serving; fusion weights are fp32 whatever this says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def decoder(config: DecoderConfig, checkpointing: str = "none") -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    for layer in model.model.layers:
        layer.activation_checkpointing = None if checkpointing == "none" else checkpointing
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["332m", "1.5b", "4b", "70b"])
def test_parameters_are_those_of_the_decoder(name: str, method: str) -> None:
    config = shape(name, method)
    model = decoder(config)
    assert Counter(all_shapes(config)) == Counter(tuple(p.shape) for p in model.parameters())


@pytest.mark.parametrize("method", KINDS)
def test_parameters_of_every_kind_of_plan_are_those_of_the_decoder(method: str) -> None:
    config = shape("332m", method)
    assert Counter(all_shapes(config)) == Counter(tuple(p.shape) for p in decoder(config).parameters())


@pytest.mark.parametrize(
    ("name", "billions"), [("332m", 0.332), ("1.5b", 1.472), ("4b", 4.02), ("70b", 70.55)]
)
def test_shapes_have_the_parameters_of_their_names(name: str, billions: float) -> None:
    assert count(all_shapes(shape(name, "vanilla"))) / 1e9 == pytest.approx(billions, rel=1e-3)


def kept_and_peak(job: Job) -> tuple[int, int]:
    """Bytes of activations after a forward and at the largest moment of a step, counted."""
    model = decoder(job.config, job.checkpointing).train()
    ids = torch.zeros(job.batch, job.context, dtype=torch.long, device="meta")
    for parameter in model.parameters():  # gradients of parameters are another part of the formulas
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with as_on_cuda(), Live() as live:
        loss = model.loss(ids, ids)
        kept = live.now
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("method", KINDS)
def test_activations_are_what_autograd_keeps(method: str, checkpointing: str) -> None:
    """The widths of 332m; few words, so that logits hide nothing."""
    few = shapes.load("332m").updated([("data.vocab_size", 256), ("model.num_hidden_layers", 6)])
    job = Job(shapes.shape(few, method), ONE, 2, 4096, checkpointing=checkpointing)
    found, _ = kept_and_peak(job)
    assert found == pytest.approx(kept(job) + ends(job) + loss_kept(job), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("1.5b", "vanilla", {}),
        ("1.5b", "fusedkv", {}),
        ("1.5b", "fusedkv", {"recompute_fusion": True}),
        ("4b", "gqa", {}),
        ("70b", "fusedkv", {}),
    ],
)
def test_activations_at_the_sizes_of_the_tables(name: str, method: str, options: dict[str, Any]) -> None:
    """With 128,000 words the largest moment is the loss."""
    job = Job(shape(name, method, **options), ONE, 1, 8192)
    found, peak = kept_and_peak(job)
    assert found == pytest.approx(kept(job) + ends(job) + loss_kept(job), rel=5e-4)
    assert peak == pytest.approx(kept(job) + ends(job) + loss(job), rel=5e-4)


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("method", ["vanilla", "gqa", "fusedkv", "cla"])
def test_the_largest_moment_of_a_small_vocabulary_is_in_a_layer(method: str, checkpointing: str) -> None:
    """An upper bound, that of the feed-forward network with all of its layer kept: a few buffers go
    earlier."""
    config = shapes.load("1.5b").updated([("data.vocab_size", 256), ("model.num_hidden_layers", 8)])
    job = Job(shapes.shape(config, method), ONE, 1, 8192, checkpointing=checkpointing)
    peak = kept_and_peak(job)[1]
    bound = kept(job) + ends(job) + layer_backward(job)
    assert 0.8 * bound < peak < bound


@pytest.mark.parametrize(
    ("checkpointing", "fuses_again"), [("none", True), ("non_reentrant", False), ("reentrant", True)]
)
def test_non_reentrant_checkpointing_keeps_what_its_layer_fuses(
    checkpointing: str, fuses_again: bool
) -> None:
    """Its hooks on what is saved take the place of those of recompute_fusion."""
    few = shapes.load("1.5b").updated([("data.vocab_size", 256), ("model.num_hidden_layers", 4)])
    configs = [shapes.shape(few, "fusedkv", recompute_fusion=again) for again in (False, True)]
    plain, again = (Job(config, ONE, 1, 4096, checkpointing=checkpointing) for config in configs)
    assert (kept_by_layer(again, 3) < kept_by_layer(plain, 3)) == fuses_again
    assert (kept_and_peak(again)[1] < kept_and_peak(plain)[1]) == fuses_again


def test_the_peak_is_below_the_sum_of_the_parts_and_above_each_moment() -> None:
    size = memory(Job(shape("1.5b", "fusedkv"), Layout(dp_shard=8)))
    assert (
        size.state + size.activations + size.loss
        < size.peak
        < size.state + size.activations + size.loss + size.gathered
    )


def test_fsdp_divides_the_state_and_accumulating_keeps_whole_gradients() -> None:
    config = shape("1.5b", "fusedkv")
    alone, shared = (memory(Job(config, Layout(dp_shard=n))) for n in (1, 8))
    assert alone.state == 16 * count(all_shapes(config))
    assert shared.state == pytest.approx(alone.state / 8, rel=1e-3)
    added = memory(Job(config, Layout(dp_shard=8), accumulate=2))
    assert added.gradients == alone.gradients and added.moments == shared.moments
    # cp ranks are like further data ranks to the weights
    assert memory(Job(config, Layout(dp_shard=2, cp=4), context=8192)).state == shared.state


def test_rows_that_do_not_divide_are_rounded_up() -> None:
    assert sharded([(5, 3), (1, 7)], 4) == 2 * 3 + 7


@pytest.mark.parametrize("method", ["vanilla", "fusedkv", "skipv1"])
def test_tp_divides_what_belongs_to_heads_and_widths(method: str) -> None:
    config = shape("1.5b", method)
    whole, half = (sum(map(math.prod, all_shapes(config, tp))) for tp in (1, 2))
    norms = config.num_hidden_layers * 2 * config.hidden_size + config.hidden_size
    norms += sum(1 + bool(config.plan.stored_key_heads(i, 16)) for i in range(24)) * config.head_dim
    assert 2 * half == whole + norms


@pytest.mark.parametrize("method", KINDS)
def test_the_cache_is_that_of_kvcache(method: str) -> None:
    config = shape("332m", method)
    server = Server(config, context=100)
    cache = KVCache(
        config.plan, 1, 100, config.num_key_value_heads, config.head_dim, dtype=torch.bfloat16, device="meta"
    )
    assert server.cache == cache.nbytes == 100 * config.cache_bytes_per_token(torch.bfloat16)
    assert Server(config, context=100, cache_element=1).cache == cache.nbytes / 2


def test_kv_heads_are_copied_where_there_are_more_gpus() -> None:
    config = shape("70b", "gqa")  # 4 KV heads
    four, eight = (Server(config, tp=tp, context=1000) for tp in (4, 8))
    assert four.cache == eight.cache == Server(config, context=1000).cache / 4
    assert 2 * eight.cache_read == 2 * four.cache_read


def test_decoding_reads_what_the_papers_say() -> None:
    """Section 5 of the paper: 2 L S G D for vanilla and Lite, 3 L S G D for FusedKV."""
    sizes = {method: shape("1.5b", method) for method in METHODS}
    config = sizes["vanilla"]
    unit = 24 * 8192 * 16 * 128 * 2
    reads = {method: Server(sizes[method], context=8192).cache_read for method in METHODS}
    assert reads == {"vanilla": 2 * unit, "gqa": unit, "fusedkv": 3 * unit, "fusedkv-lite": 2 * unit}
    assert config.num_hidden_layers == 24


@pytest.mark.parametrize("method", KINDS)
def test_flops_of_a_prompt_are_those_of_the_decoder(method: str) -> None:
    if method == "gqa" and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("FlopCounterMode of torch 2.11 does not count attention of grouped heads")
    config = shape("332m", method)
    server = Server(config, context=2048)
    model, ids = decoder(config).eval(), torch.zeros(1, 2048, dtype=torch.long, device="meta")
    with as_on_cuda(), torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(ids, logits_to_keep=1)
    counts = {str(name): number for name, number in flops.get_flop_counts()["Global"].items()}
    attention = sum(number for name, number in counts.items() if "attention" in name)
    assert sum(counts.values()) - attention == server.prefill_products
    # Counted without the mask, that is whole squares; the last rows go through an operation that counts
    # nothing.
    layers = config.plan.prefill_layers - 1
    square = 4 * config.head_dim * config.num_attention_heads * 2048**2 * layers
    assert attention == square
    last = sum(server._attention(i) for i in range(layers, 16))
    assert server.prefill_attention == square // 2 * 2049 // 2048 + last


def test_flops_of_a_token_are_two_per_weight() -> None:
    config = shape("332m", "fusedkv")
    model, ids = decoder(config).eval(), torch.zeros(1, 1, dtype=torch.long, device="meta")
    with as_on_cuda(), torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(ids)
    assert flops.get_total_flops() == Server(config).decode_products
    fusion = sum(count(fusion_shapes(config, i)) for i in range(16))
    norms = 16 * (2 * 1024 + 64) + 8 * 64 + 1024
    assert Server(config).decode_products == 2 * (count(all_shapes(config)) - fusion - norms)


@pytest.mark.parametrize("chunk", [4096, 1024])
@pytest.mark.parametrize("method", ["vanilla", "gqa", "fusedkv", "cla"])
def test_prefill_memory_is_that_of_the_decoder(method: str, chunk: int) -> None:
    """All at once, and in chunks."""
    config = shape("1.5b", method)
    ids = torch.zeros(1, chunk, dtype=torch.long, device="meta")
    model = decoder(config).eval()
    sizes = (config.plan, 1, 4096, config.num_key_value_heads, config.head_dim)
    cache = KVCache(*sizes, dtype=torch.bfloat16, device="meta")
    with as_on_cuda(), torch.no_grad(), torch.device("meta"), Live() as live:
        for _ in range(4096 // chunk):
            model(ids, cache=cache, logits_to_keep=1)
    assert live.peak == pytest.approx(Server(config, context=4096, chunk=chunk).prefill, rel=3e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"layout": Layout()}, "dp_shard of the layout must be at least 1, got 0"),
        ({"precision": "fp8"}, 'precision must be "bf16" or "fp32", got \'fp8\''),
        ({"checkpointing": "full"}, "checkpointing must be one of none, non_reentrant, reentrant"),
        ({"layout": Layout(dp_shard=1, cp=3)}, "context must be a multiple of 2 x cp = 6 chunks, got"),
        ({"layout": Layout(dp_shard=1, tp=3)}, "must be a multiple of tp"),
    ],
)
def test_a_job_that_cannot_be_is_an_error_with_its_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Job(**{"config": shape("332m", "fusedkv"), "layout": ONE, **change})


def test_decoders_without_formulas_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"interval 0\.\.1/2 of the KV heads must .* whole heads, got 1 KV heads"
    ):
        count(all_shapes(replace(shape("332m", "skipv1"), num_key_value_heads=1)))
    windows = shapes.load("332m").updated([("model.sliding_window", 64)])
    with pytest.raises(ValueError, match="full attention"):
        Job(shapes.shape(windows, "vanilla"), ONE)
    experts = shapes.load("332m").updated([("model.num_experts", 4)])
    with pytest.raises(ValueError, match="needs a dense decoder"):
        Server(shapes.shape(experts, "vanilla"))
