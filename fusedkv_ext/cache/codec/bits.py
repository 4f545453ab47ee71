"""Packing of small unsigned codes into bytes.

Codes of 8 / k bits share a byte k at a time: byte i holds the codes i, i + n / k, i + 2 n / k, ..., lowest
bits first. So unpacking is k shifts of whole rows. Other widths are stored as such planes, low bits first:
3 bits are a plane of 2 bits and one of 1 bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["look_up", "pack", "packed_bytes", "unpack"]

PLANES = (8, 4, 2, 1)
_AS_ONE = {2: torch.int64, 4: torch.complex128}  # types of as many bytes as k float32


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n packed codes.

    Raises:
        ValueError: n codes do not fill whole bytes.
    """
    if n * bits % 8 or n % (8 // (bits & -bits)):
        least = 8 // (bits & -bits)
        raise ValueError(
            f"codes must fill whole bytes, got {n} codes of {bits} bits; use a multiple of {least}"
        )
    return n * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes 0 .. 2^bits - 1, uint8 (..., n), into uint8 (..., n * bits / 8)."""
    packed_bytes(codes.shape[-1], bits)
    planes, shift = [], 0
    for width in PLANES:
        if bits & width:
            plane = (codes >> shift) & (2**width - 1)
            parts = plane.unflatten(-1, (8 // width, -1)).unbind(-2)
            packed = parts[0].clone()
            for i, part in enumerate(parts[1:], 1):
                packed |= part << (i * width)
            planes.append(packed)
            shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def look_up(packed: Tensor, numbers: Tensor, n: int) -> Tensor:
    """numbers[unpack(packed, n, bits)], float32 (..., n).

    With k = 8 / bits codes to a byte, a byte is looked up as one in a table of the k numbers that it stands
    for: twice as fast as one lookup for each code.

    Args:
        packed: uint8, of ``pack``.
        numbers: float32 (2^bits,), what each code stands for.
        n: Codes of a row.
    """
    bits = len(numbers).bit_length() - 1
    if bits not in PLANES:
        return numbers[unpack(packed, n, bits).long()]
    k = 8 // bits
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    table = numbers[unpack(every_byte, k, bits).long()]  # (256, k)
    whole = _AS_ONE.get(k, torch.float32)  # index_select copies elements faster than rows
    found = table.view(whole).squeeze(-1).index_select(0, packed.flatten().int()).view(torch.float32)
    return found.view(*packed.shape, k).transpose(-1, -2).flatten(-2)


def unpack(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of ``pack``: uint8 (..., n)."""
    codes, shift, at = None, 0, 0
    for width in PLANES:
        if bits & width:
            size = n * width // 8
            plane = packed[..., at : at + size]
            parts = [(plane >> (i * width)) & (2**width - 1) for i in range(8 // width)]
            found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            codes = found if codes is None else codes | (found << shift)
            at, shift = at + size, shift + width
    assert codes is not None
    return codes
