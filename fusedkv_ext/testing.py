"""The error criterion of this package, for its tests, its benchmarks and your own kernels.

A result passes if its error against a float64 oracle is at most twice the error of the same math computed by
torch in the working dtype, plus ``ROUNDINGS[dtype] * eps(dtype) * size of the exact result``. The largest and
the root-mean-square error must both pass: the first finds one wrong element, the second a small error in all
elements. NaN and infinities must be exactly where the oracle has them.

To test your own kernel, write its formula in plain torch with an argument ``dtype``, in which everything is
computed, and let ``assert_matches_oracle`` call both::

    fkv.testing.assert_matches_oracle(my_fuse_kv, fkv.testing.reference.fuse_kv, sources, weights)

``reference`` holds the oracles of this package's operations. For gradients, or for results that you already
have, use ``assert_close``. To test your own caching method, put its plan into a small ``Decoder``
and compare the logits with a cache and without one by ``assert_near``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from fusedkv_ext.errors import WrongResult
from fusedkv_ext.ops import reference

__all__ = [
    "FACTOR",
    "ROUNDINGS",
    "Comparison",
    "WrongResult",
    "assert_close",
    "assert_matches_oracle",
    "assert_near",
    "assert_same_bits",
    "compare",
    "reference",
]

FACTOR = 2.0

# Roundings of the size of the output's own that a faultless kernel makes. 16-bit dtypes are summed in
# float32: the output's is the only one. In float32 those of the scores, of exp and of the sums come on top,
# and torch may be lucky in all of them. In float64 the oracle makes as many as the kernel.
ROUNDINGS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 6, torch.float64: 8}

Outputs = Tensor | Sequence[Tensor]
_Result = TypeVar("_Result", Tensor, Sequence[Tensor])


@dataclass(frozen=True)
class Comparison:
    """One result under the criterion.

    Args:
        error: Largest absolute error; NaN if NaN, infinities or the shape differ from the oracle's.
        allowed: Limit of ``error``.
        complaint: What is wrong and where; None if the result passes.
    """

    error: float
    allowed: float
    complaint: str | None = None


def compare(
    got: Tensor, exact: Tensor, same_maths: Tensor, name: str = "out", terms: float = 1
) -> Comparison:
    """Applies the criterion to one tensor; arguments as in ``assert_close``."""
    wrong = float("nan")
    if got.shape != exact.shape:
        text = f"{name}: shape must be {tuple(exact.shape)}, got {tuple(got.shape)}"
        return Comparison(wrong, 0.0, text)
    got, exact, same_maths = (x.detach().to(exact.device) for x in (got, exact, same_maths))
    expected = exact.to(got.dtype)  # what overflows the working dtype must be infinite in the result as well
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differs = kind(got) != kind(expected)
        if differs.any():
            text = f"{kind.__name__} differs at {int(differs.sum())} places, first"
            return Comparison(wrong, 0.0, f"{name}: {text} {_at(differs.int(), got, exact)}")
    finite = torch.isfinite(expected)
    if not finite.any():
        return Comparison(0.0, 0.0)
    exact, same_maths = exact.double(), same_maths.double()
    error = torch.where(finite, got.double() - exact, 0.0).abs()
    usual = torch.where(finite & torch.isfinite(same_maths), same_maths - exact, 0.0).abs()
    size = torch.where(finite, exact, 0.0).abs()
    rounding = ROUNDINGS[got.dtype] * torch.finfo(got.dtype).eps * terms**0.5
    found = []
    for measure, of in (("largest", torch.amax), ("root-mean-square", lambda x: x.square().mean().sqrt())):
        mine, torchs = float(of(error)), float(of(usual))
        limit, complaint = FACTOR * torchs + rounding * float(of(size)), None
        if not mine <= limit:
            complaint = (
                f"{name}: {measure} error {mine:.3e}, allowed {limit:.3e} (torch in the working dtype: "
                f"{torchs:.3e}); worst {_at(error, got, exact)}"
            )
        found.append(Comparison(mine, limit, complaint))
    largest, mean_square = found
    return Comparison(largest.error, largest.allowed, largest.complaint or mean_square.complaint)


def _at(badness: Tensor, got: Tensor, exact: Tensor) -> str:
    """Where ``badness`` has its first maximum, and both values there."""
    where = tuple(int(i) for i in torch.unravel_index(badness.argmax(), badness.shape))
    return f"at {where} of {tuple(got.shape)}: got {got[where].item()!r}, exact {exact[where].item()!r}"


def assert_close(
    got: Outputs, exact: Outputs, same_maths: Outputs, name: str = "out", terms: float = 1
) -> None:
    """Holds a result, or each of several results, to the criterion.

    Args:
        got: What the operation returned.
        exact: The same in float64, from the oracle.
        same_maths: The same from torch in the working dtype.
        name: What the error message calls the result.
        terms: Number of summands where an element is a sum that may run in any order, as in gradients of
            shared inputs. Their roundings add up like a random walk, so the limit grows with the square root.

    Raises:
        WrongResult: If a result misses the criterion. It is an AssertionError.
    """
    if isinstance(got, Tensor):
        wanted, beside = cast(Tensor, exact), cast(Tensor, same_maths)
        complaint = compare(got, wanted, beside, name, terms).complaint
        if complaint is not None:
            raise WrongResult(complaint)
        return
    if not len(got) == len(exact) == len(same_maths):
        raise WrongResult(f"{name}: number of results must be {len(exact)}, got {len(got)}")
    for i, triple in enumerate(zip(got, exact, same_maths, strict=True)):
        assert_close(*triple, f"{name}[{i}]", terms)


def assert_matches_oracle(
    op: Callable[..., _Result],
    oracle: Callable[..., Outputs],
    *args: object,
    terms: float = 1,
    **kwargs: object,
) -> _Result:
    """Calls ``op`` and holds what it returns to the criterion.

    Args:
        op: The operation under test.
        oracle: A function with the arguments of ``op`` and ``dtype``, such as those of ``reference``.
        *args: Arguments of both.
        terms: As in ``assert_close``.
        **kwargs: Keyword arguments of both.

    Returns:
        What ``op`` returned, so that a test can go on with it.

    Raises:
        WrongResult: If a result misses the criterion.
    """
    got = op(*args, **kwargs)
    with torch.no_grad():
        exact = oracle(*args, **kwargs, dtype=torch.float64)
        same_maths = oracle(*args, **kwargs)
    assert_close(got, exact, same_maths, terms=terms)
    return got


def assert_same_bits(first: Outputs, second: Outputs) -> None:
    """Every element of both is the same bit pattern: NaN equals itself, -0 differs from +0.

    Raises:
        WrongResult: At the first place where they differ.
    """
    if not isinstance(first, Tensor):
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)
        return
    assert isinstance(second, Tensor)
    kinds = [(x.dtype, tuple(x.shape)) for x in (first, second)]
    if kinds[0] != kinds[1]:
        raise WrongResult(f"dtype and shape must be {kinds[1]}, got {kinds[0]}")
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    differs = first.contiguous().view(width) != second.contiguous().view(width)
    if differs.any():
        where = tuple(differs.nonzero()[0].tolist())
        raise WrongResult(
            f"{int(differs.sum())} of {differs.numel()} elements differ in their bits, first at {where}: "
            f"{first[where].item()!r} and {second[where].item()!r}"
        )


def assert_near(first: Tensor, second: Tensor, rounding_steps: float = 8) -> None:
    """Two results of the same dtype differ by at most a few roundings of their largest element.

    This is for properties that relate two calls. Against an oracle use ``assert_matches_oracle``.

    Raises:
        AssertionError: If they differ more, or in dtype or shape.
    """
    magnitude = float(second.abs().max()) if second.numel() else 0.0
    atol = rounding_steps * torch.finfo(second.dtype).eps * magnitude
    torch.testing.assert_close(first, second, rtol=0, atol=atol)
