"""Sampling of the next token: greedy, or with temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """A sampling method: a callable that maps logits to tokens.

    Args:
        temperature: Divisor of the logits; 0 is greedy.
        top_k: Number of most likely tokens to keep; 0 keeps all.
        top_p: Of these, the smallest set whose probability reaches top_p is kept (nucleus sampling, arXiv
            1904.09751); 1 keeps all.

    Raises:
        ValueError: A number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0 (greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (no limit), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (no limit), got {self.top_p}")

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Chooses the next token of each sequence.

        Args:
            logits: (B, vocabulary).
            generator: Source of random numbers; None: torch's global generator.

        Returns:
            (B,) token ids.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            weakest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < weakest, -math.inf)
        if self.top_p < 1:
            ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
            # A token is kept if the more likely ones do not reach top_p, so the first is always kept.
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
