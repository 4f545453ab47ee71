"""Bad calls give a ValueError or a TypeError that names the argument; no call crashes or is silently
wrong."""

from __future__ import annotations

import faulthandler
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fuzz
import pytest
import torch
from cases import Case, cache_inputs, dense_inputs
from torch import Tensor

import fusedkv_ext

CPU = torch.device("cpu")
CASE = Case("base", B=2, S=2, T=12, H=4, G=2, D=16, m_k=2, m_v=3, lengths=(12, 7))
FUSE, DENSE, CACHED, APPEND = fuzz.OPS

Arguments = dict[str, object]


def base_arguments(op: str, paged: bool = False) -> Arguments:
    """Keyword arguments of a call that works."""
    q, keys, values, a, b = dense_inputs(CASE, CPU)
    if op == FUSE:
        return {"sources": keys, "weights": a}
    if op == DENSE:
        return {"q": q, "keys": keys, "values": values, "key_weights": a, "value_weights": b}
    (q, keys, values, a, b), state = cache_inputs(
        Case(**{**vars(CASE), "page_size": 4 if paged else None}), CPU
    )
    if op == CACHED:
        caches = {"key_caches": keys, "value_caches": values}
        return {"q": q, **caches, "key_weights": a, "value_weights": b, **state}
    angles = torch.randn(12, 8)
    new = {"key": torch.randn(2, 2, 2, 16), "value": torch.randn(2, 2, 2, 16)}
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    return {**new, "key_cache": keys[0], "value_cache": values[0], **state, **rotary}


@dataclass(frozen=True)
class Bad:
    """A change that spoils a good call, and the error that must come of it."""

    name: str
    op: str
    change: Arguments | Callable[[Arguments], Arguments]
    error: type[Exception]
    match: str
    paged: bool = False

    def arguments(self) -> Arguments:
        base = base_arguments(self.op, self.paged)
        change = self.change(base) if callable(self.change) else self.change
        return {**base, **change}


def spoilt(op: str, *rows: tuple) -> list[Bad]:
    """Rows of name, change, error, pattern at the start of the message and, if the cache is paged, True."""
    return [Bad(row[0], op, *row[1:]) for row in rows]


def first(name: str, change: Callable[[Tensor], object]) -> Callable[[Arguments], Arguments]:
    """Changes the first tensor of a list argument."""
    return lambda arguments: {name: [change(arguments[name][0]), *arguments[name][1:]]}


def one(name: str, change: Callable[[Tensor], object]) -> Callable[[Arguments], Arguments]:
    """Changes a tensor argument."""
    return lambda arguments: {name: change(arguments[name])}


def every(name: str, change: Callable[[Tensor], object]) -> Callable[[Arguments], Arguments]:
    """Changes all tensors of a list argument."""
    return lambda arguments: {name: [change(x) for x in arguments[name]]}


def with_head_dim(dim: int, *names: str) -> Callable[[Arguments], Arguments]:
    """Gives all tensors of these arguments another last dim, and weights that fit."""

    def resize(x: Tensor) -> Tensor:
        return torch.randn(*x.shape[:-1], dim)

    def change(arguments: Arguments) -> Arguments:
        new: Arguments = {}
        for name in names:
            value = arguments[name]
            new[name] = [resize(x) for x in value] if isinstance(value, list) else resize(value)
        return new

    return change


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pages(*values: int) -> Tensor:
    return ints(*values).view(2, 3)


def tables(rows: int, columns: int) -> Arguments:
    return {"rotary_cos": torch.ones(rows, columns), "rotary_sin": torch.ones(rows, columns)}


def gapped(x: Tensor) -> Tensor:
    """The same values with a gap between channels."""
    return x.repeat_interleave(2, -1)[..., ::2]


NO_SLOTS = {name: [torch.zeros(7, 0, 2, 16)] * m for name, m in (("key_caches", 2), ("value_caches", 3))}

BAD_FUSE = spoilt(
    FUSE,
    ("no_sources", {"sources": []}, ValueError, r"sources must hold .* got 0"),
    (
        "thirty_three_sources",
        {"sources": [torch.randn(1, 1, 1, 8)] * 33},
        ValueError,
        r"sources must hold .* got 33",
    ),
    ("source_none", first("sources", lambda x: None), TypeError, r"sources\[0\] must be .* got NoneType"),
    ("source_list", first("sources", Tensor.tolist), TypeError, r"sources\[0\] must be .* got list"),
    ("sources_string", {"sources": "layers"}, TypeError, r"sources must be .* got str"),
    ("sources_none", {"sources": None}, TypeError, r"sources must be .* got NoneType"),
    ("source_of_3_dims", every("sources", lambda x: x[0]), ValueError, r"sources\[0\] .*4 dims"),
    (
        "source_shapes_differ",
        first("sources", lambda x: x[:, :5]),
        ValueError,
        r"sources\[1\] must have shape .* got",
    ),
    ("source_dtypes_differ", first("sources", Tensor.half), TypeError, r"sources\[1\] must .* got float32"),
    ("source_int", every("sources", Tensor.int), TypeError, r"sources\[0\] must .* got int32"),
    ("source_complex", every("sources", lambda x: x + 0j), TypeError, r"sources\[0\] must .* got complex64"),
    (
        "source_on_meta",
        first("sources", lambda x: x.to("meta")),
        ValueError,
        r"sources\[1\] must be on .* on cpu",
    ),
    (
        "source_sparse",
        first("sources", Tensor.to_sparse),
        TypeError,
        r"sources\[0\] must be .* got layout torch.sparse",
    ),
    (
        "source_last_dim_strided",
        first("sources", gapped),
        ValueError,
        r"sources\[0\] must have stride 1 in its last.* got 2",
    ),
    ("head_dim_0", with_head_dim(0, "sources"), ValueError, r"sources\[0\] must have a head dim .* got 0"),
    ("weights_none", {"weights": None}, TypeError, r"weights must be .* got NoneType"),
    ("weights_float", {"weights": 1.0}, TypeError, r"weights must be .* got float"),
    ("weights_int", one("weights", Tensor.int), TypeError, r"weights must .* got int32"),
    (
        "weights_too_few",
        {"weights": torch.ones(3, 2, 16)},
        ValueError,
        r"weights must be broadcastable .* got \(3, 2, 16\)",
    ),
    ("weights_wrong_heads", {"weights": torch.ones(2, 3, 16)}, ValueError, r"weights .*\(2, 2, 16\)"),
    ("weights_wrong_channels", {"weights": torch.ones(2, 2, 8)}, ValueError, r"weights .*\(m, G, D\)"),
    ("weights_of_4_dims", {"weights": torch.ones(1, 2, 2, 16)}, ValueError, r"weights must be broadcastable"),
    ("weights_on_meta", one("weights", lambda x: x.to("meta")), ValueError, r"weights must be on .* on meta"),
    ("weights_sparse", one("weights", Tensor.to_sparse), TypeError, r"weights must be .* got layout"),
)

BAD_DENSE = spoilt(
    DENSE,
    ("q_none", {"q": None}, TypeError, r"q must be .* got NoneType"),
    (
        "q_of_3_dims",
        one("q", lambda x: x[0]),
        ValueError,
        r"q must have 4 dims \(B, S, H, D\), got \(2, 4, 16\)",
    ),
    ("q_int", one("q", Tensor.int), TypeError, r"q must .* got int32"),
    ("q_other_dtype", one("q", Tensor.half), TypeError, r"keys\[0\] must be float16 as q, got float32"),
    ("q_on_meta", one("q", lambda x: x.to("meta")), ValueError, r"keys\[0\] must be on meta as q.* on cpu"),
    ("q_sparse", one("q", Tensor.to_sparse), TypeError, r"q must be .* got layout"),
    ("q_other_batch", one("q", lambda x: x[:1]), ValueError, r"keys\[0\] .*B = 1"),
    ("q_other_head_dim", with_head_dim(24, "q"), ValueError, r"keys\[0\] .*D = 24"),
    ("q_heads_no_multiple", one("q", lambda x: x[:, :, :3]), ValueError, r"q must have a multiple .* got 3"),
    ("q_no_heads", one("q", lambda x: x[:, :, :0]), ValueError, r"q must have a multiple of .* got 0"),
    ("q_last_dim_strided", one("q", gapped), ValueError, r"q must have stride 1 in its last dim.* got 2"),
    (
        "keys_last_dim_strided",
        first("keys", gapped),
        ValueError,
        r"keys\[0\] must have stride 1 in its last dim.* got 2",
    ),
    (
        "values_last_dim_strided",
        first("values", gapped),
        ValueError,
        r"values\[0\] must have stride 1 in its last dim.* got 2",
    ),
    ("keys_empty", {"keys": []}, ValueError, r"keys must hold .* got 0"),
    ("keys_none", {"keys": None}, TypeError, r"keys must be .* got NoneType"),
    ("key_shapes_differ", first("keys", lambda x: x[:, :5]), ValueError, r"keys\[1\] must have shape .* got"),
    ("key_dtype", first("keys", Tensor.bfloat16), TypeError, r"keys\[0\] must .* got bfloat16"),
    (
        "values_shorter_than_keys",
        every("values", lambda x: x[:, :5]),
        ValueError,
        r"values\[0\] must have keys\[0\]'s \(B, T, G\)",
    ),
    (
        "values_other_heads",
        every("values", lambda x: x[:, :, :1]),
        ValueError,
        r"values\[0\] must have keys\[0\]'s \(B, T, G\)",
    ),
    (
        "values_head_dim_0",
        with_head_dim(0, "values"),
        ValueError,
        r"values\[0\] must have a head dim .* got 0",
    ),
    ("value_sparse", first("values", Tensor.to_sparse), TypeError, r"values\[0\] must be .* got layout"),
    ("keys_34", {"keys": [torch.randn(2, 12, 2, 16)] * 34}, ValueError, r"keys must hold .* got 34"),
    (
        "key_weights_count",
        {"key_weights": torch.ones(3, 2, 16)},
        ValueError,
        r"key_weights must be broadcastable",
    ),
    (
        "value_weights_count",
        {"value_weights": torch.ones(2, 2, 16)},
        ValueError,
        r"value_weights must be broadcastable",
    ),
    ("key_weights_list", {"key_weights": [1.0, 1.0]}, TypeError, r"key_weights must be .* got list"),
    ("value_weights_bool", one("value_weights", Tensor.bool), TypeError, r"value_weights must .* got bool"),
    ("scale_string", {"softmax_scale": "1"}, TypeError, r"softmax_scale must be .* got str"),
    ("scale_tensor", {"softmax_scale": torch.tensor(1.0)}, TypeError, r"softmax_scale must be .* got Tensor"),
    ("window_int", {"window_size": 4}, TypeError, r"window_size must be two ints .* got 4"),
    ("window_of_one", {"window_size": (4,)}, TypeError, r"window_size must be two ints .* got \(4,\)"),
    (
        "window_of_floats",
        {"window_size": (4.0, 1.0)},
        TypeError,
        r"window_size must be two ints .* got \(4.0, 1.0\)",
    ),
    (
        "window_below_minus_one",
        {"window_size": (-2, 0)},
        ValueError,
        r"window_size must hold sizes >= 0.* got \(-2, 0\)",
    ),
    ("causal_tensor", {"causal": torch.ones(2)}, TypeError, r"causal must be .* got Tensor"),
    ("causal_string", {"causal": "yes"}, TypeError, r"causal must be .* got str"),
    ("return_lse_tensor", {"return_lse": torch.ones(2)}, TypeError, r"return_lse must be .* got Tensor"),
)

BAD_CACHED = spoilt(
    CACHED,
    ("q_none", {"q": None}, TypeError, r"q must be .* got NoneType"),
    ("q_of_5_dims", one("q", lambda x: x[None]), ValueError, r"q must have 4 dims, got"),
    ("q_float64", one("q", Tensor.double), TypeError, r"q"),
    (
        "q_other_dtype",
        one("q", Tensor.bfloat16),
        TypeError,
        r"key_caches\[0\] must be bfloat16 as q.* got float32",
    ),
    ("q_other_batch", one("q", lambda x: x[:1]), ValueError, r"cache_seqlens|key_caches\[0\]"),
    (
        "q_heads_no_multiple",
        one("q", lambda x: x[:, :, :3]),
        ValueError,
        r"q must have a multiple of key_caches\[0\]'s 2.* got 3",
    ),
    ("q_other_head_dim", with_head_dim(24, "q"), ValueError, r"key_caches\[0\] .*head dim 24"),
    ("q_last_dim_strided", one("q", gapped), ValueError, r"q must have stride 1 in its last dim.* got 2"),
    (
        "q_on_meta",
        one("q", lambda x: x.to("meta")),
        ValueError,
        r"key_caches\[0\] must be on meta as q.* on cpu",
    ),
    ("head_dim_12", with_head_dim(12, "q", "key_caches"), ValueError, r"key_weights must be broadcastable"),
    ("head_dim_264", with_head_dim(264, "q", "key_caches"), ValueError, r"key_weights must be broadcastable"),
    ("caches_empty", {"key_caches": []}, ValueError, r"key_caches must hold .* got 0"),
    (
        "caches_33",
        {"value_caches": [torch.zeros(2, 12, 2, 16)] * 33},
        ValueError,
        r"value_caches must hold .* got 33",
    ),
    (
        "cache_sparse",
        first("key_caches", Tensor.to_sparse),
        TypeError,
        r"key_caches\[0\] must be .* got layout",
    ),
    (
        "cache_shapes_differ",
        first("key_caches", lambda x: x[:, :8]),
        ValueError,
        r"key_caches\[1\] must have shape \(2, 8, 2, 16\)",
    ),
    (
        "value_cache_shorter",
        every("value_caches", lambda x: x[:, :8]),
        ValueError,
        r"value_caches\[0\] must have the shape of.* got \(2, 8, 2, 16\)",
    ),
    (
        "value_cache_dtype",
        first("value_caches", Tensor.half),
        TypeError,
        r"value_caches\[0\] must be float32 as q.* got float16",
    ),
    (
        "cache_last_dim_strided",
        first("value_caches", gapped),
        ValueError,
        r"value_caches\[0\] must have stride 1 in its.* got 2",
    ),
    (
        "key_weights_shape",
        {"key_weights": torch.ones(2, 4, 16)},
        ValueError,
        r"key_weights must be broadcastable",
    ),
    ("value_weights_int", one("value_weights", Tensor.long), TypeError, r"value_weights must .* got int64"),
    ("lengths_list", {"cache_seqlens": [12, 7]}, TypeError, r"cache_seqlens must be .* got list"),
    ("lengths_int", {"cache_seqlens": 13}, ValueError, r"cache_seqlens must be from 0 to 12.* got 13"),
    ("lengths_int_negative", {"cache_seqlens": -1}, ValueError, r"cache_seqlens must be from 0 .* got -1"),
    ("lengths_int_huge", {"cache_seqlens": 2**40}, ValueError, r"cache_seqlens must be from 0 .* got 1099"),
    ("lengths_bool", {"cache_seqlens": True}, TypeError, r"cache_seqlens must be .* got bool"),
    ("lengths_none", {"cache_seqlens": None}, ValueError, r"cache_seqlens must be given .* got None", True),
    (
        "lengths_int64_wrap",
        {"cache_seqlens": torch.tensor([12, 2**32 + 7])},
        ValueError,
        r"cache_seqlens\[1\] must be from 0 to 12",
    ),
    ("lengths_int16", one("cache_seqlens", Tensor.short), TypeError, r"cache_seqlens .*int32"),
    ("lengths_float", one("cache_seqlens", Tensor.float), TypeError, r"cache_seqlens .*int32"),
    (
        "lengths_of_2_dims",
        one("cache_seqlens", lambda x: x[None]),
        ValueError,
        r"cache_seqlens must have 1 dim \(B,\).* got \(1, 2\)",
    ),
    (
        "lengths_of_another_batch",
        {"cache_seqlens": ints(12, 7, 3)},
        ValueError,
        r"cache_seqlens must have 2 entries, the.* got 3",
    ),
    (
        "length_beyond_cache",
        {"cache_seqlens": ints(12, 13)},
        ValueError,
        r"cache_seqlens\[1\] must be from 0 to 12, the.* got 13",
    ),
    (
        "length_negative",
        {"cache_seqlens": ints(-1, 7)},
        ValueError,
        r"cache_seqlens\[0\] must be from 0 to 12, the.* got -1",
    ),
    ("length_int32_max", {"cache_seqlens": ints(2**31 - 1, 7)}, ValueError, r"cache_seqlens\[0\]"),
    (
        "length_beyond_pages",
        {"cache_seqlens": ints(12, 13)},
        ValueError,
        r"cache_seqlens\[1\] must be from 0 to 12, the.* got 13",
        True,
    ),
    (
        "table_list",
        {"block_table": [[0, 1, 2], [3, 4, 0]]},
        TypeError,
        r"block_table must be .* got list",
        True,
    ),
    ("table_int16", one("block_table", Tensor.short), TypeError, r"block_table .*int32", True),
    (
        "table_int64_wrap",
        {"block_table": pages(0, 1, 2, 3, 4, 5).long() + torch.tensor([[0, 2**32, 0], [0, 0, 0]])},
        ValueError,
        r"block_table\[0, 1\] must be a page from 0 to 6",
        True,
    ),
    (
        "table_of_1_dim",
        one("block_table", lambda x: x[0]),
        ValueError,
        r"block_table must have 2 dims \(B, max_pages\).* got \(3\)",
        True,
    ),
    (
        "table_of_another_batch",
        one("block_table", lambda x: x[:1]),
        ValueError,
        r"block_table must have 2 rows, the batch size.* got 1",
        True,
    ),
    (
        "table_on_meta",
        one("block_table", lambda x: x.to("meta")),
        ValueError,
        r"block_table must be on",
        True,
    ),
    (
        "page_too_large",
        {"block_table": pages(0, 1, 7, 2, 3, 4)},
        ValueError,
        r"block_table\[0, 2\] must be a page from 0 to 6.* got 7",
        True,
    ),
    (
        "page_negative",
        {"block_table": pages(0, 1, 2, 3, -1, 4)},
        ValueError,
        r"block_table\[1, 1\] must be a page from 0 to 6.* got -1",
        True,
    ),
    (
        "page_unused_entry",
        {"cache_seqlens": ints(12, 9)},
        ValueError,
        r"block_table\[1, 2\] must be a page from 0 to 6.* got 2147483647",
        True,
    ),
    ("page_size_0", NO_SLOTS, ValueError, r"key_caches\[0\]", True),
    ("scale_list", {"softmax_scale": [1.0]}, TypeError, r"softmax_scale must be .* got list"),
    ("window_none", {"window_size": None}, TypeError, r"window_size must be two ints .* got None"),
    ("window_of_bools", {"window_size": (True, False)}, TypeError, r"window_size"),
)

BAD_APPEND = spoilt(
    APPEND,
    ("key_none", {"key": None}, TypeError, r"key must be .* got NoneType"),
    ("value_list", one("value", Tensor.tolist), TypeError, r"value must be .* got list"),
    (
        "key_of_3_dims",
        one("key", lambda x: x[0]),
        ValueError,
        r"key must have 4 dims \(B, S, G, D\).* got \(2, 2, 16\)",
    ),
    (
        "key_cache_of_3_dims",
        one("key_cache", lambda x: x[0]),
        ValueError,
        r"key_cache must have 4 dims \(B, capacity, G.* got \(12, 2, 16\)",
    ),
    ("key_int", one("key", Tensor.int), TypeError, r"key"),
    (
        "key_cache_other_dtype",
        one("key_cache", Tensor.half),
        TypeError,
        r"key_cache must be float32 as key.* got float16",
    ),
    (
        "value_other_dtype",
        one("value", Tensor.half),
        TypeError,
        r"value must be float32 as key.* got float16",
    ),
    (
        "value_other_length",
        one("value", lambda x: x[:, :1]),
        ValueError,
        r"value must have B and S of key, \(2, 2, 2.* got \(2, 1, 2, 16\)",
    ),
    (
        "key_other_heads",
        one("key", lambda x: x[:, :, :1]),
        ValueError,
        r"key must have the heads and head dim of.* got \(2, 2, 1, 16\)",
    ),
    (
        "key_other_head_dim",
        with_head_dim(24, "key"),
        ValueError,
        r"key must have the heads and head dim of.* got \(2, 2, 2, 24\)",
    ),
    (
        "head_dim_0",
        with_head_dim(0, "key", "key_cache"),
        ValueError,
        r"key must have a head dim of at least 1.* got 0",
    ),
    ("head_dim_12", with_head_dim(12, "key", "key_cache"), ValueError, r"rotary_cos .*D / 2 = 6 columns"),
    (
        "unequal_capacity",
        one("value_cache", lambda x: x[:, :8]),
        ValueError,
        r"value_cache must have the first two dims of.* got \(2, 8, 2, 16\)",
    ),
    (
        "cache_other_batch",
        one("key_cache", lambda x: x[:1]),
        ValueError,
        r"value_cache must have the first two dims of",
    ),
    ("key_sparse", one("key", Tensor.to_sparse), TypeError, r"key must be .* got layout"),
    (
        "key_cache_on_meta",
        one("key_cache", lambda x: x.to("meta")),
        ValueError,
        r"key_cache must be on .* on meta",
    ),
    (
        "key_last_dim_strided",
        one("key", gapped),
        ValueError,
        r"key must have stride 1 in its last dim.* got 2",
    ),
    (
        "cache_last_dim_strided",
        one("value_cache", gapped),
        ValueError,
        r"value_cache must have stride 1 in its last.* got 2",
    ),
    ("lengths_int64", one("cache_seqlens", Tensor.long), TypeError, r"cache_seqlens .*int32"),
    (
        "length_beyond_cache",
        {"cache_seqlens": ints(12, 13)},
        ValueError,
        r"cache_seqlens\[1\] must be from 0 to 12, the.* got 13",
    ),
    (
        "length_negative",
        {"cache_seqlens": ints(-3, 7)},
        ValueError,
        r"cache_seqlens\[0\] must be from 0 to 12, the.* got -3",
    ),
    (
        "lengths_of_another_batch",
        {"cache_seqlens": ints(12)},
        ValueError,
        r"cache_seqlens must have 2 entries, the.* got 1",
    ),
    (
        "page_too_large",
        {"block_table": pages(0, 1, 7, 2, 3, 4)},
        ValueError,
        r"block_table\[0, 2\] must be a page from 0 to 6.* got 7",
        True,
    ),
    (
        "page_negative",
        {"block_table": pages(0, 1, 2, 3, -1, 4)},
        ValueError,
        r"block_table\[1, 1\] must be a page from 0 to 6.* got -1",
        True,
    ),
    ("sin_missing", {"rotary_sin": None}, ValueError, r"rotary_cos and rotary_sin"),
    ("cos_missing", {"rotary_cos": None}, ValueError, r"rotary_cos and rotary_sin"),
    ("cos_int", one("rotary_cos", Tensor.int), TypeError, r"rotary_cos must .* got int32"),
    ("cos_string", {"rotary_cos": "cos"}, TypeError, r"rotary_cos must be .* got str"),
    (
        "cos_of_1_dim",
        one("rotary_cos", lambda x: x[0]),
        ValueError,
        r"rotary_cos must be contiguous of shape.* got \(8\)",
    ),
    (
        "sin_of_another_shape",
        one("rotary_sin", lambda x: x[:, :4]),
        ValueError,
        r"rotary_sin must have shape \(12, 8\) as.* got \(12, 4\)",
    ),
    ("tables_too_short", tables(11, 8), ValueError, r"rotary_cos must have at least 12 rows, the.* got 11"),
    ("tables_too_wide", tables(12, 9), ValueError, r"rotary_cos must have at most D / 2 = 8.* got \(12, 9\)"),
    (
        "interleaved_tensor",
        {"rotary_interleaved": torch.ones(2)},
        TypeError,
        r"rotary_interleaved must be .* got Tensor",
    ),
)

BAD_CALLS = [*BAD_FUSE, *BAD_DENSE, *BAD_CACHED, *BAD_APPEND]


@pytest.mark.parametrize("op", fuzz.OPS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_the_calls_that_are_spoilt_are_good_ones(op: str, paged: bool) -> None:
    getattr(fusedkv_ext, op)(**base_arguments(op, paged))


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: f"{bad.op}-{bad.name}")
def test_error_names_the_argument(bad: Bad) -> None:
    arguments = bad.arguments()
    with pytest.raises(bad.error, match=f"^{bad.match}") as caught:
        getattr(fusedkv_ext, bad.op)(**arguments)
    assert type(caught.value) is bad.error
    assert re.search("expected|must|grad|;", str(caught.value))


@pytest.mark.parametrize("op", fuzz.OPS)
def test_empty_batch_and_no_tokens_are_no_errors(op: str) -> None:
    empty = Case(**{**vars(CASE), "B": 0, "lengths": ()})
    q, keys, values, a, b = dense_inputs(empty, CPU)
    lengths = ints()
    if op == FUSE:
        assert fusedkv_ext.fuse_kv(keys, a).shape == (0, 12, 2, 16)
        assert fusedkv_ext.fuse_kv([x.new_zeros(2, 0, 2, 16) for x in keys], a).shape == (2, 0, 2, 16)
    elif op == DENSE:
        assert fusedkv_ext.fused_kv_attn_func(q, keys, values, a, b).shape == (0, 2, 4, 16)
        none = [q.new_zeros(2, 0, 2, 16)]
        out, lse = fusedkv_ext.fused_kv_attn_func(q.new_ones(2, 3, 4, 16), none, none, return_lse=True)
        assert not out.any() and bool((lse == -torch.inf).all())
    elif op == CACHED:
        out = fusedkv_ext.fused_kv_attn_with_kvcache(q, keys, values, a, b, cache_seqlens=lengths)
        assert out.shape == (0, 2, 4, 16)
        full = base_arguments(op)
        assert fusedkv_ext.fused_kv_attn_with_kvcache(**{**full, "q": full["q"][:, :0]}).shape == (
            2,
            0,
            4,
            16,
        )
    else:
        new = torch.randn(0, 2, 2, 16)
        fusedkv_ext.append_kvcache(new, new, keys[0], values[0], cache_seqlens=lengths)
        full = base_arguments(op)
        before = full["key_cache"].clone()
        fusedkv_ext.append_kvcache(**{**full, "key": full["key"][:, :0], "value": full["value"][:, :0]})
        assert torch.equal(full["key_cache"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("op", fuzz.OPS[:3])
def test_non_finite_weights_propagate_and_stay_in_their_head(op: str, value: float) -> None:
    arguments = base_arguments(op)
    name = "weights" if op == FUSE else "value_weights"
    weights = arguments[name].clone()
    weights[0, 1, 3] = value
    out = getattr(fusedkv_ext, op)(**{**arguments, name: weights})
    heads = slice(1, 2) if op == FUSE else slice(2, 4)
    assert not torch.isfinite(out[:, :, heads, 3]).any()
    out[:, :, heads, 3] = 0
    assert bool(torch.isfinite(out).all())


@pytest.fixture
def stopwatch() -> Iterator[None]:
    """A call that hangs ends the run with the place where it hangs."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", range(5))
@pytest.mark.parametrize("op", fuzz.OPS)
def test_random_calls_agree_with_the_oracle_or_are_refused(
    op: str, batch: int, stopwatch: None, with_threads: Callable[[int], None]
) -> None:
    with_threads(1)
    agreed = refused = 0
    failures = []
    for seed in range(200 * batch, 200 * (batch + 1)):
        call = fuzz.random_call(op, seed)
        try:
            agreed, refused = (agreed + 1, refused) if fuzz.check(call) else (agreed, refused + 1)
        except Exception as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {error}\n  {call}")
    assert not failures, "\n".join(failures[:5])
    # Both kinds must occur, or the changes are too tame or too wild to find anything. Over four operations
    # and five batches at least 2000 calls are bad.
    assert agreed >= 20 and refused >= 100


def test_native_operations_survive_any_arguments(tmp_path: Path) -> None:
    """In a process of its own, because a crash would take the test run with it."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import fuzz; fuzz.main(600)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = tmp_path / "last_call.txt"
    called = last.read_text() if last.exists() else "nothing was called"
    assert done.returncode == 0, f"{called}\n{done.stderr[-3000:]}"
