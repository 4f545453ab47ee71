"""debug_checks: a switch, and a context manager that restores the earlier state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fusedkv_ext as fkv
from fusedkv_ext.ops import debug


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    fkv.debug_checks(False)
    yield
    fkv.debug_checks(False)


def test_a_plain_call_switches_at_once() -> None:
    fkv.debug_checks(True)
    assert debug.active
    fkv.debug_checks(False)
    assert not debug.active
    fkv.debug_checks()
    assert debug.active


@pytest.mark.parametrize("before", [False, True])
def test_a_block_restores_the_earlier_state(before: bool) -> None:
    fkv.debug_checks(before)
    with fkv.debug_checks():
        assert debug.active
        with fkv.debug_checks(False):
            assert not debug.active
        assert debug.active
    assert debug.active == before


def test_an_error_in_the_block_passes_and_restores() -> None:
    with pytest.raises(KeyError), fkv.debug_checks():
        raise KeyError
    assert not debug.active


def test_a_block_checks_the_lengths_that_the_host_gives() -> None:
    """With many rows; on the CPU, where they are always compared, so that only the path is the same."""
    q, cache = torch.randn(1, 33, 1, 16), torch.randn(1, 40, 1, 16)
    lengths = torch.tensor([40], dtype=torch.int32)
    with (
        fkv.debug_checks(),
        pytest.raises(ValueError, match=r"host_seqlens must be \[40\] as cache_seqlens, got \[39\]"),
    ):
        fkv.fused_kv_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, host_seqlens=[39])
