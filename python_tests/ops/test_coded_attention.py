"""Attention over caches of codes: the oracle decodes them, the kernels multiply them as they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coded_cases import BF16, CODES, E4M3, F32, FP16, I4, I8, NAN_CODE, Inputs, size_of_codes
from torch import Tensor

from fusedkv_ext import explain, fused_kv_attn_func, fused_kv_attn_with_kvcache
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.testing import assert_near, assert_same_bits

PAIRS = [
    pytest.param(key, value, id=f"{str(key)[6:]}-{str(value)[6:]}")
    for key, value in itertools.product((BF16, *CODES), repeat=2)
    if key in CODES or value in CODES
]
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)


@DTYPES
@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_every_pair_of_codes_matches_oracle(
    kernels: str, key: torch.dtype, value: torch.dtype, dtype: torch.dtype
) -> None:
    for page_size, S in ((None, 1), (7, 3)):
        Inputs(key, value, dtype, page_size=page_size, S=S).check()


@DTYPES
@pytest.mark.parametrize("code", CODES, ids=str)
def test_every_head_dim_matches_oracle(kernels: str, code: torch.dtype, dtype: torch.dtype) -> None:
    for D, Dv in ((8, 24), (24, 8), (40, 72), (64, 128), (128, 64), (200, 16), (256, 256)):
        for S in (2,) if kernels.startswith("simt") else (1, 2, 4):
            Inputs(code, code, dtype, D=D, Dv=Dv, S=S, H=4, G=1, lengths=(45, 7)).check()


@DTYPES
@pytest.mark.parametrize("code", CODES, ids=str)
def test_rows_beyond_one_task_match_oracle(kernels: str, code: torch.dtype, dtype: torch.dtype) -> None:
    """Prompts over codes run the same kernel: 37 tokens of 3 heads are 111 rows per KV head."""
    Inputs(code, code, dtype, S=37, H=3, G=1, D=32, lengths=(70, 11, 0)).check()


@DTYPES
@pytest.mark.parametrize("code", CODES, ids=str)
def test_long_sequences_of_several_splits_match_oracle(
    kernels: str, code: torch.dtype, dtype: torch.dtype
) -> None:
    Inputs(code, code, dtype, S=1, H=5, G=1, D=32, lengths=(1500, 513), page_size=64).check()


@DTYPES
def test_windows_soft_cap_sinks_and_slopes_apply_to_codes(kernels: str, dtype: torch.dtype) -> None:
    for code in CODES:
        x = Inputs(code, code, dtype, S=3, lengths=(70, 40, 2))
        x.options |= {"window_size": (20, -1), "softcap": 15.0}
        x.options |= {"sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
        x.check()


@DTYPES
def test_queries_packed_over_codes_match_oracle(kernels: str, dtype: torch.dtype) -> None:
    for code in CODES:
        x = Inputs(code, code, dtype, lengths=(70, 33, 9), page_size=16)
        x.q = torch.randn(6, 4, 64).to(dtype)
        x.options |= {"cu_seqlens_q": torch.tensor([0, 1, 1, 6], dtype=torch.int32), "max_seqlen_q": 5}
        x.check()


@DTYPES
def test_query_per_source_matches_oracle(kernels: str, dtype: torch.dtype) -> None:
    for code in (BF16, *CODES):
        key = dtype if code == BF16 else code
        x = Inputs(key, key, dtype)
        x.q = [torch.randn_like(x.q) for _ in range(2)]
        x.check()
        x.a = None
        x.q = [q / size_of_codes(key) for q in x.q]
        x.check()


def test_equal_queries_per_source_are_one_query(kernels: str) -> None:
    for dtype, code in itertools.product((F32, BF16), CODES):
        x = Inputs(code, code, dtype)
        expected = x.call()
        x.q = [x.q, x.q.clone()]
        assert_same_bits(x.call(), expected)


def test_packed_queries_per_source_match_oracle(kernels: str) -> None:
    x = Inputs(I8, I4, BF16, lengths=(70, 33, 9))
    x.q = [torch.randn(6, 4, 64).to(BF16) for _ in range(2)]
    x.options |= {"cu_seqlens_q": torch.tensor([0, 1, 1, 6], dtype=torch.int32), "max_seqlen_q": 5}
    x.check()


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_see_all_take_a_query_per_source(packed: bool) -> None:
    x = Inputs(I8, I8, F32, S=5, lengths=(3, 40))
    x.options |= {"causal": False, "left_padding": False}
    x.q = [torch.randn_like(x.q) for _ in range(2)]
    if packed:
        x.q = [q.flatten(0, 1) for q in x.q]
        x.options |= {"cu_seqlens_q": torch.tensor([0, 5, 10], dtype=torch.int32), "max_seqlen_q": 5}
    x.check()


@DTYPES
@pytest.mark.parametrize("page_size", [None, 7])
def test_token_scales_match_oracle(kernels: str, dtype: torch.dtype, page_size: int | None) -> None:
    for key, value in ((I8, I8), (I4, I4), (E4M3, I8), (dtype, I4), (dtype, dtype)):
        x = Inputs(key, value, dtype, page_size=page_size)
        x.options |= {"key_token_scales": x.token_scales(), "value_token_scales": x.token_scales()}
        x.check()


@DTYPES
def test_codebook_matches_oracle(kernels: str, dtype: torch.dtype) -> None:
    for key, value in ((I4, I4), (I4, I8), (I8, I4)):
        x = Inputs(key, value, dtype, D=40, Dv=72)
        x.options["codebook"] = torch.randn(16).sort().values * 4.6
        x.check()


def test_codebook_of_integers_is_the_default(kernels: str) -> None:
    x = Inputs(I4, I4, F32)
    expected = x.call()
    assert_same_bits(x.call(codebook=torch.arange(-8.0, 8.0)), expected)


@DTYPES
def test_value_bias_matches_oracle_and_leaves_empty_rows_zero(kernels: str, dtype: torch.dtype) -> None:
    several_splits = 300 if kernels.startswith("simt") else 1500
    for code in (dtype, *CODES):
        for lengths in ((70, 1, 0), (several_splits, 1, 0)):
            x = Inputs(code, code, dtype, S=2, D=32, lengths=lengths)
            x.options["value_bias"] = torch.randn(2, 32)
            out, lse = x.check()
            assert out[2].eq(0).all() and out[1, 0].eq(0).all()
            x.options["sinks"] = torch.randn(4)
            out, _ = x.check()
            assert out[2].eq(0).all() and out[1, 0].eq(0).all()
            x.options["value_bias"] = None
            assert_same_bits(x.call()[1], x.check()[1])


def test_value_bias_does_not_change_lse(kernels: str) -> None:
    x = Inputs(I8, I8, BF16)
    assert_same_bits(x.call(value_bias=torch.randn(2, 64))[1], x.call()[1])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_channel_scale_of_1000_does_not_saturate(kernels: str, dtype: torch.dtype) -> None:
    """The folded query leaves the range of fp16. The channel dominates in one case, not in the other."""
    for key, value in ((I8, I8), (I4, I4), (E4M3, E4M3)):
        x = Inputs(key, value, dtype)
        x.a[:, :, 5] *= 1000
        x.options["softmax_scale"] = 1e-4
        out, _ = x.check()
        assert out.isfinite().all()
        x = Inputs(key, value, dtype)
        x.a[:, :, 5] *= 1000
        x.q[..., 5] /= 1000
        x.b[:, :, 7] *= 1000
        out, _ = x.check()
        assert out.isfinite().all()


def test_every_reader_uses_the_scale_of_the_source(kernels: str) -> None:
    """A stored tensor has one scale. Its owner and a reader of two sources fold that one."""
    D, T = 64, 40
    raw = [torch.randn(1, T, 2, D) * size for size in (1.0, 30.0)]
    scales = [x.abs().amax((0, 1)) / 127 for x in raw]
    codes = [(x / s).round().to(I8) for x, s in zip(raw, scales, strict=True)]
    decoded = [c * s for c, s in zip(codes, scales, strict=True)]
    q, a = torch.randn(1, 1, 4, D) / 30, torch.randn(2, 2, D)
    own = fused_kv_attn_with_kvcache(q, codes[1:], codes[1:], scales[1][None], scales[1][None])
    assert_near(own, fused_kv_attn_func(q, decoded[1:], decoded[1:]), 64)
    folded = a * torch.stack(scales)
    read = fused_kv_attn_with_kvcache(q, codes, codes, folded, folded)
    assert_near(read, fused_kv_attn_func(q, decoded, decoded, a, a), 64)


def test_center_of_keys_drops_out_and_that_of_values_is_a_bias(kernels: str) -> None:
    """x = c + s (.) u: attention over u with s in the weights and c in the bias is attention over x."""
    T, D = 40, 64
    u = [torch.randint(-127, 128, (1, T, 2, D), dtype=I8) for _ in range(2)]
    c, s = torch.randn(2, 2, D), torch.rand(2, 2, D) / 127
    x = [c[j] + s[j] * u[j] for j in range(2)]
    q = torch.randn(1, 1, 4, D)
    expected = fused_kv_attn_func(q, x[:1], x[1:])
    got = fused_kv_attn_with_kvcache(q, u[:1], u[1:], s[:1], s[1:], value_bias=c[1])
    assert_near(got, expected, 64)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nan_codes_of_a_visible_token_reach_the_result(kernels: str, dtype: torch.dtype) -> None:
    x = Inputs(E4M3, E4M3, dtype, m=1, lengths=(20,), S=1, G=1, H=2)
    x.keys[0].view(torch.uint8)[0, 3, 0, 1] = NAN_CODE
    assert x.call()[0].isnan().all()
    y = Inputs(E4M3, E4M3, dtype, m=1, lengths=(20,), S=1, G=1, H=2)
    y.values[0].view(torch.uint8)[0, 3, 0, 1] = NAN_CODE | 0x80
    out = y.call()[0]
    assert out[..., 1].isnan().all() and out[..., 2:].isfinite().all() and out[..., 0].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
def test_all_256_codes_stand_for_their_numbers(kernels: str, dtype: torch.dtype) -> None:
    """With one token the output is its value: every code of every kind, one by one.

    Products in integers round to 1/512 of a step between codes.
    """
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = {
        I8: bits.view(I8).float(),
        E4M3: bits.view(E4M3).float(),
        I4: torch.cat((bits & 15, bits >> 4)).float() - 8,
    }
    for code, expected in numbers.items():
        values = bits.view(code).view(256 // 64, 1, 1, 64)
        q = torch.zeros(4, 1, 1, 64, dtype=dtype)
        out = fused_kv_attn_with_kvcache(q, torch.zeros(4, 1, 1, 64, dtype=I8), values)
        wanted = (
            expected.view(2, 4, 64).transpose(0, 1).reshape(4, 128) if code == I4 else expected.view(4, 64)
        )
        atol = 0 if dtype == F32 or code == E4M3 else 1 / 500
        torch.testing.assert_close(out.flatten(1).float(), wanted, rtol=1e-4, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_bits_do_not_depend_on_threads_or_batch(
    kernels: str, code: torch.dtype, dtype: torch.dtype, with_threads: Callable[[int], None]
) -> None:
    x = Inputs(code, code, dtype, lengths=(1500, 40, 700), H=4, G=2)
    if kernels.startswith("simt"):
        x.options["batch_invariant"] = True  # which the CPU kernels always are
    together = x.call()
    with_threads(1)
    assert_same_bits(x.call(), together)
    alone = Inputs(code, code, dtype, lengths=(1,), H=4, G=2)
    alone.q, alone.a, alone.b = x.q[2:], x.a, x.b
    alone.lengths, alone.options = (700,), x.options
    alone.keys, alone.values = [y[2:] for y in x.keys], [y[2:] for y in x.values]
    assert_same_bits(alone.call()[0], together[0][2:])


def test_infinite_and_nan_queries_give_nan(kernels: str) -> None:
    for dtype, bad in itertools.product((F32, BF16), (math.inf, math.nan)):
        x = Inputs(I8, I8, dtype)
        x.q[0, 0, 0, 3] = bad
        out = x.call()[0]
        assert out[0, 0, 0].isnan().all() and out[1].isfinite().all() and out[0, 1].isfinite().all()


def test_cuda_graph_style_meta_call_has_the_shapes(kernels: str) -> None:
    x = Inputs(I8, I4, BF16, Dv=32)
    args = [x.q, x.keys, x.values, x.a, x.b]
    meta = [[y.to("meta") for y in part] if isinstance(part, list) else part.to("meta") for part in args]
    state = {name: y.to("meta") if isinstance(y, Tensor) else y for name, y in x.state().items()}
    out, lse = fused_kv_attn_with_kvcache(*meta, **state)
    real_out, real_lse = x.call()
    assert (out.shape, out.dtype) == (real_out.shape, real_out.dtype) and lse.shape == real_lse.shape


@pytest.mark.parametrize("code", [I8, I4], ids=str)  # torch's checks multiply, which float8 cannot
def test_opcheck(code: torch.dtype) -> None:
    """Schema, fake and autograd registration of the operation with every tensor that belongs to codes."""
    x = Inputs(code, code, BF16, D=16, lengths=(9, 2), page_size=4)
    lengths = x.state()["cache_seqlens"]
    queries = torch.stack([x.q, torch.randn_like(x.q)])
    call = AttentionCall(x.q, x.keys, x.values, x.a, x.b, lengths, x.table, 0.25, -1, 0)._replace(
        codebook=torch.randn(16) if code == I4 else None,
        key_token_scales=x.token_scales(),
        value_token_scales=x.token_scales(),
        q_sources=queries,
        value_bias=torch.randn(2, 16),
    )
    results = torch.library.opcheck(torch.ops.fusedkv.attn_with_kvcache.default, tuple(call[:22]))
    assert set(results.values()) == {"SUCCESS"}, results


def test_codes_into_a_given_out(kernels: str) -> None:
    x = Inputs(I4, I8, BF16)
    x.options |= {"value_bias": torch.randn(2, 64), "key_token_scales": x.token_scales()}
    expected, _ = x.call()
    out = torch.empty_like(expected)
    assert x.call(out=out)[0] is out
    assert_same_bits(out, expected)


def test_autocast_does_not_cast_queries_to_codes() -> None:
    x = Inputs(E4M3, E4M3, BF16)
    expected = x.call()
    with torch.autocast("cpu", dtype=BF16):
        assert_same_bits(x.call(), expected)


SOME_CODES = torch.zeros(2, 70, 2, 64, dtype=I8)
# A change of a good call, the error and the start of its message.
BAD: list[Any] = [
    (
        "sources_differ",
        {"keys": [SOME_CODES, SOME_CODES.to(E4M3)]},
        TypeError,
        r"key_caches\[1\] must be int8 as key_",
    ),
    (
        "raw_of_other_dtype",
        {"keys": [SOME_CODES.half()] * 2},
        TypeError,
        r"key_caches\[0\] must be bfloat16 as q",
    ),
    (
        "int32",
        {"values": [SOME_CODES.int()] * 2},
        TypeError,
        r"value_caches\[0\] must be bfloat16 as q, got int32",
    ),
    ("too_narrow", {"keys": [SOME_CODES[..., :32]] * 2}, ValueError, r"key_weights must be broadcastable"),
    (
        "nibbles_too_wide",
        {"keys": [SOME_CODES.view(I4)] * 2, "a": None},
        ValueError,
        r"key_caches\[0\] must have head",
    ),
    (
        "book_without_nibbles",
        {"codebook": torch.zeros(16)},
        ValueError,
        r"codebook must be None without uint8",
    ),
    (
        "book_half",
        {"keys": [SOME_CODES[..., :32].clone().view(I4)] * 2, "codebook": torch.zeros(16).half()},
        TypeError,
        r"codebook must be float32",
    ),
    (
        "scales_float",
        {"key_token_scales": [torch.ones(2, 70, 2)] * 2},
        TypeError,
        r"key_token_scales\[0\] must be",
    ),
    (
        "scales_one",
        {"key_token_scales": torch.ones(2, 70, 2).half()},
        ValueError,
        r"key_token_scales must hold 2",
    ),
    (
        "scales_shape",
        {"value_token_scales": [torch.ones(2, 70).half()] * 2},
        ValueError,
        r"value_token_scales\[0\]",
    ),
    (
        "scales_int",
        {"value_token_scales": 1},
        TypeError,
        r"value_token_scales must be a tensor or a list",
    ),
    ("bias_shape", {"value_bias": torch.zeros(64)}, ValueError, r"value_bias must have shape \(G, Dv\)"),
    (
        "bias_dtype",
        {"value_bias": torch.zeros(2, 64).bfloat16()},
        TypeError,
        r"value_bias must be float32",
    ),
    (
        "queries_three",
        {"q": [torch.zeros(2, 2, 4, 64, dtype=BF16)] * 3},
        ValueError,
        r"q must hold 2 tensors",
    ),
    ("queries_none", {"q": []}, ValueError, r"q must hold one tensor per key cache"),
    (
        "queries_differ",
        {"q": [torch.zeros(2, 2, 4, 64), torch.zeros(2, 2, 4, 8)]},
        ValueError,
        r"q\[1\] must have",
    ),
    (
        "queries_dtypes",
        {"q": [torch.zeros(1), torch.zeros(1).half()]},
        TypeError,
        r"q\[1\] must be float32 as q",
    ),
    (
        "query_text",
        {"q": [torch.zeros(1), "q"]},
        TypeError,
        r"q\[1\] must be a dense torch.Tensor, got str",
    ),
    (
        "bias_grad",
        {"value_bias": torch.zeros(2, 64).requires_grad_()},
        ValueError,
        r"value_bias must not require",
    ),
]


@pytest.mark.parametrize(("change", "error", "match"), [x[1:] for x in BAD], ids=[x[0] for x in BAD])
def test_bad_call_names_the_argument(change: dict[str, Any], error: type[Exception], match: str) -> None:
    x = Inputs(I8, I8, BF16)
    for name in ("q", "keys", "values", "a"):
        if name in change:
            setattr(x, name, change[name])
    more = {name: y for name, y in change.items() if name not in ("q", "keys", "values", "a")}
    with pytest.raises(error, match=match):
        x.call(**more)


def test_explain_counts_the_bytes_of_codes() -> None:
    x = Inputs(I8, I4, BF16, S=40)
    step = explain(x.q, x.keys, x.values, x.a, x.b, cache_seqlens=torch.tensor(x.lengths, dtype=torch.int32))
    assert step.path == "fold" and "codes" in step.reason
    tokens, dims = sum(x.lengths) * 2 * 2, 64 + 32
    rows = 2 * 40 * 4
    assert step.bytes == tokens * dims + rows * (2 * 64 * 2 + 4) + 4 * (2 * 2 * 2 * 64 + 2)


def test_head_dims_without_a_kernel_are_refused() -> None:
    for D in (12, 264):
        x = Inputs(I8, I8, F32, D=D)
        with pytest.raises(
            ValueError, match=r"q and values must have head dims that are multiples of 8 up to 256"
        ):
            x.call()
