"""Runs the forward operations on small inputs and compares them with the float64 reference.

`fusedkv_ext.testing` has the criterion by which an operation passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.ops import functional, reference
from fusedkv_ext.testing import compare

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SEED = 20


@dataclass(frozen=True)
class Check:
    """The check of one operation in one dtype.

    Attributes:
        op: Name of the operation.
        dtype: Name of the dtype.
        device: Name of the device.
        max_error: Largest absolute error against the oracle.
        allowed: Largest allowed error.
        complaint: Description and place of the error; None if the check passed.
    """

    op: str
    dtype: str
    device: str
    max_error: float
    allowed: float
    complaint: str | None = None

    @property
    def passed(self) -> bool:
        return self.complaint is None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dict, with None for NaN."""
        error = self.max_error if math.isfinite(self.max_error) else None
        return {**asdict(self), "max_error": error, "passed": self.passed}


class _Inputs:
    """Small inputs that cover the special cases: unequal lengths, G < H, T not a multiple of a tile."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(_SEED)

        def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, of)

        batch, self.steps, tokens, heads, kv_heads, dim = 2, 3, 37, 4, 2, 48
        self.sources = [draw(batch, tokens, kv_heads, dim) for _ in range(2)]
        self.values = [draw(batch, tokens, kv_heads, dim) for _ in range(3)]
        self.key_weights = draw(2, kv_heads, dim, of=torch.float32)
        self.value_weights = draw(3, kv_heads, dim, of=torch.float32)
        self.q = draw(batch, tokens, heads, dim)
        self.new_q = draw(batch, self.steps, heads, dim)
        self.new_key, self.new_value = (draw(batch, self.steps, kv_heads, dim) for _ in range(2))
        angles = torch.rand(tokens, dim // 2, generator=generator).to(device) * 6.28
        self.cos, self.sin = angles.cos(), angles.sin()
        self.lengths = torch.tensor([tokens, 20], dtype=torch.int32, device=device)


Run = Callable[[Any, _Inputs, dict[str, Any]], list[Tensor]]


def _fuse(module: Any, x: _Inputs, extra: dict[str, Any]) -> list[Tensor]:
    return [module.fuse_kv(x.sources, x.key_weights, **extra)]


def _attend(module: Any, x: _Inputs, extra: dict[str, Any]) -> list[Tensor]:
    return [
        module.fused_kv_attn_func(
            x.q,
            x.sources,
            x.values,
            x.key_weights,
            x.value_weights,
            causal=True,
            window_size=(20, 0),
            **extra,
        )
    ]


def _decode(module: Any, x: _Inputs, extra: dict[str, Any]) -> list[Tensor]:
    out, lse = module.fused_kv_attn_with_kvcache(
        x.new_q,
        x.sources,
        x.values,
        x.key_weights,
        x.value_weights,
        cache_seqlens=x.lengths,
        return_lse=True,
        **extra,
    )
    return [out, lse]


def _decode_paged(module: Any, x: _Inputs, extra: dict[str, Any]) -> list[Tensor]:
    """The caches as pages of 8 tokens in reverse order."""
    page = 8
    pages, order = [], torch.empty(0)
    for cache in (*x.sources, *x.values):
        padded = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, -cache.shape[1] % page))
        flat = padded.unflatten(1, (-1, page)).flatten(0, 1)
        order = torch.arange(len(flat) - 1, -1, -1, device=flat.device)
        pages.append(flat[order])
    table = order.view(len(x.lengths), -1).to(torch.int32)
    count = len(x.sources)
    return [
        module.fused_kv_attn_with_kvcache(
            x.new_q,
            pages[:count],
            pages[count:],
            x.key_weights,
            x.value_weights,
            cache_seqlens=x.lengths,
            block_table=table,
            **extra,
        )
    ]


def _append(module: Any, x: _Inputs, extra: dict[str, Any]) -> list[Tensor]:
    wide = extra.get("dtype", x.new_key.dtype)
    caches = [torch.zeros_like(x.sources[0], dtype=wide) for _ in range(2)]
    module.append_kvcache(
        x.new_key, x.new_value, *caches, cache_seqlens=x.lengths, rotary_cos=x.cos, rotary_sin=x.sin, **extra
    )
    return caches


_OPS: dict[str, Run] = {
    "fuse_kv": _fuse,
    "fused_kv_attn_func": _attend,
    "fused_kv_attn_with_kvcache": _decode,
    "fused_kv_attn_with_kvcache, paged": _decode_paged,
    "append_kvcache": _append,
}
_SIDES: list[tuple[Any, dict[str, Any]]] = [
    (functional, {}),
    (reference, {"dtype": torch.float64}),
    (reference, {}),
]


@torch.no_grad()
def checks(device: torch.device | str = "cpu") -> Iterator[Check]:
    """Compares all operations in all dtypes on one device."""
    device = torch.device(device)
    for dtype in DTYPES:
        inputs = _Inputs(dtype, device)
        for name, call in _OPS.items():
            results = [call(module, inputs, extra) for module, extra in _SIDES]
            yield judged(name, dtype, device, results)


def judged(op: str, dtype: torch.dtype, device: torch.device, results: list[list[Tensor]]) -> Check:
    """Compares the outputs of one call with the oracle and with the same math in torch; the worst Check."""
    triples = zip(*results, strict=True)
    found = [compare(x, y, z, name=f"output {i}") for i, (x, y, z) in enumerate(triples)]
    worst = max(found, key=lambda x: (x.complaint is not None, x.error / (x.allowed or 1.0)))
    which = str(dtype).removeprefix("torch.")
    return Check(op, which, str(device), worst.error, worst.allowed, worst.complaint)
