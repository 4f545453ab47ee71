"""plain_step: the short way of a decoding step without options, which gives what the long way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkv_ext import debug_checks, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import cached
from fusedkv_ext.testing import assert_same_bits


def step(m: int = 2, page_size: int | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    shape = (2, 48, 2, 64) if page_size is None else (96 // page_size, page_size, 2, 64)
    keys, values = ([torch.randn(shape).to(dtype) for _ in range(m)] for _ in range(2))
    table = None if page_size is None else torch.randperm(shape[0]).int().view(2, -1)
    weights = [torch.randn(m, 2, 64) if m > 1 else None for _ in range(2)]
    return {
        "q": torch.randn(2, 1, 8, 64).to(dtype),
        "key_caches": keys,
        "value_caches": values,
        "key_weights": weights[0],
        "value_weights": weights[1],
        "cache_seqlens": torch.tensor([48, 7], dtype=torch.int32),
        "block_table": table,
    }


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call since then took the short way."""
    taken: list[bool] = []
    plain_step = cached.plain_step

    def recorded(*args: Any) -> Tensor | None:
        out = plain_step(*args)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(cached, "plain_step", recorded)
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "page_size"), [(1, None), (2, None), (3, 16)])
def test_both_ways_give_the_same_bits(
    m: int, page_size: int | None, dtype: torch.dtype, short: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = step(m, page_size, dtype)
    for scale in ({}, {"softmax_scale": 0.3}):
        out = fused_kv_attn_with_kvcache(**call, **scale)
        assert short.pop() and isinstance(out, Tensor)
        with monkeypatch.context() as patched:
            patched.setattr(cached, "plain_step", lambda *_: None)
            assert_same_bits(out, fused_kv_attn_with_kvcache(**call, **scale))


CHANGES: dict[str, dict[str, Any]] = {
    "lse": {"return_lse": True},
    "window": {"window_size": (5, 0)},
    "not causal": {"causal": False},
    "soft cap": {"softcap": 3.0},
    "sinks": {"sinks": torch.zeros(8)},
    "lengths on the host": {"host_seqlens": [48, 7]},
    "batch-invariant": {"batch_invariant": True},
    "out": {"out": torch.empty(2, 1, 8, 64, dtype=torch.bfloat16)},
    "int64 lengths": {"cache_seqlens": torch.tensor([48, 7])},
    "an int as lengths": {"cache_seqlens": 48},
    "weights to be broadcast": {"key_weights": torch.ones(2, 1, 1)},
    "bfloat16 weights": {"value_weights": torch.ones(2, 2, 64, dtype=torch.bfloat16)},
    "an int as scale": {"softmax_scale": 1},
    "tuples": {"key_caches": tuple(step()["key_caches"])},
    "many rows": {"q": torch.randn(2, 9, 8, 64).bfloat16()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_with_an_option_takes_the_long_way(change: str, short: list[bool]) -> None:
    result = fused_kv_attn_with_kvcache(**{**step(), **CHANGES[change]})
    assert isinstance(result, tuple) == (change == "lse") and not any(short)


def test_debug_checks_take_the_long_way(short: list[bool]) -> None:
    with debug_checks():
        fused_kv_attn_with_kvcache(**step())
    assert not any(short)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"cache_seqlens": torch.tensor([49, 7], dtype=torch.int32)},
            ValueError,
            r"cache_seqlens\[0\] must be",
        ),
        ({"q": torch.randn(2, 1, 7, 64).bfloat16()}, ValueError, "q must have a multiple of"),
        ({"q": torch.randn(3, 1, 8, 64).bfloat16()}, ValueError, "must"),
        ({"q": torch.randn(2, 1, 8, 72).bfloat16()}, ValueError, "must"),
        ({"key_caches": []}, ValueError, "key_caches must hold 1 to 32 tensors, got 0"),
        ({"key_caches": [None]}, TypeError, r"key_caches\[0\] must be a torch.Tensor, got NoneType"),
        ({"key_weights": torch.randn(3, 2, 64)}, ValueError, "key_weights must be broadcastable"),
        (
            {"key_weights": torch.randn(2, 2, 64, requires_grad=True)},
            ValueError,
            "key_weights must not require",
        ),
    ],
)
def test_errors_are_those_of_the_long_way(
    change: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**step(), **change}
    with pytest.raises(error, match=message) as short_way:
        fused_kv_attn_with_kvcache(**call)
    monkeypatch.setattr(cached, "plain_step", lambda *_: None)
    with pytest.raises(error) as long_way:
        fused_kv_attn_with_kvcache(**call)
    assert str(short_way.value) == str(long_way.value)
