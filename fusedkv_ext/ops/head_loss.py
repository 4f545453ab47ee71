"""Cross entropy and distillation at the output head, without ever holding the logits of all tokens.

With a vocabulary of 128,000, the fp32 logits of 8192 tokens are 4.2 GB, and a plain loss keeps several copies
of them for its backward. Here the head is applied to a chunk of tokens at a time, and the gradient of the
chunk is computed at once: the loss is the last thing a model computes, so softmax minus target goes through
the head right away. What is kept are the gradients of the hidden states and of the head. (Idea: Liger Kernel,
arXiv:2410.10989, section 3; here in plain torch, with a teacher.)

    CE = mean_t -log p_s(label_t)        KL = T^2 mean_t sum_v p_t(v) (log p_t(v) - log p_s(v))

with p_s, p_t the softmax of the student's and the teacher's logits over the temperature T (in CE: over 1).
T^2 keeps the gradient's size independent of T (Hinton et al., arXiv:1503.02531, section 2).

Why not ``torch.nn.functional.linear_cross_entropy`` (torch 2.13): its chunked path returns the loss in the
dtype of the hidden states, so 8 bits of it in bf16, keeps the gradient of the head in that dtype too, and has
neither a teacher nor a vocabulary that ranks share. docs/training.md has both measured in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedkv_ext.ops.packing import IGNORED

__all__ = ["Head", "HeadLosses", "VocabShard", "Workspace", "chunk_rows", "head_losses"]

# Logits that exist at a time: more make larger matrix products, fewer take less memory.
_CHUNK_LOGITS = {"cpu": 2**24}
_CHUNK_LOGITS_ELSEWHERE = 2**27
_BLOCK_LOGITS = 2**20  # of a chunk on a CPU, whose fp32 copies stay in its cache


class VocabShard(NamedTuple):
    """Which tokens of the vocabulary a head has, where ranks share them.

    Args:
        rank: of this process; it has the tokens from ``rank * size`` on.
        ranks: their number.
        size: tokens per rank; the last rank may have fewer.
        maximum: all-reduces a tensor in place.
        total: all-reduces a tensor in place.
    """

    rank: int
    ranks: int
    size: int
    maximum: Callable[[Tensor], Any]
    total: Callable[[Tensor], Any]


class Head(NamedTuple):
    """An output head: weight (V, C) and bias (V,) or None, any float dtype. shard: if ranks share the
    vocabulary, which part of it this is; the hidden states then get this part's share of their gradient.
    """

    weight: Tensor
    bias: Tensor | None = None
    shard: VocabShard | None = None


class HeadLosses(NamedTuple):
    """loss: ce_weight * ce + kl_weight * kl, differentiable. ce, kl: its parts in nats per token, detached;
    kl is None without a teacher. All scalars, fp32 (fp64 for fp64 input).
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor | None


class Workspace:
    """Memory that stays from call to call. Fresh memory costs a page fault per 4 KiB, which for logits takes
    longer than what is computed with them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized tensor (shape), which the next call with this name may overwrite."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != dtype or kept.device != device:
            kept = self._kept[name] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)


def chunk_rows(rows: int, vocab_size: int, device_type: str) -> int:
    """Tokens whose logits exist at a time, of `rows` tokens, where nothing else is asked for."""
    logits = _CHUNK_LOGITS.get(device_type, _CHUNK_LOGITS_ELSEWHERE)
    return max(1, min(rows, logits // vocab_size))


def head_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    num_target_tokens: Tensor | float | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    workspace: Workspace | None = None,
) -> HeadLosses:
    """The losses of the logits ``hidden @ head.weight.T + head.bias``.

    Under autocast the products run in its dtype, everything else in fp32 (fp64 for fp64 input).
    Differentiable once, in hidden, head.weight and head.bias.

    Args:
        hidden: (..., C), any float dtype.
        labels: (...) int64, already shifted, IGNORED where nothing is to be predicted.
        num_target_tokens: the divisor of the sums over tokens. None: the number of labels that count.
        teacher_hidden, teacher_head: (..., C_t) and the head of the model to imitate; both or neither.
        chunk: tokens whose logits exist at a time. None: ``chunk_rows``.
        workspace: kept by whoever calls this often.

    Raises:
        ValueError: for shapes that do not fit, vocabularies of different sizes, temperature <= 0, chunk < 1
            and, where num_target_tokens is None, labels that are all IGNORED.
    """
    run = _head_losses
    if torch.compiler.is_compiling():  # outside of the graph; as a decorator it would import torch's compiler
        run = torch.compiler.disable(_head_losses)
    teacher = (teacher_hidden, teacher_head)
    weights = (ce_weight, kl_weight, temperature)
    return run(hidden, head, labels, num_target_tokens, *teacher, *weights, chunk, workspace)


def _head_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    num_target_tokens: Tensor | float | None,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
    chunk: int | None,
    workspace: Workspace | None,
) -> HeadLosses:
    _check(hidden, head, labels, num_target_tokens, teacher_hidden, teacher_head, temperature, chunk)
    dtype, device = hidden.dtype, hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).to(dtype)
        teacher = (rows, _in(teacher_head, dtype))
    flat = labels.reshape(-1)
    if num_target_tokens is None:
        num_target_tokens = int((flat != IGNORED).sum())
    elif isinstance(num_target_tokens, Tensor):
        num_target_tokens = num_target_tokens.to(torch.promote_types(dtype, torch.float32))
    task = _Task(
        labels=flat,
        teacher=teacher,
        shard=head.shard,
        scale=1.0 / num_target_tokens,
        ce_weight=ce_weight,
        kl_weight=0.0 if teacher is None else kl_weight,
        temperature=temperature,
        chunk=chunk or chunk_rows(len(flat), len(head.weight), device),
        dtype=dtype,
        with_grad=torch.is_grad_enabled(),
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss, ce, kl = _HeadLoss.apply(rows, head.weight, head.bias, task, workspace or Workspace())
    return HeadLosses(loss, ce, None if teacher is None else kl)


def _in(head: Head, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Head(head.weight.detach().to(dtype), bias)


def _check(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    num_target_tokens: Tensor | float | None,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    temperature: float,
    chunk: int | None,
) -> None:
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: expected one per row of hidden, {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head belong together: give both or neither")
    if teacher_hidden is not None and teacher_head is not None:
        if teacher_hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"teacher_hidden: expected rows of shape {tuple(labels.shape)}, got "
                f"{tuple(teacher_hidden.shape)}"
            )
        if teacher_head.weight.shape[0] != head.weight.shape[0]:
            raise ValueError(
                f"teacher_head: its vocabulary has {teacher_head.weight.shape[0]} entries, the student's "
                f"{head.weight.shape[0]}; they have to be the same"
            )
        if head.shard is not None:
            raise ValueError("teacher_head needs a head with the whole vocabulary, got one that ranks share")
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    if num_target_tokens is None and not bool((labels != IGNORED).any()):
        raise ValueError("labels: all are ignored, so there is no token to take the mean over")


@dataclass
class _Task:
    """What is asked of the logits. labels: (N,). teacher: its rows (N, C_t) and its head, in ``dtype``, that
    of the products. scale: one over the number of target tokens.
    """

    labels: Tensor
    teacher: tuple[Tensor, Head] | None
    shard: VocabShard | None
    scale: Tensor | float
    ce_weight: float
    kl_weight: float
    temperature: float
    chunk: int
    dtype: torch.dtype
    with_grad: bool

    def targets(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Of some rows: the columns (n, 1) of their labels in this rank's logits, 0 where a label does not
        count or is another rank's; and where that is so, None without other ranks.
        """
        labels = self.labels[rows].unsqueeze(1)
        ignored = labels == IGNORED
        if self.shard is None:
            return labels.masked_fill(ignored, 0), None
        # Labels that are no tokens belong to the first or last rank, where gathering them fails.
        owner = labels.div(self.shard.size, rounding_mode="floor").clamp(0, self.shard.ranks - 1)
        elsewhere = ignored | (owner != self.shard.rank)
        return (labels - self.shard.rank * self.shard.size).masked_fill(elsewhere, 0), elsewhere


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, workspace: Workspace
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, device = task.dtype, hidden.device
        exact = torch.promote_types(dtype, torch.float32)
        own = _in(Head(weight, bias), dtype)
        needs = [task.with_grad and needed for needed in ctx.needs_input_grad[:3]]
        task.with_grad = any(needs)
        grads = [
            torch.zeros_like(tensor, dtype=exact) if needed and tensor is not None else None
            for tensor, needed in zip((hidden, weight, bias), needs, strict=True)
        ]
        ce, kl = (torch.zeros((), dtype=exact, device=device) for _ in range(2))
        for start in range(0, len(hidden), task.chunk):
            part = slice(start, min(start + task.chunk, len(hidden)))
            shape = (part.stop - part.start, len(weight))
            # Rows that do not count may hold anything, NaN included.
            ignored = (task.labels[part] == IGNORED).unsqueeze(1)
            rows = hidden[part].to(dtype).masked_fill(ignored, 0)
            logits = _logits(rows, own, workspace.get("logits", shape, dtype, device))
            theirs = None
            if task.teacher is not None:
                room = workspace.get("theirs", shape, dtype, device)
                theirs = _logits(task.teacher[0][part].masked_fill(ignored, 0), task.teacher[1], room)
            part_ce, part_kl = _losses_to_gradients(logits, theirs, task, start, workspace)
            ce += part_ce
            kl += part_kl
            if grads[0] is not None:
                grads[0][part] = logits @ own.weight
            if grads[1] is not None:
                if dtype == exact:
                    grads[1].addmm_(logits.T, rows)
                else:
                    room = workspace.get("weight", tuple(weight.shape), dtype, device)
                    grads[1] += torch.mm(logits.T, rows, out=room)
            if grads[2] is not None:
                grads[2] += logits.sum(0, dtype=exact)
        # Not saved through ctx: they are results, used once and changed in place.
        ctx.grads, ctx.dtypes = grads, (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.mark_non_differentiable(ce, kl)
        return task.ce_weight * ce + task.kl_weight * kl, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("head_losses can be differentiated once only; call it again")
        grads = tuple(
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        ctx.grads = None
        return (*grads, None, None)


def _logits(rows: Tensor, head: Head, out: Tensor) -> Tensor:
    if head.bias is None:
        return torch.mm(rows, head.weight.T, out=out)
    return torch.addmm(head.bias, rows, head.weight.T, out=out)


def _log_softmax(logits: Tensor, out: Tensor, shard: VocabShard | None) -> Tensor:
    """Log-probabilities (n, V) in the dtype of ``out``, over the tokens of all ranks."""
    if shard is None:
        return torch.log_softmax(logits, -1, dtype=out.dtype, out=out)
    own = torch.logsumexp(out.copy_(logits), -1, keepdim=True)
    largest = own.clone()
    shard.maximum(largest)
    whole = (own - largest).exp_()
    shard.total(whole)
    return out.sub_(whole.log_().add_(largest))


def _losses_to_gradients(
    logits: Tensor, theirs: Tensor | None, task: _Task, start: int, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Sums of CE and KL times `task.scale` over the rows of one chunk that begins at row `start`.

    logits (n, V) become the gradient of the weighted sum; theirs (n, V): the teacher's logits. On a CPU it
    goes through the rows in blocks whose fp32 copies stay in the cache.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    blocks = logits.device.type == "cpu" and task.shard is None
    step = max(1, _BLOCK_LOGITS // logits.shape[1]) if blocks else len(logits)
    ce, kl = (torch.zeros((), dtype=exact, device=logits.device) for _ in range(2))
    for first in range(0, len(logits), step):
        ours = logits[first : first + step]
        rows = slice(start + first, start + first + len(ours))
        targets, elsewhere = task.targets(rows)
        weights = (task.labels[rows] != IGNORED).unsqueeze(1).to(exact) * task.scale
        y = _log_softmax(ours, workspace.get("y", tuple(ours.shape), exact, logits.device), task.shard)
        found = y.gather(1, targets)
        if task.shard is not None and elsewhere is not None:
            found = found.masked_fill(elsewhere, 0)
            task.shard.total(found)
        ce -= (found * weights).sum()
        x, p_weight = None, task.ce_weight
        if theirs is not None:
            x, part_kl, p_weight = _distill(ours, theirs[first : first + step], y, weights, task, workspace)
            kl += part_kl
        if not task.with_grad:
            continue
        y.exp_()
        if p_weight != 1:
            y.mul_(p_weight)
        if x is not None:
            y.sub_(x, alpha=task.kl_weight * task.temperature)
            if task.temperature != 1:
                y.add_(ours)
        one = torch.full_like(found, -task.ce_weight)
        y.scatter_add_(1, targets, one if elsewhere is None else one.masked_fill_(elsewhere, 0))
        if ours.dtype == exact:
            torch.mul(y, weights, out=ours)
        else:
            ours.copy_(y.mul_(weights))
    return ce, kl


def _distill(
    ours: Tensor, theirs: Tensor, y: Tensor, weights: Tensor, task: _Task, workspace: Workspace
) -> tuple[Tensor, Tensor, float]:
    """The teacher's probabilities, the sum of KL, and the weight of p_s in the gradient.

    y: log p_s at temperature 1; it becomes that at ``task.temperature``. The part of the gradient that has
    temperature 1 then waits in ``ours``.
    """
    x, z = (workspace.get(name, tuple(ours.shape), y.dtype, y.device) for name in "xz")
    p_weight = task.ce_weight
    if task.temperature != 1:
        x.copy_(ours)
        if task.with_grad:
            ours.copy_(y.exp_().mul_(task.ce_weight))
        torch.log_softmax(x.div_(task.temperature), -1, out=y)
        p_weight = 0.0
    x.copy_(theirs)
    torch.log_softmax(x.div_(task.temperature) if task.temperature != 1 else x, -1, out=z)
    torch.exp(z, out=x)
    kl = (z.sub_(y).mul_(x).sum(-1, keepdim=True) * weights).sum() * task.temperature**2
    return x, kl, p_weight + task.kl_weight * task.temperature
