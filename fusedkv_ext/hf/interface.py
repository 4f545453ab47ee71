"""The attention implementation "fusedkv" of transformers.

With few query rows (decoding, verification of guessed tokens) the kernel reads the sources in place. The
weights are folded into the query and the output, and no fused key or value is created. With more rows, keys
and values are fused once for SDPA (``dispatch.decode_max_rows`` is the rule). A mask of left padding or of a
static cache's empty slots is read as a range start..stop of tokens per sequence. Any other mask goes to SDPA
unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fusedkv_ext.hf.versions import check_keywords
from fusedkv_ext.ops.dispatch import folds_dense, native_head_dim
from fusedkv_ext.ops.functional import fused_kv_attn_func

__all__ = ["NAME", "attend", "folds", "prefix", "ranges_if_folding", "register_attention"]

NAME = "fusedkv"

_SDPA_KEYWORDS = frozenset(inspect.signature(sdpa_attention_forward).parameters)

Ranges = Sequence[tuple[int, int]]

# A step has one mask for all of its layers, and reading it waits for the device: (version, what it says).
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prefix(tensors: Sequence[Tensor | None], steps: int) -> list[Tensor | None]:
    """(B, T, heads, D) -> the valid tokens, if there is no mask.

    transformers leaves out the mask if a prompt of ``steps`` tokens goes into an empty static cache. The
    other slots of the cache must then be ignored.
    """
    if steps == 1:
        return list(tensors)
    return [x if x is None or x.shape[1] <= steps else x[:, :steps] for x in tensors]


def folds(head_dim: int) -> bool:
    """True if our kernels support this head dim; otherwise torch's own attention is better."""
    return native_head_dim(head_dim)


def ranges_if_folding(query: Tensor, key: Tensor, mask: Tensor) -> Ranges | None:
    """The token ranges of a mask (B, 1, S, T), if the rows of query (B, S, H, D) use the fold path.

    The rows are the last tokens of their range, and see those before them. None means more rows, a gradient,
    a graph of torch.compile (which cannot read a mask), or any other mask.

    Args:
        key: any source (B, T, G, D).
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() and query.requires_grad:
        return None
    if not folds_dense(query, [key], [key], 0, query.device.type):
        return None
    if mask.shape != (query.shape[0], 1, query.shape[1], key.shape[1]) or mask.dtype != torch.bool:
        return None
    if mask.is_inference():  # counts no version: it may have been written to since
        return _ranges(mask) or None
    version, found = _known.get(mask, (None, ()))
    if version != mask._version:
        found = _ranges(mask)
        _known[mask] = mask._version, found
    return found or None


def _ranges(mask: Tensor) -> Ranges:
    """The ranges start..stop; empty if the mask is not a range per sequence."""
    mask = mask[:, 0]
    steps, tokens = mask.shape[1:]
    index = torch.arange(tokens, device=mask.device)
    last = mask[:, -1]
    stop = (last * (index + 1)).amax(-1)
    start = stop - last.sum(-1)
    ends = stop[:, None] - torch.arange(steps - 1, -1, -1, device=mask.device)
    expected = (index >= start[:, None, None]) & (index < ends[:, :, None])
    same = (expected == mask).all().expand_as(stop)
    rows = torch.stack((start, stop, same), dim=1).tolist()
    if not all(same and stop > start for start, stop, same in rows):
        return ()
    return [(start, stop) for start, stop, _ in rows]


def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    scaling: float,
    window: int | None = None,
    ranges: Ranges | None = None,
    **scores: Any,
) -> Tensor:
    """Causal attention of the last tokens, query (B, S, H, D), over sources (B, T, G, D): (B, S, H, D).

    There is one call for each run of sequences with equal ranges.

    Args:
        ranges: the tokens start..stop of each sequence, including those that a window hides; None means all.
        scores: soft cap and sinks, as in ``fused_kv_attn_func``.
    """
    weights = (key_weights, value_weights)

    def attention(*tensors: Any, **options: Any) -> Tensor:
        options |= scores
        return cast(Tensor, fused_kv_attn_func(*tensors, softmax_scale=scaling, causal=True, **options))

    if ranges is None:
        size = (-1, -1) if window is None else (window - 1, 0)
        return attention(query, keys, values, *weights, window_size=size)
    outs, first = [], 0
    for (start, stop), run in groupby(ranges):
        rows = slice(first, first + len(list(run)))
        first = rows.stop
        parts = ([x[rows, start:stop] for x in side] for side in (keys, values))
        outs.append(attention(query[rows], *parts, *weights))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def fusedkv_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """ "fusedkv" in a plain model of transformers: (B, heads, tokens, D) in, (B, S, H, D) out.

    Models of this package do not use this function, because they attend over several sources.

    Args:
        softcap: the soft cap of the scores (Gemma 2); None means none.
        s_aux: (H,) attention sinks (GPT-OSS).

    Raises:
        ValueError: a keyword is unknown and not None, or is not supported with a soft cap or sinks.
    """
    check_keywords(kwargs, 'attn_implementation="fusedkv"', also=_SDPA_KEYWORDS)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    biased = kwargs.get("position_bias") is not None  # which only SDPA takes
    if softcap is not None or s_aux is not None:
        if dropout or biased:
            extra = "position_bias" if biased else "dropout"
            raise ValueError(
                f"{extra} must be left out with softcap or s_aux, got it; use another attn_implementation "
                'such as "eager"'
            )
        scores: dict[str, Any] = {"softcap": softcap or 0.0, "sinks": s_aux}
        return _attend_scores(q, k, v, attention_mask, scaling, sliding_window, causal, scores), None
    if causal and not dropout and not biased and folds(q.shape[3]) and folds(v.shape[3]):
        ranges = None
        if attention_mask is None:
            visible: list[Any] = list(prefix([k, v], q.shape[1]))
            k, v = visible
        else:
            ranges = ranges_if_folding(q, k, attention_mask)
        if attention_mask is None or ranges is not None:
            scaling = q.shape[3] ** -0.5 if scaling is None else scaling
            return attend(q, [k], [v], None, None, scaling, sliding_window, ranges), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
    )


def _attend_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    causal: bool,
    scores: dict[str, Any],
) -> Tensor:
    """Attention with a soft cap or sinks, (B, S, H, D): as without them, but torch's SDPA has neither."""
    scaling = q.shape[3] ** -0.5 if scaling is None else scaling
    if mask is None and causal:
        visible: list[Any] = list(prefix([k, v], q.shape[1]))
        return attend(q, visible[:1], visible[1:], None, None, scaling, window, **scores)
    if mask is None:
        return cast(Tensor, fused_kv_attn_func(q, [k], [v], softmax_scale=scaling, **scores))
    ranges = ranges_if_folding(q, k, mask) if causal else None
    if ranges is not None:
        return attend(q, [k], [v], None, None, scaling, None, ranges, **scores)
    return cast(Tensor, fused_kv_attn_func(q, k, v, softmax_scale=scaling, attn_mask=mask, **scores))


def register_attention() -> None:
    """Registers ``attn_implementation="fusedkv"`` with transformers, with the masks of "sdpa"."""
    AttentionInterface.register(NAME, fusedkv_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
