"""Named attention cases and their tensors.

The tensors cover the layouts of users: views of wider tensors and transposed layouts. Unused slots of caches
hold NaN, and unused block-table entries hold a page that does not exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

NO_SUCH_PAGE = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """One attention call. Letters as in the package; ``lengths``: valid tokens per sequence of a cache."""

    name: str
    B: int = 2
    S: int = 5
    T: int = 37
    H: int = 4
    G: int = 2
    D: int = 64
    Dv: int | None = None
    m_k: int = 2
    m_v: int = 2
    dtype: torch.dtype = torch.float32
    weights: str = "channel"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    magnitude: float = 1.0
    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = None
    page_size: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def value_dim(self) -> int:
        return self.D if self.Dv is None else self.Dv

    @property
    def terms(self) -> float:
        """By how much errors grow with the scores: see ``compare.assert_close``.

        Scores spread like magnitude * sqrt(m_k), and exp makes the rounding of a score s an error of s
        roundings. In 16 bits most of that is in torch's error already, which the criterion allows for.
        """
        spread = self.magnitude * math.sqrt(self.m_k)
        return spread if self.dtype in (torch.bfloat16, torch.float16) else spread**2

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments that both attention functions share."""
        return {
            "softmax_scale": self.scale,
            "causal": self.causal,
            "window_size": self.window,
            "return_lse": True,
        }


def named(cases: list[Case]) -> dict[str, object]:
    """Arguments of ``pytest.mark.parametrize`` for a list of cases, whose names must be unique."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases have the same name"
    return {"argnames": "case", "argvalues": cases, "ids": names}


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Normal (B, S, H, D) values whose last dim is contiguous and whose other strides are what ``layout``
    says.

    transposed: a (B, H, S, D) tensor's transpose. sliced: channels 3.. of a wider tensor, so that no row
    starts at an aligned address. every_other: each second token of a longer tensor. one_batch: a batch of
    stride 0.
    """
    b, s, h, d = shape
    if layout == "transposed":
        return torch.randn(b, h, s, d).to(dtype).transpose(1, 2)
    if layout == "sliced":
        return torch.randn(b, s, h, d + 5).to(dtype)[..., 3 : 3 + d]
    if layout == "every_other":
        return torch.randn(b, 2 * s, h, d).to(dtype)[:, ::2]
    if layout == "one_batch":
        return torch.randn(1, s, h, d).to(dtype).expand(shape)
    assert layout == "contiguous"
    return torch.randn(shape).to(dtype)


def random_weights(kind: str, m: int, heads: int, dim: int) -> Tensor | None:
    """fp32 fusion weights that broadcast to (m, G, D)."""
    shapes = {
        "channel": (m, heads, dim),
        "shared_channel": (m, 1, dim),
        "head": (m, heads, 1),
        "scalar": (m, 1, 1),
    }
    return None if kind == "none" else torch.randn(shapes[kind])


def dense_inputs(
    case: Case, device: torch.device
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    """(q, keys, values, key_weights, value_weights) of ``fused_kv_attn_func``."""
    q = case.magnitude * random_tensor((case.B, case.S, case.H, case.D), case.dtype, case.layout)
    keys = [random_tensor((case.B, case.T, case.G, case.D), case.dtype, case.layout) for _ in range(case.m_k)]
    shape = (case.B, case.T, case.G, case.value_dim)
    values = [random_tensor(shape, case.dtype, case.layout) for _ in range(case.m_v)]
    key_weights = random_weights(case.weights, case.m_k, case.G, case.D)
    value_weights = random_weights(case.weights, case.m_v, case.G, case.value_dim)
    return to_device((q, keys, values, key_weights, value_weights), device)


def cache_inputs(case: Case, device: torch.device) -> tuple[tuple, dict[str, Tensor]]:
    """Positional arguments of ``fused_kv_attn_with_kvcache``, and its cache_seqlens and block_table."""
    q, keys, values, key_weights, value_weights = dense_inputs(case, torch.device("cpu"))
    lengths = case.lengths or (case.T,) * case.B
    table = block_table(lengths, case.T, case.page_size) if case.page_size else None
    key_caches = [as_cache(key, lengths, case.page_size, table) for key in keys]
    value_caches = [as_cache(value, lengths, case.page_size, table) for value in values]
    state = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32), "block_table": table}
    args = (q, key_caches, value_caches, key_weights, value_weights)
    return to_device(args, device), to_device(state, device)


def append(module: ModuleType, *args: object, query: object = None, **options: object) -> Tensor | None:
    """``append_kvcache`` of the package or of its oracle, or ``rope_append_kvcache`` if there is a query."""
    if query is None:
        return module.append_kvcache(*args, **options)
    names = ("key", "value", "key_cache", "value_cache")
    return module.rope_append_kvcache(query, **dict(zip(names, args, strict=False)), **options)


def block_table(lengths: tuple[int, ...], max_len: int, page_size: int) -> Tensor:
    """Scattered pages for each sequence; entries beyond a sequence's length name a page that does not
    exist."""
    used = [math.ceil(length / page_size) for length in lengths]
    free = torch.randperm(sum(used) + 2).tolist()
    table = torch.full((len(lengths), math.ceil(max_len / page_size)), NO_SUCH_PAGE, dtype=torch.int32)
    for b, count in enumerate(used):
        for i in range(count):
            table[b, i] = free.pop()
    return table


def as_cache(tokens: Tensor, lengths: tuple[int, ...], page_size: int | None, table: Tensor | None) -> Tensor:
    """(B, T, G, D) tokens as a cache in which every slot beyond a sequence's length is NaN."""
    if page_size is None or table is None:
        cache = tokens if tokens.stride(0) else tokens.clone()
        for b, length in enumerate(lengths):
            cache[b, length:] = math.nan
        return cache
    pages = sum(math.ceil(length / page_size) for length in lengths) + 2
    cache = torch.full((pages, page_size, *tokens.shape[2:]), math.nan, dtype=tokens.dtype)
    for b, length in enumerate(lengths):
        for start in range(0, length, page_size):
            count = min(page_size, length - start)
            cache[int(table[b, start // page_size]), :count] = tokens[b, start : start + count]
    return cache


def to_device(value: object, device: torch.device) -> object:
    """Moves every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        # Tensor.to() makes a contiguous copy of some views; on the CPU nothing is copied and strides stay
        # as they are.
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value
