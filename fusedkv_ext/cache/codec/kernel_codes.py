"""Codes that kernels read as they are stored: 8 or 4 bits with static scales, or with one per token.

For static scales, with x^ = c + s (.) u, and fusion weights a and b,

    q . sum_j a_j (.) k^_j = q . sum_j (a_j (.) s_j) (.) u_j + q . sum_j a_j (.) c_j
    P sum_j b_j (.) v^_j   = sum_j (b_j (.) s_j) (.) (P u_j) + sum_j b_j (.) c_j

so scales join the weights, the constant of the keys drops out of softmax, and the constant of the values is
added once. Every layer that reads a tensor folds the scales of the layer that stores it. Scales of tokens are
in coded_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedkv_ext.cache.codec.codec import Codec
from fusedkv_ext.cache.codec.codec_plan import CodecPlan
from fusedkv_ext.cache.codec.tensor_codec import TensorCodec
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.plan.pieces import SIDES

__all__ = ["check_codes", "code_dtype", "fold"]


def code_dtype(codec: Codec, *, static: bool = False) -> torch.dtype:
    """The dtype of codes: int8, float8_e4m3fn, or uint8 of two each.

    Args:
        codec: The codec.
        static: Whether scales of tokens are not possible.

    Raises:
        ValueError: No kernel reads such codes.
    """
    if codec.scale in (("channel",) if static else ("channel", "token")) and codec.rank is None:
        if codec.kind == "e4m3":
            return torch.float8_e4m3fn
        if codec.bits in (4, 8):
            return torch.int8 if codec.bits == 8 else torch.uint8
    scales = "static scales per channel" if static else "scales per channel or per token"
    raise ValueError(
        f"codecs must have 8 or 4 bits and {scales}, got {codec}: kernels read no other codes; generate with "
        "transformers, whose cache holds all"
    )


def check_codes(codecs: CodecPlan, plan: CachePlan, *, static: bool = False) -> None:
    """Checks that kernels read the codes of every layer, and that those of each sum are coded alike.

    Args:
        codecs: The codecs.
        plan: The cache plan.
        static: Whether raw tokens and scales of tokens are not possible.

    Raises:
        ValueError: They do not; the message names the layer and the side.
    """
    if static and (codecs.tail or codecs.sinks):
        raise ValueError(
            f"codecs must keep no raw rows here, got sinks={codecs.sinks} and tail={codecs.tail}; ask for "
            f"{codecs.name.split(':')[0]}:sinks=0,tail=0"
        )
    for i in range(plan.num_layers):
        four_bits: set[str] = set()
        for side, sources in zip(SIDES, (plan.key_sources(i), plan.value_sources(i)), strict=True):
            reads = [j for j in sources if i not in sources or j == i]
            kinds = [codecs.codec(j, side) for j in reads]
            for codec in kinds:
                if not codec.is_raw:
                    code_dtype(codec, static=static)
            four_bits |= {codec.kind for codec in kinds if codec.bits == 4}
            if len(set(kinds)) > 1:
                found = ", ".join(f"{codec} in layer {j}" for j, codec in zip(reads, kinds, strict=True))
                raise ValueError(f"layer {i} {side}: the sources of one sum must be coded alike, got {found}")
        if len(four_bits) > 1:
            raise ValueError(
                f"layer {i}: 4-bit codes of keys and values must be of one kind, got {sorted(four_bits)}"
            )


def fold(
    sources: Sequence[tuple[TensorCodec | None, slice | None]], weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weights over codes, and the constant.

    Args:
        sources: The codec of each source, and which of its heads are read (None: all). All coded, or none.
        weights: Fusion weights, float32 (m, g, D); None for ones.

    Returns:
        weights (.) scale, float32 (m, g, D), or ``weights`` without static scales; and sum_j weights_j (.)
        c_j, (g, D), or None without codes.
    """
    scales, centers = [], []
    for codec, heads in sources:
        if codec is None or codec.center is None:
            return weights, None
        part = slice(None) if heads is None else heads
        if codec.scale is not None:
            scales.append(codec.scale[part])
        centers.append(codec.center[part])
    center = torch.stack(centers)
    center = (center if weights is None else center * weights).sum(0)
    if not scales:
        return weights, center
    scale = torch.stack(scales)
    return (scale if weights is None else scale * weights).contiguous(), center
