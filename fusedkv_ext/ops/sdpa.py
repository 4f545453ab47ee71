"""Attention of many query rows: keys and values fused once, then torch's SDPA.

SDPA has no bottom-right alignment of windows, no documents, no fully masked rows and no lse; they are added
here. The lse comes from SDPA's flash kernel where that runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend

from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.recompute import recomputed
from fusedkv_ext.ops.scores import log_sum_exp, score_attention
from fusedkv_ext.ops.sizes import always, chunks
from fusedkv_ext.ops.visibility import fully_masked_rows, seen_tokens, visible

__all__ = ["sdpa_attention", "sdpa_attention_lse", "sdpa_with_mask"]

# With a window of W tokens a chunk of C query rows sees C + W keys: the others are not multiplied. With
# documents the mask of a chunk is the largest tensor: (B, C, T) in q's dtype.
_CHUNK = 512


def sdpa_attention(call: AttentionCall) -> Tensor:
    """Attention over one source of keys and values, without weights and without a cache. Differentiable.

    Query row i has position i + T - S. Fully masked rows give zeros. With ``document_ids`` S is at most T.

    Returns:
        (B, S, H, Dv) in q's dtype.
    """
    return sdpa_attention_lse(call._replace(return_lse=False))[0]


def sdpa_attention_lse(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """``sdpa_attention`` and, if the call returns it, the natural log-sum-exp of the scores.

    torch's flash kernel computes both at once. Otherwise ``log_sum_exp`` computes the scores again. Calls
    with a soft cap, sinks or ALiBi slopes are those of ``score_attention``.

    Returns:
        (B, S, H, Dv) in q's dtype, and None or (B, H, S) float32.
    """
    if call.adjusted:
        return score_attention(call)
    q, v = call.q, call.values[0]
    S, T = q.shape[1], v.shape[1]
    masked = fully_masked_rows(S, T, call.right)
    size = S if call.left < 0 and call.document_ids is None else max(_CHUNK, call.left)
    # If all rows are masked, SDPA of no rows gives them their place in the graph, and gradients of zeros.
    parts = [_sdpa(call, i, end) for i, end in chunks(masked, S, size) or [(S, S)]]
    if masked:
        B, H = q.shape[0], q.shape[2]
        parts.insert(0, (q.new_zeros(B, masked, H, v.shape[3]), _no_keys(q, masked)))
    outs = [out for out, _ in parts]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    if not call.return_lse:
        return out, None
    lses = [lse for _, lse in parts if lse is not None]
    return out, log_sum_exp(call, torch.cat(lses, dim=2) if len(lses) == len(parts) else None)


def _no_keys(q: Tensor, rows: int) -> Tensor:
    """The log-sum-exp of fully masked rows, (B, H, rows)."""
    return q.new_full((q.shape[0], q.shape[2], rows), float("-inf"), dtype=torch.float32)


def sdpa_with_mask(call: AttentionCall, mask: Tensor) -> Tensor:
    """Attention of all rows under a mask that broadcasts to (B, H, S, T) instead of the call's own bounds."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.keys[0], call.values[0]))
    return _attend(q, k, v, mask, True, False, call.scale, False)[0].transpose(1, 2)


def _sdpa(call: AttentionCall, first: int, end_row: int) -> tuple[Tensor, Tensor | None]:
    """SDPA of the rows first..end_row - 1, all of which see a token; and lse if the kernel returns it."""
    k, v, left, right, documents = call.keys[0], call.values[0], call.left, call.right, call.document_ids
    position = first + k.shape[1] - call.q.shape[1]
    q = call.q[:, first:end_row]
    S, T = q.shape[1], k.shape[1]
    begin, end = seen_tokens(position, S, T, left, right)
    k, v = k[:, begin:end], v[:, begin:end]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Without a left bound there is one chunk: its last row is the last token, which sees all keys.
    causal = right == 0 and left < 0 and documents is None
    square = causal and always(S == T)
    lower_right = causal and not square and _masks_lower_right(q, k, v)
    masked = documents is not None or (not (square or lower_right) and (left >= 0 or right >= 0))
    mask: Any = None
    keeping: AbstractContextManager[None] = nullcontext()
    if lower_right:
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler: not at start-up

        mask = causal_lower_right(S, T)
    elif documents is not None:
        inputs = (documents[:, begin:end], S, position - begin, left, right, q.dtype)
        mask = _document_mask(*inputs)
        if not torch.compiler.is_compiling():  # autograd would keep all masks, S T elements a sequence
            keeping = recomputed(lambda: [_document_mask(*inputs)], [mask], [documents])
    elif masked:
        mask = visible(S, end - begin, position - begin, left, right, q.device)
    with keeping:
        out, lse = _attend(q, k, v, mask, masked, square, call.scale, call.return_lse)
    return out.transpose(1, 2), lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, masked: bool, square: bool, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """torch's SDPA of (B, heads, tokens, channels), with heads expanded where its kernel reads no groups."""
    grouped = not always(q.shape[1] == k.shape[1])
    if grouped and not _reads_groups(q, v, masked):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    if scale <= 0:  # masks of torch's kernels are scaled: -inf would become inf or NaN
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if with_lse and (masked or mask is None) and _takes_flash(q, k, v, mask, square, scale, grouped):
        return _flash(q, k, v, mask, square, scale)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped
    )
    return out, None


def _takes_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, square: bool, scale: float, grouped: bool
) -> bool:
    """Whether SDPA would run its flash kernel, and that kernel as it is takes the head dim."""
    if torch.compiler.is_compiling() or hasattr(q, "to_local") or q.device.type not in ("cpu", "cuda"):
        return False
    if q.is_cuda and q.shape[3] % 8:  # SDPA would pad it
        return False
    chosen = torch._fused_sdp_choice(  # torch has no public name for it; the same from 2.11 to 2.13
        q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=square, scale=scale, enable_gqa=grouped
    )
    return chosen == SDPBackend.FLASH_ATTENTION.value


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, square: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """What SDPA's flash kernel computes: out, and lse (B, H, S)."""
    if q.device.type == "cpu":
        if mask is not None and mask.dtype == torch.bool:  # the kernel adds masks
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(q, k, v, 0.0, square, attn_mask=mask, scale=scale)
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = attend(q, k, v, 0.0, square, False, scale=scale)[:2]
    return out, lse.detach().float()


def _masks_lower_right(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch has a kernel that masks S < T causally at the bottom right without reading a mask.

    Only CUDA has: FlashAttention and the memory-efficient kernel. A graph of torch.compile takes the mask.
    """
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    params = SDPAParams(q[:, : k.shape[1]], k, v, None, 0.0, False, False)
    return can_use_flash_attention(params) or can_use_efficient_attention(params)


def _reads_groups(q: Tensor, v: Tensor, masked: bool) -> bool:
    """Whether the kernel that SDPA picks reads each KV head for its whole group of query heads.

    On CUDA FlashAttention and cuDNN do, which take 16 bits and no mask tensor. The memory-efficient kernel
    does not: it gets expanded heads, for without it SDPA would write out all scores.
    """
    if q.device.type != "cuda":
        return True
    return not masked and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] == v.shape[3]


def _document_mask(
    documents: Tensor, rows: int, position: int, left: int, right: int, dtype: torch.dtype
) -> Tensor:
    """What SDPA adds to the scores, (B, 1, rows, tokens): 0 where a row sees a key, else -inf.

    documents: (B, tokens). SDPA would make the same of a boolean mask, as a tensor of its own that autograd
    keeps.
    """
    batch, tokens = documents.shape
    seen = documents[:, position : position + rows, None] == documents[:, None, :]
    seen = seen & visible(rows, tokens, position, left, right, documents.device)
    mask = torch.zeros(batch, 1, rows, tokens, dtype=dtype, device=documents.device)
    return mask.masked_fill_(~seen[:, None], float("-inf"))
