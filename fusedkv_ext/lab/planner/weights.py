"""Parameter counts of a layer, of a decoder, and of the shard on one GPU.

Letters: h hidden_size, I intermediate_size, H heads, G KV heads, D head dim, V vocab_size. k_i and v_i are
the numbers of heads whose keys and values layer i stores.

Tensor parallelism over tp GPUs shards heads, I and V: the rows of q, k, v, gate, up, embeddings and output
head, and the columns of o and down. If tp > G, each GPU computes with one KV head, and the k and v
projections and the fusion weights are replicated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from fusedkv_ext.layers.decoder_config import DecoderConfig
from fusedkv_ext.plan import Segment
from fusedkv_ext.plan.pieces import SIDES

__all__ = [
    "Shape",
    "all_shapes",
    "check",
    "count",
    "fusion_shapes",
    "kv_shapes",
    "layer_shapes",
    "outer_shapes",
    "segment_heads",
    "shared",
    "sharded",
    "stored_heads",
]

Shape = tuple[int, ...]


def check(config: DecoderConfig) -> None:
    """Raises ValueError for decoders without formulas."""
    if config.kv_lora_rank is not None or config.num_experts or config.sliding_window is not None:
        raise ValueError(
            "the planner needs a dense decoder with full attention, got latent attention (kv_lora_rank), "
            "experts (num_experts) or a sliding window (sliding_window); leave them out"
        )


def shared(number: int, tp: int) -> int:
    """Heads or channels of one of tp GPUs: ceil(number / tp)."""
    return -(-number // tp)


def _holders(config: DecoderConfig, tp: int) -> int:
    """GPUs that shard the parameters of the KV heads: tp, or 1 if there are fewer KV heads than GPUs."""
    return tp if tp <= config.num_key_value_heads else 1


def stored_heads(config: DecoderConfig, layer: int, tp: int = 1) -> tuple[int, int]:
    """k_i and v_i of one of tp GPUs.

    Raises:
        ValueError: A head interval of the plan does not consist of whole heads.
    """
    keys, values = (
        sum(_heads(config, start, stop) for start, stop in config.plan.stored_shares(layer, side))
        for side in SIDES
    )
    return shared(keys, tp), shared(values, tp)


def segment_heads(config: DecoderConfig, segment: Segment) -> int:
    """Number of KV heads of a segment."""
    return _heads(config, *segment.heads)


def _heads(config: DecoderConfig, start: Fraction, stop: Fraction) -> int:
    """Number of KV heads in an interval."""
    kv_heads = config.num_key_value_heads
    # Integer arithmetic for speed: this runs for every layer of every layout.
    first, last = (divmod(kv_heads * bound.numerator, bound.denominator) for bound in (start, stop))
    if first[1] or last[1]:
        raise ValueError(
            f"the interval {start}..{stop} of the KV heads must consist of whole heads, got {kv_heads} KV "
            "heads; give the model another number of KV heads, or the plan another interval"
        )
    return last[0] - first[0]


def layer_shapes(config: DecoderConfig, layer: int, tp: int = 1) -> list[Shape]:
    """Parameters of a layer without fusion weights: 2 h H D + h (k_i + v_i) D + 3 h I, norms and biases."""
    h, D, width = config.hidden_size, config.head_dim, shared(config.intermediate_size, tp)
    q = shared(config.num_attention_heads, tp) * D
    shapes: list[Shape] = [(q, h), (h, q), (width, h), (width, h), (h, width), (h,), (h,)]
    if config.attention_bias:
        shapes += [(q,), (h,)]
    if config.qk_norm:
        shapes += [(D,), (D,)] if stored_heads(config, layer)[0] else [(D,)]
    return shapes + kv_shapes(config, layer, tp)


def kv_shapes(config: DecoderConfig, layer: int, tp: int = 1) -> list[Shape]:
    """The k and v projections of a layer: h (k_i + v_i) D, and biases."""
    widths = [heads * config.head_dim for heads in stored_heads(config, layer, _holders(config, tp)) if heads]
    biases: list[Shape] = [(width,) for width in widths] if config.attention_bias else []
    return [*((width, config.hidden_size) for width in widths), *biases]


def fusion_shapes(config: DecoderConfig, layer: int, tp: int = 1) -> list[Shape]:
    """Fusion weights of a layer, one parameter per side and source.

    The shape is (g, D), or (g, D / 2) if the two channels of a RoPE pair share a weight. It has one row if
    heads share weights, and one column if channels do.
    """
    row = config.plan.layers[layer]
    return [
        _fusion_shape(config, segment, tp)
        for segment in (*row.keys, *row.values)
        if segment.fusion is not None
        for _ in segment.sources
    ]


def _fusion_shape(config: DecoderConfig, segment: Segment, tp: int) -> Shape:
    fusion = segment.fusion
    assert fusion is not None
    heads = shared(segment_heads(config, segment), _holders(config, tp))
    rows = 1 if fusion.granularity in ("shared_channel", "scalar") else heads
    if fusion.granularity not in ("channel", "shared_channel"):
        return rows, 1
    return rows, config.head_dim // 2 if fusion.tied else config.head_dim


def outer_shapes(config: DecoderConfig, tp: int = 1) -> list[Shape]:
    """Embeddings V h, the last norm h, and the output head V h unless it is the embeddings."""
    embeddings = (shared(config.vocab_size, tp), config.hidden_size)
    return [embeddings] * (1 if config.tie_word_embeddings else 2) + [(config.hidden_size,)]


def all_shapes(config: DecoderConfig, tp: int = 1) -> list[Shape]:
    """All parameters of a decoder on one of tp GPUs."""
    layers = range(config.num_hidden_layers)
    inner = [shape for i in layers for shape in layer_shapes(config, i, tp)]
    fusion = [shape for i in layers for shape in fusion_shapes(config, i, tp)]
    return [*inner, *fusion, *outer_shapes(config, tp)]


def count(shapes: Iterable[Shape]) -> int:
    """Total number of elements."""
    return sum(map(math.prod, shapes))


def sharded(shapes: Iterable[Shape], ranks: int) -> int:
    """Elements on the first of ``ranks`` GPUs: FSDP2 shards each parameter into ceil(rows / ranks) rows."""
    return sum(shared(rows, ranks) * math.prod(rest) for rows, *rest in shapes)
