"""Cross entropy and distillation at the output head, without ever holding the logits of all tokens.

With a vocabulary of 49152, the fp32 logits of 4096 tokens are 0.8 GB, and a plain loss keeps several copies
of them for its backward. Here the head is applied to a chunk of tokens at a time, and the chunk's gradient is
formed on the spot: the loss is the last thing a model computes, so softmax minus target goes through the head
right away, and what is kept are the gradients of the hidden states and of the head. (Idea: Liger Kernel,
arXiv:2410.10989, section 3; here in plain torch, with a teacher.)

    CE = mean_t -log p_s(label_t)        KL = T^2 mean_t sum_v p_t(v) (log p_t(v) - log p_s(v))

with p_s, p_t the softmax of the student's and the teacher's logits over the temperature T (in CE: over 1).
T^2 keeps the gradient's size independent of T (Hinton et al., arXiv:1503.02531, section 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 64  # rows whose logits are worked on at a time
IGNORED = -100  # a label that does not count, as in torch's and transformers' losses


class Head(NamedTuple):
    """An output head: weight (V, C) and bias (V,) or None, any float dtype."""

    weight: Tensor
    bias: Tensor | None = None


class HeadLosses(NamedTuple):
    """loss: ce_weight * ce + kl_weight * kl, differentiable. ce, kl: its parts in nats per token, detached;
    kl is None without a teacher. All scalars, fp32 (fp64 for fp64 input).
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor | None


def shifted_labels(ids: Tensor) -> Tensor:
    """The next token of each position: (B, S) -> (B, S) with IGNORED at the last one."""
    return F.pad(ids[:, 1:], (0, 1), value=IGNORED)


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


def head_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 2048,
    workspace: Workspace | None = None,
) -> HeadLosses:
    """The losses of the logits ``hidden @ head.weight.T + head.bias``.

    hidden: (..., C), any float dtype; labels: (...) int64 of the same leading shape, already shifted,
    IGNORED where nothing is to be predicted. teacher_hidden (..., C_t), teacher_head: of the model to
    imitate; both or neither. chunk: tokens whose logits exist at a time. workspace: kept by whoever calls
    this often. Under autocast the products run in its dtype, everything else in fp32 (fp64 for fp64 input).
    Differentiable once, in hidden, head.weight and head.bias.

    Raises ValueError for shapes that do not fit, vocabularies of different size, temperature <= 0, chunk < 1
    and labels that are all IGNORED.
    """
    _check(hidden, head, labels, teacher_hidden, teacher_head, temperature, chunk)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).to(dtype)
        teacher = (rows, _in(teacher_head, dtype))
    flat = labels.reshape(-1)
    task = _Task(
        labels=flat,
        teacher=teacher,
        scale=1.0 / int((flat != IGNORED).sum()),
        ce_weight=ce_weight,
        kl_weight=0.0 if teacher is None else kl_weight,
        temperature=temperature,
        with_grad=torch.is_grad_enabled(),
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss, ce, kl = _HeadLoss.apply(rows, head.weight, head.bias, task, chunk, dtype, workspace or Workspace())
    return HeadLosses(loss, ce, None if teacher is None else kl)


def _in(head: Head, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Head(head.weight.detach().to(dtype), bias)


def _check(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    temperature: float,
    chunk: int,
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
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    if not bool((labels != IGNORED).any()):
        raise ValueError("labels: all are ignored, so there is no token to take the mean over")


@dataclass
class _Task:
    """What is asked of the logits. labels: (N,). teacher: its rows (N, C_t) and its head, in the dtype of the
    products. scale: one over the number of labels that count.
    """

    labels: Tensor
    teacher: tuple[Tensor, Head] | None
    scale: float
    ce_weight: float
    kl_weight: float
    temperature: float
    with_grad: bool


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task: _Task,
        chunk: int,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(dtype, torch.float32)
        own, device = _in(Head(weight, bias), dtype), hidden.device
        needs = [task.with_grad and needed for needed in ctx.needs_input_grad[:3]]
        task.with_grad = any(needs)
        grads = [
            torch.zeros_like(tensor, dtype=exact) if needed else None
            for tensor, needed in zip((hidden, weight, bias), needs, strict=True)
        ]
        ce, kl = (torch.zeros((), dtype=exact, device=device) for _ in range(2))
        for start in range(0, len(hidden), chunk):
            part = slice(start, min(start + chunk, len(hidden)))
            shape = (part.stop - part.start, len(weight))
            rows = hidden[part].to(dtype)
            logits = _logits(rows, own, workspace.get("logits", shape, dtype, device))
            theirs = None
            if task.teacher is not None:
                room = workspace.get("theirs", shape, dtype, device)
                theirs = _logits(task.teacher[0][part], task.teacher[1], room)
            part_ce, part_kl = _losses_to_gradients(logits, theirs, task, start, workspace)
            ce += part_ce
            kl += part_kl
            if grads[0] is not None:
                grads[0][part] = logits @ own.weight
            if grads[1] is not None:
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
        return (*grads, None, None, None, None)


def _logits(rows: Tensor, head: Head, out: Tensor) -> Tensor:
    if head.bias is None:
        return torch.mm(rows, head.weight.T, out=out)
    return torch.addmm(head.bias, rows, head.weight.T, out=out)


def _losses_to_gradients(
    logits: Tensor, theirs: Tensor | None, task: _Task, start: int, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Means of CE and KL, each row counted with `task.scale`, over the rows of one chunk that begins at row
    `start`. logits (n, V) become the gradient of the weighted sum; theirs (n, V): the teacher's logits.

    Goes through the rows in blocks whose fp32 copies stay in the cache of a CPU.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    step = _BLOCK if logits.device.type == "cpu" else len(logits)
    ce, kl = (torch.zeros((), dtype=exact, device=logits.device) for _ in range(2))
    for first in range(0, len(logits), step):
        ours = logits[first : first + step]
        x, y, z = (workspace.get(name, tuple(ours.shape), exact, logits.device) for name in "xyz")
        labels = task.labels[start + first : start + first + len(ours)]
        counted = labels != IGNORED
        targets = labels.clamp_min(0).unsqueeze(1)
        torch.log_softmax(x.copy_(ours), -1, out=y)
        ce -= y.gather(1, targets).squeeze(1)[counted].sum() * task.scale
        p_weight = task.ce_weight
        if theirs is not None:
            if task.temperature != 1:
                # y holds log p_s at temperature 1: its part of the gradient waits in `ours`.
                if task.with_grad:
                    ours.copy_(y.exp_().mul_(task.ce_weight * task.scale))
                torch.log_softmax(x.div_(task.temperature), -1, out=y)
                p_weight = 0.0
            x.copy_(theirs[first : first + step])
            torch.log_softmax(x.div_(task.temperature) if task.temperature != 1 else x, -1, out=z)
            torch.exp(z, out=x)
            kl += z.sub_(y).mul_(x).sum(-1)[counted].sum() * (task.scale * task.temperature**2)
            p_weight += task.kl_weight * task.temperature
        if not task.with_grad:
            continue
        y.exp_().mul_(p_weight * task.scale)
        if theirs is not None:
            y.sub_(x, alpha=task.kl_weight * task.temperature * task.scale)
            if task.temperature != 1:
                y.add_(ours)
        y.scatter_add_(1, targets, y.new_full(targets.shape, -task.ce_weight * task.scale))
        y[~counted] = 0
        ours.copy_(y)
    return ce, kl
