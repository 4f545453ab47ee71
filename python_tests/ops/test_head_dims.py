"""Head dims that the native kernels do not take: no multiple of 8, below 8, above 256. All operations do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import Case, append, cache_inputs, dense_inputs, named, random_tensor
from tiny import tiny_decoder
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import native, reference
from fusedkv_ext.ops.dispatch import native_head_dim
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_same_bits

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
HEAD_DIMS = [1, 4, 12, 100, 264, 320]
RAGGED = {"lengths": (37, 20), "T": 37}

DENSE_CASES = [
    Case("D1", D=1, S=37),
    Case("D4_few_rows", D=4, S=2),
    Case("D12_windows", D=12, S=37, window=(5, 3), causal=False),
    Case("D100_bfloat16", D=100, S=37, dtype=BF16, m_k=3),
    Case("D264", D=264, S=9, G=4),
    Case("D320_float16_one_source", D=320, S=9, G=1, m_k=1, m_v=1, weights="none", dtype=FP16),
    Case("odd_D_float64", D=7, S=37, dtype=FP64),
    Case("odd_values", D=16, Dv=12, S=5),
    Case("odd_keys_wide_values", D=20, Dv=264, S=5, weights="head"),
    Case("sliced", D=12, S=5, layout="sliced"),
    Case("transposed", D=12, S=5, layout="transposed"),
]

CACHED_CASES = [
    Case("D1", D=1, S=1),
    Case("D4_ragged", D=4, S=2, **RAGGED),
    Case("D12_paged", D=12, S=1, page_size=7, **RAGGED),
    Case("D12_paged_many_rows", D=12, S=24, page_size=7, **RAGGED),
    Case("D12_one_head_paged", D=12, S=1, G=1, page_size=7, **RAGGED),
    Case("D100_bfloat16", D=100, S=1, dtype=BF16, m_k=3, **RAGGED),
    Case("D100_float16_paged_window", D=100, S=3, dtype=FP16, window=(6, -1), page_size=4, **RAGGED),
    Case("D264_window", D=264, S=2, window=(9, 0), **RAGGED),
    Case("D320_one_source", D=320, S=1, m_k=1, m_v=1, weights="none", **RAGGED),
    Case("D320_bfloat16_paged", D=320, S=4, dtype=BF16, page_size=16, **RAGGED),
    Case("not_causal", D=12, S=3, causal=False, **RAGGED),
    Case("odd_values", D=16, Dv=12, S=2, **RAGGED),
    Case("odd_keys", D=12, Dv=16, S=2, **RAGGED),
    Case("empty_and_short_sequences", D=12, S=4, T=9, B=3, lengths=(9, 0, 2)),
    Case("empty_and_short_sequences_paged", D=12, S=4, T=9, B=3, lengths=(9, 0, 2), page_size=2),
    Case("all_empty", D=12, S=2, T=5, lengths=(0, 0)),
    Case("head_major", D=20, S=1, layout="transposed"),
]


def test_the_rule() -> None:
    assert all(native_head_dim(x) for x in (8, 16, 200, 256)) and native_head_dim(64, 128)
    assert not any(native_head_dim(x) for x in (-8, 0, 1, 4, 12, 100, 257, 264, 512))
    assert not native_head_dim(64, 100) and not native_head_dim(100, 64)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP64], ids=str)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_fuse_kv(D: int, dtype: torch.dtype, heads: int, device: torch.device) -> None:
    for layout in ("contiguous", "sliced", "transposed"):
        sources = [random_tensor((2, 5, heads, D), dtype, layout).to(device) for _ in range(3)]
        weights = torch.randn(3, heads, D, device=device)
        out = assert_matches_oracle(fkv.fuse_kv, reference.fuse_kv, sources, weights)
        assert out.shape == (2, 5, heads, D) and out.stride(3) == 1


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_fuse_kv_at_every_level(D: int, level: str) -> None:
    sources = [random_tensor((2, 5, 3, D), BF16, "sliced") for _ in range(3)]
    assert_matches_oracle(fkv.fuse_kv, reference.fuse_kv, sources, torch.randn(3, 3, D))


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("D", [1, 4, 12, 100, 264])
def test_gradients_of_fuse_kv(D: int, heads: int, device: torch.device) -> None:
    sources = [torch.randn(2, 5, heads, D, device=device).requires_grad_() for _ in range(2)]
    weights = torch.randn(2, heads, 1, device=device).requires_grad_()
    grad = torch.randn(2, 5, heads, D, device=device)
    got = torch.autograd.grad(fkv.fuse_kv(sources, weights), [*sources, weights], grad)
    same = torch.autograd.grad(reference.fuse_kv(sources, weights), [*sources, weights], grad)
    wide = [x.detach().double().requires_grad_() for x in (*sources, weights)]
    exact = torch.autograd.grad(reference.fuse_kv(wide[:2], wide[2]), wide, grad.double())
    assert_close(got, exact, same, terms=10)

    grads, of_weights = fkv.fuse_kv_backward(grad, sources, weights)
    assert_same_bits((*grads, of_weights), got)
    buffers = [torch.randn(2, 5, heads, D, device=device) for _ in range(2)]
    expected = [x.double() + y for x, y in zip(buffers, exact, strict=False)]
    rounded = [x + y for x, y in zip(buffers, same, strict=False)]
    results, none = fkv.fuse_kv_backward(grad, sources, weights, grad_sources=buffers, needs_weights=False)
    assert none is None and all(x is y for x, y in zip(results, buffers, strict=True))
    assert_close(tuple(buffers), tuple(expected), tuple(rounded))


def test_fuse_kv_passes_gradcheck_twice() -> None:
    sources = [torch.randn(1, 3, 2, 5, dtype=FP64, requires_grad=True) for _ in range(2)]
    weights = torch.randn(2, 2, 5, dtype=FP64, requires_grad=True)

    def fuse(weights: Tensor, *sources: Tensor) -> Tensor:
        return fkv.fuse_kv(sources, weights)

    assert torch.autograd.gradcheck(fuse, (weights, *sources))
    assert torch.autograd.gradgradcheck(fuse, (weights, *sources))


def test_buffers_for_gradients_have_to_fit() -> None:
    sources, grad = [torch.randn(1, 4, 2, 5)] * 2, torch.randn(1, 4, 2, 5)
    weights = torch.ones(2, 1, 1)
    for buffer in (torch.zeros(1, 4, 2, 4), torch.zeros(1, 2, 4, 5).transpose(1, 2)):
        with pytest.raises(
            ValueError, match=r"grad_sources\[1\] must be a contiguous \(1, 4, 2, 5\), got shape"
        ):
            fkv.fuse_kv_backward(grad, sources, weights, grad_sources=[torch.zeros_like(grad), buffer])
    with pytest.raises(ValueError, match=r"grad must have shape .* got \(1, 4, 5, 2\)"):
        fkv.fuse_kv_backward(grad.mT, sources, weights)


@pytest.mark.parametrize(**named(DENSE_CASES))
def test_fused_kv_attn_func(case: Case, device: torch.device) -> None:
    args = dense_inputs(case, device)
    with torch.no_grad():
        assert_matches_oracle(
            fkv.fused_kv_attn_func, reference.fused_kv_attn_func, *args, **case.options, terms=case.terms
        )


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_gradients_of_fused_kv_attn_func(case: Case) -> None:
    case = dataclasses.replace(case, dtype=FP64)
    q, keys, values, a, b = dense_inputs(case, torch.device("cpu"))
    leaves = [x.detach().requires_grad_() for x in (q, *keys, *values, a, b) if x is not None]
    options = {**case.options, "return_lse": False}

    def gradients(function: object) -> tuple[Tensor, ...]:
        rest = list(leaves)
        q, keys, values = rest[0], rest[1 : 1 + case.m_k], rest[1 + case.m_k : 1 + case.m_k + case.m_v]
        weights = rest[1 + case.m_k + case.m_v :] or [None, None]
        out = function(q, keys, values, *weights, **options)
        return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves)

    exact = gradients(reference.fused_kv_attn_func)
    for got, expected in zip(gradients(fkv.fused_kv_attn_func), exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # weights are float32


@pytest.mark.parametrize(**named(CACHED_CASES))
def test_fused_kv_attn_with_kvcache(case: Case, device: torch.device) -> None:
    """Unused slots hold NaN, unused entries of the block table a page that does not exist."""
    args, state = cache_inputs(case, device)
    oracle = reference.fused_kv_attn_with_kvcache
    cached = fkv.fused_kv_attn_with_kvcache
    options = {**case.options, **state}
    assert_matches_oracle(cached, oracle, *args, **options, terms=case.terms)
    options["return_lse"] = False
    assert_matches_oracle(cached, oracle, *args, **options, terms=case.terms)


@pytest.mark.parametrize("page_size", [None, 7], ids=["contiguous", "paged"])
def test_a_sequence_has_the_same_bits_in_any_batch(page_size: int | None, device: torch.device) -> None:
    case = Case("batch", D=12, S=2, B=3, T=37, lengths=(37, 5, 20), page_size=page_size)
    (q, keys, values, a, b), state = cache_inputs(case, device)
    options = {"return_lse": True, "batch_invariant": True}
    args = (keys, values, a, b)
    whole = assert_matches_oracle(
        lambda *x, **o: fkv.fused_kv_attn_with_kvcache(*x, **o, batch_invariant=True),
        reference.fused_kv_attn_with_kvcache,
        q,
        *args,
        **state,
        return_lse=True,
        terms=case.terms,
    )
    for rows in (slice(0, 1), slice(1, 3)):
        own = args if page_size else ([x[rows] for x in keys], [x[rows] for x in values], a, b)
        part = {name: None if x is None else x[rows] for name, x in state.items()}
        got = fkv.fused_kv_attn_with_kvcache(q[rows], *own, **part, **options)
        assert_same_bits(got, tuple(x[rows] for x in whole))


def test_padding_rows_may_hold_anything(device: torch.device) -> None:
    (q, *args), state = cache_inputs(Case("padding", D=12, S=4, T=9, lengths=(9, 2)), device)
    expected = fkv.fused_kv_attn_with_kvcache(q, *args, **state)
    q[1, :2] = math.nan
    assert_same_bits(fkv.fused_kv_attn_with_kvcache(q, *args, **state), expected)


def test_gpu_kernels_give_nan_where_lengths_or_pages_are_out_of_range(simt: object) -> None:
    """As with head dims that kernels take: nothing is read beside the caches."""
    case = Case("beyond", D=12, S=2, B=4, T=12, lengths=(12, 12, 12, 12), page_size=4)
    args, state = cache_inputs(case, torch.device("cpu"))
    args = (*args[:3], None, None)
    state["cache_seqlens"][1], state["cache_seqlens"][2] = 13, -1
    state["block_table"][3, 1] = 99
    before, native._ops = native._ops, torch.ops.fusedkv_simt
    try:
        out = fkv.fused_kv_attn_with_kvcache(*args, **state)
    finally:
        native._ops = before
    assert out[0].isfinite().all() and out[1:].isnan().all()


@pytest.mark.parametrize("rotary", [0, 2, 8, 12])
@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("D", "Dv"), [(12, 12), (100, 7), (13, 264), (320, 1)], ids=str)
def test_append_kvcache(D: int, Dv: int, page_size: int | None, rotary: int, device: torch.device) -> None:
    case = Case("append", D=D, Dv=Dv, S=3, T=12, m_k=1, m_v=1, lengths=(12, 2), page_size=page_size)
    (query, keys, values, *_), state = cache_inputs(case, device)
    new = [torch.randn(2, 3, case.G, d, device=device) for d in (D, Dv)]
    options: dict[str, object] = dict(state)
    if rotary:
        angles = torch.randn(12, rotary // 2, device=device)
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "query": query}
    caches = [keys[0].clone(), values[0].clone()], [keys[0].double(), values[0].double()]
    rotated = append(fkv, *new, *caches[0], **options)
    exact = append(reference, *new, *caches[1], **options, dtype=FP64)
    for got, expected in zip(caches[0], caches[1], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if rotary:
        torch.testing.assert_close(rotated.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["fuse_kv", "fused_kv_attn_func", "append_kvcache"])
def test_no_channels_are_refused(op: str) -> None:
    x = torch.zeros(1, 2, 1, 0)
    arguments = {
        "fuse_kv": ([x], torch.ones(1)),
        "fused_kv_attn_func": (x, x, x),
        "append_kvcache": (x, x, x, x),
    }
    options = {"cache_seqlens": torch.tensor([2], dtype=torch.int32)} if op == "append_kvcache" else {}
    with pytest.raises(ValueError, match="must have a head dim of at least 1, got 0"):
        getattr(fkv, op)(*arguments[op], **options)


def test_bad_lengths_and_pages_are_named() -> None:
    (q, *args), state = cache_inputs(
        Case("bad", D=12, S=2, T=12, lengths=(12, 12), page_size=4), torch.device("cpu")
    )
    call = fkv.fused_kv_attn_with_kvcache
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] must be from 0 to 12, .*, got 13"):
        call(q, *args, **{**state, "cache_seqlens": torch.tensor([12, 13], dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"key_caches\[0\] must have head dim 20"):
        call(torch.randn(2, 2, 4, 20), *args, **state)
    state["block_table"][1, 2] = 77
    with pytest.raises(ValueError, match=r"block_table\[1, 2\] must be a page .*, got 77"):
        call(q, *args, **state)


@pytest.mark.parametrize("case", [CACHED_CASES[2], CACHED_CASES[7]], ids=str)
def test_cached_attention_compiles_into_one_graph(case: Case) -> None:
    args, state = cache_inputs(case, torch.device("cpu"))
    options = {**case.options, **state}
    torch._dynamo.reset()
    compiled = torch.compile(fkv.fused_kv_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*args, **options), fkv.fused_kv_attn_with_kvcache(*args, **options)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_explain_says_why() -> None:
    q, keys, values, a, b = dense_inputs(Case("odd", D=12, S=1), torch.device("cpu"))
    said = fkv.explain(q, keys, values, a, b)
    assert (said.path, said.kernel) == ("fuse-once", "torch SDPA after fuse_kv")
    assert said.reason == "head dim 12: kernels take multiples of 8 up to 256"
    lengths = torch.tensor([37, 37], dtype=torch.int32)
    for options in ({}, {"return_lse": True}, {"batch_invariant": True}):
        said = fkv.explain(q, keys, values, a, b, cache_seqlens=lengths, **options)
        assert (said.path, said.kernel) == ("fuse-once", "torch SDPA after fuse_kvcache")
    assert fkv.explain(q, keys, [x[..., :8] for x in values]).reason.startswith("head dim 8 and 12")


@pytest.mark.parametrize("head_dim", [12, 100, 264])
@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "fusedkv-lite", "yoco", "yoco++", "skipv1"])
def test_decoders_of_any_head_dim_decode_as_they_read(plan: str, head_dim: int) -> None:
    model, ids = tiny_decoder(plan, head_dim=head_dim).double(), torch.randint(61, (2, 9))
    loss = model(ids, labels=ids)[1]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = model.float()
    for page_size in (None, 4):
        cached = model.generate(ids, 4, page_size=page_size)
        assert torch.equal(cached, model.generate(ids, 4, use_cache=False))


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "skipv1"])
def test_latents_of_any_width(plan: str) -> None:
    widths = dict(kv_lora_rank=30, qk_nope_head_dim=260, qk_rope_head_dim=6, v_head_dim=9, head_dim=None)
    model, ids = tiny_decoder(plan, **widths), torch.randint(61, (2, 9))
    model(ids, labels=ids)[1].backward()
    for page_size in (None, 4):
        assert torch.equal(
            model.generate(ids, 4, page_size=page_size), model.generate(ids, 4, use_cache=False)
        )
