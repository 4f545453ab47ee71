"""Fits the numbers of a codec to a sample of the tensor that it writes.

Errors are measured by what they cost: an error e of a key costs e^T M e in squared scores, with M = E[q q^T];
an error of a value costs e^T M e in the squared output, with M = O^T O of the output projection.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fusedkv_ext.cache.codec.codec import Codec
from fusedkv_ext.cache.codec.tensor_codec import E4M3_MAX, TensorCodec

__all__ = ["FIRST_TOKENS", "fit", "spectrum"]

FIRST_TOKENS = 4  # of a text: their norms are ten times those of others

# Parts of the range below and above the median that a static scale may cover; numbers beyond it saturate.
_CLIPS = torch.linspace(0.3, 1.0, 8).tolist()
# With 8 bits a number beyond the range costs more than a coarser scale: room for what the sample lacks.
_MARGIN_OF_8_BITS = 2.0


@torch.no_grad()
def fit(
    codec: TensorCodec, sample: Tensor, metric: Tensor | None = None, first: Tensor | None = None
) -> TensorCodec:
    """Sets the center, scale, balance and basis of ``codec``; returns it.

    Args:
        codec: The codec to fit.
        sample: (N, g, D), vectors of the tensor. Without the first tokens of texts, whose norms would set the
            ranges.
        metric: M, float64 (g, D, D); None for the identity.
        first: (N, g, D), vectors of first tokens. Static ranges of 8 bits hold them, raw or not: texts have
            other tokens of such norms. Fewer bits have no room for them.

    Raises:
        ValueError: A sample has another shape, fewer than 2 vectors, or NaN or infinities.
    """
    heads, dim = codec.num_heads, codec.head_dim
    sample = _checked("sample", sample, heads, dim, least=2)
    first = sample[:0] if first is None else _checked("first", first, heads, dim, least=0)
    if metric is None:
        metric = torch.eye(dim, dtype=torch.float64).expand(heads, -1, -1)
    if codec.center is not None:
        codec.center.copy_(sample.mean(0))
    if codec.balance is not None:
        variance = sample.var(0).double().clamp_min(1e-12)
        weight = metric.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).to(variance.device)
        # The least of (sum of weight b^2) (sum of variance / b^2): the rotation spreads the error evenly.
        balance = (variance / weight) ** 0.25
        codec.balance.copy_(balance / balance.mean(-1, keepdim=True))
    if codec.down is not None and codec.up is not None:
        down, up = _basis(codec.codec, sample, metric, codec.channels)
        codec.down.copy_(down)
        codec.up.copy_(up)
    if codec.scale is not None:
        _fit_range(codec, codec.into_frame(sample), codec.into_frame(first))
    return codec


def _checked(name: str, sample: Tensor, heads: int, dim: int, least: int) -> Tensor:
    if sample.dim() != 3 or sample.shape[1:] != (heads, dim) or len(sample) < least:
        expected = f"(N, {heads}, {dim})" + (f" with N >= {least}" if least else "")
        raise ValueError(f"{name} must be {expected}, got {tuple(sample.shape)}")
    if not sample.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or inf: the model or the text is damaged")
    return sample.float()


def spectrum(codec: Codec, sample: Tensor, metric: Tensor) -> Tensor:
    """What each further coefficient of a basis saves of E[e^T M e], float64 (g, D), falling.

    Args:
        codec: A codec with a rank.
        sample: (N, g, D).
        metric: M, float64 (g, D, D).
    """
    if codec.basis == "pairs":
        return (_pair_scores(sample, metric).sort(-1, descending=True).values / 2).repeat_interleave(2, -1)
    return _components(sample, metric)[0]


def _basis(codec: Codec, sample: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down (g, r, D) and up (g, D, r) of what a codec keeps."""
    if codec.basis == "pairs":
        pairs = _pair_scores(sample, metric).topk(rank // 2).indices.sort().values
        kept = torch.cat((pairs, pairs + sample.shape[2] // 2), dim=-1)  # (g, r)
        down = torch.nn.functional.one_hot(kept, sample.shape[2]).float()
        return down, down.mT
    _, basis, root, inverse = _components(sample, metric)
    basis = basis[..., :rank]
    return (basis.mT @ root).float(), (inverse @ basis).float()


def _components(sample: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted principal components, those with the least E[e^T M e] for any rank.

    With S the covariance, the rows of down are U^T M^(1/2) and the columns of up M^(-1/2) U, with U the
    first eigenvectors of M^(1/2) S M^(1/2).

    Returns:
        The eigenvalues (g, D), falling, their vectors in columns, M^(1/2) and M^(-1/2).
    """
    centered = (sample - sample.mean(0)).double()
    covariance = torch.einsum("ngi,ngj->gij", centered, centered) / len(sample)
    numbers, vectors = torch.linalg.eigh(metric.to(covariance.device))
    numbers = numbers.clamp_min(1e-6 * numbers.amax(-1, keepdim=True))
    root = vectors * numbers.sqrt().unsqueeze(-2) @ vectors.mT
    inverse = vectors * numbers.rsqrt().unsqueeze(-2) @ vectors.mT
    values, basis = torch.linalg.eigh(root @ covariance @ root)
    return values.flip(-1).clamp_min(0), basis.flip(-1), root, inverse


def _pair_scores(sample: Tensor, metric: Tensor) -> Tensor:
    """(g, D / 2): sum of M_ii Var[x_i] over the pair, for keys E[q_i^2] Var[k_i].

    That is ThinK's ||q_i k_i^T||^2 (arXiv:2407.21018, eq. 6) in the mean over a text, of what differs from
    the center.
    """
    weight = metric.diagonal(dim1=-2, dim2=-1).to(sample.device)
    return (weight * sample.double().var(0, unbiased=False)).unflatten(-1, (2, -1)).sum(-2)


def _fit_range(codec: TensorCodec, y: Tensor, first: Tensor) -> None:
    """Static scales of the channels y (N, g, r): of the range whose rounding has the smallest error.

    With 8 bits it is the range of all numbers, those of the first tokens included.
    """
    assert codec.scale is not None
    spec = codec.codec
    if spec.kind == "e4m3" or spec.bits == 8:
        y = torch.cat((y, first))
    if spec.kind == "e4m3":
        codec.scale.copy_((_MARGIN_OF_8_BITS * y.abs().amax(0) / E4M3_MAX).clamp_min(1e-12))
        return
    most = 127.0 if spec.bits == 8 else 2.0 ** (spec.bits - 1) - 1
    least = -127.0 if spec.bits == 8 else -most - 1
    middle = y.median(0).values
    below, above = middle - y.amin(0), y.amax(0) - middle
    clips = [_MARGIN_OF_8_BITS] if spec.bits == 8 else _CLIPS
    smallest = torch.full_like(middle, torch.inf)
    scale, center = torch.ones_like(middle), torch.zeros_like(middle)
    for low, high in itertools.product(clips, clips):
        step = ((low * below + high * above) / (most - least)).clamp_min(1e-12)
        zero = middle - low * below - step * least  # what code 0 stands for
        error = (((y - zero) / step).round().clamp(least, most) * step + zero - y).square().mean(0)
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        scale, center = torch.where(better, step, scale), torch.where(better, zero, center)
    codec.scale.copy_(scale)
    if codec.center is not None:
        codec.center.add_(codec.from_frame(center, center=False))
