"""Every SIMD level of the CPU kernels that this machine runs, each against the oracle and inside its
memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, cache_inputs, named, random_tensor

from fusedkv_ext import fuse_kv, fuse_kv_backward, fused_kv_attn_with_kvcache, rope_append_kvcache
from fusedkv_ext.ops import native, reference
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_same_bits

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Head dims around the widths of vectors: a part of one, one and a part, several and a part.
DIMS = [8, 16, 24, 40, 72, 104, 128, 200, 248, 256]


def test_portable_is_there_and_last() -> None:
    assert native.cpu_levels()[-1] == "portable"
    assert native.cpu_level() in native.cpu_levels()


def test_level_in_use_is_the_one_that_was_set(level: str) -> None:
    assert native.cpu_level() == level


def test_unknown_level_is_refused_and_changes_nothing() -> None:
    before = native.cpu_level()
    with pytest.raises(ValueError, match="level"):
        native.set_cpu_level("avx1024")
    assert native.cpu_level() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fuse_kv_and_its_gradients_match_oracle(level: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        for m in (1, 3):
            sources = [random_tensor((2, 9, 3, dim), dtype, "sliced") for _ in range(m)]
            weights = torch.randn(m, 3, dim)
            assert_matches_oracle(fuse_kv, reference.fuse_kv, sources, weights)
            grad = torch.randn(2, 9, 3, dim).to(dtype)
            results = []
            for function, wanted, options in (
                (fuse_kv, dtype, {}),
                (reference.fuse_kv, torch.float64, {"dtype": torch.float64}),
                (reference.fuse_kv, dtype, {}),
            ):
                inputs = [x.to(wanted).requires_grad_() for x in sources]
                weight = weights.clone().requires_grad_()
                out = function(inputs, weight, **options)
                results.append(torch.autograd.grad(out, [*inputs, weight], grad.to(wanted)))
            assert_close(*results, name=f"gradient, D={dim}, m={m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_added_to_buffers_match_oracle(level: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        sources, weights = [random_tensor((2, 9, 3, dim), dtype) for _ in range(2)], torch.randn(2, 3, dim)
        grad = torch.randn(2, 9, 3, dim).to(dtype)
        for sum_dtype in {torch.float32, dtype}:
            before = [torch.randn(grad.shape).to(sum_dtype) for _ in sources]
            sums = [x.clone() for x in before]
            fuse_kv_backward(grad, sources, weights, grad_sources=sums)
            exact = tuple(x.double() + w * grad.double() for x, w in zip(before, weights, strict=True))
            same_maths = tuple(
                x + w.to(sum_dtype) * grad.to(sum_dtype) for x, w in zip(before, weights, strict=True)
            )
            assert_close(tuple(sums), exact, same_maths, f"sum, D={dim}, {sum_dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_matches_oracle_for_every_head_dim(level: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        case = Case("dims", S=1, T=45, H=6, G=2, D=dim, m_k=2, m_v=3, dtype=dtype, lengths=(45, 33))
        args, state = cache_inputs(case, CPU)
        assert_matches_oracle(
            fused_kv_attn_with_kvcache,
            reference.fused_kv_attn_with_kvcache,
            *args,
            **state,
            **case.options,
            terms=case.terms,
        )


CASES = [
    Case("one_source_without_weights", S=1, T=65, m_k=1, m_v=1, weights="none"),
    Case("values_wider", S=1, T=65, D=24, Dv=136),
    Case("values_narrower", S=1, T=65, D=136, Dv=24),
    Case("rows_1_of_one_head", S=1, T=65, H=1, G=1),
    Case("rows_7", S=1, T=65, H=7, G=1),
    Case("rows_15", S=3, T=65, H=5, G=1),
    Case("rows_33", S=11, T=65, H=3, G=1),
    Case("rows_64", S=8, T=65, H=8, G=1),
    Case("unaligned", S=1, T=65, layout="sliced"),
    Case("paged_ragged", B=4, S=2, T=70, lengths=(70, 0, 1, 33), page_size=7),
    Case("window", S=2, T=600, window=(530, -1)),
    Case("several_splits", B=2, S=1, T=1100, D=32, lengths=(1100, 513)),
    Case("large_scores", S=1, T=65, magnitude=100.0),
    Case("eight_sources", S=1, T=33, m_k=8, m_v=8, D=40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(**named(CASES))
def test_decode_matches_oracle(level: str, case: Case, dtype: torch.dtype) -> None:
    typed = Case(**{**vars(case), "dtype": dtype})
    args, state = cache_inputs(typed, CPU)
    assert_matches_oracle(
        fused_kv_attn_with_kvcache,
        reference.fused_kv_attn_with_kvcache,
        *args,
        **state,
        **typed.options,
        terms=typed.terms,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_specials_pass_through_unchanged(level: str, dtype: torch.dtype) -> None:
    """NaN, infinities, -0, the smallest and the largest values pass through unchanged."""
    inf, nan = float("inf"), float("nan")
    values = [nan, inf, -inf, -0.0, 1e-40, -1e-7, 1.00390625, 65504.0, 65520.0, 3.39e38]
    row = torch.tensor(values * 4).to(dtype).view(1, 1, 1, 40)
    one = torch.ones(1, 1, 1)
    out = fuse_kv([row], one)
    assert torch.equal(out.nan_to_num(7.0), row.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_as_torch_rounds(level: str, dtype: torch.dtype) -> None:
    """To nearest, ties to even. With a source of ones the sum is the float32 weight itself, whatever its
    bits."""
    patterns = torch.randint(-(2**31), 2**31, (128, 256), dtype=torch.int32)
    # bfloat16 drops 16 bits and float16 13: a tie, and its neighbors on both sides.
    for row, (bits, low) in enumerate((bits, low) for bits in (16, 13) for low in (-1, 0, 1)):
        patterns[row::8] = (patterns[row::8] >> bits << bits) + 2 ** (bits - 1) + low
    weights = patterns.view(torch.float32)
    out = fuse_kv([torch.ones(1, 1, 128, 256, dtype=dtype)], weights[None])
    assert_same_bits(out[0, 0].nan_to_num(7.0), weights.to(dtype).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_with_rotation_matches_oracle(level: str, dtype: torch.dtype) -> None:
    for dim, rotary in ((8, 8), (24, 10), (128, 128), (200, 64)):
        key, value = torch.randn(2, 3, 2, dim).to(dtype), torch.randn(2, 3, 2, 16).to(dtype)
        angles = torch.randn(9, rotary // 2)
        caches = torch.zeros(2, 9, 2, dim, dtype=dtype), torch.zeros(2, 9, 2, 16, dtype=dtype)
        exact = tuple(x.double() for x in caches)
        same_maths = tuple(x.clone() for x in caches)
        options = {
            "cache_seqlens": torch.tensor([9, 2], dtype=torch.int32),
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
        }
        query = torch.randn(2, 3, 6, dim).to(dtype)
        rotated = rope_append_kvcache(query, key, value, *caches, **options)
        results = (
            (
                *exact,
                reference.rope_append_kvcache(query, key, value, *exact, **options, dtype=torch.float64),
            ),
            (*same_maths, reference.rope_append_kvcache(query, key, value, *same_maths, **options)),
        )
        assert_close((*caches, rotated), *results, f"cache, D={dim}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory with Linux's mprotect")
def test_no_level_touches_memory_outside_its_inputs(tmp_path: Path) -> None:
    """All inputs end, then begin, at a page that may not be touched: one byte too far ends the process."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "guard_pages.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stdout.strip().splitlines()[-1:] or ["the start"]
    assert done.returncode == 0, f"stopped at {last[0]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_row_that_sees_nothing_is_zero_whatever_the_values_are(
    level: str, dtype: torch.dtype, heads: int
) -> None:
    q, key = torch.randn(1, 2, heads, 32).to(dtype), torch.randn(1, 4, 1, 32).to(dtype)
    value = torch.full_like(key, float("nan"))
    length = torch.tensor([1], dtype=torch.int32)  # the first query token is padding
    out, lse = fused_kv_attn_with_kvcache(q, key, value, cache_seqlens=length, return_lse=True)
    assert (out[:, 0] == 0).all() and (lse[..., 0] == -math.inf).all()
    assert out[:, 1].isnan().all()
