"""Mixture of SwiGLU experts as feed-forward network (Switch Transformers, arXiv 2101.03961).

    out = sum over the top k experts e of  p_e * down_e(silu(gate_e(x)) * up_e(x)),   p = softmax(router(x))

Rows are sorted by expert, so that each expert is one matrix product over its rows. No row is dropped.
Parameter names are those of HF's Qwen3Moe (transformers 5), with all experts stacked into one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Experts", "MoE", "balance_loss"]


def balance_loss(probabilities: Tensor, experts: Tensor, context: Any = None) -> Tensor:
    """Load-balancing loss of each sequence: mean over the sequences of E * sum_e f_e P_e.

    f_e is the fraction of a sequence's S * k choices for expert e, and P_e the expert's mean probability
    (arXiv 2101.03961, eq. 4 to 6, for k = 1; arXiv 2412.19437, eq. 17 to 20, for top k). The loss is 1 if all
    experts are used equally and at most E / k. Its gradient flows through P. It is a mean over sequences, so
    it does not depend on the split of a batch.

    HF's load_balancing_loss_func sums f over the k choices, so it is k times as large. It computes f and P
    over the whole batch.

    Args:
        probabilities: (B, S, E), the router's softmax.
        experts: (B, S, k) integers, the chosen experts.
        context: A ContextParallel whose ranks have S tokens of each sequence each. The result is then this
            rank's summand of the loss.
    """
    count, chosen = probabilities.shape[-1], experts.shape[-1]
    used = torch.zeros_like(probabilities).scatter(-1, experts, 1.0).mean(dim=-2) / chosen
    if context is not None:
        used, count = context.sum(used) / context.size, count / context.size
    return count * (used * probabilities.mean(dim=-2)).sum(dim=-1).mean()


class Experts(nn.Module):
    """E SwiGLU networks without biases.

    Parameters: ``gate_up_proj`` (E, 2 I, hidden), the gate's rows first; ``down_proj`` (E, hidden, I).
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Draws all matrices from N(0, std)."""
        for weight in (self.gate_up_proj, self.down_proj):
            weight.normal_(0.0, std, generator=generator)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Runs the rows before ends[0] through expert 0, those before ends[1] through expert 1, and so on.

        Args:
            rows: (N, hidden), sorted by expert.
            ends: (E,) int32, ascending, the last one N.

        Returns:
            (N, hidden), computed in the dtype of ``rows``.
        """
        # torch's grouped product needs strides that are multiples of 16 bytes. In bfloat16 it is one kernel
        # on SM90 and later, without a host sync for `ends`. Elsewhere it loops too, has no float64, and
        # torch.compile supports it in bfloat16 only. There our own loop is as good. In graphs that loop is
        # one operation, because the rows per expert are data-dependent.
        aligned = all(size % 8 == 0 for size in self.down_proj.shape[1:])
        looped = _looped_in_graph if torch.compiler.is_compiling() else _looped
        products = _grouped if rows.dtype is torch.bfloat16 and aligned else looped
        return products(rows, self.gate_up_proj.to(rows.dtype), self.down_proj.to(rows.dtype), ends)

    def extra_repr(self) -> str:
        count, hidden, intermediate = self.down_proj.shape
        return f"{count} experts, hidden={hidden}, intermediate={intermediate}"


def _grouped(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)


def _looped(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    bounds = [0, *ends.tolist()]  # synchronizes with a GPU
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    outs = []
    for part, in_proj, out_proj in zip(rows.split(sizes), gate_up.unbind(), down.unbind(), strict=True):
        if part.shape[0]:
            gate, up = F.linear(part, in_proj).chunk(2, dim=-1)
            outs.append(F.linear(F.silu(gate) * up, out_proj))
    return torch.cat(outs) if outs else rows


def _looped_in_graph(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    gate, up = _grouped_linear(rows, gate_up, ends).chunk(2, dim=-1)
    return _grouped_linear(F.silu(gate) * up, down, ends)


def _parts(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return rows.tensor_split(ends[:-1].tolist())  # synchronizes with a GPU


@torch.library.custom_op("fusedkv_moe::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """(N, in), weight (E, out, in) -> (N, out): weight[0] for the rows before ends[0], and so on."""
    return torch.cat([F.linear(part, w) for part, w in zip(_parts(rows, ends), weight, strict=True)])


@torch.library.custom_op("fusedkv_moe::grouped_outer", mutates_args=())
def _grouped_outer(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """(N, out), (N, in) -> (E, out, in): the gradient of the weight."""
    pairs = zip(_parts(grad, ends), _parts(rows, ends), strict=True)
    return torch.stack([of_out.T @ part for of_out, part in pairs])


@_grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, ends = ctx.saved_tensors
    return _grouped_linear(grad, weight.mT, ends), _grouped_outer(grad, rows, ends), None


def _outer_backward(ctx: Any, c: Tensor) -> tuple[Tensor, Tensor, None]:
    grad, rows, ends = ctx.saved_tensors
    return _grouped_linear(rows, c, ends), _grouped_linear(grad, c.mT, ends), None


_grouped_linear.register_autograd(_linear_backward, setup_context=_save)
_grouped_outer.register_autograd(_outer_backward, setup_context=_save)


class MoE(nn.Module):
    """Top-k routing over SwiGLU experts; ``gate`` is the router, (E, hidden).

    Args:
        hidden_size: Channels of the hidden state.
        moe_intermediate_size: Intermediate channels of each expert.
        num_experts: E.
        num_experts_per_tok: k, at most E.
        norm_topk_prob: Whether the top k probabilities are divided by their sum.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.context: Any = None  # a ContextParallel, from distributed.context.apply_cp
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden_size, moe_intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Routes each token to its top k experts.

        Softmax and balance loss are computed in fp32 (fp64 for fp64). torch.topk breaks ties.

        Args:
            x: (B, S, hidden).

        Returns:
            (B, S, hidden), and the layer's ``balance_loss`` in training mode, otherwise None.
        """
        logits = self.gate(x)
        k, dtype = self.num_experts_per_tok, torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits.softmax(dim=-1, dtype=dtype)
        weights, experts = probabilities.topk(k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)

        # Choice c = k * token + rank; `order` sorts the choices by expert.
        sorted_experts, order = experts.flatten().sort(stable=True)
        each = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(sorted_experts, each, right=True, out_int32=True)
        # In the router's dtype, which differs from x under autocast: autocast does not cover grouped_mm.
        rows = x.flatten(0, 1).to(logits.dtype).index_select(0, order // k)
        rows = self.experts(rows, ends)
        outs = torch.zeros_like(rows).index_copy(0, order, rows).unflatten(0, (*x.shape[:2], k))
        out = (outs * weights.to(outs.dtype).unsqueeze(-1)).sum(dim=-2)
        return out, balance_loss(probabilities, experts, self.context) if self.training else None
