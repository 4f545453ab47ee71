"""The criterion of ``fusedkv_ext.testing``: what it lets pass, what it refuses, what it says."""

from __future__ import annotations

import re

import pytest
import torch

import fusedkv_ext as fkv
from fusedkv_ext.errors import WrongResult
from fusedkv_ext.testing import (
    assert_close,
    assert_matches_oracle,
    assert_near,
    assert_same_bits,
    compare,
    reference,
)

DTYPES = [torch.float32, torch.bfloat16]


def test_it_is_part_of_the_package_and_an_assertion() -> None:
    assert fkv.testing.assert_close is assert_close
    assert issubclass(WrongResult, AssertionError)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_infinities_and_wrong_shapes_are_refused(dtype: torch.dtype) -> None:
    exact = torch.randn(5, 7, dtype=torch.float64)
    assert_close(exact.to(dtype), exact, exact.to(dtype))
    for bad in (torch.full((5, 7), torch.nan), torch.ones(5, 6), exact + 0.1, exact.clone().fill_(torch.inf)):
        with pytest.raises(WrongResult):
            assert_close(bad.to(dtype), exact, exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_error_of_torch_passes_and_more_does_not(dtype: torch.dtype) -> None:
    exact = torch.full((4, 4), 3.0, dtype=torch.float64)
    torchs = (exact + 0.5).to(dtype)
    assert_close((exact + 1.0).to(dtype), exact, torchs)
    with pytest.raises(WrongResult, match="largest error 1.2"):
        assert_close((exact + 1.25).to(dtype), exact, torchs)


def test_a_small_error_everywhere_is_found_by_its_mean_square() -> None:
    exact = torch.ones(100, dtype=torch.float64)
    torchs = exact.float()
    torchs[0] += 0.1
    with pytest.raises(WrongResult, match="root-mean-square error 5.0"):
        assert_close(exact.float() + 0.05, exact, torchs)


def test_messages_say_where_and_what() -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64)
    got = exact.float()
    got[1, 2] = 4.0
    with pytest.raises(WrongResult, match=re.escape("grad[1]: largest error 4.000e+00, allowed 0.000e+00")):
        assert_close([exact.float(), got], [exact] * 2, [exact.float()] * 2, "grad")
    with pytest.raises(WrongResult, match=re.escape("at (1, 2) of (2, 3): got 4.0, exact 0.0")):
        assert_close(got, exact, exact.float())
    got[0, 1] = torch.nan
    with pytest.raises(WrongResult, match=re.escape("isnan differs at 1 places, first at (0, 1)")):
        assert_close(got, exact, exact.float())
    with pytest.raises(WrongResult, match="number of results must be 2, got 1"):
        assert_close([got], [exact] * 2, [exact] * 2)


def test_empty_results_and_equal_infinities_pass() -> None:
    for exact in (torch.ones(0, 3).double(), torch.full((2,), -torch.inf).double()):
        assert compare(exact.float(), exact, exact.float()).complaint is None


def test_what_overflows_the_working_dtype_is_infinite() -> None:
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_close(exact.half(), exact, exact.half())
    with pytest.raises(WrongResult, match="isposinf"):
        assert_close(torch.tensor([65504.0, 1.0]).half(), exact, exact.half())


def test_sums_of_many_terms_get_more_room() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    got = exact.float() + 1e-5
    with pytest.raises(WrongResult):
        assert_close(got, exact, exact.float())
    assert_close(got, exact, exact.float(), terms=1000)


def test_an_own_kernel_is_called_beside_the_oracle() -> None:
    sources, weights = [torch.randn(1, 3, 2, 8) for _ in range(2)], torch.rand(2, 2, 8)
    got = assert_matches_oracle(
        lambda x, w: w[0] * x[0] + w[1] * x[1], reference.fuse_kv, sources, weights, terms=2
    )
    assert got.shape == (1, 3, 2, 8)
    with pytest.raises(WrongResult):
        assert_matches_oracle(lambda x, w: w[0] * x[0], reference.fuse_kv, sources, weights)


def test_bits_and_roundings() -> None:
    x = torch.tensor([0.0, torch.nan, 1.0])
    assert_same_bits([x, x], [x, x.clone()])
    with pytest.raises(WrongResult, match=re.escape("1 of 3 elements differ in their bits, first at (0,)")):
        assert_same_bits(x, torch.tensor([-0.0, torch.nan, 1.0]))
    with pytest.raises(WrongResult, match="dtype and shape must be"):
        assert_same_bits(x, x.double())
    one = torch.ones(3)
    assert_near(one, one + 5e-7)
    for other in (one + 5e-6, one.double()):
        with pytest.raises(AssertionError):
            assert_near(one, other)
