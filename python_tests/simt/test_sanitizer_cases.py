"""One small call for each path through the CUDA kernels: what gpu_check.sh runs under compute-sanitizer, with
which the whole suite would take hours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import Case, as_cache, block_table, cache_inputs, named, random_tensor, to_device
from coded_cases import CODES, Inputs
from torch import Tensor

from fusedkv_ext import append_kvcache, fuse_kv, fused_kv_attn_with_kvcache, rope_append_kvcache
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_matches_oracle

BF16, FP16 = torch.bfloat16, torch.float16

ATTENTION = [
    Case("few_rows", B=3, S=1, T=150, H=8, D=128, dtype=BF16, lengths=(150, 0, 33)),
    Case("few_rows_paged", B=3, S=1, T=150, H=8, D=64, m_k=1, dtype=FP16, lengths=(150, 7, 64), page_size=16),
    Case("few_rows_odd_pages", S=1, T=70, H=8, D=128, dtype=BF16, lengths=(70, 9), page_size=7),
    Case("few_rows_window", S=2, T=150, H=4, D=128, m_v=1, dtype=BF16, window=(17, 0)),
    Case("wide_heads", S=1, T=70, D=256, m_k=1, m_v=1, weights="none", dtype=BF16),
    Case("three_sources", S=1, T=70, D=128, m_k=3, m_v=3, dtype=BF16),
    Case("many_rows", S=3, T=150, H=16, D=128, dtype=BF16, lengths=(150, 2)),
    Case("many_rows_paged", S=5, T=150, H=16, D=64, dtype=FP16, lengths=(150, 40), page_size=32),
    Case("fused_first", S=40, T=70, dtype=torch.float32, lengths=(70, 41), page_size=16),
]


@pytest.mark.parametrize(**named(ATTENTION))
def test_attention(case: Case, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **state, **case.options, terms=case.terms)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_attention_over_codes(code: torch.dtype, page_size: int | None, device: torch.device) -> None:
    x = Inputs(code, code, BF16, lengths=(150, 0, 33), S=2, D=128, page_size=page_size)
    x.options |= {"key_token_scales": x.token_scales(), "value_token_scales": x.token_scales()}
    x.to(device)
    x.check()


@pytest.mark.parametrize("sources", [1, 2, 5])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_fusion_and_its_gradients(sources: int, layout: str, device: torch.device) -> None:
    made = [random_tensor((2, 9, 2, 64), BF16, layout) for _ in range(sources)]
    inputs = [x.requires_grad_() for x in to_device([*made, torch.randn(sources, 2, 64)], device)]
    out = assert_matches_oracle(fuse_kv, reference.fuse_kv, inputs[:-1], inputs[-1])
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("page_size", [None, 16])
def test_append(page_size: int | None, device: torch.device) -> None:
    lengths = (40, 2)
    query, key, value = (random_tensor((2, 3, heads, 64), BF16) for heads in (8, 2, 2))
    table = block_table(lengths, 48, page_size) if page_size else None
    cache = as_cache(torch.randn(2, 48, 2, 64), lengths, page_size, table).nan_to_num(0.5)
    angles = torch.randn(48, 32)
    state = dict(cache_seqlens=torch.tensor(lengths, dtype=torch.int32), block_table=table)
    state.update(rotary_cos=angles.cos(), rotary_sin=angles.sin())
    query, key, value, cache, state = to_device((query, key, value, cache, state), device)

    def append(op: Callable[..., Tensor], **options: torch.dtype) -> tuple[Tensor, ...]:
        caches = [cache.to(options.get("dtype", BF16), copy=True) for _ in range(2)]
        return op(query, key, value, *caches, **state, **options), *caches

    assert_matches_oracle(
        partial(append, rope_append_kvcache), partial(append, reference.rope_append_kvcache)
    )


@pytest.mark.parametrize("code", CODES, ids=str)
def test_append_of_codes(code: torch.dtype, device: torch.device) -> None:
    """Without a rotation the codes are those of the oracle, bit for bit."""
    lengths = torch.tensor([40, 2], dtype=torch.int32)
    new = [random_tensor((2, 3, 2, 64), BF16) for _ in range(2)]
    scales = {"key_scale": torch.rand(2, 64) + 0.5, "value_scale": torch.rand(2, 64) + 0.5}
    new, scales, lengths = to_device((new, scales, lengths), device)

    def append(op: Callable[..., None], **options: torch.dtype) -> list[Tensor]:
        width = 32 if code == torch.uint8 else 64
        caches = [torch.zeros(2, 48, 2, width, dtype=torch.uint8, device=device).view(code) for _ in range(2)]
        op(*new, *caches, cache_seqlens=lengths, **scales, **options)
        return [x.view(torch.uint8) for x in caches]

    expected = append(reference.append_kvcache, dtype=torch.float32)
    assert all(map(torch.equal, append(append_kvcache), expected))
