"""TensorCodec: a codec with the numbers of one stored tensor.

    x^ = center + up y,   y = scale (.) u       u codes; scale static per channel, or of the token or group

Encoding rounds y = down (x - center) / scale to the nearest code. ``up`` is the identity, diag(balance) R^T
with the rotation R, or a basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedkv_ext.cache.codec.bits import look_up, pack, unpack
from fusedkv_ext.cache.codec.codec import Codec
from fusedkv_ext.cache.codec.rotation import gaussian_cells, gaussian_grid, rotation

__all__ = ["E4M3_MAX", "Encoded", "TensorCodec"]

E4M3_MAX = 448.0
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of a float16: a scale of zero would make NaN


class Encoded(NamedTuple):
    """Tokens as they are stored.

    Attributes:
        codes: (..., T, g, bytes): the cache's dtype for raw codes, int8 for 8 bits, float8_e4m3fn, else
            uint8 (bits.py).
        scales: float16, or None for static scales. (..., T, g) for a scale per token; (..., T, g, 2, r / n)
            for groups of n channels and (..., T / n, g, 2, r) for groups of n tokens: minimum and step.
    """

    codes: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


class TensorCodec(nn.Module):
    """A codec with its static numbers, for g KV heads of D channels. Nothing here is trained.

    Args:
        codec: The codec; not raw.
        num_heads: g, the KV heads that the layer stores.
        head_dim: D.

    Attributes:
        center: float32 (g, D), or None with groups.
        scale: float32 (g, r), only with a static scale per channel.
        balance: float32 (g, D), only with ``codec.balance``.
        down, up: float32 (g, r, D) and (g, D, r), only with a rank.

    Raises:
        ValueError: The codec does not fit the head dim.
    """

    center: Tensor | None
    scale: Tensor | None
    balance: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __init__(self, codec: Codec, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.codec, self.num_heads, self.head_dim = codec, num_heads, head_dim
        self.channels = r = codec.channels(head_dim)
        g, D = num_heads, head_dim
        self.register_buffer("center", torch.zeros(g, D) if codec.centered else None)
        self.register_buffer("scale", torch.ones(g, r) if codec.scale == "channel" else None)
        self.register_buffer("balance", torch.ones(g, D) if codec.balance else None)
        basis = None if codec.rank is None else torch.eye(D)[:r].expand(g, -1, -1)
        self.register_buffer("down", None if basis is None else basis.clone())
        self.register_buffer("up", None if basis is None else basis.mT.contiguous())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorCodec:
        """Moves between devices, but stays float32: a cast of the model must not round the numbers."""

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == torch.float32 else x.to(y.device, torch.float32)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self.codec}, {self.num_heads} heads of {self.head_dim}"

    # ---- the frame ------------------------------------------------------------------------------

    def into_frame(self, x: Tensor) -> Tensor:
        """y of x, float32 (..., g, r): what is divided by the scale."""
        y = x.float()
        if self.center is not None:
            y = y - self.center
        if self.balance is not None:
            y = y / self.balance
        if self.codec.rotate:
            return y @ rotation(self.head_dim).to(y.device).mT
        return y if self.down is None else torch.einsum("...gd,grd->...gr", y, self.down)

    def from_frame(self, y: Tensor, *, center: bool = True, heads: slice | None = None) -> Tensor:
        """x^ of y, float32 (..., g, D).

        Args:
            y: (..., g, r).
            center: Whether to add the center.
            heads: Which heads y has; None: all.
        """
        x, part = y.float(), slice(None) if heads is None else heads
        if self.codec.rotate:
            x = x @ rotation(self.head_dim).to(x.device)
            if self.balance is not None:
                x *= self.balance[part]
        elif self.up is not None:
            x = torch.einsum("...gr,gdr->...gd", x, self.up[part])
        return x + self.center[part] if center and self.center is not None else x

    # ---- codes ----------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Encoded:
        """Codes of x (..., T, g, D). With scales of token groups T is a multiple of the group."""
        codec, y = self.codec, self.into_frame(x)
        if codec.kind == "raw":
            return Encoded(y.to(x.dtype), None)
        if codec.scale == "channel":
            assert self.scale is not None
            return Encoded(self._static_codes(y / self.scale), None)
        if codec.scale == "token":
            return self._token_codes(y)
        dim, size = (-1, codec.group) if codec.scale == "channel-group" else (-3, codec.group)
        grouped = y.unflatten(dim, (-1, size))
        low, high = (f(grouped, dim=dim) for f in (torch.amin, torch.amax))
        low, step = low.clamp(-_LARGEST, _LARGEST).half().float(), (high - low) / (2**codec.bits - 1)
        step = _float16(step).float()
        u = ((grouped - low.unsqueeze(dim)) / step.unsqueeze(dim)).round().clamp(0, 2**codec.bits - 1)
        codes = u.nan_to_num().to(torch.uint8).flatten(dim - 1, dim)
        return Encoded(self._packed(codes), torch.stack((low, step), dim=-2).half())

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        """x^ (..., T, g, D) of what ``encode`` returned."""
        codec, u = self.codec, self.values(encoded.codes)
        if self.scale is not None:
            u *= self.scale
        elif codec.scale == "token":
            assert encoded.scales is not None
            u *= encoded.scales.float().unsqueeze(-1)
        elif codec.scale.endswith("-group"):
            assert encoded.scales is not None
            dim = -1 if codec.scale == "channel-group" else -3
            low, step = (x.unsqueeze(dim) for x in encoded.scales.float().unbind(-2))
            grouped = u.unflatten(dim, (-1, codec.group))  # a view
            grouped *= step
            grouped += low
        return self.from_frame(u).to(dtype)

    def values(self, codes: Tensor) -> Tensor:
        """The numbers u that codes stand for, float32 (..., g, r); a new tensor unless they are raw."""
        codec = self.codec
        if codec.kind in ("raw", "e4m3") or codes.dtype == torch.int8:
            return codes.float()
        if codec.kind == "grid":
            return look_up(codes, gaussian_grid(codec.bits).to(codes.device), self.channels)
        n = unpack(codes, self.channels, codec.bits).float()
        return n if codec.scale.endswith("-group") else n.sub_(2 ** (codec.bits - 1))

    def _static_codes(self, u: Tensor) -> Tensor:
        """Codes of numbers that a scale has brought into their range, signed."""
        codec = self.codec
        if codec.kind == "e4m3":
            return u.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        if codec.bits == 8:
            return u.round().clamp(-127, 127).nan_to_num().to(torch.int8)
        half = 2 ** (codec.bits - 1)
        return self._packed((u.round().clamp(-half, half - 1) + half).nan_to_num(half).to(torch.uint8))

    def _token_codes(self, y: Tensor) -> Encoded:
        """Codes with one scale per token and head."""
        codec = self.codec
        if codec.kind != "grid":
            most = E4M3_MAX if codec.kind == "e4m3" else 2.0 ** (codec.bits - 1) - 1
            scale = _float16(y.abs().amax(-1) / most)
            return Encoded(self._static_codes(y / scale.float().unsqueeze(-1)), scale)
        grid = gaussian_grid(codec.bits).to(y.device)
        norm = torch.linalg.vector_norm(y, dim=-1)
        unit = (norm / math.sqrt(y.shape[-1])).clamp_min(_SMALLEST).unsqueeze(-1)
        codes = torch.bucketize(y / unit, gaussian_cells(codec.bits).to(y.device))
        # The scale that keeps the norm of y. One with a smaller error shortens all scores and outputs alike.
        scale = _float16(norm / torch.linalg.vector_norm(grid[codes], dim=-1))
        return Encoded(self._packed(codes.to(torch.uint8)), scale)

    def _packed(self, codes: Tensor) -> Tensor:
        return codes if self.codec.bits == 8 else pack(codes, self.codec.bits)

    # ---- attention over codes -------------------------------------------------------------------

    def fold_query(self, q: Tensor, heads: slice | None = None) -> Tensor:
        """q' with q' . u = q . (x^ - center); with a scale per token, u includes it.

        Args:
            q: (..., H, D), H a multiple of g. With fusion weights a: a (.) q.
            heads: The KV heads that q reads; None: all g.

        Returns:
            float32 (..., H, r).
        """
        part = slice(None) if heads is None else heads
        x = q.float().unflatten(-2, (len(range(self.num_heads)[part]), -1))
        if self.balance is not None:
            x = x * self.balance[part].unsqueeze(-2)
        if self.codec.rotate:
            x = x @ rotation(self.head_dim).to(x.device).mT
        elif self.up is not None:
            x = torch.einsum("...ghd,gdr->...ghr", x, self.up[part])
        if self.scale is not None:
            x = x * self.scale[part].unsqueeze(-2)
        return x.flatten(-3, -2)

    def fold_output(self, out: Tensor, seen: Tensor | None = None) -> Tensor:
        """The output over x^ of the output over codes: center + up (scale (.) out).

        Args:
            out: (..., H, r), sums of probability times u (times the scale of the token).
            seen: (..., H) bool: whether the row sees any token. The others stay zero.

        Returns:
            float32 (..., H, D).
        """
        x = out.float().unflatten(-2, (self.num_heads, -1)).transpose(-3, -2)  # (..., group, g, r)
        if self.scale is not None:
            x = x * self.scale
        x = self.from_frame(x, center=False)
        if self.center is not None:
            center = self.center if seen is None else _rows(seen, self.num_heads)[..., None] * self.center
            x = x + center
        return x.transpose(-3, -2).flatten(-3, -2)


def _rows(seen: Tensor, heads: int) -> Tensor:
    """(..., H) as (..., group, g)."""
    return seen.unflatten(-1, (heads, -1)).transpose(-2, -1).float()


def _float16(scale: Tensor) -> Tensor:
    return scale.clamp(_SMALLEST, _LARGEST).half()
