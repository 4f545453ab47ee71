"""Second moments of a model's keys, values and queries."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_folders import tiny_llama
from hf_tiny import LAYERS, tokens

from fusedkv_ext.conversion.second_moments import collect

G, D, H = 2, 8, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama()


def test_moments_are_those_of_the_cache(model):
    ids = tokens(3, 20)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    second_moments = collect(model, ids, batch_size=3)
    assert second_moments.tokens == 60
    for head in range(G):
        for i in range(LAYERS):
            for j in range(LAYERS):
                k, m = (cache.layers[x].keys[:, head] for x in (i, j))
                k, m = (x - x.mean(1, keepdim=True) for x in (k, m))
                expected = torch.einsum("btd,bte->de", k, m).double() / 60
                torch.testing.assert_close(
                    second_moments.covariance("key", head, i, j), expected, rtol=1e-4, atol=1e-5
                )
                v, w = (cache.layers[x].values[:, head] for x in (i, j))
                expected = torch.einsum("btd,bte->de", v, w).double() / 60
                found = second_moments.covariance("value", head, i, j)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_query_moments_sum_over_the_group_after_rope(model):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ids, seen = tokens(2, 12), {}
    attention = model.model.layers[1].self_attn

    def hook(_module, _args, kwargs):
        seen.update(kwargs)

    handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(ids)
        q = attention.q_proj(seen["hidden_states"]).unflatten(-1, (H, D)).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *seen["position_embeddings"])
    handle.remove()
    second_moments = collect(model, ids)
    for head in range(G):
        own = q[:, head * H // G : (head + 1) * H // G]
        expected = torch.einsum("bhtd,bhte->de", own, own).double() / 24
        torch.testing.assert_close(second_moments.query_metric(1, head), expected, rtol=1e-4, atol=1e-5)


def test_share_of_stream_counts_every_token_alike(model):
    ids, seen = tokens(2, 12), []
    layer = model.model.layers[2]
    hooks = [
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
        layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.append(out[0])),
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    stream, added = seen
    expected = (added.square().sum(-1) / stream.square().sum(-1)).mean().item()
    assert collect(model, ids).share_of_stream(2) == pytest.approx(expected, rel=1e-4)


def test_batches_add_up(model):
    ids = tokens(5, 16)
    whole, parts = collect(model, ids, batch_size=5), collect(model, ids, batch_size=2)
    for name in ("keys", "values", "queries", "shares"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-3)
    assert model.config._attn_implementation == "sdpa"  # as it was
