"""Attention of one layer of a cache plan: FusedKV (arXiv 2512.03870) and all other plans with K/V heads.

A layer projects and stores the KV heads that the plan assigns to it, and reads the others from its source
layers. If the layer is one of its own sources, fusion weights are applied before storage, otherwise when the
layer reads. Keys are stored after RoPE. Keys and values are arguments and return values, so the module works
in any block, with activation checkpointing and with FSDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedkv_ext.cache.kv_cache import KV, KVCache
from fusedkv_ext.layers.coded_attention import attend_to_codes
from fusedkv_ext.layers.fusion import FusionTensors, FusionWeights
from fusedkv_ext.layers.layer_io import SidePlan, WeightedSum, mixed, mixes_any
from fusedkv_ext.layers.norm import RMSNorm
from fusedkv_ext.ops import cached
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.functional import fused_kv_attn_func
from fusedkv_ext.ops.packing import Documents, document_positions
from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary
from fusedkv_ext.plan import CachePlan

__all__ = ["FusedKVAttention"]


_NOTHING = KV(None, None)


class FusedKVAttention(nn.Module):
    """Causal self-attention of layer ``layer`` (from 0) of ``plan``. Only stored heads have projections.

    Parameter names are those of HF's Qwen3: ``q_proj`` and ``o_proj``; ``k_proj`` and ``v_proj`` if the layer
    stores keys or values; with ``qk_norm`` also ``q_norm``, and ``k_norm`` if keys are stored. ``kv_fusion``
    (``FusionWeights``, fp32) exists if the plan has fusion weights.

    Args:
        plan: The cache plan.
        layer: The layer of the plan, from 0.
        hidden_size: Channels of the hidden state.
        num_attention_heads: H.
        num_key_value_heads: G.
        head_dim: D.
        qk_norm: Whether an RMSNorm over the head dim is applied to queries and keys before RoPE.
        rms_norm_eps: Epsilon of these norms.
        bias: Whether the q, k, v and o projections have biases.
        rope: Position embeddings if ``forward`` gets no ``position_embeddings``. It also defines the pairing
            of channels. If None, pairs are half-split, and without ``position_embeddings`` there are no
            positions.
        sliding_window: Number of tokens that a token attends to, itself included (as in HF). None: no limit.
        recompute_fusion: As in ``fused_kv_attn_func``.

    Raises:
        ValueError: The numbers of heads do not divide, head intervals are not whole heads, or
            ``sliding_window`` is below 1.
    """

    def __init__(
        self,
        plan: CachePlan,
        layer: int,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        qk_norm: bool = False,
        rms_norm_eps: float = 1e-6,
        bias: bool = False,
        rope: RotaryEmbedding | None = None,
        sliding_window: int | None = None,
        recompute_fusion: bool = False,
    ) -> None:
        super().__init__()
        heads, kv_heads = num_attention_heads, num_key_value_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}"
            )
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window must be None or at least 1 (the token), got {sliding_window}")
        self.plan, self.layer, self.hidden_size, self.head_dim = plan, layer, hidden_size, head_dim
        self.source_layers = plan.source_layers(layer)
        self.num_sources = len(self.source_layers)
        self.recompute_fusion = recompute_fusion
        self.context: Any = None  # a ContextParallel, from distributed.context.apply_cp
        self.window_size = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self._resolve(heads, kv_heads)

        def projection(num_heads: int) -> nn.Linear | None:
            return nn.Linear(hidden_size, num_heads * head_dim, bias=bias) if num_heads else None

        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = projection(self._keys.num_stored)
        self.v_proj = projection(self._values.num_stored)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, rms_norm_eps) if qk_norm and self.k_proj is not None else None
        self.rope = rope
        self.interleaved = rope is not None and rope.interleaved
        self.kv_fusion: FusionWeights | None = None
        if plan.layers[layer].has_fusion:
            rotary_dim = None if rope is None else rope.rotary_dim
            self.kv_fusion = FusionWeights(plan, layer, kv_heads, head_dim, self.interleaved, rotary_dim)

        # Keys are mixed after RoPE, so layers that mix and their sources cannot leave RoPE to the cache.
        self.needs_positions = rope is not None and any(
            layer in (i, *plan.source_layers(i)) and mixes_any(plan, i, kv_heads)
            for i in range(plan.num_layers)
        )

    def _resolve(self, heads: int, kv_heads: int) -> None:
        self.num_heads, self.num_kv_heads = heads, kv_heads
        self._keys = SidePlan.resolve(self.plan, self.layer, kv_heads, "key")
        self._values = SidePlan.resolve(self.plan, self.layer, kv_heads, "value")
        # Query heads of each resolved segment; None: all heads in one call.
        segments, group = self.plan.segments(self.layer, kv_heads), heads // kv_heads
        bounds = [slice(segment.start * group, segment.stop * group) for segment in segments]
        q_heads: Sequence[slice | None] = [None] if len(bounds) == 1 else bounds
        self._reads = list(zip(q_heads, self._keys.reads, self._values.reads, strict=True))

    def shard_heads(self, heads: int, kv_heads: int, first: int | None = None) -> None:
        """Sets the numbers of heads to those of this rank under tensor parallelism.

        The caller has already sharded the parameters.

        Args:
            heads: Query heads of this rank.
            kv_heads: KV heads of this rank.
            first: As in ``FusionWeights.shard_heads``.
        """
        self._resolve(heads, kv_heads)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.of_heads = True
        if self.kv_fusion is not None:
            self.kv_fusion.shard_heads(kv_heads, first)

    @property
    def mixes_before_storing(self) -> bool:
        """Whether this layer needs the new tokens of its sources even if a cache has them."""
        return bool(self._keys.mixes or self._values.mixes)

    def forward(
        self,
        x: Tensor,
        sources: Sequence[KV] = (),
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
        document_ids: Tensor | Documents | None = None,
        fusion: FusionTensors | None = None,
        read: KV | None = None,
    ) -> tuple[Tensor, KV]:
        """Computes attention for the S rows of x, which are the last S tokens of each sequence.

        Args:
            x: (B, S, hidden).
            sources: KV of the layers ``source_layers``, in that order, T tokens each, as these layers
                returned them. With a cache only a layer with ``mixes_before_storing`` needs them (of the S
                new tokens); other layers read the cache. Under context parallelism x has this rank's tokens
                and KV has all tokens.
            position_embeddings: cos and sin, (S, rotary_dim / 2) or (B, S, rotary_dim / 2).
            cache: A cache after ``cache.advance(S)``. This layer's keys and values are appended. Not
                differentiable.
            last: Number of last rows to compute the output for. Keys and values are computed for all S rows.
            document_ids: (B, T) integers, see ``fused_kv_attn_func``. Positions from ``rope`` restart where
                they change. Not supported with a cache.
            fusion: The result of ``kv_fusion()``, if the caller has it already.
            read: KV of another layer to attend to instead of this layer's own, without a cache. Only for a
                layer that reads nothing but its own (``training.random_sources``).

        Returns:
            out (B, S or last, hidden), and the KV that this layer stores of its S tokens. With a cache and
            without ``position_embeddings`` it is KV(None, None), unless a layer with ``mixes_before_storing``
            needs it.

        Raises:
            ValueError: A shape is wrong, sources are missing, or the cache is for another plan.
        """
        check_call(self, x, sources, cache, last, document_ids)
        # Attribute access on modules searches three dicts, at every token.
        modules: dict[str, Any] = self._modules
        rope, rotary = modules.get("rope"), None
        if position_embeddings is None and rope is not None:
            if cache is None or self.needs_positions:
                position_embeddings = rope.cos_sin(self._positions(x, sources, cache, document_ids))
            else:
                rotary = cache.rotary_tables(rope)
        if fusion is None and self.kv_fusion is not None and (cache is None or self.mixes_before_storing):
            fusion = self.kv_fusion()
        if self.context is None:
            kv = self._project(x, sources, position_embeddings, fusion)
        else:
            own = [self.context.take_kv(source) for source in sources] if self.mixes_before_storing else ()
            kv = self.context.gather(self._project(x, own, position_embeddings, fusion))
        if last is not None and last < x.shape[1]:
            x = x[:, -last:]
            if position_embeddings is not None:
                cos, sin = position_embeddings
                position_embeddings = cos[..., -last:, :], sin[..., -last:, :]
        q = self._rotated(modules["q_proj"](x), modules.get("q_norm"), position_embeddings)
        if cache is None:
            out = self._attend(q, kv if read is None else read, sources, fusion, document_ids)
            return modules["o_proj"](out.flatten(2)), kv
        if rotary is None:
            cache.append(self.layer, kv.key, kv.value)
        else:
            q = cache.rope_append(self.layer, q, kv.key, kv.value, rotary, self.interleaved)
            kv = _NOTHING
        return modules["o_proj"](self._attend_cached(q, cache).flatten(2)), kv

    def _positions(
        self, x: Tensor, sources: Sequence[KV], cache: KVCache | None, document_ids: Tensor | Documents | None
    ) -> Tensor:
        """Positions of the rows of x: (S,), or (B, S) if they differ between sequences."""
        steps = x.shape[1]
        if cache is not None:
            return cache.positions(steps)
        if document_ids is not None:
            positions = document_positions(document_ids)
            return positions[:, -steps:] if self.context is None else self.context.take(positions)
        if self.context is not None:
            return self.context.positions(steps * self.context.size, x.device)
        tokens = steps
        if self.k_proj is None and self.v_proj is None:
            tokens = next(tensor for tensor in sources[0] if tensor is not None).shape[1]
        return torch.arange(tokens - steps, tokens, device=x.device)

    def _project(
        self,
        x: Tensor,
        sources: Sequence[KV],
        position_embeddings: tuple[Tensor, Tensor] | None,
        fusion: FusionTensors | None,
    ) -> KV:
        """Keys and values to store of the tokens x: projected, normalized, rotated, mixed."""
        key = value = None
        modules: dict[str, Any] = self._modules
        k_proj, v_proj = modules.get("k_proj"), modules.get("v_proj")
        available: Any  # has every tensor that a mix needs
        if k_proj is not None:
            key = self._rotated(k_proj(x), modules.get("k_norm"), position_embeddings)
            if self._keys.mixes:
                available = (*(source.key for source in sources), key)
                key = mixed(available, self._keys.mixes, fusion and fusion.keys)
        if v_proj is not None:
            value = v_proj(x).unflatten(-1, (-1, self.head_dim))
            if self._values.mixes:
                available = (*(source.value for source in sources), value)
                value = mixed(available, self._values.mixes, fusion and fusion.values)
        return KV(key, value)

    def _rotated(
        self, x: Tensor, norm: RMSNorm | None, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(B, S, heads * D) -> (B, S, heads, D), normalized and rotated."""
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            x = norm(x)
        if position_embeddings is None:
            return x
        return apply_rotary(x, *position_embeddings, self.interleaved)

    def _attend(
        self,
        q: Tensor,
        kv: KV,
        sources: Sequence[KV],
        fusion: FusionTensors | None,
        document_ids: Tensor | Documents | None,
    ) -> Tensor:
        """One call per resolved segment, on its heads: (B, S, H, D)."""
        available: Any = (*sources, kv)  # has every tensor that a segment reads
        weights: Any = fusion
        attend: Any = fused_kv_attn_func if self.context is None else self.context.attend
        outs = [
            attend(
                q if q_heads is None else q[:, :, q_heads],
                [heads.of(available[heads.index].key) for heads in keys.tensors],
                [heads.of(available[heads.index].value) for heads in values.tensors],
                None if keys.segment is None else weights.keys[keys.segment],
                None if values.segment is None else weights.values[values.segment],
                causal=True,
                window_size=self.window_size,
                document_ids=document_ids,
                recompute_fusion=self.recompute_fusion,
            )
            for q_heads, keys, values in self._reads
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _attend_cached(self, q: Tensor, cache: KVCache) -> Tensor:
        """Like ``_attend``, over the cache."""
        outs = []
        for segment, (q_heads, keys, values) in enumerate(self._reads):
            part = q if q_heads is None else q[:, :, q_heads]
            key_caches = [heads.of(cache.keys(heads.layer)) for heads in keys.tensors]
            _, steps, num_heads, head_dim = part.shape
            schedule = cache.schedule(steps, num_heads, key_caches[0].shape[2], self.window_size)
            call = AttentionCall(
                part,
                key_caches,
                [heads.of(cache.values(heads.layer)) for heads in values.tensors],
                *self._weights(keys, values),
                cache.stored_lens,
                cache.block_table,
                head_dim**-0.5,
                self.window_size[0],
                0,
                schedule,
                host_seqlens=cache.stored_lengths,
            )
            if cache.codecs is None:
                outs.append(cached.attend_layer(call))
            else:
                outs.append(attend_to_codes(call, cache, (self.layer, segment), keys, values))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _weights(self, keys: WeightedSum, values: WeightedSum) -> tuple[Tensor | None, Tensor | None]:
        """Fusion weights as in ``kv_fusion()``, without the overhead of a module call per token."""
        if keys.segment is None and values.segment is None:
            return None, None
        fusion: Any = self._modules.get("kv_fusion")
        return (
            None if keys.segment is None else fusion.key_weights(keys.segment),
            None if values.segment is None else fusion.value_weights(values.segment),
        )


def check_call(
    attention: Any,  # FusedKVAttention or LatentAttention
    x: Tensor,
    sources: Sequence[KV],
    cache: KVCache | None,
    last: int | None,
    document_ids: Tensor | Documents | None,
) -> None:
    """Checks the arguments of ``forward``, for all attention modules."""
    hidden, plan = attention.hidden_size, attention.plan
    if x.dim() != 3 or x.shape[-1] != hidden:
        raise ValueError(f"x must have shape (B, S, {hidden}), got {tuple(x.shape)}")
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1 or None, got {last}")
    if cache is not None and document_ids is not None:
        raise ValueError(
            "document_ids must be None with a cache, which holds one document per sequence; leave one out"
        )
    if attention.context is not None and not (cache is None and last is None):
        raise ValueError(
            "cache and last must be None under context parallelism, where each rank has a part of the rows"
        )
    if cache is not None and cache.plan is not plan and cache.plan != plan:
        raise ValueError(
            f"cache must be for plan {plan.name!r} of this layer, got one for {cache.plan.name!r}"
        )
    # Not len(source_layers): torch.compile would compile one graph for each set of layers.
    if len(sources) != attention.num_sources and (cache is None or attention.mixes_before_storing):
        layers = attention.source_layers
        expected = f"the KV of layers {layers}, in that order," if layers else "empty"
        raise ValueError(
            f"sources must be {expected} for layer {attention.layer} of plan {plan.name!r}; "
            f"got {len(sources)}"
        )
