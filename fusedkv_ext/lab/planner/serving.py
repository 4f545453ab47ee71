"""Estimates of serving: memory of one GPU, bytes read per token, traffic and FLOPs.

A server is tp GPUs that shard the heads of a decoder. Letters are those of weights.py. S: tokens in the
cache; e: bytes per element of the weights; c: bytes per element of the cache. Heads and widths in formulas
are those of one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusedkv_ext.distributed.tensor import check_shares
from fusedkv_ext.lab.planner.weights import (
    all_shapes,
    check,
    count,
    fusion_shapes,
    kv_shapes,
    layer_shapes,
    outer_shapes,
    segment_heads,
    shared,
    stored_heads,
)
from fusedkv_ext.layers.decoder_config import DecoderConfig

__all__ = ["Server"]


@dataclass(frozen=True)
class Server:
    """tp GPUs that decode sequences of ``context`` tokens.

    Attributes:
        config: The decoder.
        tp: Number of GPUs.
        context: S, tokens per sequence.
        element: Bytes per element of weights and activations.
        cache_element: Bytes per element of the cache.
        chunk: Prompt tokens per prefill step; 0 means all.

    Raises:
        ValueError: A number is out of range, tp GPUs cannot shard the decoder, or it has no formulas.
    """

    config: DecoderConfig
    tp: int = 1
    context: int = 8192
    element: int = 2
    cache_element: int = 2
    chunk: int = 0

    def __post_init__(self) -> None:
        check(self.config)
        check_shares(self.config, self.tp)
        for name in ("context", "element", "cache_element"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.chunk < 0:
            raise ValueError(f"chunk must be at least 1 token, or 0 for the whole prompt, got {self.chunk}")

    @property
    def _layers(self) -> range:
        return range(self.config.num_hidden_layers)

    # Memory

    @property
    def weights(self) -> int:
        """e P / tp, with fusion weights in fp32. If tp > G, the k and v projections are replicated."""
        fusion = sum(count(fusion_shapes(self.config, i, self.tp)) for i in self._layers)
        return self.element * (count(all_shapes(self.config, self.tp)) - fusion) + 4 * fusion

    @property
    def cache_per_token(self) -> int:
        """sum_i (k_i + v_i) D c, with at least one head per storage layer."""
        heads = sum(sum(stored_heads(self.config, i, self.tp)) for i in self._layers)
        return heads * self.config.head_dim * self.cache_element

    @property
    def cache(self) -> int:
        """S times that: the cache of one sequence."""
        return self.context * self.cache_per_token

    @property
    def prefill(self) -> int:
        """Working memory of a prefill step of s = min(chunk, S) tokens.

        It is the larger of s (3 I + 4 h) e (feed-forward network) and s (2 h + 4 H D + 4 k D) e (attention),
        plus 4 S D for cos and sin.
        """
        config, tp = self.config, self.tp
        heads = shared(config.num_attention_heads, tp) + shared(config.num_key_value_heads, tp)
        mlp = 3 * shared(config.intermediate_size, tp) + 4 * config.hidden_size
        attention = 2 * config.hidden_size + 4 * heads * config.head_dim
        tokens = min(self.chunk or self.context, self.context)
        return tokens * max(mlp, attention) * self.element + 4 * self.context * config.head_dim

    def sequences(self, gpu_memory: float) -> int:
        """(memory - weights - prefill) / cache: sequences that fit during the prefill of another one."""
        return max(int((gpu_memory - self.weights - self.prefill) // self.cache), 0)

    # Reads and traffic of a decode step

    def _reads(self, layer: int) -> Iterator[tuple[int, int]]:
        """(KV heads, stored tensors that attention reads) of each key and value segment of a layer.

        A segment that is mixed before storage is one tensor.
        """
        row = self.config.plan.layers[layer]
        for segment in (*row.keys, *row.values):
            sources = 1 if layer in segment.sources else len(segment.sources)
            yield segment_heads(self.config, segment), sources

    @property
    def cache_read(self) -> int:
        """S D c sum_i (KV heads of all sources), per token of one sequence.

        It is 2 L S G D c for vanilla and 1.5 times that for FusedKV.
        """
        reads = (read for i in self._layers for read in self._reads(i))
        heads = sum(shared(heads, self.tp) * sources for heads, sources in reads)
        return self.context * heads * self.config.head_dim * self.cache_element

    @property
    def weights_read(self) -> int:
        """Per step of all sequences: all weights except untied embeddings, of which it reads a few rows."""
        embeddings = 0 if self.config.tie_word_embeddings else self._head
        return self.weights - self.element * embeddings

    @property
    def messages(self) -> int:
        """Bytes received per token: (2 L + 1) all-reduces of h e, and an all-gather of V e logits."""
        hidden = 2 * (2 * len(self._layers) + 1) * self.config.hidden_size // self.tp
        return (self.tp - 1) * (hidden + shared(self.config.vocab_size, self.tp)) * self.element

    # FLOPs of one GPU in matrix products and attention, which are all but a few percent

    @property
    def _head(self) -> int:
        return count(outer_shapes(self.config, self.tp)[:1])

    def _matrices(self, layer: int) -> tuple[int, int]:
        """Number of weights in the k and v projections of a layer on one GPU, and in its other matrices."""
        config = self.config
        kv = sum(stored_heads(config, layer, self.tp)) * config.head_dim * config.hidden_size
        held = sum(count([shape]) for shape in kv_shapes(config, layer, self.tp) if len(shape) == 2)
        both = sum(count([shape]) for shape in layer_shapes(config, layer, self.tp) if len(shape) == 2)
        return kv, both - held

    def _attention(self, layer: int) -> int:
        """FLOPs of one token: 2 S D per query head and tensor that its KV head reads."""
        config = self.config
        group = config.num_attention_heads // config.num_key_value_heads
        heads = group * sum(heads * sources for heads, sources in self._reads(layer))
        return 2 * self.context * config.head_dim * heads // self.tp

    @property
    def decode_products(self) -> int:
        """FLOPs of one token in matrix products: 2 per weight of layers and head."""
        return 2 * (sum(sum(self._matrices(i)) for i in self._layers) + self._head)

    @property
    def decode_attention(self) -> int:
        """FLOPs of one token in the attention of all layers."""
        return sum(map(self._attention, self._layers))

    @property
    def prefill_products(self) -> int:
        """FLOPs of a prompt in matrix products: 2 per weight and token, with early exit.

        The last storage layer computes keys and values of all S tokens. Its other products and all later
        layers run for the last token only.
        """
        exit_layer = self.config.plan.prefill_layers - 1
        weights = self._head
        for i in self._layers:
            kv, others = self._matrices(i)
            weights += (self.context if i <= exit_layer else 1) * kv
            weights += (self.context if i < exit_layer else 1) * others
        return 2 * weights

    @property
    def prefill_attention(self) -> int:
        """4 D H S (S + 1) / 2 per layer before the last storage layer; one token in the others."""
        config, S = self.config, self.context
        exit_layer = config.plan.prefill_layers - 1
        square = 2 * config.head_dim * config.num_attention_heads * S * (S + 1) // self.tp
        return exit_layer * square + sum(self._attention(i) for i in self._layers if i >= exit_layer)
