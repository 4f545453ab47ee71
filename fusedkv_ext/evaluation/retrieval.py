"""Retrieval scores on the questions of `needles`: greedy answer, multiple choice, and likelihood in nats.

The prefill of a prompt runs once, with early exit if the plan has one. The greedy answer and every candidate
continue from that cache, which is cropped back to the prompt in between.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.evaluation.needles import Example, Questions, make_questions
from fusedkv_ext.evaluation.perplexity import BATCH_TOKENS, check_context, evaluation
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.training.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """Means over examples with their standard errors.

    Standard errors of fractions are binomial, sqrt(p (1 - p) / n). At p = 0 and p = 1 they are 0 and carry
    no information.

    Attributes:
        task: Name of the task.
        length: Tokens of prompt and answer.
        depth: Requested depth of the needle; None for the mean over all depths.
        examples: Number of examples.
        place: Mean depth of the needles.
        chance: Accuracy of random choice, 1 / k for k choices.
        exact: Fraction of greedy answers that begin with the value.
        choice: Fraction of examples in which the right value is the most likely choice. Ties count in part.
        nll: Negative log-likelihood of the whole right value, in nats.
        baseline_nll: The same without the needle in the text.
        gain: baseline_nll - nll.
    """

    task: str
    length: int
    depth: float | None
    examples: int
    place: float
    chance: float
    exact: float
    exact_stderr: float
    choice: float
    choice_stderr: float
    nll: float
    nll_stderr: float | None
    baseline_nll: float
    baseline_nll_stderr: float | None
    gain: float
    gain_stderr: float | None


@dataclass(frozen=True)
class Retrieval:
    """Scores of the grid: `cells` per task, length and depth; `totals` per task and length."""

    cells: tuple[Score, ...]
    totals: tuple[Score, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """The result of one example: `text` is the greedy answer, the other fields are as in `Score`."""

    text: str
    exact: bool
    choice: float
    nll: float
    baseline_nll: float
    depth: float
    keys: int


def answers(model: Decoder, tokenizer: Tokenizer, questions: Questions) -> list[Answer]:
    """Runs the examples in batches and returns one answer for each.

    Raises:
        RuntimeError: Logits are NaN.
    """
    rows = max(1, BATCH_TOKENS // questions.length)
    batches = (questions.examples[i : i + rows] for i in range(0, len(questions.examples), rows))
    with evaluation(model) as device:
        return [found for batch in batches for found in _answer_batch(model, tokenizer, batch, device)]


def _answer_batch(
    model: Decoder, tokenizer: Tokenizer, batch: Sequence[Example], device: torch.device
) -> list[Answer]:
    size = len(batch[0].prompt)
    room = max(len(candidate) for example in batch for candidate in example.candidates)
    prompts, baselines = (
        torch.tensor([getattr(example, name) for example in batch], device=device)
        for name in ("prompt", "baseline")
    )
    cache = model.make_cache(len(batch), size + room)

    start = model(prompts, cache=cache, logits_to_keep=1)[:, -1]
    token, greedy = start.argmax(-1), []
    for step in range(room):
        greedy.append(token)
        if step < room - 1:
            token = model(token[:, None], cache=cache, logits_to_keep=1)[:, -1].argmax(-1)
    texts = [tokenizer.decode(ids) for ids in torch.stack(greedy, 1).tolist()]
    choices = []
    for column in zip(*(example.candidates for example in batch), strict=True):
        cache.crop(size)
        choices.append(_nll(model, cache, start, column))
    nll = torch.stack(choices, 1)

    cache.crop(0)
    start = model(baselines, cache=cache, logits_to_keep=1)[:, -1]
    baseline = _nll(model, cache, start, [example.candidates[0] for example in batch])
    if nll.isnan().any() or baseline.isnan().any():
        raise RuntimeError(
            "the model's logits must be finite, got NaN: training diverged or the weights are damaged; use "
            "another checkpoint"
        )
    best = nll == nll.min(1, keepdim=True).values
    credit = best[:, 0] / best.sum(1)
    results = zip(batch, texts, credit.tolist(), nll[:, 0].tolist(), baseline.tolist(), strict=True)
    return [
        Answer(text, text.startswith(example.values[0]), share, own, without, example.depth, nll.shape[1])
        for example, text, share, own, without in results
    ]


def _nll(model: Decoder, cache: KVCache, start: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """-log p of each answer after the cached tokens, in nats, (B,) float64; `start`: first logits (B, V).

    The cache is extended by the answers.
    """
    width = max(map(len, answers))
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in answers], device=start.device)
    logits = start[:, None]
    if width > 1:
        logits = torch.cat((logits, model(ids[:, :-1], cache=cache)), dim=1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].double()
    lengths = torch.tensor([len(ids) for ids in answers], device=start.device)
    # Padding follows the answer, so it does not affect the answer's logits. It is masked out of the sum.
    return -found.masked_fill(torch.arange(width, device=start.device) >= lengths[:, None], 0.0).sum(1)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _score(task: str, length: int, depth: float | None, found: Sequence[Answer]) -> Score:
    count = len(found)

    def share(values: Sequence[float]) -> tuple[float, float]:
        mean = statistics.fmean(values)
        return mean, math.sqrt(mean * (1.0 - mean) / count)

    return Score(
        task,
        length,
        depth,
        count,
        statistics.fmean(answer.depth for answer in found),
        1.0 / found[0].keys,
        *share([float(answer.exact) for answer in found]),
        *share([answer.choice for answer in found]),
        *_mean([answer.nll for answer in found]),
        *_mean([answer.baseline_nll for answer in found]),
        *_mean([answer.baseline_nll - answer.nll for answer in found]),
    )


def score_questions(model: Decoder, tokenizer: Tokenizer, grid: Sequence[Questions]) -> Retrieval:
    """Scores one model on the questions of `make_questions`.

    Raises:
        ConfigError: A length exceeds the model's positions. This is checked before anything runs.
    """
    for questions in grid:
        check_context(model, questions.length)
    cells: list[Score] = []
    together: dict[tuple[str, int], list[Answer]] = {}
    for questions in grid:
        found = answers(model, tokenizer, questions)
        cells.append(_score(questions.task, questions.length, questions.depth, found))
        together.setdefault((questions.task, questions.length), []).extend(found)
    totals = (_score(task, length, None, found) for (task, length), found in together.items())
    return Retrieval(tuple(cells), tuple(totals))


def score(
    model: Decoder, tokenizer: Tokenizer, documents: Sequence[str], *, lengths: Sequence[int], **settings: Any
) -> Retrieval:
    """Creates questions and scores one model. Arguments and errors are those of `make_questions`."""
    return score_questions(
        model, tokenizer, make_questions(tokenizer, documents, lengths=lengths, **settings)
    )
