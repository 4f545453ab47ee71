"""No rows, no tokens, no sequences: a result with a graph and gradients of zeros, as torch's SDPA has."""

from __future__ import annotations

import pytest
import torch
from cases import Case, dense_inputs
from tiny import tiny_decoder
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import reference

EMPTY = {"S=0": (2, 0, 5), "T=0": (2, 3, 0), "S=T=0": (2, 0, 0), "B=0": (0, 3, 5)}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal_window": {"causal": True, "window_size": (2, -1)},
    "lse": {"return_lse": True},
    "recompute": {"recompute_fusion": True, "causal": True},
}
CPU = torch.device("cpu")
LATENT = {"head_dim": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


def leaves_of(B: int, S: int, T: int, weights: str, D: int = 16) -> tuple[list[Tensor], tuple]:
    q, keys, values, a, b = dense_inputs(Case("empty", B=B, S=S, T=T, D=D, m_v=1, weights=weights), CPU)
    leaves = [x.requires_grad_() for x in (q, *keys, *values, a, b) if x is not None]
    return leaves, (q, keys, values, a, b)


def assert_zero_gradients(out: Tensor, leaves: list[Tensor]) -> None:
    assert out.grad_fn is not None and not out.any()
    for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("weights", ["none", "channel", "head"])
@pytest.mark.parametrize("D", [16, 12])
@pytest.mark.parametrize("size", EMPTY.values(), ids=EMPTY)
def test_attention_of_nothing_has_gradients_of_zeros(
    size: tuple[int, int, int], D: int, weights: str, options: dict[str, object]
) -> None:
    leaves, args = leaves_of(*size, weights, D)
    out = fkv.fused_kv_attn_func(*args, **options)
    own = {name: value for name, value in options.items() if name != "recompute_fusion"}
    expected = reference.fused_kv_attn_func(*args, **own)
    if "return_lse" in options:
        (out, lse), (expected, expected_lse) = out, expected
        assert torch.equal(lse, expected_lse) and lse.requires_grad
    assert torch.equal(out, expected)
    assert_zero_gradients(out, leaves)
    with torch.no_grad():
        plain = fkv.fused_kv_attn_func(*args, **options)
    assert torch.equal(plain[0] if isinstance(plain, tuple) else plain, expected)


@pytest.mark.parametrize("size", ["S=0", "S=T=0", "B=0"])
def test_documents_of_nothing(size: str) -> None:
    B, S, T = EMPTY[size]
    leaves, args = leaves_of(B, S, T, "channel")
    documents = torch.zeros(B, T, dtype=torch.int64)
    out = fkv.fused_kv_attn_func(*args, causal=True, document_ids=documents)
    assert out.shape == (B, S, 4, 16)
    assert_zero_gradients(out, leaves)


def test_rows_before_the_first_token_have_gradients_of_zeros() -> None:
    """All rows are blind although there are tokens: S > T, and the window ends before them."""
    leaves, args = leaves_of(2, 9, 3, "channel")
    out = fkv.fused_kv_attn_func(*args, causal=True)
    assert not out[:, :6].any() and out[:, 6:].any()
    grads = torch.autograd.grad(out[:, :6].sum(), leaves)
    assert not any(grad.any() for grad in grads)


def test_what_is_not_there_cannot_be_nan() -> None:
    q, none = torch.full((2, 3, 4, 16), float("nan"), requires_grad=True), torch.zeros(2, 0, 2, 16)
    out = fkv.fused_kv_attn_func(q, none, none)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert not out.any() and not grad.any()


@pytest.mark.parametrize("shape", [(2, 0, 2, 16), (0, 5, 2, 16), (2, 0, 3, 12)], ids=str)
def test_fuse_kv_of_nothing(shape: tuple[int, ...]) -> None:
    sources = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    weights = torch.randn(2, *shape[2:], requires_grad=True)
    out = fkv.fuse_kv(sources, weights)
    assert out.shape == shape
    assert_zero_gradients(out, [*sources, weights])
    grads, of_weights = fkv.fuse_kv_backward(out.detach(), sources, weights)
    assert all(x.shape == shape for x in grads) and not of_weights.any()


@pytest.mark.parametrize("size", [(2, 0), (0, 5)], ids=["S=0", "B=0"])
@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "skipv1", "yoco++"])
def test_attention_modules_of_nothing(plan: str, size: tuple[int, int]) -> None:
    plan = fkv.CachePlan.named(plan, 4)
    rope = fkv.RotaryEmbedding(8)
    stack = [fkv.FusedKVAttention(plan, i, 16, 4, 2, 8, rope=rope) for i in range(4)]
    x = torch.zeros(*size, 16, requires_grad=True)
    kvs: list[fkv.KV] = []
    h = x
    for layer in stack:
        out, kv = layer(h, [kvs[j] for j in layer.source_layers])
        kvs.append(kv)
        h = h + out
    assert h.shape == x.shape
    parameters = [p for layer in stack for p in layer.parameters()]
    for grad in torch.autograd.grad(h.sum(), [x, *parameters], allow_unused=True):
        assert grad is None or not grad.any()


def test_a_decoder_of_no_sequences() -> None:
    model, ids = tiny_decoder("fusedkv"), torch.zeros(0, 5, dtype=torch.int64)
    logits, loss = model(ids, labels=ids)
    assert logits.shape == (0, 5, 61) and loss == 0
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("sizes", [{}, LATENT], ids=["heads", "latent"])
def test_a_decoder_of_no_tokens(sizes: dict[str, int]) -> None:
    model, none = tiny_decoder("fusedkv", **sizes), torch.zeros(2, 0, dtype=torch.int64)
    logits = model(none)
    assert logits.shape == (2, 0, 61)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    ids = torch.randint(61, (2, 5))
    with torch.no_grad():
        cache = model.make_cache(2, 8)
        assert model(none, cache=cache).shape == (2, 0, 61)
        model(ids[:, :4], cache=cache)
        assert model(none, cache=cache).shape == (2, 0, 61) and cache.lengths == (4, 4)
        torch.testing.assert_close(model(ids[:, 4:], cache=cache), model(ids)[:, 4:])
