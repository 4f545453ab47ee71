"""The one error criterion of the tests.

A result passes when its error against the oracle in float64 is at most twice the error that the same maths
has when torch does it in the working dtype, plus a few roundings of the magnitude of the exact result
(``allowed_error`` of ``fusedkv_ext.bench.criterion``, by which benchmarks judge too). Both the largest and
the root-mean-square error are held to it: the first finds a single wrong element, the second a small error
in all of them. NaN and infinities must sit exactly where the oracle has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedkv_ext.bench.criterion import allowed_error

Outputs = Tensor | tuple[Tensor, ...]


def assert_matches_oracle(
    op: Callable[..., Outputs],
    oracle: Callable[..., Outputs],
    *args: object,
    terms: float = 1,
    **kwargs: object,
) -> Outputs:
    """Calls ``op`` and judges what it returns by ``oracle``, a function of ``fusedkv_ext.ops.reference``.

    ``terms`` as in ``assert_close``. Returns what ``op`` returned, so that a test can go on with it.
    """
    got = op(*args, **kwargs)
    with torch.no_grad():
        exact = oracle(*args, **kwargs, dtype=torch.float64)
        same_maths = oracle(*args, **kwargs)
    assert_close(got, exact, same_maths, terms=terms)
    return got


def assert_close(
    got: Outputs, exact: Outputs, same_maths: Outputs, name: str = "out", terms: float = 1
) -> None:
    """Holds ``got`` to the criterion above; ``same_maths`` is torch's result in the working dtype.

    ``terms``: where each element is a sum that may run in any order, as in gradients of shared inputs, its
    number of terms. Their roundings add up like a random walk: the atol grows with the square root.
    """
    if isinstance(got, Tensor):
        _assert_close(got, exact, same_maths, name, terms)
        return
    assert len(got) == len(exact) == len(same_maths)
    for i, triple in enumerate(zip(got, exact, same_maths, strict=True)):
        _assert_close(*triple, f"{name}[{i}]", terms)


def assert_same_bits(first: Outputs, second: Outputs) -> None:
    """Every element of both is the same bit pattern: NaN equals itself, -0 differs from +0."""
    if not isinstance(first, Tensor):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)
        return
    assert first.dtype == second.dtype and first.shape == second.shape
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    differs = first.contiguous().view(width) != second.contiguous().view(width)
    if differs.any():
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} elements differ in their bits, first at {where}: "
            f"{first[where].item()!r} and {second[where].item()!r}"
        )


def assert_near(first: Tensor, second: Tensor, rounding_steps: float = 8) -> None:
    """Two results of the same dtype differ by no more than a few roundings of their largest element.

    For properties that relate two calls of our own operations; against the oracle use
    ``assert_matches_oracle``.
    """
    assert first.dtype == second.dtype
    magnitude = float(second.abs().max()) if second.numel() else 0.0
    atol = rounding_steps * torch.finfo(first.dtype).eps * magnitude
    torch.testing.assert_close(first, second, rtol=0, atol=atol)


def _assert_close(got: Tensor, exact: Tensor, same_maths: Tensor, name: str, terms: float) -> None:
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    got_as_is, got = got.detach().cpu(), got.detach().cpu().double()
    exact, same_maths = exact.detach().cpu().double(), same_maths.detach().cpu().double()
    # What overflows the working dtype must be infinite in the result as well.
    expected = exact.to(got_as_is.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differs = kind(got_as_is) != kind(expected)
        if differs.any():
            where = tuple(differs.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {kind.__name__} differs at {int(differs.sum())} places, first at {where}: "
                f"got {got[where].item()!r}, exact {exact[where].item()!r}"
            )
    finite = torch.isfinite(expected)
    if not finite.any():
        return
    error = torch.where(finite, got - exact, 0.0).abs()
    usual = torch.where(finite & torch.isfinite(same_maths), same_maths - exact, 0.0).abs()
    size = torch.where(finite, exact, 0.0).abs()
    for measure, of in (("largest", torch.amax), ("root-mean-square", lambda x: x.square().mean().sqrt())):
        limit = allowed_error(got_as_is.dtype, float(of(usual)), float(of(size)), terms)
        if of(error) > limit:
            where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{name}: {measure} error {of(error):.3e}, allowed {limit:.3e} (torch in the working dtype: "
                f"{of(usual):.3e}); worst at {where} of {tuple(got.shape)}: got {got[where].item()!r}, "
                f"exact {exact[where].item()!r}"
            )
