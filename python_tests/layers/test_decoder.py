"""Decoder: names, loss, and that a cache, pieces and the early exit change nothing but rounding."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import CUT, LAYERS, NAMED, PLANS, hybrid, tiny_config, tiny_decoder
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fusedkv_ext.errors import CacheFullError
from fusedkv_ext.layers.decoder import Decoder, DecoderConfig
from fusedkv_ext.ops.rope import RotaryEmbedding
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.testing import assert_near

ROUNDINGS = 64  # two paths through four layers differ by a few more roundings than one operation
HYBRID = ("full_attention", "sliding_attention", "full_attention", "sliding_attention")
VARIANTS = {
    "plain": {},
    "some windows, interleaved": dict(rope_interleaved=True),  # which, depends on the plan
    "one head, windows": dict(
        num_key_value_heads=1, sliding_window=5, qk_norm=False, attention_bias=True, tie_word_embeddings=True
    ),
}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


# A single KV head cannot be cut into shares, as some of the plans want.
CASES = [
    (plan, variant)
    for plan in PLANS
    for variant in VARIANTS
    if plan not in CUT or variant != "one head, windows"
]


def variant_of(plan: str, variant: str) -> Decoder:
    windows = hybrid(plan) if variant.startswith("some windows") else {}
    return tiny_decoder(plan, **VARIANTS[variant], **windows)


def some_ids(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape)


def test_names_are_those_of_qwen3() -> None:
    names = set(tiny_decoder("fusedkv").state_dict())
    common = {"input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    common |= {"self_attn.q_proj", "self_attn.o_proj", "self_attn.q_norm"}
    storing = common | {"self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm"}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(LAYERS):
        expected |= {f"model.layers.{i}.{name}.weight" for name in (storing if i < 2 else common)}
        if i >= 2:
            fusion = ("key_0", "key_1", "value_0", "value_1")
            expected |= {f"model.layers.{i}.self_attn.kv_fusion.{name}" for name in fusion}
    assert names == expected


@pytest.mark.parametrize("plan", PLANS)
def test_loss_is_the_shifted_cross_entropy_and_trains_everything(plan: str) -> None:
    model, ids = tiny_decoder(plan), some_ids(2, 9)
    logits, loss = model(ids, labels=ids)
    assert logits.shape == (2, 9, 61)
    by_hand = [F.log_softmax(logits[b, t], -1)[ids[b, t + 1]] for b in range(2) for t in range(8)]
    torch.testing.assert_close(loss, -torch.stack(by_hand).mean())
    loss.backward()
    untouched = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not untouched


def test_labels_of_minus_100_do_not_count() -> None:
    model, ids = tiny_decoder("yoco"), some_ids(1, 8)
    labels = ids.clone()
    labels[:, 5:] = -100
    torch.testing.assert_close(model(ids, labels)[1], model(ids[:, :5], ids[:, :5])[1])


def test_loss_of_a_bf16_model_is_fp32() -> None:
    model, ids = tiny_decoder("fusedkv").bfloat16(), some_ids(2, 9)
    logits, loss = model(ids, labels=ids)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32


@pytest.mark.parametrize(("plan", "variant"), CASES)
def test_early_exit_is_exact(plan: str, variant: str) -> None:
    model, ids = variant_of(plan, variant), some_ids(2, 13)
    with torch.no_grad():
        full = model(ids)
        for keep in (1, 3, 13, 40):
            assert_near(model(ids, logits_to_keep=keep), full[:, -keep:], ROUNDINGS)
            cache = model.make_cache(2, 16)
            assert_near(model(ids, cache=cache, logits_to_keep=keep), full[:, -keep:], ROUNDINGS)
            after = model(ids[:, :1], cache=cache)  # and the cache is complete
        whole = model.make_cache(2, 16)
        model(ids, cache=whole)
        assert_near(after, model(ids[:, :1], cache=whole), ROUNDINGS)
        exact = model.double()
        torch.testing.assert_close(exact(ids, logits_to_keep=2), exact(ids)[:, -2:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", NAMED)
def test_early_exit_runs_readers_on_the_wanted_rows_alone(plan: str) -> None:
    model, ids = tiny_decoder(plan), some_ids(1, 12)
    rows: dict[int, int] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _m, args, _out, i=i: rows.__setitem__(i, args[0].shape[1]))
    exit_layer = PLANS[plan].prefill_layers - 1
    for keep, expected in ((2, 2), (0, 12)):
        for cache in (None, model.make_cache(1, 12)):
            with torch.no_grad():
                model(ids, cache=cache, logits_to_keep=keep)
            assert rows == {i: 12 if i < exit_layer else expected for i in range(LAYERS)}


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("plan", "variant"), CASES)
def test_cached_in_pieces_and_left_padded_are_the_full_pass(
    plan: str, variant: str, page_size: int | None
) -> None:
    model = variant_of(plan, variant)
    rows = [some_ids(n + 6) for n in (9, 1, 5)]
    with torch.no_grad():
        full = [model(row[None])[0] for row in rows]
        # Prompts of 9, 1 and 5 tokens padded on the left, then two tokens at a time, then one by one.
        prompts = torch.stack([F.pad(row[:-6], (9 - len(row[:-6]), 0), value=7) for row in rows])
        cache = model.make_cache(3, 16, page_size=page_size)
        first = model(prompts, cache=cache, lengths=[9, 1, 5])
        rest = torch.stack([row[-6:] for row in rows])
        steps = [model(piece, cache=cache) for piece in rest.split([2, 2, 1, 1], dim=1)]
    cached = torch.cat((first, *steps), dim=1)
    for b, logits in enumerate(full):
        assert_near(cached[b, -len(logits) :], logits, ROUNDINGS)


def test_a_crop_takes_tokens_back() -> None:
    model, ids = tiny_decoder("fusedkv"), some_ids(2, 10)
    cache = model.make_cache(2, 10, page_size=4)
    with torch.no_grad():
        whole = model(ids, cache=cache)
        cache.crop(6)
        assert_near(model(ids[:, 6:], cache=cache), whole[:, 6:], ROUNDINGS)


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
def test_beams_go_on_after_a_reorder(page_size: int | None) -> None:
    model, ids = tiny_decoder("fusedkv"), some_ids(3, 6)
    cache, index, new = model.make_cache(3, 8, page_size=page_size), torch.tensor([2, 0, 2]), some_ids(3, 2)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.reorder(index)
        out = torch.cat([model(new[:, i : i + 1], cache=cache) for i in range(2)], dim=1)
        assert_near(out, model(torch.cat((ids[index], new), dim=1))[:, -2:], ROUNDINGS)


def test_a_freed_place_takes_a_new_prompt() -> None:
    model, ids, prompt = tiny_decoder("fusedkv"), some_ids(2, 5), some_ids(3)
    cache = model.make_cache(2, 12, page_size=4)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.free(0)
        step = torch.stack((prompt, some_ids(3)))
        out = model(step, cache=cache)
        assert_near(out[:1], model(prompt[None]), ROUNDINGS)
        assert_near(out[1:], model(torch.cat((ids[1:], step[1:]), dim=1))[:, -3:], ROUNDINGS)


def test_cache_follows_the_model_and_autocast() -> None:
    model = tiny_decoder("fusedkv")
    assert model.make_cache(1, 8).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = model.make_cache(2, 8)
        assert cache.dtype == torch.bfloat16
        ids = some_ids(2, 8)
        logits = torch.cat((model(ids[:, :7], cache=cache), model(ids[:, 7:], cache=cache)), dim=1)
        torch.testing.assert_close(logits, model(ids), rtol=0.05, atol=0.1)


def test_head_is_tied_when_asked() -> None:
    model = tiny_decoder("yoco", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(name == "lm_head.weight" for name, _ in model.named_parameters()) == 0


def test_initial_values() -> None:
    config = tiny_config("fusedkv", hidden_size=64, initializer_range=0.1, attention_bias=True)
    model = Decoder(config)
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert not model.model.layers[0].self_attn.q_proj.bias.any()
    assert torch.equal(model.model.layers[3].self_attn.kv_fusion.key_1, torch.ones(2, 8))
    same = Decoder(config)
    for m in (model, same):
        m.reset_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_fusedkv_starts_as_its_lite_twin() -> None:
    models = [Decoder(tiny_config(plan)) for plan in ("fusedkv", "fusedkv-lite")]
    models[0].load_state_dict(models[1].state_dict(), strict=False)
    ids = some_ids(2, 8)
    assert_near(models[0](ids).detach(), models[1](ids).detach(), ROUNDINGS)


@pytest.mark.parametrize("plan", [*NAMED, "skipv1", "yoco++"])
def test_config_survives_json(plan: str) -> None:
    experts = dict(num_experts=4, decoder_sparse_step=2, mlp_only_layers=[1])
    config = tiny_config(
        PLANS[plan], **hybrid(plan), **experts, rope_scaling={"type": "linear", "factor": 2.0}
    )
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_fills_in_what_is_left_open() -> None:
    config = tiny_config("cla", head_dim=None, sliding_window=8)
    assert config.head_dim == 8 and config.plan == CachePlan.named("cla", LAYERS)
    assert tiny_config("cla:factor=4").plan == CachePlan.named("cla", LAYERS, factor=4)
    assert config.layer_types == ("sliding_attention",) * LAYERS
    assert tiny_config("cla").layer_types == ("full_attention",) * LAYERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive int, got 0"),
        ({"hidden_size": 30.0}, "hidden_size must be a positive int, got 30.0"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads must be a positive int"),
        ({"hidden_size": 30, "head_dim": None}, "got 30; or give head_dim"),
        ({"num_hidden_layers": 3, "plan": PLANS["yoco"]}, "plan must have num_hidden_layers=3 layers, got 4"),
        ({"plan": "flash"}, "plan name must be one of .*, got 'flash'"),
        ({"plan": 3}, "plan must be a CachePlan or the name of one, got int"),
        ({"layer_types": ("full_attention",)}, "layer_types must name .* for each of 4 layers"),
        ({"layer_types": ("local",) * 4}, "layer_types must name"),
        ({"layer_types": HYBRID}, "sliding_window must be given"),
        ({"num_experts": -1}, r"num_experts must be an int, 0 \(dense\) or more, got -1"),
        ({"num_experts": True}, "num_experts must be an int"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok must be .* num_experts=4, got 5"),
        ({"num_experts": 4, "num_experts_per_tok": 0}, "num_experts_per_tok must be"),
        (
            {"num_experts": 4, "moe_intermediate_size": 0},
            "moe_intermediate_size must be a positive int, got 0",
        ),
        ({"num_experts": 4, "decoder_sparse_step": 0}, "decoder_sparse_step must be a positive int, got 0"),
        ({"num_experts": 4, "router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be .*, got -1.0"),
        ({"num_experts": 4, "router_aux_loss_coef": "1"}, "router_aux_loss_coef must be .*, got '1'"),
        (
            {"num_experts": 4, "mlp_only_layers": (4,)},
            r"mlp_only_layers must be layers, from 0 to 3, got \(4,\)",
        ),
        (
            {"num_experts": 4, "decoder_sparse_step": 5},
            "a layer must have experts with num_experts=4, got none with decoder_sparse_step=5",
        ),
    ],
)
def test_configs_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**({"plan": "vanilla"} | changes))


SLIDING_FIRST = ("sliding_attention", *["full_attention"] * (LAYERS - 1))


@pytest.mark.parametrize(
    ("plan", "types", "reader", "source"),
    [
        ("fusedkv", HYBRID, 2, 1),
        ("fusedkv", SLIDING_FIRST, 2, 0),
        ("fusedkv-lite", SLIDING_FIRST, 2, 0),
        ("yoco", HYBRID, 2, 1),
        ("cla", SLIDING_FIRST, 1, 0),
        ("skipv1", SLIDING_FIRST, 1, 0),  # half of the value heads are enough
        ("yoco++", HYBRID, 2, 1),
    ],
)
def test_a_full_layer_cannot_read_what_a_window_keeps(
    plan: str, types: tuple[str, ...], reader: int, source: int
) -> None:
    """Where a sliding layer's cache is its window, older tokens are gone when a full layer wants them."""
    message = (
        f"layer {reader} has full attention but reads the cache of layer {source}, which keeps a sliding "
        rf"window \(plan '{re.escape(plan)}'\); make layer {source} full_attention or layer {reader} "
        "sliding_attention"
    )
    with pytest.raises(ValueError, match=message):
        tiny_config(plan, sliding_window=4, layer_types=types)
    source_is_full = (*types[:source], "full_attention", *types[source + 1 :])
    readers_slide = (*types[:reader], *["sliding_attention"] * (LAYERS - reader))
    for mended in (source_is_full, readers_slide):
        assert tiny_config(plan, sliding_window=4, layer_types=mended).layer_types == mended


@pytest.mark.parametrize("plan", ["resformer", "yoco++"])
def test_a_full_layer_may_mix_with_a_sliding_one_before_it_stores(plan: str) -> None:
    """It takes its source's new tokens, which no window has dropped, and never looks into its cache."""
    model = tiny_decoder(plan, sliding_window=4, layer_types=SLIDING_FIRST)
    ids = some_ids(1, 12)
    with torch.no_grad():
        full, cache = model(ids), model.make_cache(1, 12)
        steps = []
        for t in range(12):
            steps.append(model(ids[:, t : t + 1], cache=cache))
            if t >= 3:  # what the next token's window of four does not reach
                cache.keys(0)[:, : t - 2], cache.values(0)[:, : t - 2] = torch.nan, torch.nan
    assert_near(torch.cat(steps, dim=1), full, ROUNDINGS)


def test_configs_from_elsewhere() -> None:
    data = tiny_config("yoco").to_dict()
    with pytest.raises(ValueError, match="must have format 1 or older, got 9; upgrade"):
        DecoderConfig.from_dict(data | {"format": 9})
    with pytest.raises(ValueError, match="unknown fields, got mla_rank"):
        DecoderConfig.from_dict(data | {"mla_rank": 3})
    with pytest.raises(ValueError, match="config is incomplete.*vocab_size"):
        DecoderConfig.from_dict({key: data[key] for key in data if key != "vocab_size"})
    with pytest.raises(ValueError, match="must be that of a fusedkv_ext decoder"):
        DecoderConfig.from_dict({"model_type": "qwen3"})
    newer = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    newer += ("router_aux_loss_coef", "decoder_sparse_step", "mlp_only_layers")
    older = {key: data[key] for key in data if key not in newer}
    assert len(older) == len(data) - len(newer) and DecoderConfig.from_dict(older) == tiny_config("yoco")


def test_calls_that_cannot_be() -> None:
    model, ids = tiny_decoder("fusedkv"), some_ids(2, 5)
    cache = model.make_cache(2, 8)
    for call, message in (
        (lambda: model(ids[0]), r"ids must be \(B, S\) integers"),
        (lambda: model(ids.float()), "ids must be"),
        (lambda: model(ids, labels=ids[:, 1:]), "labels must have the shape of ids"),
        (lambda: model(ids[:, :1], labels=ids[:, :1]), "at least two positions"),
        (lambda: model(ids, labels=ids, logits_to_keep=1), "logits_to_keep must be 0 with labels, got 1"),
        (lambda: model(ids, logits_to_keep=-1), "logits_to_keep must be"),
        (lambda: model(ids, lengths=[5, 5]), "lengths must be None without a cache"),
        (lambda: model(ids, cache=cache), "cache is not differentiable"),
        (lambda: model(some_ids(1, 65)), "at most max_position_embeddings=64 tokens, got 65"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with torch.no_grad():
        for call, message in (
            (lambda: model(ids[:1], cache=cache), "a row for each of the cache's 2 sequences, got 1"),
            (lambda: model(ids, cache=cache, lengths=[4, 3]), "the longest must be S=5"),
            (lambda: model(ids, cache=tiny_decoder("yoco").make_cache(2, 8)), "cache must be for plan"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        assert cache.lengths == (0, 0)
        model(ids, cache=cache)
        with pytest.raises(CacheFullError, match=r"max_len=8 tokens, got \d+ \+ \d+ for sequence 0"):
            model(ids, cache=cache)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.vocab_size = 5


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv-lite", "fusedkv"])
def test_a_decode_step_keeps_no_memory(plan: str) -> None:
    """After warm-up every byte that a step allocates is free again when the next one has run."""
    model = tiny_decoder(plan)
    cache = model.make_cache(2, 40)
    ids = torch.randint(1, 61, (2, 1))

    def kept(steps: int) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for _ in range(steps):
                model(ids, cache=cache, logits_to_keep=1)
        return sum(event.self_cpu_memory_usage for event in profiler.key_averages())

    with torch.inference_mode():
        kept(4)
        assert kept(8) == kept(16) == 0
        held = []
        # The measure sees what is kept: a step's logits.
        model.register_forward_hook(lambda module, args, out: held.append(out))
        assert kept(3) >= sum(out.nbytes for out in held) > 0


def test_rotary_tables_are_looked_up_once_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder("fusedkv")
    made, tables = [], RotaryEmbedding.tables
    monkeypatch.setattr(RotaryEmbedding, "tables", lambda *args: made.append(args) or tables(*args))
    cache = model.make_cache(1, 8)
    with torch.inference_mode():
        for _ in range(4):
            model(torch.randint(1, 61, (1, 1)), cache=cache)
    assert len(made) == 1 and made[0][1] == 8
