"""Token generation from prompts of different lengths, with a KV cache or, as a reference, without.

Prompts are left-padded, so that the new tokens of all sequences are in the same columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.generation import cuda_graph as graphs
from fusedkv_ext.generation.sampling import Sampling

__all__ = ["CausalLM", "generate"]


class CausalLM(Protocol):
    """Interface of a model for ``generate``, as ``Decoder`` has it."""

    def __call__(
        self,
        ids: Tensor,
        *,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        lengths: Sequence[int] | None = None,
        advance: bool = True,
    ) -> Tensor: ...

    def make_cache(self, batch_size: int, max_len: int, *, page_size: int | None = None) -> KVCache: ...

    def modules(self) -> Iterator[nn.Module]: ...


def generate(
    model: CausalLM,
    ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    vocab_size: int,
    max_len: int,
    device: torch.device | None = None,
    sampling: Sampling | None = None,
    seed: int | None = None,
    stop: int | Sequence[int] | None = None,
    stream: Callable[[Tensor], None] | None = None,
    use_cache: bool = True,
    attention_mask: Tensor | None = None,
    page_size: int | None = None,
    pad_token_id: int = 0,
    cuda_graph: bool | None = None,
) -> Tensor:
    """``Decoder.generate`` for any causal model.

    Args:
        model: The model.
        ids: As in ``Decoder.generate``.
        max_new_tokens: As in ``Decoder.generate``.
        vocab_size: Size of the vocabulary.
        max_len: Largest number of prompt and new tokens together.
        device: Device of the model.
        sampling: Sampling method; None is greedy.
        seed: As in ``Decoder.generate``.
        stop: As in ``Decoder.generate``.
        stream: As in ``Decoder.generate``.
        use_cache: As in ``Decoder.generate``.
        attention_mask: As in ``Decoder.generate``.
        page_size: As in ``Decoder.generate``.
        pad_token_id: As in ``Decoder.generate``.
        cuda_graph: As in ``Decoder.generate``.

    Returns:
        As in ``Decoder.generate``.

    Raises:
        ValueError: An argument is invalid. The message names it.
    """
    rows = _rows(ids, attention_mask, vocab_size, device)
    width = ids.shape[1] if isinstance(ids, Tensor) else max(map(len, rows), default=0)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not 0 <= pad_token_id < vocab_size:
        raise ValueError(f"pad_token_id must be in 0..{vocab_size - 1}, got {pad_token_id}")
    prompts = _left_padded(rows, width, pad_token_id, device)
    if cuda_graph and not (use_cache and prompts.device.type in graphs.CAPTURES):
        raise ValueError(
            f"cuda_graph=True needs a model on a CUDA device and use_cache=True, got a model on "
            f"{prompts.device} and use_cache={use_cache}"
        )
    if not rows or max_new_tokens == 0:
        return prompts
    longest = max(map(len, rows))
    if longest + max_new_tokens > max_len:
        raise ValueError(
            f"prompt and new tokens must be at most max_position_embeddings={max_len} together, got "
            f"{longest} tokens in the longest prompt and max_new_tokens={max_new_tokens}; shorten one of "
            "them"
        )
    stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    generator = None if seed is None else torch.Generator(prompts.device).manual_seed(seed)
    choose = functools.partial(sampling or Sampling(), generator=generator)

    source: _Cached | _Uncached
    with _eval_mode(model), torch.inference_mode():
        if use_cache:
            source = _Cached(model, rows, max_new_tokens, page_size, cuda_graph)
        else:
            source = _Uncached(model, rows)
        new = _decode(source, choose, max_new_tokens, stops, pad_token_id, stream)
    # Copied outside of inference mode, so that the result is an ordinary tensor for autograd.
    return torch.cat((prompts, new.clone()), dim=1)


def _decode(
    next_logits: Callable[[Tensor | None], Tensor],
    choose: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    stops: list[int],
    pad_token_id: int,
    stream: Callable[[Tensor], None] | None,
) -> Tensor:
    """The decode loop, until max_new_tokens or until every sequence has a stop token: (B, new)."""
    new: list[Tensor] = []
    finished = stop_ids = None
    while len(new) < max_new_tokens:
        token = choose(next_logits(new[-1] if new else None))
        if stops:
            if finished is None or stop_ids is None:
                stop_ids = torch.tensor(stops, device=token.device)
                finished = torch.zeros_like(token, dtype=torch.bool)
            token = token.masked_fill(finished, pad_token_id)
            finished |= torch.isin(token, stop_ids)
        new.append(token)
        if stream is not None:
            stream(token)
        if finished is not None and finished.all():
            break
    return torch.stack(new, dim=1)


@contextmanager
def _eval_mode(model: CausalLM) -> Iterator[None]:
    """Context manager for evaluation mode, which restores the mode of every module."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Cached:
    """Logits of the next token with a cache: prefill in the first call, then one decode step per call.

    A decode step has two parts. On the host the cache advances and adds pages. The rest is device work on
    tensors with fixed addresses, as a CUDA graph needs it.
    """

    def __init__(
        self,
        model: CausalLM,
        rows: list[Tensor],
        max_new_tokens: int,
        page_size: int | None,
        cuda_graph: bool | None,
    ) -> None:
        self.model = model
        self.lengths = [len(row) for row in rows]
        longest = max(self.lengths)
        self.prompts = _left_padded(rows, longest, 0, rows[0].device)
        # The last token is not an input, so it needs no cache slot.
        self.cache = model.make_cache(len(rows), longest + max_new_tokens - 1, page_size=page_size)
        self.step: Callable[[Tensor], Tensor] = functools.partial(
            model, cache=self.cache, logits_to_keep=1, advance=False
        )
        self.graph_required = cuda_graph is True
        self.capture_next = self.graph_required or (
            cuda_graph is None
            and graphs.pays_off(cast(nn.Module, model), self.prompts.device, max_new_tokens - 1)
        )

    def __call__(self, token: Tensor | None) -> Tensor:
        if token is None:
            logits = self.model(self.prompts, cache=self.cache, logits_to_keep=1, lengths=self.lengths)
            return logits[:, -1]
        self.cache.advance(1)
        ids = token[:, None]
        if self.capture_next:
            # The warm-up and the step store the same keys and values in the same slots.
            self.step = graphs.graphed(self.step, ids, self.graph_required)
            self.capture_next = False
        return self.step(ids)[:, -1]


class _Uncached:
    """Reference logits: every sequence alone, recomputed from its start for each new token."""

    def __init__(self, model: CausalLM, rows: list[Tensor]) -> None:
        self.model, self.rows = model, rows

    def __call__(self, token: Tensor | None) -> Tensor:
        if token is not None:
            self.rows = [torch.cat((row, token[b : b + 1])) for b, row in enumerate(self.rows)]
        return torch.stack([self.model(row[None])[0, -1] for row in self.rows])


def _rows(
    ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    vocab_size: int,
    device: torch.device | None,
) -> list[Tensor]:
    """The checked prompts without padding, on the model's device."""
    if isinstance(ids, Tensor):
        if ids.dim() != 2:
            raise ValueError(
                f"ids must have shape (B, S) or be a list of 1-D tensors, got shape {tuple(ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != ids.shape:
            got = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must have the shape of ids, {tuple(ids.shape)}, got {got}")
        keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rows = [row[kept.to(row.device)] for row, kept in zip(ids, keep, strict=True)]
    elif attention_mask is not None:
        raise ValueError("attention_mask must be None for a list of prompts, which have no padding")
    else:
        rows = [row if isinstance(row, Tensor) else torch.as_tensor(row, dtype=torch.int64) for row in ids]
    for b, row in enumerate(rows):
        if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise ValueError(f"prompt {b} must be a 1-D integer tensor, got {row.dtype} {tuple(row.shape)}")
        if len(row) == 0:
            raise ValueError(
                f"prompt {b} must have at least one token, got none; give it one, such as a start token"
            )
    if rows:
        low, high = (int(x) for x in torch.cat(rows).aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token ids must be in 0..{vocab_size - 1}, got ids from {low} to {high}")
    return [row.to(device, torch.int64) for row in rows]


def _left_padded(rows: list[Tensor], width: int, pad_token_id: int, device: torch.device | None) -> Tensor:
    out = torch.full((len(rows), width), pad_token_id, dtype=torch.int64, device=device)
    for b, row in enumerate(rows):
        out[b, width - len(row) :] = row
    return out
