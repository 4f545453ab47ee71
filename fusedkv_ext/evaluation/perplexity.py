"""Loss of a trained model on text: perplexity, and the loss at each position of the context.

A window feeds N = `context` tokens and predicts the token after each of them. With stride s, window k begins
at token k * s. The targets are all N predictions of the first window and the last s of every later one. Each
token of the text except the first is a target exactly once. Outside the first window, at least N - s + 1
tokens precede it. With s = N windows do not overlap. The last window ends with the text and may be shorter.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.evaluation.language_model import LanguageModel
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.training.data.corpus import TextFile, default_corpus, split_files, user_corpus
from fusedkv_ext.training.data.tokenizer import Tokenizer
from fusedkv_ext.training.metrics import bits_per_byte

BATCH_TOKENS = 16384  # tokens of one forward pass
_BATCH_LOGITS = 2**24  # logits of one forward pass
_LOSS_LOGITS = 2**22  # logits per cross-entropy call, which copies them in fp32


class Scored(Protocol):
    """The interface of a model that can be evaluated, as ``Decoder`` and ``LanguageModel`` have it.

    A call maps ids (B, S) to logits (B, S, V), or to those of the last `logits_to_keep` positions.

    Attributes:
        config: `vocab_size` and `max_position_embeddings`.
    """

    config: Any

    def __call__(self, ids: Tensor, *, logits_to_keep: int = 0) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Text:
    """Documents to evaluate on.

    Attributes:
        documents: The texts.
        origin: Description of their source.
    """

    documents: tuple[str, ...]
    origin: str

    @property
    def bytes(self) -> int:
        """Size of the documents in UTF-8."""
        return sum(len(document.encode("utf-8")) for document in self.documents)

    def ids(self, tokenizer: Tokenizer) -> Tensor:
        """Token ids of all documents, each followed by the separator if the tokenizer has one: (T,) int32."""
        ids = array("i")
        for document in self.documents:
            ids.extend(tokenizer.encode(document))
            if tokenizer.separator is not None:
                ids.append(tokenizer.separator)
        return torch.tensor(ids, dtype=torch.int32)

    def tokens_per_byte(self, tokens: int) -> float:
        """Tokens per byte. The end of a document counts as one byte, as in training."""
        return tokens / (self.bytes + len(self.documents))


def read_text(paths: Sequence[str | Path] = (), *, valid_fraction: float = 0.02) -> Text:
    """Reads text files, or the validation split of the default corpus.

    Args:
        paths: Files and folders. If empty, the validation split of the default corpus is read.
        valid_fraction: Fraction of the default corpus that training held out, by a hash of the file names.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file is not UTF-8 text, or no text was found.
    """

    def documents(files: Sequence[TextFile]) -> tuple[str, ...]:
        return tuple(file.path.read_bytes().decode("utf-8") for file in files)

    if paths:
        corpus = user_corpus(paths)
        return Text(documents(corpus.files), corpus.origin)
    corpus = default_corpus()
    held_out = split_files(corpus.files, valid_fraction)[1]
    return Text(documents(held_out), f"{len(held_out)} files held out of the {corpus.origin}")


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    Attributes:
        loss: Mean loss over the target tokens, in nats per token.
        stderr: Standard error of the loss over windows, assumed independent; None for a single window.
        perplexity: Exponential of the loss.
        bits_per_byte: The loss per byte of text; None if the tokens per byte were not given.
        tokens: Number of target tokens.
        windows: Number of windows.
        context: Tokens per window.
        stride: Tokens between the starts of two windows.
    """

    loss: float
    stderr: float | None
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    windows: int
    context: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Positions:
    """Mean loss by the number of tokens that precede the target token, in buckets.

    Attributes:
        first: Smallest number of preceding tokens in each bucket, from 1.
        last: Largest number of preceding tokens in each bucket, up to `context`.
        loss: Mean loss of each bucket, in nats per token.
        stderr: Standard error over windows; None for a bucket with targets in a single window.
        tokens: Number of target tokens in each bucket.
        windows: Number of windows.
        context: Tokens per window.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    loss: tuple[float, ...]
    stderr: tuple[float | None, ...]
    tokens: tuple[int, ...]
    windows: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class WindowLosses:
    """Losses per window and bucket of positions.

    Attributes:
        sums: Sums of the losses in nats, (W, K) float64.
        counts: Numbers of target tokens, (W, K) float64.
        last: Upper end of each bucket.
        context: Tokens per window.
        stride: Tokens between the starts of two windows.
    """

    sums: Tensor
    counts: Tensor
    last: tuple[int, ...]
    context: int
    stride: int

    def perplexity(self, tokens_per_byte: float | None = None) -> Perplexity:
        """The mean over all target tokens; `tokens_per_byte` of the text adds bits per byte."""
        loss, stderr = _mean(self.sums.sum(1), self.counts.sum(1))
        bits = None if tokens_per_byte is None else bits_per_byte(loss, tokens_per_byte)
        tokens, windows = int(self.counts.sum()), len(self.counts)
        return Perplexity(loss, stderr, math.exp(loss), bits, tokens, windows, self.context, self.stride)

    def positions(self) -> Positions:
        """The mean of each bucket that has target tokens."""
        tokens = self.counts.sum(0)
        kept = [k for k, number in enumerate(tokens.tolist()) if number]
        means = [_mean(self.sums[:, k], self.counts[:, k]) for k in kept]
        return Positions(
            first=tuple(self.last[k - 1] + 1 if k else 1 for k in kept),
            last=tuple(self.last[k] for k in kept),
            loss=tuple(loss for loss, _ in means),
            stderr=tuple(stderr for _, stderr in means),
            tokens=tuple(int(tokens[k]) for k in kept),
            windows=len(self.counts),
            context=self.context,
        )


@dataclass(frozen=True)
class Difference:
    """Paired difference of the losses of two models on the same windows, in nats per token.

    Attributes:
        loss: Mean difference.
        stderr: Standard error of the difference over windows. The difficulty of a window affects both models
            alike, so this error is much smaller than the errors of the two losses.
    """

    loss: float
    stderr: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


def paired_difference(one: WindowLosses, other: WindowLosses) -> Difference:
    """Difference `one - other`.

    Raises:
        ValueError: The losses were not measured on the same windows.
    """
    if not torch.equal(one.counts, other.counts):
        raise ValueError(
            "paired losses must be from the same windows, got different ones; measure both with the same "
            "ids, context and stride"
        )
    return Difference(*_mean((one.sums - other.sums).sum(1), one.counts.sum(1)))


def _mean(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Ratio of the total sum to the total count, and its standard error over windows (W,)."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    windows, total = len(counts), counts.sum()
    mean = sums.sum() / total
    if windows < 2:
        return mean.item(), None
    spread = (sums - mean * counts).square().sum() * windows / (windows - 1)
    return mean.item(), (spread.sqrt() / total).item()


def position_buckets(context: int) -> tuple[int, ...]:
    """Upper ends of the position buckets 1..context, two per octave: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    ends = sorted(
        {2**i for i in range(context.bit_length())} | {3 * 2**i for i in range(context.bit_length())}
    )
    return (*(end for end in ends if end < context), context)


def check_context(model: Scored, context: int, name: str = "the model") -> None:
    """Raises ConfigError for a context below 1 token or beyond the model's `max_position_embeddings`."""
    limit = model.config.max_position_embeddings
    if context < 1:
        raise ConfigError(f"context must be at least 1 token, got {context}")
    if context > limit:
        raise ConfigError(
            f"context must be at most max_position_embeddings of {name} ({limit}), got {context}; choose a "
            "shorter context"
        )


@contextmanager
def evaluation(model: Scored) -> Iterator[torch.device]:
    """Context manager for evaluation mode without gradients; yields the model's device."""
    training = [module for module in model.modules() if module.training]
    # FSDP2 gathers weights into tensors that training uses again, so they cannot be inference tensors.
    no_gradients = torch.no_grad() if hasattr(model, "unshard") else torch.inference_mode()
    try:
        for module in training:
            module.training = False
        with no_gradients:
            yield next(model.parameters()).device
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Window:
    start: int  # first input token
    length: int  # number of input tokens
    targets: int  # number of target tokens, at the end


def _windows(tokens: int, context: int, stride: int, max_tokens: int | None) -> list[_Window]:
    predictions = tokens - 1
    total = 1 + -(-(predictions - context) // stride)
    count = total if max_tokens is None else min(total, max(1, max_tokens // stride))
    windows = []
    for k in (i * total // count for i in range(count)):
        length = min(context, predictions - k * stride)
        windows.append(_Window(k * stride, length, length - (context - stride) if k else length))
    return windows


def _batches(windows: Sequence[_Window], vocab_size: int) -> Iterator[list[_Window]]:
    """Batches of consecutive windows of one shape, as large as one forward pass allows."""
    for (length, targets), group in itertools.groupby(
        windows, lambda window: (window.length, window.targets)
    ):
        rows = max(1, min(BATCH_TOKENS // length, _BATCH_LOGITS // (targets * vocab_size)))
        while batch := list(itertools.islice(group, rows)):
            yield batch


def window_losses(
    model: Scored,
    ids: Tensor,
    *,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> WindowLosses:
    """Loss of every target token, summed per window and bucket. See the module docstring for the windows.

    Args:
        model: The model to evaluate.
        ids: Token ids of the text, (T,).
        context: N, the input tokens of a window.
        stride: s, from 1 to N. If None, N.
        max_tokens: Approximate number of target tokens, in windows spread evenly over the text. If None, all.

    Raises:
        ConfigError: A number is out of range, or the context exceeds the model's positions.
        ValueError: The text is shorter than one window.
        RuntimeError: A loss is not finite.
    """
    stride = context if stride is None else stride
    check_context(model, context)
    if not 1 <= stride <= context:
        raise ConfigError(f"stride must be from 1 to the context of {context} tokens, got {stride}")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, or None for all, got {max_tokens}")
    if len(ids) < context + 1:
        raise ValueError(
            f"the text must have at least {context + 1} tokens for a context of {context}, got {len(ids)}; "
            "give more text or a shorter context"
        )
    windows = _windows(len(ids), context, stride, max_tokens)
    last = position_buckets(context)
    bucket = torch.bucketize(torch.arange(1, context + 1), torch.tensor(last))
    shape = len(windows), len(last)
    sums, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    row = 0
    with evaluation(model) as device:
        for batch in _batches(windows, model.config.vocab_size):
            length, targets = batch[0].length, batch[0].targets
            rows = torch.stack([ids[w.start : w.start + length + 1] for w in batch]).to(device, torch.int64)
            nll = _losses(model, rows, targets).cpu()
            if not nll.isfinite().all():
                raise RuntimeError(
                    "the model's loss must be finite, got inf or NaN: training diverged or the weights are "
                    "damaged; use another checkpoint"
                )
            where = bucket[length - targets : length]
            sums[row : row + len(batch)].index_add_(1, where, nll)
            counts[row : row + len(batch)].index_add_(1, where, torch.ones_like(nll))
            row += len(batch)
    return WindowLosses(sums, counts, last, context, stride)


def _losses(model: Scored, rows: Tensor, num_targets: int) -> Tensor:
    """Cross entropy of the last `num_targets` predictions of rows (B, S + 1): (B, num_targets) float64."""
    inputs, targets = rows[:, :-1], rows[:, -num_targets:]
    keep = 0 if num_targets == inputs.shape[1] else num_targets
    rows_at_once = max(1, _LOSS_LOGITS // model.config.vocab_size)
    if isinstance(model, Decoder):  # computes logits for a few rows at a time
        hidden, _ = model.model(inputs, keep=keep)
        parts = map(model.lm_head, hidden.flatten(0, 1).split(rows_at_once))
    else:
        parts = iter(model(inputs, logits_to_keep=keep).flatten(0, 1).split(rows_at_once))
    nll = [_cross_entropy(*pair) for pair in zip(parts, targets.flatten().split(rows_at_once), strict=True)]
    return torch.cat(nll).view_as(targets).double()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each row in fp32, or in fp64 for fp64 logits."""
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none"
    )


def perplexity(
    model: Any,
    ids: Tensor,
    *,
    context: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    tokens_per_byte: float | None = None,
) -> Perplexity:
    """Perplexity of a text: mean loss in nats per token, its exponential, and the number of target tokens.

    Losses are computed in fp32, for a few rows of logits at a time, and summed in fp64.

    Args:
        model: A ``Decoder`` or any causal language model of transformers, in any dtype.
        ids: Token ids of the text, (T,). With T <= context the text is one window with T - 1 targets.
        context: Input tokens of a window.
        stride: Tokens between the starts of two windows. If None, `context`.
        max_tokens: Approximate number of target tokens, in windows spread evenly over the text. If None, all.
        tokens_per_byte: `Text.tokens_per_byte`, for bits per byte.

    Raises:
        ConfigError: A number is out of range, or the context exceeds the model's positions.
        ValueError: The text has fewer than two tokens.
        RuntimeError: A loss is not finite.
    """
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids must have shape (T,) with T >= 2, got {tuple(ids.shape)}")
    if hasattr(model.config, "get_text_config"):
        model = LanguageModel(model)
    context = min(context, len(ids) - 1)
    stride = None if stride is None else min(stride, context)
    losses = window_losses(model, ids, context=context, stride=stride, max_tokens=max_tokens)
    return losses.perplexity(tokens_per_byte)


def per_position(model: Scored, ids: Tensor, *, context: int, max_tokens: int | None = None) -> Positions:
    """Loss by position in non-overlapping windows. Arguments and errors are those of `window_losses`."""
    return window_losses(model, ids, context=context, max_tokens=max_tokens).positions()
