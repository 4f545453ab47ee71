"""Runs the native operations on inputs that lie against memory which may not be touched (Linux).

Started by test_levels.py in a process of its own: one byte read or written too far ends it. Prints what it
is about to do, so that the last line names the case.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap

import torch
from torch import Tensor

from fusedkv_ext import append_kvcache, fuse_kv, fused_kv_attn_with_kvcache, rope_append_kvcache
from fusedkv_ext.ops import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn, torch.uint8)
DIMS = ((8, 24), (24, 8), (40, 72), (64, 128), (200, 16))
PAGE = mmap.PAGESIZE


class Walls:
    """Makes copies of tensors whose last byte is the last before a wall, or whose first byte is the first
    after."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.areas: list[mmap.mmap] = []

    def copy(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        room = -(-size // PAGE) * PAGE
        area = mmap.mmap(-1, room + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for wall in (start, start + PAGE + room):
            if self.libc.mprotect(ctypes.c_void_p(wall), PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.areas.append(area)
        offset = PAGE + (room - size if self.at_end else 0)
        return torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x)


def run(dtype: torch.dtype, dim: int, value_dim: int, walls: Walls, paged: bool) -> None:
    """Every operation once, all inputs walled in."""

    def new(*shape: int) -> Tensor:
        return walls.copy(torch.randn(shape).to(dtype))

    sources = [new(1, 5, 2, dim).requires_grad_() for _ in range(2)]
    weights = walls.copy(torch.randn(2, 2, dim))
    fuse_kv(sources, weights.requires_grad_()).backward(new(1, 5, 2, dim))

    slots = (5, 7) if paged else (2, 33)
    table = walls.copy(torch.tensor([[4, 0, 2, 3, 1], [1, 0, 0, 0, 0]], dtype=torch.int32)) if paged else None
    lengths = walls.copy(torch.tensor([33, 1], dtype=torch.int32))
    keys = [new(*slots, 2, dim) for _ in range(2)]
    values = [new(*slots, 2, value_dim) for _ in range(2)]
    angles = torch.randn(33, 4)
    with torch.no_grad():
        rope_append_kvcache(
            new(2, 3, 4, dim),
            new(2, 3, 2, dim),
            new(2, 3, 2, value_dim),
            keys[0],
            values[0],
            cache_seqlens=lengths,
            block_table=table,
            rotary_cos=walls.copy(angles.cos()),
            rotary_sin=walls.copy(angles.sin()),
        )
        value_weights = walls.copy(torch.randn(2, 2, value_dim))
        for rows in (1, 3):
            fused_kv_attn_with_kvcache(
                new(2, rows, 6, dim),
                keys,
                values,
                weights,
                value_weights,
                cache_seqlens=lengths,
                block_table=table,
            )


def run_coded(dtype: torch.dtype, dim: int, value_dim: int, walls: Walls, paged: bool) -> None:
    """The operations over codes, caches and token scales walled in."""
    slots = (5, 7) if paged else (2, 33)
    table = walls.copy(torch.tensor([[4, 0, 2, 3, 1], [1, 0, 0, 0, 0]], dtype=torch.int32)) if paged else None
    state = {"cache_seqlens": walls.copy(torch.tensor([33, 1], dtype=torch.int32)), "block_table": table}
    for code in CODES:
        sides = []
        for width in (dim, value_dim):
            shape = (*slots, 2, width // 2 if code == torch.uint8 else width)
            sides.append(
                [walls.copy(torch.randint(0, 100, shape).to(torch.uint8).view(code)) for _ in range(2)]
            )
        scales = {
            f"{name}_scale": walls.copy(torch.ones(2, n)) for name, n in (("key", dim), ("value", value_dim))
        }
        new = [walls.copy(torch.randn(2, 3, 2, n).to(dtype)) for n in (dim, value_dim)]
        append_kvcache(*new, sides[0][0], sides[1][0], **state, **scales)
        factors = [walls.copy(torch.rand(*slots, 2).half()) for _ in range(2)]
        more = {"value_bias": walls.copy(torch.randn(2, value_dim)), "key_token_scales": factors}
        for rows in (1, 3):
            q = walls.copy(torch.randn(2, rows, 6, dim).to(dtype))
            fused_kv_attn_with_kvcache(q, *sides, **state, **more, value_token_scales=factors)


def main() -> None:
    """All levels, dtypes and head dims, walls at the end and at the start of every input."""
    faulthandler.enable()
    for level in native.cpu_levels():
        native.set_cpu_level(level)
        for dtype in DTYPES:
            for dim, value_dim in DIMS:
                for at_end in (True, False):
                    for paged in (True, False):
                        where = "end" if at_end else "start"
                        print(
                            f"{level} {dtype} D={dim} Dv={value_dim} wall at the {where}, paged={paged}",
                            flush=True,
                        )
                        run(dtype, dim, value_dim, Walls(at_end), paged)
                        run_coded(dtype, dim, value_dim, Walls(at_end), paged)


if __name__ == "__main__":
    main()
