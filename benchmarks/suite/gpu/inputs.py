"""What the decode cells share: shapes, rotating caches in three views, exact results of a few heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fusedkv_ext.ops import reference
from fusedkv_ext.testing import WrongResult, assert_close
from suite.gpu.lab import Lab
from suite.measure import Call, Contestant, require_same_function, shape_text

TOKEN_MULTIPLE = 64  # capacities are whole pages of every page size in use


@dataclass(frozen=True)
class Decode:
    """S query tokens against ``lengths`` cached ones. page: tokens per page, None for a contiguous cache."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    sources: int
    page: int | None = None
    steps: int = 1

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def capacity(self) -> int:
        return -(-max(self.lengths) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE

    @property
    def elements_per_token(self) -> int:
        return self.kv_heads * self.head_dim

    def cache_bytes(self, element: float = 2) -> int:
        """That must be read: keys and values of the valid tokens, from every source."""
        return int(2 * self.sources * sum(self.lengths) * self.elements_per_token * element)

    def allocated_bytes(self, element: float = 2) -> int:
        return int(2 * self.sources * self.batch * self.capacity * self.elements_per_token * element)

    @property
    def flops(self) -> float:
        """Of plain attention: two products per pair of a query row and a token that it sees."""
        unseen = self.batch * self.steps * (self.steps - 1) / 2
        return 4.0 * (self.steps * sum(self.lengths) - unseen) * self.heads * self.head_dim

    @property
    def params(self) -> dict[str, int | str]:
        lengths = self.lengths if self.ragged else self.lengths[:1]
        found: dict[str, int | str] = {"B": self.batch, "T": "+".join(map(str, lengths)), "H": self.heads}
        found |= {"G": self.kv_heads, "D": self.head_dim}
        found |= {"S": self.steps} if self.steps > 1 else {}
        return found | {"page": self.page or "none"}

    def __str__(self) -> str:
        return shape_text(self.params)


class DecodeInputs:
    """Rotating caches. One memory serves all rivals, each of which reads it as its own layout.

    So every rival computes with other numbers, moves the same bytes, and is checked against its own exact
    result: "paged" (pages in random order), "heads first" (the same pages, where the tokens of a head are
    neighbors in memory), "contiguous", and "concat", where the heads of the m sources lie side by side as one
    head of dim m * D.
    """

    def __init__(self, shape: Decode, lab: Lab) -> None:
        self.shape, self.lab = shape, lab
        self._exact: dict[str, list[list[Tensor]]] = {}
        self.sets = lab.sets_for(shape.cache_bytes(self.element_bytes))
        self.sets = max(
            1, min(self.sets, int(0.5 * lab.free_bytes() // shape.allocated_bytes(self.element_bytes)))
        )
        B, H, G, D, m = shape.batch, shape.heads, shape.kv_heads, shape.head_dim, shape.sources
        amount = m * B * shape.capacity * G * D
        self.key_buffers = [self.make_buffer(amount) for _ in range(self.sets)]
        self.value_buffers = [self.make_buffer(amount) for _ in range(self.sets)]
        self.q = lab.random(B, shape.steps, H, D)
        self.key_weights, self.value_weights = self.make_weights(), self.make_weights()
        self.seqlens = torch.tensor(shape.lengths, dtype=torch.int32, device=lab.device)
        self.table: Tensor | None = None
        if shape.page is not None:
            pages = B * shape.capacity // shape.page
            order = torch.randperm(pages, device=lab.device).to(torch.int32)
            self.table = order.view(B, shape.capacity // shape.page)

    @property
    def element_bytes(self) -> float:
        """Of a channel in a cache."""
        return self.lab.dtype.itemsize

    def make_buffer(self, amount: int) -> Tensor:
        """So many channels of caches."""
        return self.lab.random(amount)

    def make_weights(self) -> Tensor | None:
        s = self.shape
        return self.lab.weights(s.sources, s.kv_heads, s.head_dim) if s.sources > 1 else None

    def split(self, buffer: Tensor) -> list[Tensor]:
        """m contiguous caches (B, capacity, G, D)."""
        s = self.shape
        return list(buffer.view(s.sources, s.batch, s.capacity, s.kv_heads, -1).unbind(0))

    def paged(self, buffer: Tensor) -> list[Tensor]:
        """m pools (P, page size, G, D); the contiguous caches where there are no pages."""
        caches = self.split(buffer)
        return (
            caches if self.shape.page is None else [x.view(-1, self.shape.page, *x.shape[2:]) for x in caches]
        )

    def heads_first(self, buffer: Tensor) -> list[Tensor]:
        """m pools of the same shape as ``paged``, with memory in the order (P, G, page size, D)."""
        return [x.view(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2) for x in self.paged(buffer)]

    def concat(self, buffer: Tensor) -> Tensor:
        """One cache (B, capacity, G, m * D)."""
        s = self.shape
        return buffer.view(s.batch, s.capacity, s.kv_heads, s.sources * s.head_dim)

    def sources_of(self, view: str, buffer: Tensor, b: int, g: int) -> list[Tensor]:
        """The valid tokens of one sequence and head as (1, length, 1, D), one tensor per source."""
        length = self.shape.lengths[b]
        if view == "concat":
            whole = self.concat(buffer)[b : b + 1, :length, g : g + 1]
            return list(whole.chunk(self.shape.sources, dim=-1))
        if view == "contiguous" or self.table is None:
            return [x[b : b + 1, :length, g : g + 1] for x in self.split(buffer)]
        pages = self.table[b, : -(-length // self.shape.page)].long()
        pools = self.heads_first(buffer) if view == "heads first" else self.paged(buffer)
        return [x[:, :, g][pages].flatten(0, 1)[None, :length, None] for x in pools]

    @cached_property
    def checked(self) -> list[tuple[int, int]]:
        """(sequence, KV head): first and last of each, and the longest sequence."""
        lengths = self.shape.lengths
        sequences = {0, len(lengths) - 1, lengths.index(max(lengths))}
        return [(b, g) for b in sorted(sequences) for g in sorted({0, self.shape.kv_heads - 1})]

    def exact(self, view: str) -> list[list[Tensor]]:
        """In float64 and from the same math in the working dtype, for ``checked``: (1, S, H / G, D) each.

        Computed once per view.
        """
        if view not in self._exact:
            both = (torch.float64, None)
            self._exact[view] = [[self._reference(view, *at, dtype) for dtype in both] for at in self.checked]
        return self._exact[view]

    def numbers(self, sources: list[Tensor]) -> list[Tensor]:
        """What the elements of caches stand for."""
        return sources

    def _reference(self, view: str, b: int, g: int, dtype: torch.dtype | None) -> Tensor:
        rows = self.shape.heads // self.shape.kv_heads
        return reference.fused_kv_attn_func(
            self.q[b : b + 1, :, g * rows : (g + 1) * rows],
            self.numbers(self.sources_of(view, self.key_buffers[0], b, g)),
            self.numbers(self.sources_of(view, self.value_buffers[0], b, g)),
            None if self.key_weights is None else self.key_weights[:, g : g + 1],
            None if self.value_weights is None else self.value_weights[:, g : g + 1],
            causal=True,
            dtype=dtype,
        )

    def check(self, name: str, view: str, result: Tensor, *, ours: bool = False) -> None:
        """result: (B, S, H, D). Ours has to meet the criterion; a peer computes the same function."""
        rows = self.shape.heads // self.shape.kv_heads
        if result.shape != self.q.shape or not bool(torch.isfinite(result).all()):
            raise WrongResult(f"{name}: must be finite and {tuple(self.q.shape)}, got {tuple(result.shape)}")
        for (b, g), (exact, same) in zip(self.checked, self.exact(view), strict=True):
            got, where = result[b : b + 1, :, g * rows : (g + 1) * rows], f"{name}, sequence {b}, KV head {g}"
            if ours:
                assert_close(got, exact, same, where)
            else:
                require_same_function(where, got, exact)

    def peer(
        self,
        name: str,
        view: str,
        run: Callable[[int], Tensor],
        group: str | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Contestant:
        """run: of the number of a set."""
        return Contestant(self.on_sets(run), partial(self.check, name, view), group, prepare)

    def on_sets(self, run: Callable[[int], Tensor]) -> list[Call]:
        return [partial(run, i) for i in range(self.sets)]


class CodedInputs(DecodeInputs):
    """The same with caches of codes, int8 or two of 4 bits per byte, whose scales are in the weights."""

    def __init__(self, shape: Decode, lab: Lab, bits: int) -> None:
        self.bits = bits
        super().__init__(shape, lab)

    @property
    def element_bytes(self) -> float:
        return self.bits / 8

    def make_buffer(self, amount: int) -> Tensor:
        codes = torch.empty(amount * self.bits // 8, dtype=torch.uint8, device=self.lab.device)
        for piece in codes.split(1 << 28):
            piece.random_(0, 256)
        return codes if self.bits == 4 else codes.view(torch.int8)

    def make_weights(self) -> Tensor:
        """For numbers of about the size 1: codes have a mean square of 73^2, or of 4.6^2."""
        s, size = self.shape, 4.6 if self.bits == 4 else 73.0
        return self.lab.weights(s.sources, s.kv_heads, s.head_dim) / size

    def numbers(self, sources: list[Tensor]) -> list[Tensor]:
        if self.bits == 8:
            return [x.to(self.q.dtype) for x in sources]
        return [torch.cat((x & 15, x >> 4), dim=-1).to(self.q.dtype) - 8 for x in sources]
