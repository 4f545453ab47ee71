"""The error criterion of what is timed, of `fusedkv info --verify` and of the tests.

A result passes when its error against the oracle in float64 is at most twice the error that the same maths
has when torch does it in the working dtype, plus ``ROUNDINGS[dtype] * eps(dtype) * magnitude of the exact
result``. Both the largest and the root-mean-square error are held to it. NaN and infinities must sit exactly
where the oracle has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 2.0

# Roundings of the size of the output's own that a faultless kernel makes. 16-bit dtypes are summed in
# float32: the output's is the only one. In float32 those of the scores, of exp and of the sums come on top,
# and torch may be lucky in all of them. In float64 the oracle makes as many as the kernel.
ROUNDINGS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 6, torch.float64: 8}

Outputs = Tensor | Sequence[Tensor]


class WrongResult(RuntimeError):
    """What was to be timed does not compute what it should."""


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def largest_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest absolute difference; NaN when there is one anywhere."""
    return float(torch.stack([(a.double() - b).abs().max() for a, b in zip(got, exact, strict=True)]).max())


def allowed_error(dtype: torch.dtype, usual: float, size: float, terms: float = 1) -> float:
    """The limit of an error where torch in ``dtype`` makes ``usual`` and the result is of size ``size``.

    ``terms``: of how many summands, in any order, an element is made; their roundings add up like a random
    walk.
    """
    return FACTOR * usual + ROUNDINGS[dtype] * torch.finfo(dtype).eps * terms**0.5 * size


def require_right(name: str, got: Outputs, exact: Outputs, same_maths: Outputs, terms: float = 1) -> None:
    """Raises WrongResult unless every tensor of ``got`` meets the criterion."""
    triples = zip(as_tuple(got), as_tuple(exact), as_tuple(same_maths), strict=True)
    for i, triple in enumerate(triples):
        _require_right(f"{name}, output {i}", *(x.detach() for x in triple), terms)


def _require_right(name: str, got: Tensor, exact: Tensor, same_maths: Tensor, terms: float) -> None:
    if got.shape != exact.shape:
        raise WrongResult(f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    expected = exact.to(got.dtype)  # what overflows the working dtype must be infinite in the result as well
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differing = int((kind(got) != kind(expected)).sum())
        if differing:
            raise WrongResult(f"{name}: {kind.__name__} differs at {differing} places")
    finite, exact = torch.isfinite(expected), exact.double()
    error = torch.where(finite, got.double() - exact, 0.0).abs()
    usual = torch.where(finite & torch.isfinite(same_maths), same_maths.double() - exact, 0.0).abs()
    size = torch.where(finite, exact, 0.0).abs()
    for measure, of in (("largest", torch.amax), ("root-mean-square", lambda x: x.square().mean().sqrt())):
        limit = allowed_error(got.dtype, float(of(usual)), float(of(size)), terms)
        if float(of(error)) > limit:
            raise WrongResult(f"{name}: {measure} error {float(of(error)):.3e}, allowed {limit:.3e}")


def require_same_maths(name: str, got: Outputs, ours: Outputs) -> None:
    """Raises WrongResult where a peer is not near our result, which was checked: rounding, and no mistake.

    A peer may round more often than we do, so the distance is relative to the norm and wide.
    """
    mine, peer = (torch.cat([x.detach().flatten().double() for x in as_tuple(o)]) for o in (ours, got))
    distance = float((mine - peer).norm() / mine.norm()) if mine.shape == peer.shape else float("inf")
    if not distance < 0.03:
        raise WrongResult(f"{name} computes something else: relative distance {distance:.3f}")
