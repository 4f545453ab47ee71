"""What the tests of models of transformers do in several processes, beyond ranks.py."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor


def example(word: str) -> str:
    """The program with ``word`` in docs/huggingface_training.md that torchrun is to run."""
    text = (Path(__file__).parents[1] / "docs" / "huggingface_training.md").read_text()
    (found,) = [
        body for body in re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if word in body
    ]
    return found


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to norms that round to float32 within a model of float64; ``expected`` is not just zeros."""
    largest = expected.abs().max().item()
    assert largest > 1e-6
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * largest)
