"""The cache layer of transformers for coded keys and values.

Raw rows are the first and the last tokens of the sequence; the tokens between them are codes. ``update``
returns all tokens, codes decoded. So memory between steps is that of the codes, and one layer's decoded
tensors live for the time of a forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fusedkv_ext.cache.codec import CodecPlan, Encoded, TensorCodec

__all__ = ["CodedDynamicLayer"]


class _CodedSide:
    """Keys or values of one layer: raw first rows, codes, raw last rows. Tensors are (B, tokens, g, D)."""

    def __init__(self, codec: TensorCodec | None, plan: CodecPlan) -> None:
        self.codec, self.plan = codec, plan
        self.first: Tensor | None = None
        self.coded: Encoded | None = None
        self.last: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that exist."""
        scales = None if self.coded is None else self.coded.scales
        codes = None if self.coded is None else self.coded.codes
        return [x for x in (self.first, codes, scales, self.last) if x is not None]

    def map(self, change: Any) -> None:
        """Replaces every tensor x by change(x)."""
        self.first, self.last = (None if x is None else change(x) for x in (self.first, self.last))
        if self.coded is not None:
            self.coded = Encoded(*(None if x is None else change(x) for x in self.coded))  # type: ignore[arg-type]

    @property
    def num_coded(self) -> int:
        """Tokens that are codes."""
        return 0 if self.coded is None else self.coded.codes.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of each sequence."""
        raw = sum(0 if x is None else x.shape[1] for x in (self.first, self.last))
        return raw + self.num_coded

    def append(self, new: Tensor) -> Tensor:
        """Stores new tokens (B, S, g, D) and returns all, codes decoded.

        One token sees the others as they are stored after it, as every later step does. Several tokens see
        each other raw, and what was raw before them.
        """
        if self.last is None:
            # Not views: they would keep the memory of the prompt.
            self.first = self.last = new.new_empty(new.shape[0], 0, *new.shape[2:])
        self.last = torch.cat((self.last, new), dim=1)
        if new.shape[1] == 1:
            self._encode()
            return self.decoded()
        found = self.decoded()
        self._encode()
        return found

    def _encode(self) -> None:
        """Codes the raw tokens that are no longer among the last ones."""
        assert self.first is not None and self.last is not None
        missing = self.plan.sinks - self.first.shape[1]
        if missing > 0 and self.num_coded == 0:
            self.first = torch.cat((self.first, self.last[:, :missing]), dim=1)
            self.last = self.last[:, missing:].clone()
        if self.codec is None:
            return
        due = len(self.plan.coded_tokens(self.num_tokens)) - self.num_coded
        if due <= 0:
            return
        fresh = self.codec.encode(self.last[:, :due])
        self.last = self.last[:, due:].clone()  # a view would keep the memory of all tokens
        if self.coded is None:
            self.coded = fresh
            return
        pairs = zip(self.coded, fresh, strict=True)
        self.coded = Encoded(*(None if a is None or b is None else torch.cat((a, b), 1) for a, b in pairs))  # type: ignore[arg-type]

    def decoded(self) -> Tensor:
        """All tokens, (B, T, g, D)."""
        assert self.first is not None and self.last is not None
        parts = [self.first, self.last]
        if self.coded is not None and self.codec is not None:
            parts.insert(1, self.codec.decode(self.coded, self.last.dtype))
        parts = [x for x in parts if x.shape[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) if parts else self.last

    def check_crop(self, length: int) -> None:
        """Raises ValueError if ``length`` is within a group of tokens with common scales."""
        raw = 0 if self.first is None else self.first.shape[1]
        group = self.plan.token_group
        if raw < length < raw + self.num_coded and (length - raw) % group:
            raise ValueError(
                f"crop must not end within a group of {group} tokens that share scales, got {length} tokens: "
                f"keep {raw} plus a multiple of {group}, or use codecs that are local to a token"
            )

    def crop(self, length: int) -> None:
        """Keeps the first ``length`` tokens. Codes stay codes, also where they become the last ones."""
        if self.first is None or self.last is None:
            return
        raw = self.first.shape[1]
        coded = min(max(length - raw, 0), self.num_coded)
        if coded < self.num_coded and self.coded is not None and self.codec is not None:
            group = 1 if self.codec.codec.local else self.codec.codec.group
            scales = self.coded.scales
            scales = None if scales is None else scales[:, : coded // group]
            self.coded = Encoded(self.coded.codes[:, :coded], scales)
        self.last = self.last[:, : max(length - raw - coded, 0)]
        self.first = self.first[:, :length]


class CodedDynamicLayer(DynamicLayer):
    """A DynamicLayer that stores codes.

    ``keys`` and ``values`` are empty tensors: they say that the layer is initialized, as transformers asks.

    Args:
        plan: Says which tokens stay raw.
        key: The codec of keys; None stores them as they are.
        value: The codec of values; None stores them as they are.
    """

    stores_codes = True

    def __init__(self, plan: CodecPlan, key: TensorCodec | None, value: TensorCodec | None) -> None:
        super().__init__()
        self.sides = _CodedSide(key, plan), _CodedSide(value, plan)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and raw rows."""
        return sum(x.untyped_storage().nbytes() for side in self.sides for x in side.tensors())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens, (B, heads, S, D), and returns all as (B, heads, T, D), codes decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        keys, values = (side.append(x.transpose(1, 2)) for side, x in zip(self.sides, new, strict=True))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_seq_length(self) -> int:
        """Tokens of each sequence."""
        return self.sides[0].num_tokens if self.is_initialized else 0

    def reset(self) -> None:
        """Drops all tokens."""
        for side in self.sides:
            side.first = side.coded = side.last = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: The number is positive, or the end is within a group of tokens with common scales.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0, got {tokens_to_remove}")
        if tokens_to_remove and self.is_initialized:
            length = max(0, self.get_seq_length() + tokens_to_remove)
            for side in self.sides:
                side.check_crop(length)
            for side in self.sides:
                side.crop(length)

    def _map(self, change: Any) -> None:
        for side in self.sides:
            side.map(change)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences."""
        self._map(lambda x: x[indices.to(x.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences, for beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def offload(self) -> None:
        """Moves everything to the CPU."""
        if self.is_initialized:
            self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves everything back to the device of the layer."""
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))
