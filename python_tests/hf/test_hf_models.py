"""Models of transformers on any plan give one result, however they are run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import IMPLEMENTATIONS, LAYERS, Ops, close, left_padded, sizes, tiny_model, tokens
from tiny import PLANS, hybrid
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fusedkv_ext.layers.decoder import Decoder, DecoderConfig

EVERY_PLAN = sorted(PLANS)
FAMILIES = ("llama", "qwen3")
PADDING = [3, 0, 1]


def in_steps(model, ids, steps, **inputs):
    """Logits of a run in pieces of ``steps`` tokens over one cache."""
    cache, logits, first = DynamicCache(config=model.config), [], 0
    mask = inputs.get("attention_mask")
    for count in steps:
        now = slice(first, first + count)
        first = now.stop
        seen = {} if mask is None else {"attention_mask": mask[:, : now.stop]}
        positions = {"position_ids": inputs["position_ids"][:, now]} if "position_ids" in inputs else {}
        logits.append(model(ids[:, now], past_key_values=cache, **seen, **positions).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("plan", EVERY_PLAN)
@torch.no_grad()
def test_every_run_of_a_plan_gives_the_same_logits(plan: str) -> None:
    """All at once, in pieces, token by token, and left-padded, with each attention implementation."""
    for family in FAMILIES:
        model, ids = tiny_model(family, plan), tokens(3, 11)
        padded, mask = left_padded(ids, PADDING)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        alone = [model(padded[row : row + 1, count:]).logits[0] for row, count in enumerate(PADDING)]
        expected = model(ids, use_cache=False).logits
        for implementation in IMPLEMENTATIONS:
            model.set_attn_implementation(implementation)
            close(model(ids, use_cache=False).logits, expected)
            close(in_steps(model, ids, (5, 3, 1, 1, 1)), expected)
            close(in_steps(model, ids, [1] * 11), expected)
            batch = in_steps(model, padded, (6, 3, 1, 1), attention_mask=mask, position_ids=positions)
            for row, count in enumerate(PADDING):
                close(batch[row, count:], alone[row])


@pytest.mark.parametrize("plan", EVERY_PLAN)
@torch.no_grad()
def test_the_packages_own_decoder_is_the_same_model(plan: str) -> None:
    for family in FAMILIES:
        model = tiny_model(family, plan)
        common = sizes()
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        options = {name: value for name, value in common.items() if name not in names}
        decoder = Decoder(DecoderConfig(**options, plan=PLANS[plan], qk_norm=family == "qwen3"))
        decoder.load_state_dict(model.state_dict())
        ids = tokens(2, 9)
        close(model(ids).logits, decoder.eval()(ids))


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "cla", "skipv1", "resformer", "yoco"])
@torch.no_grad()
def test_sliding_windows_hide_the_same_tokens_everywhere(plan: str) -> None:
    windows = hybrid(plan)
    options = {"layer_types": list(windows["layer_types"]), "sliding_window": windows["sliding_window"]}
    try:
        model = tiny_model("qwen3", plan, use_sliding_window=True, **options)
    except ValueError as error:
        assert "needs transformers 5.23" in str(error) and plan == "cla"
        pytest.skip("before 5.23 the first layer with a window must store")
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    common = {name: value for name, value in sizes().items() if name not in names}
    decoder = Decoder(DecoderConfig(**common, **windows, plan=PLANS[plan]))
    decoder.load_state_dict(model.state_dict())
    ids = tokens(2, 12)
    expected = decoder.eval()(ids)
    assert not torch.allclose(expected, without_windows(decoder, common, plan)(ids), atol=1e-3)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        close(model(ids).logits, expected)
        close(in_steps(model, ids, (7, 1, 1, 1, 2)), expected)


def without_windows(decoder: Decoder, common: dict, plan: str) -> Decoder:
    other = Decoder(DecoderConfig(**common, plan=PLANS[plan]))
    other.load_state_dict(decoder.state_dict())
    return other.eval()


@pytest.mark.parametrize(
    ("family", "config", "plain"),
    [("llama", LlamaConfig, LlamaForCausalLM), ("qwen3", Qwen3Config, Qwen3ForCausalLM)],
)
@torch.no_grad()
def test_a_vanilla_plan_is_the_plain_model_and_fusedkv_serves_plain_models(family, config, plain) -> None:
    ours = tiny_model(family, "vanilla")
    model = plain(config(**sizes())).eval()
    model.load_state_dict(ours.state_dict())
    ids = tokens(3, 11)
    padded, mask = left_padded(ids, PADDING)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids).logits
    in_batch = model(padded, attention_mask=mask, position_ids=positions).logits
    close(ours(ids).logits, expected)
    model.set_attn_implementation("fusedkv")
    with Ops() as ops:
        close(in_steps(model, ids, (8, 1, 2)), expected)
        batch = in_steps(model, padded, (8, 1, 2), attention_mask=mask, position_ids=positions)
    for row, count in enumerate(PADDING):
        close(batch[row, count:], in_batch[row, count:])
    assert ops.calls["attn_with_kvcache"] > 3 * LAYERS


@pytest.mark.parametrize("plan", EVERY_PLAN)
@torch.no_grad()
def test_steps_of_few_rows_go_through_our_kernel_and_fuse_nothing(plan: str) -> None:
    model, ids = tiny_model("llama", plan), tokens(2, 40)
    cut = [len(PLANS[plan].segments(i, 4)) for i in range(LAYERS)]
    mixing = sum(
        i in part.sources and len(part.sources) > 1
        for i, layer in enumerate(PLANS[plan].layers)
        for part in (*layer.keys, *layer.values)
    )
    cache = DynamicCache(config=model.config)
    model(ids[:, :36], past_key_values=cache)
    for now in (slice(36, 37), slice(37, 40)):
        with Ops() as ops:
            model(ids[:, now], past_key_values=cache)
        assert ops.calls["attn_with_kvcache"] == sum(cut)
        assert ops.calls["fuse_kv_pair"] == 0
        assert ops.calls["fuse_kv"] <= 2 * mixing, "only layers that mix before they store fuse"
        assert mixing or not ops.calls["fuse_kv"]


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1"])
@torch.no_grad()
def test_padded_batches_decode_through_our_kernel_too(plan: str) -> None:
    model = tiny_model("qwen3", plan)
    ids, mask = left_padded(tokens(3, 12), PADDING)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :11], attention_mask=mask[:, :11], position_ids=positions[:, :11], past_key_values=cache)
    with Ops() as ops:
        model(ids[:, 11:], attention_mask=mask, position_ids=positions[:, 11:], past_key_values=cache)
    segments = sum(len(PLANS[plan].segments(i, 4)) for i in range(LAYERS))
    assert ops.calls["attn_with_kvcache"] == len(PADDING) * segments, "one call for each length"
    assert ops.calls["fuse_kv"] == ops.calls["fuse_kv_pair"] == 0


@torch.no_grad()
def test_a_mask_of_any_other_shape_is_obeyed() -> None:
    """A hole in the middle: not start..stop, so SDPA gets it."""
    model, ids = tiny_model("llama", "fusedkv"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 3:5] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("eager")
    close(model(ids, attention_mask=mask, use_cache=False).logits, expected)
    assert not torch.allclose(expected[0, 5:], model(ids).logits[0, 5:], atol=1e-3)


@torch.no_grad()
def test_masks_of_the_user_are_read_anew_when_they_change_and_may_broadcast() -> None:
    model, ids = tiny_model("llama", "fusedkv"), tokens(2, 9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    close(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask = mask.repeat(2, 1, 1, 1)
    close(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask[:, :, :, :3] = False  # in place: the same tensor says something else now
    positions = torch.arange(9)[None]
    found = model(ids, attention_mask=mask, position_ids=positions).logits[:, 3:]
    close(found, model(ids[:, 3:], position_ids=positions[:, 3:]).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("plan", ["fusedkv", "yoco++", "skipv1-yoco", "cla", "vanilla"])
@torch.no_grad()
def test_prefill_exits_early_and_changes_nothing(plan: str, implementation: str) -> None:
    model = tiny_model("qwen3", plan, implementation)
    rows: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    ids, mask = left_padded(tokens(3, 40), PADDING)
    full = model(ids, attention_mask=mask).logits
    early = PLANS[plan].prefill_layers
    for keep in (1, 3):
        for attention_mask in (mask, None):
            rows.clear()
            wanted = model(ids, attention_mask=attention_mask).logits[:, -keep:]
            assert rows == [40] * LAYERS
            rows.clear()
            close(model(ids, attention_mask=attention_mask, logits_to_keep=keep).logits, wanted)
            assert rows == [40] * early + [keep] * (LAYERS - early)
    for option in ({"output_hidden_states": True}, {"logits_to_keep": torch.tensor([39])}):
        rows.clear()
        model(ids, attention_mask=mask, **{"logits_to_keep": 1, **option})
        assert rows == [40] * LAYERS
    close(model(ids, attention_mask=mask, logits_to_keep=torch.tensor([39])).logits, full[:, -1:])


@torch.no_grad()
def test_hidden_states_are_recorded_and_eager_gives_the_scores() -> None:
    model, ids = tiny_model("llama", "fusedkv", "eager"), tokens(2, 7)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == LAYERS + 1
    assert [tuple(x.shape) for x in out.attentions] == [(2, 8, 7, 7)] * LAYERS
    torch.testing.assert_close(out.attentions[-1].sum(-1), torch.ones(2, 8, 7))


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1", "resformer", "cla"])
@torch.no_grad()
def test_bf16_rounds_no_more_through_our_kernel_than_through_sdpa(plan: str) -> None:
    model, ids = tiny_model("qwen3", plan).bfloat16(), tokens(4, 24)
    exact = tiny_model("qwen3", plan)
    exact.load_state_dict(model.state_dict())
    expected = exact(ids).logits
    errors = {}
    for implementation in ("sdpa", "fusedkv"):
        model.set_attn_implementation(implementation)
        out = in_steps(model, ids, (20, 1, 3)).float()
        errors[implementation] = (out - expected).square().mean().sqrt().item()
    assert 0 < errors["fusedkv"] <= 1.25 * errors["sdpa"]
