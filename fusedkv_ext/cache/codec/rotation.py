"""The fixed rotation of rotated codecs, and the grids for what it makes of a vector.

R = H diag(signs) / sqrt(D) spreads the energy of a few large channels over all channels (QuaRot,
arXiv:2404.00456). A rotated vector of norm sqrt(D) is close to D standard normal numbers, whose best grid of
2^bits points is that of Lloyd and Max (TurboQuant, arXiv:2504.19874).
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["MAX_GRID_BITS", "gaussian_cells", "gaussian_grid", "rotation"]

MAX_GRID_BITS = 4
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: its multiples are spread evenly


@lru_cache(maxsize=32)
def rotation(dim: int) -> Tensor:
    """R (D, D), float32, orthogonal: y = R x.

    H is the Hadamard matrix of the largest power of two that divides D, in blocks along the diagonal. Signs
    are fixed, so that codes of one program can be read by another.
    """
    block = dim & -dim
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        top = torch.cat((hadamard, hadamard), 1)
        hadamard = torch.cat((top, torch.cat((hadamard, -hadamard), 1)))
    signs = [1.0 if (_GOLDEN * (d + 1) % 2**32) >> 31 else -1.0 for d in range(dim)]
    blocks = torch.block_diag(*[hadamard] * (dim // block)) / math.sqrt(block)
    return (blocks * torch.tensor(signs, dtype=torch.float64)).float()


@lru_cache(maxsize=8)
def gaussian_grid(bits: int) -> Tensor:
    """The 2^bits points that approximate a standard normal number best, ascending, float32.

    Points are the means of their cells and cells end half way between points (Lloyd 1982, Max 1960). The
    relative errors are 0.363, 0.117, 0.0345 and 0.0095 for 1 to 4 bits.
    """
    if not 1 <= bits <= MAX_GRID_BITS:
        raise ValueError(f"bits of a grid must be from 1 to {MAX_GRID_BITS}, got {bits}")
    half = 2 ** (bits - 1)
    points = [(i + 0.5) * 2.5 / half for i in range(half)]  # the positive ones; the others mirror them
    for _ in range(4000):
        ends = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(points)), math.inf]
        points = [_mean(a, b) for a, b in itertools.pairwise(ends)]
    return torch.tensor([-x for x in reversed(points)] + points)


@lru_cache(maxsize=8)
def gaussian_cells(bits: int) -> Tensor:
    """The 2^bits - 1 ends of the cells between those points, ascending, float32."""
    grid = gaussian_grid(bits)
    return (grid[1:] + grid[:-1]) / 2


def _mean(low: float, high: float) -> float:
    """Mean of a standard normal number within low .. high."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
    return (density(low) - density(high)) / mass
