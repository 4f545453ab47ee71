"""Attention over packed sequences of different lengths: torch's ``varlen_attn`` on CUDA, SDPA elsewhere.

q is (1, total_q, H, D), keys and values are (1, total_k, G, D): all sequences one after another. SDPA runs
once per sequence, so that no score of two sequences is computed. Neighbors of equal lengths share a call. A
graph of torch.compile cannot read lengths, and takes one SDPA with a mask instead.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.checks import in_forward_mode
from fusedkv_ext.ops.masked import masked_attention
from fusedkv_ext.ops.sdpa import sdpa_attention_lse
from fusedkv_ext.ops.sizes import host_reads
from fusedkv_ext.ops.visibility import visible_range

__all__ = ["Packing", "document_attention", "varlen_attention"]

Lengths = Sequence[tuple[int, int]]  # of each sequence: query rows, tokens


class Packing(NamedTuple):
    """Where the sequences of a pack lie: sequence b has rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1.

    ``lengths`` are those of ``cu_seqlens_q`` and ``cu_seqlens_k``, if the host has them.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    lengths: Lengths | None = None

    def read(self, rows: int, tokens: int) -> Lengths | None:
        """The lengths, checked against ``rows`` and ``tokens``; None where the host cannot read them.

        Waits for the device that has them.

        Raises:
            ValueError: The lengths do not fit.
        """
        if self.lengths is not None:
            return self.lengths
        if not (host_reads(self.cu_seqlens_q) and host_reads(self.cu_seqlens_k)):
            return None
        sides = (
            _lengths("q", self.cu_seqlens_q, self.max_seqlen_q, rows),
            _lengths("k", self.cu_seqlens_k, self.max_seqlen_k, tokens),
        )
        return list(zip(*sides, strict=True))


def _lengths(side: str, cu_seqlens: Tensor, longest: int, total: int) -> list[int]:
    """The lengths of the rows, or of the tokens, of all sequences."""
    bounds, name = cu_seqlens.tolist(), f"cu_seqlens_{side}"
    if bounds[0] != 0:
        raise ValueError(f"{name} must start with 0, got {bounds[0]}; prepend 0 to the cumulative lengths")
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{name} must not fall, got {bounds[b]} before {bounds[b + 1]}")
    if bounds[-1] != total:
        what = "rows of q" if side == "q" else "tokens of keys[0]"
        raise ValueError(f"{name} must end with {total}, the {what}, got {bounds[-1]}")
    if max(lengths, default=0) > longest:
        needed = f"at least {max(lengths)}, the longest sequence of {name}"
        raise ValueError(f"max_seqlen_{side} must be {needed}, got {longest}")
    return lengths


def varlen_attention(call: AttentionCall, packing: Packing) -> tuple[Tensor, Tensor | None]:
    """Attention of every sequence over its own tokens. Differentiable.

    Args:
        call: One source of keys and of values, without weights: q (1, total_q, H, D).
        packing: The sequences. Row i of one with S rows and T tokens has position i + T - S.

    Returns:
        (total_q, H, Dv) in q's dtype, and (H, total_q) float32 without a gradient if the call returns it.
        Fully masked rows give zeros, and -inf or their sink.
    """
    if _takes_flash(call, packing):
        return _flash(call, packing)
    lengths = packing.read(call.q.shape[1], call.keys[0].shape[1])
    out, lse = _masked(call, packing) if lengths is None else _by_sequence(call, lengths)
    return out, None if lse is None else lse.detach()  # FlashAttention has no gradient of it either


def document_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Attention of every document over itself, in sequences that are packed with ``document_lengths``.

    Args:
        call: One source of keys and of values, without weights: q (B, S, H, D), the last S of T tokens.

    Returns:
        (B, S, H, Dv) in q's dtype, and (B, H, S) float32 without a gradient if the call returns it.
    """
    assert call.document_lengths is not None
    q, k, v = call.q, call.keys[0], call.values[0]
    (B, S), T = q.shape[:2], k.shape[1]
    lengths = []
    for row in call.document_lengths:
        ends = itertools.accumulate(row)
        lengths += [
            (min(tokens, max(end - (T - S), 0)), tokens) for end, tokens in zip(ends, row, strict=True)
        ]
    sides = [list(side) for side in zip(*lengths, strict=True)] or [[], []]
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32, device=q.device) for side in sides
    )
    max_q, max_k = (max(side, default=0) for side in sides)
    packed = call._replace(
        q=q.flatten(0, 1)[None], keys=[k.flatten(0, 1)[None]], values=[v.flatten(0, 1)[None]]
    )
    out, lse = varlen_attention(packed, Packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k, lengths))
    if lse is not None:
        lse = lse.unflatten(1, (B, S)).transpose(0, 1)
    return out.unflatten(0, (B, S)), lse


def _by_sequence(call: AttentionCall, lengths: Lengths) -> tuple[Tensor, Tensor | None]:
    """SDPA per sequence; one call for neighbors of equal lengths."""
    runs = [(len(list(run)), *sizes) for sizes, run in itertools.groupby(lengths)] or [(0, 0, 0)]
    slopes = call.alibi_slopes
    # split, not slices: the backward of each slice would fill a whole tensor with zeros.
    rows = call.q[0].split([n * S for n, S, _ in runs])
    tokens = [n * T for n, _, T in runs]
    keys, values = call.keys[0][0].split(tokens), call.values[0][0].split(tokens)
    outs, lses, end = [], [], 0
    for (n, S, T), q, k, v in zip(runs, rows, keys, values, strict=True):
        first, end = end, end + n
        if S == 0 and len(runs) > 1:
            continue
        part = call.fused(*(x.unflatten(0, (n, size)) for x, size in ((q, S), (k, T), (v, T))))
        if slopes is not None and slopes.dim() == 2:
            part = part._replace(alibi_slopes=slopes[first:end])
        out, lse = sdpa_attention_lse(part)
        outs.append(out.flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1))
    if not outs:  # several sequences, all without rows
        outs.append(sdpa_attention_lse(call._replace(return_lse=False, alibi_slopes=None))[0][0])
        lses.append(call.q.new_empty(call.q.shape[2], 0, dtype=torch.float32))
    return torch.cat(outs), torch.cat(lses, dim=1) if call.return_lse else None


def _masked(call: AttentionCall, packing: Packing) -> tuple[Tensor, Tensor | None]:
    """One SDPA with a mask of (total_q, total_k), for graphs."""
    q, k = call.q, call.keys[0]
    row = torch.arange(q.shape[1], device=q.device)
    sequence = torch.searchsorted(packing.cu_seqlens_q[1:], row, right=True)
    begin, end = packing.cu_seqlens_k[sequence], packing.cu_seqlens_k[sequence + 1]
    # The token of the pack at which a row has its position: the last row's is the sequence's last.
    position = row - packing.cu_seqlens_q[sequence + 1] + end
    first, behind = visible_range(position, end, call.left, call.right)
    first, behind = torch.maximum(first, begin)[:, None], torch.as_tensor(behind)[:, None]
    token = torch.arange(k.shape[1], device=q.device)
    mask, slopes = (token >= first) & (token < behind), call.alibi_slopes
    if slopes is not None:  # distances within a sequence are those within the pack
        slopes = slopes[sequence].T[..., None] if slopes.dim() == 2 else slopes[:, None, None]
        distance = (position[:, None] - token).abs()
        mask = (-slopes * distance).masked_fill(~mask, -math.inf)
    out, lse = masked_attention(call._replace(left=-1, right=-1, attn_mask=mask, alibi_slopes=None))
    return out[0], None if lse is None else lse[0]


def _takes_flash(call: AttentionCall, packing: Packing) -> bool:
    """Whether torch's ``varlen_attn`` takes the call: FlashAttention on CUDA, 16 bits, head dims up to 256.

    It has no tangents. It bounds windows by max_seqlen_k, which is wrong for rows far before the first token.
    """
    q, v = call.q, call.values[0]
    if (
        call.adjusted
        or not q.is_cuda
        or q.dtype not in (torch.bfloat16, torch.float16)
        or hasattr(q, "to_local")
    ):
        return False
    if max(q.shape[3], v.shape[3]) > 256 or call.scale <= 0 or in_forward_mode():
        return False
    bounded = call.left >= 0 or call.right > 0
    if bounded and packing.max_seqlen_q > packing.max_seqlen_k:
        return False
    return q.shape[1] > 0 and v.shape[1] > 0 and packing.max_seqlen_q > 0 and packing.max_seqlen_k > 0


@functools.cache
def _torchs() -> tuple[Callable[..., Any], Any, bool]:
    """torch's function, its request for lse, and whether it takes grouped heads (from torch 2.12 on)."""
    from torch.nn.attention import varlen  # imports torch's compiler: not at start-up

    parameters = inspect.signature(varlen.varlen_attn).parameters
    return varlen.varlen_attn, varlen.AuxRequest(lse=True), "enable_gqa" in parameters


def _flash(call: AttentionCall, packing: Packing) -> tuple[Tensor, Tensor | None]:
    """torch's ``varlen_attn``: one head dim for all, a multiple of 8, in rows of 16-byte alignment."""
    varlen_attn, wants_lse, takes_groups = _torchs()
    q, k, v = call.q[0], call.keys[0][0], call.values[0][0]
    value_dim, group = v.shape[2], q.shape[1] // k.shape[1]
    head_dim = -(-max(q.shape[2], value_dim) // 8) * 8
    options: dict[str, Any] = {"scale": call.scale, "window_size": (call.left, call.right)}
    if group > 1 and takes_groups:
        options["enable_gqa"] = True
    elif group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if call.return_lse:
        options["return_aux"] = wants_lse
    tensors = (_aligned(x, head_dim) for x in (q, k, v))
    result = varlen_attn(*tensors, *packing[:4], **options)
    out, lse = result if call.return_lse else (result, None)
    if lse is not None:  # FlashAttention's is inf for a fully masked row
        lse = lse.detach()
        lse = lse.masked_fill(lse == math.inf, -math.inf)
    return out[..., :value_dim], lse


def _aligned(x: Tensor, head_dim: int) -> Tensor:
    """x with ``head_dim`` channels, padded with zeros, where the kernel may read 16 bytes at a time."""
    if x.shape[2] < head_dim:
        return F.pad(x, (0, head_dim - x.shape[2]))
    if x.storage_offset() % 8 or any(stride % 8 for stride in x.stride()[:2]):
        return x.contiguous()
    return x
