"""Adapter that gives causal language models of transformers the interface of ``Decoder``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Cache:
    """The KV cache of transformers. The model creates it in its first call, with the class that it needs."""

    def __init__(self) -> None:
        self.states: Any = None

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens and drops the rest."""
        if length == 0:
            self.states = None
        elif self.states is not None and (surplus := self.states.get_seq_length() - length) > 0:
            self.states.crop(-surplus)


class LanguageModel(nn.Module):
    """Adapter around a causal language model of transformers.

    Args:
        model: The model. It is referenced, not copied.

    Attributes:
        config: `vocab_size` and `max_position_embeddings` (`sys.maxsize` if the model has no limit).
        resident_cache_bytes: Bytes that the tensors of the cache held at the end of the last `generate`; None
            before it, and for a model without a KV cache.
    """

    resident_cache_bytes: int | None = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        text = model.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or sys.maxsize
        self.config = SimpleNamespace(vocab_size=text.vocab_size, max_position_embeddings=limit)
        arguments = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in arguments
        self._cache = "cache" if "cache" in arguments else "past_key_values"  # before transformers 5.24

    @property
    def name(self) -> str:
        """The name of the cache plan, or the model type if the model has no plan."""
        plan = getattr(self.model.config, "plan", None)
        return getattr(plan, "name", self.model.config.model_type)

    def forward(self, ids: Tensor, *, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Computes logits.

        Args:
            ids: Token ids, (B, S).
            cache: KV cache to read and extend, or None.
            logits_to_keep: Number of last positions to return logits for; 0 means all.

        Returns:
            Logits, (B, S, V) or (B, logits_to_keep, V).
        """
        settings: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            settings[self._cache] = cache.states
        if self._keeps_logits:
            settings["logits_to_keep"] = logits_to_keep
        output = self.model(input_ids=ids, **settings)
        if cache is not None:
            cache.states = output[self._cache]
        return output.logits[:, -logits_to_keep:]

    def make_cache(self, batch_size: int, max_len: int) -> Cache:
        """Returns an empty cache. It grows on demand, so both arguments are ignored."""
        return Cache()

    def cache_bytes_per_token(self) -> float | None:
        """Cache bytes per token, measured on a few tokens; None for a model without a KV cache.

        With codecs it is the formula for tokens that are coded: the first and last ones stay raw.
        """
        if getattr(self.model.config, "codecs", None) is not None:
            return self.model.config.bytes_per_token(self.model.dtype)
        tokens, cache = 8, Cache()
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            self(torch.zeros(1, tokens, dtype=torch.int64, device=device), cache=cache, logits_to_keep=1)
        layers = getattr(cache.states, "layers", ())
        held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor)) / tokens or None

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: int | None = None,
        stream: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Calls transformers' `generate` with the arguments of `Decoder.generate`.

        Args:
            ids: One prompt, (1, S).
            max_new_tokens: Largest number of new tokens.
            temperature: Softmax temperature; 0 means greedy decoding.
            top_k: Number of most likely tokens to sample from; 0 means all.
            top_p: Probability mass to sample from.
            seed: Seed of the sampling, or None for torch's current state.
            stop: Token that ends generation, in addition to those of the generation config.
            stream: Called with each new token, (1,).

        Returns:
            Prompt and new tokens, (1, S + new).
        """
        settings: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if ends := self.ends() | (set() if stop is None else {stop}):
            settings |= {"eos_token_id": sorted(ends), "pad_token_id": min(ends)}
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            found = self.model.generate(
                ids.to(device),
                attention_mask=torch.ones_like(ids, device=device),
                max_new_tokens=max_new_tokens,
                streamer=_Streamer(stream) if stream else None,
                return_dict_in_generate=True,
                **settings,
            )
        self.resident_cache_bytes = resident_bytes(getattr(found, self._cache, None))
        return found.sequences

    def ends(self) -> set[int]:
        """End-of-text tokens from generation_config.json."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        if ends is None:
            return set()
        return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def resident_bytes(cache: Any) -> int | None:
    """Bytes of the memory that the tensors of a transformers cache hold; None if there are none."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "nbytes"):  # a layer that stores codes
            total += layer.nbytes
            continue
        held = (getattr(layer, name, None) for name in ("keys", "values"))
        total += sum(x.untyped_storage().nbytes() for x in held if isinstance(x, Tensor))
    return total or None


class _Streamer:
    """Streamer protocol of transformers: `put` receives the prompt first, then each new token."""

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        self._take, self._prompt = take, True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self._take(value)
        self._prompt = False

    def end(self) -> None: ...
