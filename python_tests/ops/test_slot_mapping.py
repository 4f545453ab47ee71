"""append_kvcache with a slot_mapping: packed tokens into slots of a cache, as in vLLM."""

from __future__ import annotations

import math

import pytest
import torch
from cases import random_tensor, to_device
from torch import Tensor

from fusedkv_ext import append_kvcache, debug_checks, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import reference, slots
from fusedkv_ext.testing import assert_same_bits

CPU = torch.device("cpu")
LAYOUTS = ["contiguous", "transposed", "sliced"]


def inputs(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    shape: tuple[int, int] = (7, 16),
    total: int = 40,
) -> tuple[Tensor, ...]:
    """key, value, key_cache, value_cache and slots that differ, a third of them -1. Caches are NaN."""
    key, value = (random_tensor((1, total, 2, d), dtype, layout)[0] for d in (64, 24))
    caches = [random_tensor((*shape, 2, d), dtype, layout).fill_(math.nan) for d in (64, 24)]
    mapping = torch.randperm(shape[0] * shape[1])[:total]
    mapping[torch.rand(total) < 0.33] = -1
    return to_device((key, value, *caches, mapping), device)


def assert_appends_as_oracle(key: Tensor, value: Tensor, *rest: Tensor) -> None:
    *caches, mapping = rest
    expected = [x.clone() for x in caches]
    reference.append_kvcache(key, value, *expected, slot_mapping=mapping)
    append_kvcache(key, value, *caches, slot_mapping=mapping)
    for got, wanted in zip(caches, expected, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan()), "a slot was written that was not asked for, or not"
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_token_goes_to_its_slot_and_no_other_slot_is_written(
    dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    for shape in ((7, 16), (112, 1), (1, 112), (16, 7)):
        assert_appends_as_oracle(*inputs(device, dtype, layout, shape))


@pytest.mark.parametrize("total", [0, 1, 112])
def test_any_number_of_tokens(total: int, device: torch.device) -> None:
    assert_appends_as_oracle(*inputs(device, total=total))


def test_only_skipped_tokens_write_nothing(device: torch.device) -> None:
    key, value, *caches, mapping = inputs(device)
    append_kvcache(key, value, *caches, slot_mapping=torch.full_like(mapping, -1))
    assert all(bool(x.isnan().all()) for x in caches)


def test_first_and_last_slot(device: torch.device) -> None:
    key, value, *caches, _ = inputs(device, total=2)
    mapping = torch.tensor([111, 0], device=device)
    assert_appends_as_oracle(key, value, *caches, mapping)


def test_slots_are_the_pages_that_attention_reads(device: torch.device) -> None:
    """A batch of two sequences whose tokens were appended by slots, and by lengths and pages."""
    key, value, *caches, _ = inputs(device, total=20)
    table = torch.tensor([[5, 2], [3, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([13, 7], device=device)
    token = torch.arange(20, device=device)
    row, position = (token >= 13).long(), torch.where(token < 13, token, token - 13)
    mapping = table[row, position // 16] * 16 + position % 16
    append_kvcache(key, value, *caches, slot_mapping=mapping.long())
    q = torch.randn(2, 1, 4, 64).to(device)
    got = fused_kv_attn_with_kvcache(q, *caches, cache_seqlens=lengths, block_table=table)
    dense = [x.new_full((2, 16, *x.shape[1:]), math.nan) for x in (key, value)]
    for x, new in zip(dense, (key, value), strict=True):
        x[0, :13], x[1, :7] = new[:13], new[13:]
    torch.testing.assert_close(got, fused_kv_attn_with_kvcache(q, *dense, cache_seqlens=lengths))


@pytest.mark.parametrize("backend", ["simt1", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_slots_out_of_range_are_not_written_on_a_gpu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "host_reads", lambda x: False)
    key, value, *caches, mapping = inputs(device)
    wrong = mapping.clone()
    wrong[::3] = torch.tensor([112, 2**40, -7, 2**35 + 3, -(2**62)], device=device).repeat(3)[
        : len(wrong[::3])
    ]
    expected = [x.clone() for x in caches]
    valid = torch.where((wrong >= 0) & (wrong < 112), wrong, -1)
    reference.append_kvcache(key, value, *expected, slot_mapping=valid)
    append_kvcache(key, value, *caches, slot_mapping=wrong)
    assert_same_bits(caches, expected)


def test_one_graph_of_torch_compile_appends() -> None:
    key, value, *caches, mapping = inputs(CPU)
    expected = [x.clone() for x in caches]
    append_kvcache(key, value, *expected, slot_mapping=mapping)
    torch._dynamo.reset()
    compiled = torch.compile(append_kvcache, fullgraph=True, backend="aot_eager")
    compiled(key, value, *caches, slot_mapping=mapping)
    assert_same_bits([x.nan_to_num() for x in caches], [x.nan_to_num() for x in expected])


def test_a_write_invalidates_what_autograd_saved() -> None:
    key, value, *caches, mapping = inputs(CPU)
    versions = [x._version for x in caches]
    append_kvcache(key, value, *caches, slot_mapping=mapping)
    assert all(x._version > version for x, version in zip(caches, versions, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"slot_mapping": torch.full((40,), 112)},
            ValueError,
            r"slot_mapping\[0\] must be from 0 to 111, .* got 112",
        ),
        ({"slot_mapping": torch.full((40,), -2)}, ValueError, r"slot_mapping\[0\] must be .* or -1, got -2"),
        ({"slot_mapping": torch.zeros(40).int()}, TypeError, "slot_mapping must be int64, got int32"),
        ({"slot_mapping": [0] * 40}, TypeError, "slot_mapping must be a torch.Tensor, got list"),
        (
            {"slot_mapping": torch.zeros(39).long()},
            ValueError,
            r"slot_mapping must have shape \(40,\), .* got \(39,\)",
        ),
        ({"slot_mapping": torch.zeros(1, 40).long()}, ValueError, r"slot_mapping must have shape \(40,\)"),
        ({"slot_mapping": torch.zeros(40, device="meta").long()}, ValueError, "slot_mapping must be on cpu"),
        ({"key": torch.zeros(1, 40, 2, 64)}, ValueError, r"key must have 3 dims \(total, G, D\)"),
        ({"value": torch.zeros(39, 2, 24)}, ValueError, "value must have B and S of key"),
        (
            {"value": torch.zeros(40, 2, 64)},
            ValueError,
            "value must have the heads and head dim of value_cache",
        ),
        ({"key": torch.zeros(40, 2, 64).half()}, TypeError, "key_cache must be float16"),
        ({"key": torch.zeros(40, 2, 64, requires_grad=True)}, ValueError, "key must not require grad"),
        (
            {"cache_seqlens": torch.ones(40).int()},
            ValueError,
            "cache_seqlens must be None with a slot_mapping",
        ),
        (
            {"block_table": torch.ones(40, 1).int()},
            ValueError,
            "block_table must be None with a slot_mapping",
        ),
        (
            {"rotary_cos": torch.ones(9, 8)},
            ValueError,
            "rotary_cos must be None with a slot_mapping.*rotate key",
        ),
        ({"slot_mapping": None}, TypeError, "cache_seqlens must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    names = ("key", "value", "key_cache", "value_cache", "slot_mapping")
    arguments = dict(zip(names, inputs(CPU), strict=True))
    caches = [arguments["key_cache"], arguments["value_cache"]]
    with pytest.raises(error, match=f"^{message}"), debug_checks():
        append_kvcache(**{**arguments, **change})
    assert all(bool(x.isnan().all()) for x in caches)
