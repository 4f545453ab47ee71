"""Loss of a trained model on text: perplexity, and the loss at each position of the context.

A window feeds N = `context` tokens and predicts the token after each of them. With stride s, window k begins
at token k * s. All N predictions of the first window count, and the last s of every later one: their tokens
are the target tokens. So each token of the text but the first is a target exactly once, and outside the first
window with at least N - s + 1 tokens before it. s = N: windows that do not overlap. The last window ends with
the text and may be shorter.
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
_BATCH_LOGITS = 2**24  # and logits
_LOSS_LOGITS = 2**22  # logits whose loss is taken at once: it makes copies of them, in fp32


class Scored(Protocol):
    """A model whose losses can be taken: ``Decoder`` and ``LanguageModel`` are.

    config: with vocab_size and max_position_embeddings. Called with ids (B, S) it gives logits (B, S, V), of
    the last `logits_to_keep` positions where that is not 0.
    """

    config: Any

    def __call__(self, ids: Tensor, *, logits_to_keep: int = 0) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class Text:
    """Documents to evaluate on. `origin` says in words where they come from."""

    documents: tuple[str, ...]
    origin: str

    @property
    def bytes(self) -> int:
        """Of the documents in UTF-8."""
        return sum(len(document.encode("utf-8")) for document in self.documents)

    def ids(self, tokenizer: Tokenizer) -> Tensor:
        """All documents one after the other, each ended by the separator if there is one: (T,) int32."""
        ids = array("i")
        for document in self.documents:
            ids.extend(tokenizer.encode(document))
            if tokenizer.separator is not None:
                ids.append(tokenizer.separator)
        return torch.tensor(ids, dtype=torch.int32)

    def tokens_per_byte(self, tokens: int) -> float:
        """`tokens` of `ids` per byte, where the end of a document counts as one byte, as in training."""
        return tokens / (self.bytes + len(self.documents))


def read_text(paths: Sequence[str | Path] = (), *, valid_fraction: float = 0.02) -> Text:
    """All text of files and folders; without `paths` the validation side of the default corpus.

    valid_fraction: share of the default corpus that was held out of training, by a hash of the files' names.
    Raises as `corpus.user_corpus` does.
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
    """Mean loss in nats per token over `tokens` tokens; perplexity is its exponential, per token.

    stderr: standard error of the loss over the windows, taken as independent; None for a single window.
    bits_per_byte: None where the text's tokens per byte were not given.
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
    """Mean loss in nats per token by the number of tokens before the target token, in buckets.

    Bucket i: `first[i]` to `last[i]` tokens before it, both included, 1 to `context`; `tokens[i]` of them
    were targets; `stderr[i]` is over windows, None where one window alone counts.
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
    """Sums of the losses, in nats, and their number, per window and bucket of positions: (W, K) float64."""

    sums: Tensor
    counts: Tensor
    last: tuple[int, ...]
    context: int
    stride: int

    def perplexity(self, tokens_per_byte: float | None = None) -> Perplexity:
        """The mean over all target tokens. tokens_per_byte: of the text, for bits per byte."""
        loss, stderr = _mean(self.sums.sum(1), self.counts.sum(1))
        bits = None if tokens_per_byte is None else bits_per_byte(loss, tokens_per_byte)
        tokens, windows = int(self.counts.sum()), len(self.counts)
        return Perplexity(loss, stderr, math.exp(loss), bits, tokens, windows, self.context, self.stride)

    def positions(self) -> Positions:
        """The mean over the tokens of each bucket that has any target."""
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
    """Loss of a model less that of another on the same windows, in nats per token.

    stderr: over the windows. A window is hard or easy for both models, so this error is far below those of
    the two losses.
    """

    loss: float
    stderr: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


def paired_difference(one: WindowLosses, other: WindowLosses) -> Difference:
    """`one` less `other`. Raises ValueError when they were not measured on the same windows."""
    if not torch.equal(one.counts, other.counts):
        raise ValueError("only losses of the same windows can be paired: same ids, context and stride")
    return Difference(*_mean((one.sums - other.sums).sum(1), one.counts.sum(1)))


def _mean(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Sum of sums over sum of counts, and the standard error of that ratio over windows (W,)."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    windows, total = len(counts), counts.sum()
    mean = sums.sum() / total
    if windows < 2:
        return mean.item(), None
    spread = (sums - mean * counts).square().sum() * windows / (windows - 1)
    return mean.item(), (spread.sqrt() / total).item()


def position_buckets(context: int) -> tuple[int, ...]:
    """Upper ends of the buckets of positions 1..context, two per octave: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    ends = sorted(
        {2**i for i in range(context.bit_length())} | {3 * 2**i for i in range(context.bit_length())}
    )
    return (*(end for end in ends if end < context), context)


def check_context(model: Scored, context: int, name: str = "the model") -> None:
    """Raises ConfigError for a context that is empty or longer than the model has positions."""
    limit = model.config.max_position_embeddings
    if context < 1:
        raise ConfigError(f"a context must be at least 1 token, got {context}")
    if context > limit:
        raise ConfigError(
            f"a context of {context} tokens is more than {name} takes: its max_position_embeddings is "
            f"{limit}; choose a shorter context"
        )


@contextmanager
def evaluation(model: Scored) -> Iterator[torch.device]:
    """Evaluation mode without gradients for a while; gives the model's device."""
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
    start: int  # first token that is fed
    length: int  # tokens that are fed
    targets: int  # predictions that count: the last ones


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
    """Consecutive windows of one shape, as many as fit into one forward pass."""
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
    """Loss of every target token, as this module's docstring says, summed per window and bucket.

    Args:
        ids: (T,) integers.
        context: N, tokens that a window feeds.
        stride: s, 1..N; None: N.
        max_tokens: score about that many, in windows spread evenly over the text; None: all.

    Raises:
        ConfigError: for a context beyond the model's positions and for numbers out of range.
        ValueError: when the text is shorter than one window.
        RuntimeError: when a loss is not finite.
    """
    stride = context if stride is None else stride
    check_context(model, context)
    if not 1 <= stride <= context:
        raise ConfigError(f"stride must be from 1 to the context of {context} tokens, got {stride}")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, or None for all, got {max_tokens}")
    if len(ids) < context + 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, but a context of {context} needs {context + 1}; give more text "
            "or a shorter context"
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
                raise RuntimeError("the model's loss is not finite: its weights are damaged or it diverged")
            where = bucket[length - targets : length]
            sums[row : row + len(batch)].index_add_(1, where, nll)
            counts[row : row + len(batch)].index_add_(1, where, torch.ones_like(nll))
            row += len(batch)
    return WindowLosses(sums, counts, last, context, stride)


def _losses(model: Scored, rows: Tensor, num_targets: int) -> Tensor:
    """Cross entropy of the last `num_targets` predictions of rows (B, S + 1), in nats: (B, num_targets)
    float64. The logits of a Decoder exist for a few rows at a time.
    """
    inputs, targets = rows[:, :-1], rows[:, -num_targets:]
    keep = 0 if num_targets == inputs.shape[1] else num_targets
    rows_at_once = max(1, _LOSS_LOGITS // model.config.vocab_size)
    if isinstance(model, Decoder):
        hidden, _ = model.model(inputs, keep=keep)
        parts = map(model.lm_head, hidden.flatten(0, 1).split(rows_at_once))
    else:
        parts = iter(model(inputs, logits_to_keep=keep).flatten(0, 1).split(rows_at_once))
    nll = [_cross_entropy(*pair) for pair in zip(parts, targets.flatten().split(rows_at_once), strict=True)]
    return torch.cat(nll).view_as(targets).double()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each row, computed in fp32 (fp64 for fp64 logits)."""
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
    """Mean loss of a text in nats per token, its exponential, and the number of target tokens.

    Losses are computed in fp32, for a few rows of logits at a time, and summed in fp64.

    Args:
        model: a ``Decoder``, or any causal language model of transformers, in any dtype.
        ids: (T,) integers. A text of T <= context tokens is one window, whose T - 1 last tokens are targets.
        context, stride, max_tokens: as in `window_losses`.
        tokens_per_byte: `Text.tokens_per_byte`, for bits per byte.

    Raises:
        ConfigError: for a context beyond the model's positions and for numbers out of range.
        ValueError: for a text of fewer than two tokens.
        RuntimeError: when a loss is not finite.
    """
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids must be one text of at least 2 tokens, got shape {tuple(ids.shape)}")
    if hasattr(model.config, "get_text_config"):
        model = LanguageModel(model)
    context = min(context, len(ids) - 1)
    stride = None if stride is None else min(stride, context)
    losses = window_losses(model, ids, context=context, stride=stride, max_tokens=max_tokens)
    return losses.perplexity(tokens_per_byte)


def per_position(model: Scored, ids: Tensor, *, context: int, max_tokens: int | None = None) -> Positions:
    """Loss by position in windows that do not overlap; arguments and errors as in `window_losses`."""
    return window_losses(model, ids, context=context, max_tokens=max_tokens).positions()
