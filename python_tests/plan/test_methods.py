"""Every method of the registry with its variants: cache, cost, gradients and early exit.

The cache changes only rounding and has the size of the formula. Gradients reach every source. Prefill exits
early if the upper layers store nothing.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from tiny import LAYERS, hybrid, tiny_decoder

from fusedkv_ext.lab.entries import Entry, every
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.plan import METHODS, CachePlan
from fusedkv_ext.testing import assert_near

ROUNDINGS = 128  # two paths through four layers differ by a few more roundings than one operation
HEADS = 8
COMBINATIONS = {
    "grouped": dict(num_key_value_heads=4),
    "windows": dict(num_key_value_heads=4, windows=True),
    "experts": dict(num_key_value_heads=4, num_experts=4),
    "latent": dict(latent=True),
    "latent, experts, windows": dict(latent=True, num_experts=4, windows=True),
}
LATENT = dict(kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=None)
CASES = [
    (entry, name)
    for entry in every()
    for name in COMBINATIONS
    # All heads of latent attention share one rotated key: keys cannot be cut by heads (test_mla.py).
    if not (name.startswith("latent") and entry.method == "skipkv1")
]
METHOD_CASES = pytest.mark.parametrize(
    ("entry", "combination"), CASES, ids=[f"{entry.label}-{name}" for entry, name in CASES]
)


def plan_of(entry: Entry) -> CachePlan:
    return CachePlan.named(entry.method, LAYERS, **dict(entry.options))


def model_of(entry: Entry, combination: str) -> Decoder:
    changes = dict(COMBINATIONS[combination])
    plan = plan_of(entry)
    if changes.pop("windows", False):
        changes |= hybrid(plan)
    if changes.pop("latent", False):
        changes |= LATENT
    else:
        changes["num_key_value_heads"] = METHODS[entry.method].kv_heads(changes["num_key_value_heads"])
    return tiny_decoder(plan, **({"num_attention_heads": HEADS, "head_dim": 8} | changes))


@METHOD_CASES
def test_cached_is_uncached_is_token_by_token(entry: Entry, combination: str) -> None:
    model, ids = model_of(entry, combination).eval(), torch.randint(0, 61, (2, 11))
    with torch.no_grad():
        full = model(ids)
        cache, single = model.make_cache(2, 11), model.make_cache(2, 11, page_size=4)
        pieces = [model(piece, cache=cache) for piece in ids.split([6, 3, 2], dim=1)]
        tokens = [model(ids[:, t : t + 1], cache=single) for t in range(11)]
    assert_near(torch.cat(pieces, dim=1), full, ROUNDINGS)
    assert_near(torch.cat(tokens, dim=1), full, ROUNDINGS)


@METHOD_CASES
def test_cache_takes_the_bytes_of_the_formula(entry: Entry, combination: str) -> None:
    model = model_of(entry, combination).bfloat16()
    config, plan = model.config, model.plan
    if config.kv_lora_rank is None:
        wanted = plan.bytes_per_token(config.num_key_value_heads, config.head_dim, torch.bfloat16)
        heads = Fraction(config.num_key_value_heads)
        assert wanted == plan.cache_ratio * 2 * LAYERS * heads * config.head_dim * 2
    else:
        wanted = plan.latent_bytes_per_token(config.kv_lora_rank, config.qk_rope_head_dim, torch.bfloat16)
    for batch, length, page_size in ((1, 16, None), (3, 32, 8)):
        assert model.make_cache(batch, length, page_size=page_size).nbytes == batch * length * wanted


@METHOD_CASES
def test_gradients_reach_every_parameter_and_every_source(entry: Entry, combination: str) -> None:
    model, ids = model_of(entry, combination), torch.randint(0, 61, (4, 24))
    model(ids, labels=ids)[1].backward()
    untouched = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert not untouched
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {
        f"model.layers.{i}.self_attn.kv_fusion.{side}_{j}"
        for i, layer in enumerate(model.plan.layers)
        for side, segments in (("key", layer.keys), ("value", layer.values))
        for segment in segments
        if segment.fusion is not None and not segment.fusion.learnable
        for j in range(len(segment.sources))
    }


@METHOD_CASES
def test_a_prompt_ends_early_where_the_top_layers_only_read_and_that_is_exact(
    entry: Entry, combination: str
) -> None:
    model, ids = model_of(entry, combination).double().eval(), torch.randint(0, 61, (1, 9))
    rows: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, given, _out: rows.append(given[0].shape[1]))
    with torch.no_grad():
        last = model(ids, logits_to_keep=1)
        ran = list(rows)
        torch.testing.assert_close(last, model(ids)[:, -1:], rtol=1e-11, atol=1e-11)
    stored = max(model.plan.storage_layers)
    assert ran == [9] * stored + [1] * (LAYERS - stored)
