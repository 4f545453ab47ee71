"""Static codes in attention: the one form of code that kernels read as it is stored.

With x^ = c + s (.) u, and fusion weights a and b,

    q . sum_j a_j (.) k^_j = q . sum_j (a_j (.) s_j) (.) u_j + q . sum_j a_j (.) c_j
    P sum_j b_j (.) v^_j   = sum_j (b_j (.) s_j) (.) (P u_j) + sum_j b_j (.) c_j

so scales join the weights, the constant of the keys drops out of softmax, and the constant of the values is
added once. Every layer that reads a tensor folds the scales of the layer that stores it.
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

__all__ = ["check_static", "code_dtype", "fold"]


def code_dtype(codec: Codec) -> torch.dtype:
    """The dtype of static codes: int8, float8_e4m3fn, or uint8 of two each.

    Raises:
        ValueError: No kernel reads such codes.
    """
    if codec.scale == "channel" and codec.rank is None:
        if codec.kind == "e4m3":
            return torch.float8_e4m3fn
        if codec.bits in (4, 8):
            return torch.int8 if codec.bits == 8 else torch.uint8
    raise ValueError(
        f"codecs must be int8, int4 or e4m3 with static scales per channel, got {codec}: kernels read no "
        "other codes; generate with transformers, whose cache holds all"
    )


def check_static(codecs: CodecPlan, plan: CachePlan, *, sinks: bool = True) -> None:
    """Checks that kernels read the codes of every layer, and that those of each sum are coded alike.

    Args:
        codecs: The codecs.
        plan: The cache plan.
        sinks: Whether raw first tokens are possible. Raw last tokens are not.

    Raises:
        ValueError: They do not; the message names the layer and the side.
    """
    if codecs.tail or (codecs.sinks and not sinks):
        label = f"{codecs.name.split(':')[0]}:" + ("tail=0" if sinks else "sinks=0,tail=0")
        raise ValueError(
            f"codecs must keep no raw {'last tokens' if sinks else 'rows'} here, got sinks={codecs.sinks} "
            f"and tail={codecs.tail}; ask for {label}"
        )
    for i in range(plan.num_layers):
        for side, sources in zip(SIDES, (plan.key_sources(i), plan.value_sources(i)), strict=True):
            reads = [j for j in sources if i not in sources or j == i]
            kinds = [codecs.codec(j, side) for j in reads]
            for codec in kinds:
                if not codec.is_raw:
                    code_dtype(codec)
            if len(set(kinds)) > 1:
                found = ", ".join(f"{codec} in layer {j}" for j, codec in zip(reads, kinds, strict=True))
                raise ValueError(f"layer {i} {side}: the sources of one sum must be coded alike, got {found}")


def fold(
    sources: Sequence[tuple[TensorCodec | None, slice | None]], weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weights over codes, and the constant.

    Args:
        sources: The codec of each source, and which of its heads are read (None: all). All coded, or none.
        weights: Fusion weights, float32 (m, g, D); None for ones.

    Returns:
        weights (.) scale, float32 (m, g, D), or None without weights and codes; and sum_j weights_j (.) c_j,
        (g, D), or None without codes.
    """
    scales, centers = [], []
    for codec, heads in sources:
        if codec is None or codec.scale is None or codec.center is None:
            return weights, None
        part = slice(None) if heads is None else heads
        scales.append(codec.scale[part])
        centers.append(codec.center[part])
    scale, center = torch.stack(scales), torch.stack(centers)
    if weights is None:
        return scale.float().contiguous(), center.float().sum(0)
    return (scale * weights).contiguous(), (center * weights).sum(0)
