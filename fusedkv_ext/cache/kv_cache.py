"""The KV cache of a plan: tensors of the storage layers, contiguous or paged.

Layers without storage have no memory: they read the tensors of their source layers. The cache manages lengths
and pages. The plan defines which layer reads which tensors, and the attention modules apply it.

Steps are right-aligned. A step has S rows, the last S tokens of each sequence, so ragged prompts are padded
on the left. A row before the start of its sequence is not stored, and its attention output is zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext.cache.cache_codecs import CacheCodecs
from fusedkv_ext.cache.codec.kernel_codes import code_dtype
from fusedkv_ext.cache.codec.tensor_codec import TensorCodec
from fusedkv_ext.cache.coded_tensors import append_codes, decode_tokens
from fusedkv_ext.cache.first_tokens import FirstTokens
from fusedkv_ext.cache.last_tokens import LastTokens
from fusedkv_ext.cache.page_table import PageTable, brief
from fusedkv_ext.cache.token_scales import TokenScales
from fusedkv_ext.errors import CacheFullError
from fusedkv_ext.ops import cached, native
from fusedkv_ext.ops.call import AppendCall
from fusedkv_ext.ops.dispatch import in_graph
from fusedkv_ext.ops.functional import decode_schedule
from fusedkv_ext.ops.rope import RotaryEmbedding
from fusedkv_ext.plan import CachePlan, latent_layers

__all__ = ["KV", "KVCache"]


class KV(NamedTuple):
    """The tensors that one layer stores: ``key`` (B, T, Gk, D) after RoPE and ``value`` (B, T, Gv, D).

    They have only the heads that the layer stores, and are None if it stores none. Latent attention stores
    one tensor: ``key`` is [k_pe ; c], (B, T, 1, channels), and ``value`` is None.
    """

    key: Tensor | None
    value: Tensor | None


class KVCache:
    """Keys and values of the storage layers of ``plan``: B = ``batch_size`` sequences of up to ``max_len``.

    Layout of a storage layer with Gk key heads and Gv value heads:

    * contiguous (``page_size`` None): keys (B, max_len, Gk, D), values (B, max_len, Gv, D), ``block_table``
      None;
    * paged: keys (P, page_size, Gk, D), values (P, page_size, Gv, D) with P = ``num_pages``. All layers have
      the same ``block_table`` (B, ceil(max_len / page_size)) int32. Token t of sequence b is in page
      block_table[b, t // page_size], slot t % page_size. Unused entries are -1;
    * latents (``rope_dim`` given), contiguous or paged: one tensor (..., 1, C) per layer, [k_pe ; c]. k_pe
      are the rotated channels, c the stored channels of the latent (plan/latent.py). ``keys`` is the whole
      tensor, ``values`` its view of c;
    * codes (``codecs`` given), contiguous or paged: the same with codes for numbers, in int8, float8_e4m3fn
      or uint8 of two 4-bit codes. ``append`` encodes, and attention reads the codes, also while a prompt is
      read. Scales of tokens are in ``scales``. The first ``sinks`` tokens of each sequence stay raw in
      ``first``. The tensors and the block table then begin with the token after them. The last ``tail``
      tokens have raw rows too, in ``last``, which every row reads for the tokens before it. A step of S
      rows needs room for S more, until the next step. To bound it, read a prompt in parts.

    Each step calls ``advance(n)`` once to reserve space. Then every layer, in order, appends its S = max(n)
    new rows and attends. ``seq_lens`` (B,) int32 on ``device`` is the number of valid tokens, including new
    ones.

    Args:
        plan: The cache plan.
        batch_size: B.
        max_len: Largest number of tokens per sequence.
        num_kv_heads: G.
        head_dim: D.
        dtype: Dtype of keys and values; default ``torch.get_default_dtype()``.
        device: Device; default torch's.
        page_size: Tokens per page; None for a contiguous cache.
        num_pages: P; by default enough for all sequences at full length. With fewer pages, the
            pool serves more sequences than fit at full length.
        rope_dim: Rotated channels of latents; None for keys and values. With it, num_kv_heads must be 1 and
            head_dim is kv_lora_rank.
        codecs: Fitted codecs of keys and values (``CacheCodecs.fit``); None stores them as they are.

    Raises:
        ValueError: A size is below 1, ``num_pages`` is given without ``page_size``, latents do not support
            the plan, or codecs do not fit it.
    """

    def __init__(
        self,
        plan: CachePlan,
        batch_size: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        rope_dim: int | None = None,
        codecs: CacheCodecs | None = None,
    ) -> None:
        sizes = {
            "batch_size": batch_size,
            "max_len": max_len,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            _check_positive(name, size)
        if rope_dim is not None:
            _check_positive("rope_dim", rope_dim)
            if num_kv_heads != 1 or rope_dim % 2:
                raise ValueError(
                    "num_kv_heads must be 1 and rope_dim even for a cache of latents, got "
                    f"num_kv_heads={num_kv_heads} and rope_dim={rope_dim}"
                )
        if codecs is not None:
            if rope_dim is not None:
                raise ValueError("codecs must be None for a cache of latents, got codecs")
            codecs.check(plan, num_kv_heads, head_dim)
        self.plan, self.batch_size, self.max_len = plan, batch_size, max_len
        self.num_kv_heads, self.head_dim, self.codecs = num_kv_heads, head_dim, codecs
        self.sinks, tail = (0, 0) if codecs is None else (codecs.codecs.sinks, codecs.codecs.tail)
        if self.sinks >= max_len:
            raise ValueError(
                f"max_len must exceed the {self.sinks} first tokens that stay raw, got {max_len}"
            )
        self.dtype = dtype or torch.get_default_dtype()
        self.page_size, self.rope_dim = page_size, rope_dim
        self._lengths = [0] * batch_size
        self._step = 0
        self._table: PageTable | None = None
        self._schedules: dict[tuple[Any, ...], Tensor] = {}
        self._rotary: dict[RotaryEmbedding, tuple[Tensor, Tensor]] = {}
        # Inference tensors could not be modified outside of inference mode.
        with torch.inference_mode(False):
            stored = max_len - self.sinks
            slots: tuple[int, int] = (batch_size, stored)
            if page_size is not None:
                _check_positive("page_size", page_size)
                max_pages = -(-stored // page_size)
                num_pages = batch_size * max_pages if num_pages is None else num_pages
                _check_positive("num_pages", num_pages)
                self._table = PageTable(batch_size, page_size, max_pages, num_pages)
                slots = (num_pages, page_size)
            elif num_pages is not None:
                raise ValueError(f"num_pages must be None without page_size, got {num_pages}")

            self._allocate(slots, device)
            sides = zip(self._keys, self._values, strict=True)
            heads = [(_num_heads(k), _num_heads(v)) for k, v in sides]
            rows = (head_dim, self.dtype, device)
            self.first = FirstTokens(self.sinks, heads, batch_size, *rows) if self.sinks else None
            self.last = LastTokens(tail, heads, batch_size, stored, *rows) if tail else None
            self.scales = self._token_scales(slots, device)
            self._no_heads = torch.empty(*slots, 0, head_dim, dtype=self.dtype, device=device)
            self.seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
            self.block_table = None if self._table is None else self._table.rows.to(device, copy=True)
        self.device = self.seq_lens.device

    def _allocate(self, slots: tuple[int, int], device: torch.device | str | None) -> None:
        """Allocates what the plan stores: tensors (*slots, heads, channels)."""
        plan, layers, dim = self.plan, range(self.plan.num_layers), self.head_dim

        def allocate(heads: int, dim: int = dim, codec: TensorCodec | None = None) -> Tensor | None:
            if not heads * dim:
                return None
            dtype = self.dtype
            if codec is not None:
                dtype, dim = code_dtype(codec.codec), codec.codec.code_bytes(dim, 1)
            tensor = torch.empty((*slots, heads, dim), dtype=dtype, device=device)
            if tensor.device.type == "cpu":
                native.advise_huge_pages(tensor)  # every step reads all of it
            return tensor

        if self.rope_dim is None:
            codecs = self.codecs
            k, v = ([None] * len(layers),) * 2 if codecs is None else (codecs.keys, codecs.values)
            heads = self.num_kv_heads
            self._keys = [allocate(len(plan.stored_key_heads(i, heads)), codec=k[i]) for i in layers]
            self._values = [allocate(len(plan.stored_value_heads(i, heads)), codec=v[i]) for i in layers]
        else:
            rotated = [layer.stores_rope * self.rope_dim for layer in latent_layers(plan)]
            latent = [layer.stored_channels(dim) for layer in latent_layers(plan)]
            self._keys = [allocate(1, sum(widths)) for widths in zip(rotated, latent, strict=True)]
            self._values = self._latents()
        owned = self._keys if self.rope_dim is not None else [*self._keys, *self._values]
        # Bytes of a float8: torch indexes those.
        self._owned = [
            x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in owned if x is not None
        ]

    def _token_scales(self, slots: tuple[int, int], device: torch.device | str | None) -> TokenScales | None:
        codecs = self.codecs
        if codecs is None or not codecs.have_token_scales:
            return None

        def heads(codec: TensorCodec | None) -> int:
            return codec.num_heads if codec is not None and codec.codec.scale == "token" else 0

        pairs = zip(codecs.keys, codecs.values, strict=True)
        scales = TokenScales(slots, [(heads(k), heads(v)) for k, v in pairs], device)
        self._owned += scales.tensors
        return scales

    def _latents(self) -> list[Tensor | None]:
        """The values of a cache of latents: views of the unrotated channels of the keys."""
        starts = [layer.stores_rope * (self.rope_dim or 0) for layer in latent_layers(self.plan)]
        return [
            x[..., start:] if x is not None and x.shape[-1] > start else None
            for x, start in zip(self._keys, starts, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without views and without lazily computed tensors."""
        values = self._values if self.rope_dim is None else None
        return {**self.__dict__, "_values": values, "_schedules": {}, "_rotary": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._values is None:
            self._values = self._latents()

    def keys(self, layer: int) -> Tensor:
        """The whole key cache of a layer.

        Raises:
            ValueError: The layer stores no keys.
        """
        return _stored(self._keys, layer, "keys", self.plan)

    def values(self, layer: int) -> Tensor:
        """The whole value cache of a layer.

        Raises:
            ValueError: The layer stores no values.
        """
        return _stored(self._values, layer, "values", self.plan)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Valid tokens of each sequence: a copy of ``seq_lens`` on the host, without a device sync."""
        return tuple(self._lengths)

    @property
    def stored_lens(self) -> Tensor:
        """(B,) int32: the tokens in the tensors, ``seq_lens`` without raw first tokens."""
        return self.lens_without(self.sinks)

    def lens_without(self, count: int) -> Tensor:
        """(B,) int32: ``seq_lens`` less ``count`` tokens, at least 0; computed once per step."""
        if not count:
            return self.seq_lens
        return self._of_step(("without", count), lambda: (self.seq_lens - count).clamp_min(0))

    def lens_up_to(self, count: int) -> Tensor:
        """(B,) int32: ``seq_lens``, at most ``count``; computed once per step."""
        return self._of_step(("up to", count), lambda: self.seq_lens.clamp_max(count))

    def _of_step(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._schedules:
            self._schedules[key] = make()
        return self._schedules[key]

    @property
    def stored_lengths(self) -> tuple[int, ...]:
        """A copy of ``stored_lens`` on the host."""
        return self.lengths if self.first is None else tuple(self._stored(self._lengths))

    def _stored(self, lengths: Sequence[int]) -> list[int]:
        return [max(length - self.sinks, 0) for length in lengths]

    @property
    def free_pages(self) -> int | None:
        """Pages that no sequence owns; None for a contiguous cache."""
        return None if self._table is None else self._table.num_free

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, without ``seq_lens`` and ``block_table``."""
        raw = [x for part in (self.first, self.last) if part is not None for x in part.tensors]
        return sum(tensor.nbytes for tensor in (*self._owned, *raw))

    def advance(self, n: int | Sequence[int] | Tensor) -> None:
        """Reserves space for the next step.

        Only empty sequences may get fewer tokens than others. The S = max(n) rows of a step are
        right-aligned, so the first S - n[b] rows of an empty sequence are padding. In any other sequence they
        would overwrite the last tokens.

        Args:
            n: New tokens per sequence: one number, or one per sequence, (B,). A tensor on a device causes a
                sync.

        Raises:
            ValueError: The shape is wrong, or numbers are negative or differ as above.
            CacheFullError: ``max_len`` or the page pool does not suffice. The cache is unchanged.
        """
        counts = [n] * self.batch_size if isinstance(n, int) else self._per_sequence("n", n)
        step = max(counts)
        for b, (count, length) in enumerate(zip(counts, self._lengths, strict=True)):
            if count < 0:
                raise ValueError(f"n must not be negative, got {count} for sequence {b}; use crop to shorten")
            if count < step and length > 0:
                raise ValueError(
                    f"n must be equal for all sequences that are not empty, got {count} for sequence {b} "
                    f"with {length} tokens and {step} for another; advance by one number, or free(b) first"
                )
            if length + count > self.max_len:
                raise CacheFullError(
                    f"a sequence must have at most max_len={self.max_len} tokens, got {length} + {count} for "
                    f"sequence {b}; crop, or make a cache with a larger max_len"
                )
        lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        stored = self._stored(self._lengths), self._stored(lengths)
        if self._table is not None:
            copies, changed = self._table.extend(*stored)
            self._copy_pages(copies)
            if changed:
                self._sync_table()
        if self.last is not None:
            self.last.advance(*stored, step)
        self._lengths, self._step = lengths, step
        self._schedules.clear()
        if isinstance(n, int):
            self.seq_lens.add_(n)
        else:
            self._sync_lengths()

    def append(
        self,
        layer: int,
        key: Tensor | None,
        value: Tensor | None,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        rotary_interleaved: bool = False,
    ) -> None:
        """Stores the S rows of this step.

        Args:
            layer: The layer, from 0.
            key: (B, S, Gk, D) after RoPE; None if the layer stores no keys.
            value: (B, S, Gv, D); None if the layer stores no values.
            rotary: The result of ``rotary_tables``. If given, ``key`` is before RoPE and is rotated.
            rotary_interleaved: Whether pairs are (2j, 2j + 1) instead of (j, j + rotary_dim / 2).

        Raises:
            ValueError: The layer does not store these sides, or S differs from the rows of ``advance``.
        """
        if self._encodes_rotated and key is not None and rotary is not None:
            key, rotary = self._rotate(key, rotary, rotary_interleaved), None
        sides = self._sides(layer, key, value)  # before anything is written
        if sides is None:
            return
        if self.first is not None and (
            min(self._lengths) - self._step < self.sinks or in_graph(self.seq_lens, self.device.type)
        ):
            self.first.store(layer, key, value, self.seq_lens)
        if self.last is not None:
            self.last.store(layer, key, value, self.stored_lens)
        if self.scales is not None:
            append_codes(self, layer, key, value)
            return
        cos, sin = (None, None) if rotary is None else rotary
        lengths, table, codes = self.stored_lens, self.block_table, self._static_codes(layer)
        cached.append(AppendCall(*sides, lengths, table, cos, sin, rotary_interleaved, None, *codes))

    def _rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
        """The rows of a step after RoPE, which the operation that stores would count from the codes on."""
        none, cache = x[:, :, :0], x.new_empty(self.batch_size, self.max_len, 0, x.shape[3])
        return cached.append(
            AppendCall(none, none, cache, cache, self.seq_lens, None, *rotary, interleaved, x)
        )

    def rope_append(
        self,
        layer: int,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        rotary_interleaved: bool = False,
    ) -> Tensor:
        """Like ``append`` with ``rotary``, and also rotates the queries of the last tokens.

        Args:
            layer: The layer, from 0.
            query: (B, S or fewer, H, D) before RoPE. With S rows it is one kernel launch.
            key: As in ``append``, before RoPE.
            value: As in ``append``.
            rotary: As in ``append``.
            rotary_interleaved: As in ``append``.

        Returns:
            The rotated queries as a new tensor.

        Raises:
            ValueError: See ``append``.
        """
        if self._encodes_rotated:
            self.append(layer, key, value, rotary=rotary, rotary_interleaved=rotary_interleaved)
            return self._rotate(query, rotary, rotary_interleaved)
        sides = self._sides(layer, key, value)
        cos, sin, codes = *rotary, self._static_codes(layer)
        if sides is None or query.shape[1] != sides[0].shape[1]:
            if sides is not None:
                self.append(layer, key, value, rotary=rotary, rotary_interleaved=rotary_interleaved)
            none, codes = query[:, :, :0], ()  # only the query is rotated
            sides = (none, none, self._no_heads, self._no_heads)
        lengths, table = self.seq_lens, self.block_table
        return cached.append(AppendCall(*sides, lengths, table, cos, sin, rotary_interleaved, query, *codes))

    @property
    def _encodes_rotated(self) -> bool:
        """Whether the operation that encodes cannot rotate, because other rows or numbers come of it."""
        return self.first is not None or self.last is not None or self.scales is not None

    def _static_codes(self, layer: int) -> tuple[Tensor | None, ...]:
        """Scales and centers of keys, then of values; empty without codecs."""
        if self.codecs is None:
            return ()
        found: list[Tensor | None] = []
        for codec in (self.codecs.keys[layer], self.codecs.values[layer]):
            found += (None, None) if codec is None else (codec.scale, codec.center)
        return tuple(found)

    def _sides(
        self, layer: int, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Checked keys, values and caches for the operation; None if the layer stores nothing.

        A side that the layer does not store has zero heads.
        """
        key_cache: Any = self._keys[layer]
        value_cache: Any = self._values[layer]
        if (key is None) != (key_cache is None) or (value is None) != (value_cache is None):
            raise ValueError(
                f"layer {layer} must get what it stores (keys: {_yes(key_cache)}, values: "
                f"{_yes(value_cache)}), got key: {_yes(key)}, value: {_yes(value)}"
            )
        if key is None:
            if value is None:
                return None
            key, key_cache = value[:, :, :0], self._no_heads
        elif value is None:
            value, value_cache = key[:, :, :0], self._no_heads
        if key.shape[1] != self._step:
            self._check_rows(layer, key)
        return key, value, key_cache, value_cache

    def append_latent(self, layer: int, latent: Tensor) -> None:
        """Stores the rows of this step in a cache of latents.

        Args:
            layer: The layer, from 0.
            latent: (B, S, 1, C), [k_pe ; c] with k_pe after RoPE.

        Raises:
            ValueError: The layer stores no latent, or S differs from the rows of ``advance``.
        """
        self._check_rows(layer, latent)
        # The op needs two sides; the second has zero heads.
        new, stored = as_heads(latent), as_heads(self.keys(layer))
        sides = (new, new[:, :, :0], stored, stored[:, :, :0])
        cached.append(AppendCall(*sides, self.seq_lens, self.block_table))

    def _check_rows(self, layer: int, rows: Tensor) -> None:
        if rows.shape[1] != self._step:
            raise ValueError(
                f"layer {layer} must get the {self._step} rows of this step, got {rows.shape[1]}; call "
                "advance(n) once before the layers of a step"
            )

    def rotary_tables(self, rope: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """Cos and sin of all positions, fp32 (max_len, rotary_dim / 2); computed once per cache."""
        tables = self._rotary.get(rope)
        if tables is None:
            tables = self._rotary[rope] = rope.tables(self.max_len, self.device)
        return tables

    def positions(self, steps: int) -> Tensor:
        """Positions of the last S = ``steps`` tokens.

        Padding rows have negative positions. For a decode step (S = 1) positions are computed from
        ``seq_lens``, because a CUDA graph would bake in numbers from the host.

        Returns:
            int64 (S,) if S > 1 and all sequences have one length, else (B, S).
        """
        shortest, longest = min(self._lengths), max(self._lengths)
        if shortest == longest and steps > 1:
            return torch.arange(longest - steps, longest, device=self.device)
        return self.seq_lens[:, None] + torch.arange(-steps, 0, device=self.device)

    def begin_step(self) -> None:
        """Drops the schedules, so that the next attention computes new ones, as ``advance`` does.

        Call it first inside a step that is captured in a CUDA graph (``Decoder`` does). Schedules are then
        computed in the graph, at each replay, from the current lengths.
        """
        self._schedules.clear()

    def schedule(
        self, query_length: int, num_heads: int, num_kv_heads: int, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor | None:
        """``decode_schedule`` of stored tokens, computed once per step for layers with the same arguments.

        Not of the last tokens that are raw.

        Args:
            query_length: S of the calls, which are not ``batch_invariant``.
            num_heads: H of the calls.
            num_kv_heads: G of the calls.
            window_size: As in the calls.

        Returns:
            The schedule; None on the CPU, which needs none.
        """
        if self.device.type == "cpu":
            return None
        left, tail = window_size[0], 0 if self.last is None else self.last.count
        if 0 <= left < tail:  # no row sees a code
            return None
        left -= tail if left >= 0 else 0
        key = (query_length, num_heads, num_kv_heads, left)
        if key not in self._schedules:
            capacity = self.max_len - self.sinks
            if self.block_table is not None and self.page_size is not None:
                capacity = self.block_table.shape[1] * self.page_size
            self._schedules[key] = decode_schedule(
                self.lens_without(self.sinks + tail),
                query_length=query_length,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                capacity=capacity,
                window_size=(left, window_size[1]),
            )
        return self._schedules[key]

    def crop(self, length: int | Sequence[int] | Tensor) -> None:
        """Truncates each sequence to its first ``length`` tokens and frees the other pages.

        Args:
            length: One number, or one per sequence, (B,). Shorter sequences are unchanged.

        Raises:
            ValueError: The shape is wrong, or a number is negative.
        """
        limits = (
            [length] * self.batch_size if isinstance(length, int) else self._per_sequence("length", length)
        )
        if min(limits) < 0:
            raise ValueError(
                f"length must not be negative, got {brief(limits)}; it is the number of tokens to keep"
            )
        self._truncate([min(pair) for pair in zip(self._lengths, limits, strict=True)])

    def free(self, b: int) -> None:
        """Empties sequence b and frees its pages, for a new prompt.

        Raises:
            ValueError: There is no sequence b.
        """
        if not 0 <= b < self.batch_size:
            raise ValueError(f"b must be in 0..{self.batch_size - 1}, got {b}")
        self._truncate([0 if i == b else length for i, length in enumerate(self._lengths)])

    def reset(self) -> None:
        """Empties all sequences. The memory stays allocated."""
        self._truncate([0] * self.batch_size)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Replaces sequence b by the former sequence ``index[b]``, as in beam search.

        A contiguous cache copies. A paged cache shares pages and copies them on write.

        Args:
            index: Former sequence of each sequence, (B,). Indices may repeat.

        Raises:
            ValueError: The shape is wrong, or an index is out of range.
        """
        order = self._per_sequence("index", index)
        for b, i in enumerate(order):
            if not 0 <= i < self.batch_size:
                raise ValueError(f"index[{b}] must be in 0..{self.batch_size - 1}, got {i}")
        by_sequence = [] if self.first is None else self.first.tensors
        if self._table is not None:
            self._table.reorder(order)
            self._sync_table()
        else:
            used = max(self.stored_lengths)
            by_sequence += [tensor[:, :used] for tensor in self._owned]
        if by_sequence or self.last is not None:
            rows = self._staged(torch.tensor(order)).to(self.seq_lens.device, non_blocking=True)
            for tensor in by_sequence:
                tensor.copy_(tensor.index_select(0, rows))
            if self.last is not None:
                self.last.reorder(order, rows)
        self._lengths = [self._lengths[i] for i in order]
        self._sync_lengths()

    def __repr__(self) -> str:
        kind = (
            "contiguous" if self.page_size is None else f"pages of {self.page_size}, {self.free_pages} free"
        )
        return (
            f"KVCache({self.plan.name}, layers {list(self.plan.storage_layers)}, {kind}, "
            f"max_len={self.max_len}, lengths={brief(self._lengths)}, {self.dtype}, {self.nbytes} bytes)"
        )

    def _truncate(self, lengths: list[int]) -> None:
        if self._table is not None:
            freed = [self._table.truncate(b, length) for b, length in enumerate(self._stored(lengths))]
            if any(freed):
                self._sync_table()
        if self.last is not None:
            self.last.crop(self._stored(lengths), functools.partial(decode_tokens, self))
        self._lengths, self._step = lengths, 0
        self._sync_lengths()

    def _per_sequence(self, name: str, numbers: Sequence[int] | Tensor) -> list[int]:
        """The numbers on the host; synchronizes if they are on a device."""
        if isinstance(numbers, Tensor) and (numbers.is_floating_point() or numbers.dim() != 1):
            raise ValueError(
                f"{name} must be an int or a 1-D integer tensor, got {numbers.dtype} {tuple(numbers.shape)}"
            )
        found = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        if len(found) != self.batch_size:
            raise ValueError(
                f"{name} must have one number for each of {self.batch_size} sequences, got {len(found)}"
            )
        return found

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if not copies:
            return
        pages = self._staged(torch.tensor(copies)).to(self.seq_lens.device, non_blocking=True)
        source, target = pages.unbind(1)
        for tensor in self._owned:
            tensor[target] = tensor[source]

    def _staged(self, host: Tensor) -> Tensor:
        """``host`` where a GPU copies it from without a wait: pinned memory, which torch keeps until then."""
        return host.pin_memory() if self.seq_lens.is_cuda else host

    def _sync_lengths(self) -> None:
        self._schedules.clear()
        lengths = torch.tensor(self._lengths, dtype=torch.int32)
        self.seq_lens.copy_(self._staged(lengths), non_blocking=True)

    def _sync_table(self) -> None:
        if self._table is not None and self.block_table is not None:
            self.block_table.copy_(self._staged(self._table.rows), non_blocking=True)


def as_heads(latent: Tensor) -> Tensor:
    """Views (B, T, 1, C) as (B, T, C / g, g), because the operations need a head dim g <= 256."""
    return latent.flatten(2).unflatten(-1, (-1, math.gcd(latent.shape[-1], 256)))


def _stored(tensors: list[Tensor | None], layer: int, side: str, plan: CachePlan) -> Tensor:
    tensor = tensors[layer]
    if tensor is None:
        raise ValueError(
            f"layer must be one that stores {side}, got {layer}; the storage layers of plan {plan.name!r} "
            f"are {plan.storage_layers}"
        )
    return tensor


def _check_positive(name: str, size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a positive int, got {size!r}")


def _num_heads(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[2]


def _yes(tensor: Tensor | None) -> str:
    return "no" if tensor is None else "yes"
