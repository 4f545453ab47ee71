"""append_kvcache into caches of codes: encoded in the same pass, or copied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Simt
from torch import Tensor

from fusedkv_ext import append_kvcache, fused_kv_attn_with_kvcache, rope_append_kvcache
from fusedkv_ext.ops import native, reference
from fusedkv_ext.testing import assert_same_bits

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
I8, E4M3, I4 = torch.int8, torch.float8_e4m3fn, torch.uint8
CODES = (I8, E4M3, I4)
MOST = {I8: 127.0, E4M3: 448.0, I4: 7.0}
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
CODED = pytest.mark.parametrize("code", CODES, ids=str)


def empty_cache(shape: tuple[int, ...], code: torch.dtype) -> Tensor:
    """A cache filled with one code, in which every byte that is not written can be seen."""
    if code not in CODES:
        return torch.full(shape, math.nan).to(code)
    shape = (*shape[:-1], shape[-1] // 2) if code == I4 else shape
    return torch.full(shape, 0x55, dtype=torch.uint8).view(code)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype in CODES else x


class Append:
    """A call that encodes keys and values, some of them beyond the largest code."""

    def __init__(
        self,
        key: torch.dtype,
        value: torch.dtype,
        dtype: torch.dtype,
        *,
        D: int = 24,
        Dv: int = 40,
        lengths: tuple[int, ...] = (9, 3, 1),
        S: int = 3,
        paged: bool = False,
    ) -> None:
        B, G = len(lengths), 2
        self.new = torch.randn(B, S, G, D).to(dtype), torch.randn(B, S, G, Dv).to(dtype)
        slots = (7, 4) if paged else (B, 10)
        self.shapes = (*slots, G, D), (*slots, G, Dv)
        self.codes = key, value
        self.state: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
        if paged:
            self.state["block_table"] = torch.tensor([[5, 0, 2], [1, 6, 6], [3, 6, 6]], dtype=torch.int32)
        for name, width, code in (("key", D, key), ("value", Dv, value)):
            if code in CODES:
                self.state[f"{name}_scale"] = (0.5 + torch.rand(G, width)) * 2 / MOST[code]
                self.state[f"{name}_center"] = torch.randn(G, width)

    def run(self, op: Callable[..., Any] = append_kvcache, **more: Any) -> tuple[Tensor, Tensor]:
        caches = [empty_cache(shape, code) for shape, code in zip(self.shapes, self.codes, strict=True)]
        op(*self.new, *caches, **{**self.state, **more})
        return caches[0], caches[1]


def assert_same_codes(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(bits(mine), bits(wanted), rtol=0, atol=0, equal_nan=True)


@DTYPES
@CODED
@pytest.mark.parametrize("paged", [False, True])
def test_codes_are_those_of_the_oracle(
    kernels: str, code: torch.dtype, dtype: torch.dtype, paged: bool
) -> None:
    """The same float32 arithmetic: every bit is equal, and no other slot is written."""
    for D, Dv in ((8, 24), (64, 128), (256, 16), (2, 6)):
        call = Append(code, code, dtype, D=D, Dv=Dv, paged=paged)
        assert_same_codes(call.run(), call.run(reference.append_kvcache, dtype=F32))


@DTYPES
def test_each_side_has_its_own_code(kernels: str, dtype: torch.dtype) -> None:
    for key, value in ((I8, I4), (dtype, I8), (E4M3, dtype), (I4, E4M3)):
        call = Append(key, value, dtype)
        assert_same_codes(call.run(), call.run(reference.append_kvcache, dtype=F32))


@DTYPES
@CODED
def test_without_a_center_it_is_zero(kernels: str, code: torch.dtype, dtype: torch.dtype) -> None:
    call = Append(code, code, dtype)
    zeros = {name: torch.zeros_like(call.state[name]) for name in ("key_center", "value_center")}
    nothing: dict[str, Any] = {"key_center": None, "value_center": None}
    assert_same_codes(call.run(**nothing), call.run(**zeros))


@DTYPES
@CODED
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_keys_are_the_nearest_codes(
    kernels: str, code: torch.dtype, dtype: torch.dtype, interleaved: bool
) -> None:
    """Against float64: a code is at most half a step, and rounding of float32, from the exact number."""
    call = Append(code, code, dtype, D=32)
    angles = torch.randn(10, 12)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
    got, _ = call.run(**tables)
    exact = torch.full(call.shapes[0], math.nan, dtype=torch.float64)
    key, value = call.new
    reference.append_kvcache(
        key, value, exact, exact.new_zeros(call.shapes[1]), cache_seqlens=call.state["cache_seqlens"],
        **tables, dtype=torch.float64,
    )  # fmt: skip
    u = (exact - call.state["key_center"].double()) / call.state["key_scale"].double()
    written = ~u.isnan()
    numbers = reference._decoded(got, None, torch.float64)[written]
    u = u[written].clamp(-8.0 if code == I4 else -MOST[code], MOST[code])
    step = torch.exp2(u.abs().clamp(min=2.0**-6).log2().floor() - 3) if code == E4M3 else torch.ones(())
    assert ((numbers - u).abs() <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_query_of_the_same_call_is_rotated_as_without_codes(kernels: str, dtype: torch.dtype) -> None:
    call = Append(I8, I4, dtype, D=32)
    angles = torch.randn(10, 16)
    query = torch.randn(3, 3, 4, 32).to(dtype)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    caches = [empty_cache(shape, code) for shape, code in zip(call.shapes, call.codes, strict=True)]
    got = rope_append_kvcache(query, *call.new, *caches, **call.state, **tables)
    raw = [empty_cache(shape, dtype) for shape in call.shapes]
    lengths = call.state["cache_seqlens"]
    expected = rope_append_kvcache(query, *call.new, *raw, cache_seqlens=lengths, **tables)
    assert_same_bits(got, expected)
    assert_same_codes((caches[0], caches[1]), call.run(**tables))


def test_every_number_has_the_nearest_code(kernels: str) -> None:
    """Ties go to the even code, numbers beyond the largest saturate, NaN is 0 or NaN."""
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 464.0, 1e30, -1e30, 1e-30, 2.0**-10, 3e-3]
    )
    numbers = torch.cat((torch.arange(-300.0, 300.0) / 2, torch.linspace(-500, 500, 4096), special))
    numbers = torch.cat((numbers, 2.0 ** torch.linspace(-12, 9, 3000)))
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 64)).view(-1, 1, 1, 64)
    one, lengths = torch.ones(1, 64), torch.ones(len(numbers), dtype=torch.int32)
    for code in CODES:
        call: list[Tensor] = []
        for op in (append_kvcache, reference.append_kvcache):
            caches = [empty_cache(tuple(numbers.shape), code) for _ in range(2)]
            op(numbers, -numbers, *caches, cache_seqlens=lengths, key_scale=one, value_scale=one)
            call += caches
        assert_same_codes((call[0], call[1]), (call[2], call[3]))


@CODED
def test_codes_that_are_there_already_are_copied(kernels: str, code: torch.dtype) -> None:
    call = Append(code, code, F32)
    made = call.run()
    tokens = [x[:, :1] for x in made]
    copies = [empty_cache(shape, code) for shape in call.shapes]
    lengths = torch.full((3,), 4, dtype=torch.int32)
    append_kvcache(*tokens, *copies, cache_seqlens=lengths)
    for copied, source in zip(copies, tokens, strict=True):
        assert bits(copied[:, 3:4]).equal(bits(source))
        assert bits(copied[:, :3]).eq(0x55).all() and bits(copied[:, 4:]).eq(0x55).all()


def test_raw_keys_with_copied_values(kernels: str) -> None:
    call = Append(BF16, I8, BF16)
    codes = torch.randint(-127, 128, call.new[1].shape, dtype=I8)
    caches = [empty_cache(shape, code) for shape, code in zip(call.shapes, call.codes, strict=True)]
    lengths = call.state["cache_seqlens"]
    append_kvcache(call.new[0], codes, *caches, cache_seqlens=lengths)
    assert caches[1][0, 6:9].equal(codes[0]) and caches[0][0, 6:9].equal(call.new[0][0])


@CODED
def test_slot_mapping_encodes_packed_tokens(kernels: str, code: torch.dtype) -> None:
    call = Append(code, code, BF16)
    call.new = call.new[0].flatten(0, 1), call.new[1].flatten(0, 1)
    call.state["cache_seqlens"] = None
    call.state["slot_mapping"] = torch.tensor([4, -1, 29, 0, 17, 11, -1, 3, 2])
    assert_same_codes(call.run(), call.run(reference.append_kvcache, dtype=F32))


def test_attention_over_an_encoded_cache_is_that_over_the_tokens() -> None:
    """Encode, then attend with the scales in the weights and the center in the bias: 8 bits are close."""
    B, T, G, D = 1, 60, 2, 64
    key, value = torch.randn(B, T, G, D), torch.randn(B, T, G, D) + 3
    q = torch.randn(B, 1, 4, D)
    lengths = torch.tensor([T], dtype=torch.int32)
    scales = [x.sub(c).abs().amax((0, 1)) / 127 for x, c in ((key, 0), (value, 3))]
    caches = [torch.zeros(B, T, G, D, dtype=I8) for _ in range(2)]
    center = torch.full((G, D), 3.0)
    append_kvcache(
        key, value, *caches, cache_seqlens=lengths, key_scale=scales[0], value_scale=scales[1],
        value_center=center,
    )  # fmt: skip
    weights = scales[0][None], scales[1][None]
    got = fused_kv_attn_with_kvcache(q, *caches, *weights, cache_seqlens=lengths, value_bias=center)
    expected = fused_kv_attn_with_kvcache(q, key, value, cache_seqlens=lengths)
    assert (got - expected).abs().max() < 0.02 < expected.abs().max()


@pytest.mark.parametrize("seed", [1, 2, 3])
@DTYPES
@CODED
def test_cuda_codes_are_those_of_the_portable_cpu_kernel(
    seed: int, code: torch.dtype, dtype: torch.dtype, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit, also of rotated keys: neither of the two fuses multiplications with additions."""
    before = native.cpu_level()
    simt.configure(seed=seed)
    for D, rotary, interleaved in (
        (64, 64, False),
        (64, 32, True),
        (128, 32, False),
        (24, 24, False),
        (40, 6, True),
    ):
        call = Append(code, code, dtype, D=D, Dv=D, paged=interleaved)
        angles = torch.randn(12, rotary // 2)
        tables = {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_interleaved": bool(interleaved),
        }
        native.set_cpu_level("portable")
        expected = call.run(**tables)
        native.set_cpu_level(before)
        with monkeypatch.context() as executor:
            executor.setattr(native, "_ops", torch.ops.fusedkv_simt)
            assert_same_codes(call.run(**tables), expected)


def odd(x: Tensor) -> Tensor:
    """The same tensor, whose rows begin at odd multiples of the element size."""
    memory = torch.zeros((*x.shape[:-1], x.shape[-1] + 5), dtype=torch.uint8 if x.itemsize == 1 else x.dtype)
    return memory.view(x.dtype)[..., 3 : 3 + x.shape[-1]].copy_(x)


@CODED
@pytest.mark.parametrize("which", ["new", "caches", "scales", "tables"])
def test_memory_at_any_address_gets_the_same_codes(kernels: str, code: torch.dtype, which: str) -> None:
    call = Append(code, code, BF16, D=64, Dv=64)
    angles = torch.randn(10, 16)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    expected = call.run(**tables)
    if which == "new":
        call.new = odd(call.new[0]), odd(call.new[1])
    for name in ("key_scale", "value_scale", "key_center", "value_center"):
        if which == "scales":
            call.state[name] = at_odd_address(call.state[name])
    if which == "tables":
        tables = {name: at_odd_address(x) for name, x in tables.items()}
    caches = [empty_cache(shape, code) for shape in call.shapes]
    if which == "caches":
        caches = [odd(x) for x in caches]
    append_kvcache(*call.new, *caches, **call.state, **tables)
    assert_same_codes((caches[0], caches[1]), expected)


def at_odd_address(x: Tensor) -> Tensor:
    """The same contiguous float32 tensor, 4 bytes into its memory."""
    memory = torch.zeros(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


@CODED
def test_copied_codes_may_lie_anywhere(kernels: str, code: torch.dtype) -> None:
    made = Append(code, code, F32, D=64, Dv=64).run()
    lengths = torch.full((3,), 4, dtype=torch.int32)
    for change in (lambda x: x, odd):
        tokens = [change(x[:, :2]) for x in made]
        copies = [change(empty_cache((3, 10, 2, 64), code)) for _ in range(2)]
        append_kvcache(*tokens, *copies, cache_seqlens=lengths)
        for copied, source in zip(copies, made, strict=True):
            assert bits(copied[:, 2:4]).equal(bits(source[:, :2]))
            assert bits(copied[:, :2]).eq(0x55).all() and bits(copied[:, 4:]).eq(0x55).all()


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "no_scale",
        {"key_scale": None},
        ValueError,
        r"key_scale must be given to encode key into key_cache of int8",
    ),
    ("scale_half", {"value_scale": torch.ones(2, 40).half()}, TypeError, r"value_scale must be float32"),
    (
        "scale_shape",
        {"value_scale": torch.ones(40)},
        ValueError,
        r"value_scale must be contiguous of shape \(G, D\)",
    ),
    (
        "center_shape",
        {"key_center": torch.ones(2, 40)},
        ValueError,
        r"key_center must be contiguous of shape",
    ),
    ("unknown", {"key_zero": torch.ones(2, 24)}, TypeError, r"append_kvcache\(\) got an unexpected keyword"),
    ("not_a_tensor", {"key_scale": 1.0}, TypeError, r"key_scale must be a torch.Tensor, got float"),
]


@pytest.mark.parametrize(("change", "error", "match"), [x[1:] for x in BAD], ids=[x[0] for x in BAD])
def test_bad_call_names_the_argument(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Append(I8, I4, BF16).run(**change)


def test_scales_of_caches_that_have_no_codes_are_refused() -> None:
    call = Append(BF16, BF16, BF16)
    with pytest.raises(
        ValueError, match=r"key_scale and key_center must be None for a key_cache of bfloat16"
    ):
        call.run(key_scale=torch.ones(2, 24))
    call = Append(I8, I8, BF16)
    call.new = torch.zeros(call.new[0].shape, dtype=I8), call.new[1]
    with pytest.raises(ValueError, match=r"key_scale and key_center must be None for a key that has codes"):
        call.run()
    angles = torch.zeros(10, 4)
    call.state["key_scale"] = call.state["key_center"] = None
    with pytest.raises(ValueError, match=r"rotary_cos must be None for a key that has codes"):
        call.run(rotary_cos=angles, rotary_sin=angles)


def test_codes_of_another_dtype_are_refused() -> None:
    call = Append(I8, I8, BF16)
    call.new = torch.zeros(call.new[0].shape, dtype=torch.uint8), call.new[1]
    with pytest.raises(TypeError, match=r"key must be"):
        call.run()
