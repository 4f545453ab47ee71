"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1) of one layer of a cache plan.

    c = norm(W_dkv x)        k_pe = RoPE(W_kr x)        stored: [k_pe ; c], one for all heads
    k_h = [k_pe ; W_uk,h c]        v_h = W_uv,h c        q_h = [RoPE(q_pe,h) ; q_nope,h]

The sources of the plan are latents (plan/latent.py). Layer i reads the sum or the concatenation of the
latents that its source layers stored, and has its own up-projections W_uk, W_uv. There are two ways to
compute it:

* up-projected: compute the keys and values of all heads, then SDPA. For training and prefill.
* absorbed (section 2.1.2): q_nope . W_uk c = (W_uk^T q_nope) . c, and P (W_uv c) = W_uv (P c). So the latent
is
  the key and value of all heads and is read once per token: attention with one KV head. For decoding.

k_pe comes first because RoPE and tied fusion weights act on the leading channels everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedkv_ext.cache.kv_cache import KV, KVCache, as_heads
from fusedkv_ext.layers.attention import check_call
from fusedkv_ext.layers.fusion import FusionTensors, FusionWeights
from fusedkv_ext.layers.norm import RMSNorm
from fusedkv_ext.ops import cached
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.checks import check_no_grad
from fusedkv_ext.ops.dispatch import native_head_dim
from fusedkv_ext.ops.functional import fuse_kv, fused_kv_attn_func
from fusedkv_ext.ops.packing import Documents, document_positions
from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary
from fusedkv_ext.ops.visibility import visible_range
from fusedkv_ext.plan import CachePlan, LatentLayer, Segment, latent_layers
from fusedkv_ext.plan.latent import channels

__all__ = ["LatentAttention"]

# Tokens per block of ``_attend_blocks``.
_BLOCK = 512


class _Part(NamedTuple):
    """Channels start..stop-1 of the latent that a layer stores."""

    layer: int
    start: int
    stop: int


class LatentAttention(nn.Module):
    """Causal multi-head latent attention of layer ``layer`` (from 0) of ``plan``.

    Parameter names are those of HF's DeepseekV3:

    * ``q_proj``, or with a ``q_lora_rank`` ``q_a_proj``, ``q_a_layernorm`` and ``q_b_proj``;
    * ``kv_a_proj_with_mqa`` (rows [c ; k_pe]) and ``kv_a_layernorm`` for the stored channels;
    * ``kv_b_proj`` (per head [k ; v]) and ``o_proj`` in every layer;
    * ``kv_fusion`` (``FusionWeights``, fp32) if the plan has fusion weights.

    Args:
        plan: The cache plan.
        layer: The layer of the plan, from 0.
        hidden_size: Channels of the hidden state.
        num_attention_heads: H.
        kv_lora_rank: r, channels of the latent.
        qk_nope_head_dim: n, channels per head of keys without positions.
        qk_rope_head_dim: d, channels of the rotated key.
        v_head_dim: v, channels per head of values.
        q_lora_rank: Channels of the query latent; None: queries are projected directly.
        rms_norm_eps: Epsilon of the norms.
        bias: Whether q_a_proj, kv_a_proj_with_mqa and o_proj have biases.
        rope: RoPE of d channels. If None, there are no positions unless ``forward`` gets
            ``position_embeddings``.
        sliding_window: Number of tokens that a token attends to, itself included. None: no limit.

    Raises:
        ValueError: Latents do not support the plan, or a size is invalid.
    """

    def __init__(
        self,
        plan: CachePlan,
        layer: int,
        hidden_size: int,
        num_attention_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rms_norm_eps: float = 1e-6,
        bias: bool = False,
        rope: RotaryEmbedding | None = None,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank)
        if num_attention_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, got {num_attention_heads}")
        if rope is not None and rope.head_dim != qk_rope_head_dim:
            raise ValueError(
                f"rope must have qk_rope_head_dim={qk_rope_head_dim} channels, got {rope.head_dim}"
            )
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window must be None or at least 1 (the token), got {sliding_window}")
        self.plan, self.layer, self.hidden_size = plan, layer, hidden_size
        self.context: Any = None  # a ContextParallel, from distributed.context.apply_cp
        self.num_heads, self.nope_dim, self.rope_dim = num_attention_heads, qk_nope_head_dim, qk_rope_head_dim
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        if rope is not None:
            self.scale *= rope.score_factor
        self.window_size = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        row = self._resolve(kv_lora_rank)

        head_dim = qk_nope_head_dim + qk_rope_head_dim
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, rms_norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, num_attention_heads * head_dim, bias=False)
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj_with_mqa: nn.Linear | None = None
        self.kv_a_layernorm: RMSNorm | None = None
        if sum(self._stored):
            self.kv_a_proj_with_mqa = nn.Linear(hidden_size, sum(self._stored), bias=bias)
        if self._stored[0]:
            self.kv_a_layernorm = RMSNorm(self._stored[0], rms_norm_eps)
        read = row.read_channels(kv_lora_rank)
        up = num_attention_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = nn.Linear(read, up, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias=bias)
        self.rope = rope
        self.interleaved = rope is not None and rope.interleaved
        self.kv_fusion: FusionWeights | None = None
        if any(segment.fusion is not None for segment in (*row.keys, *row.values, row.mix) if segment):
            rotary_dim = qk_rope_head_dim if rope is None else rope.rotary_dim
            weights_plan = row.weights_plan(plan.name, layer, plan.num_layers)
            widths = (1, qk_rope_head_dim + kv_lora_rank, self.interleaved, rotary_dim, kv_lora_rank)
            self.kv_fusion = FusionWeights(weights_plan, layer, *widths)
        # k_pe is rotated before storage, which needs cos and sin of the step's positions.
        self.needs_positions = rope is not None
        # Per query row, head and cached token, absorption costs 4 read - 2 (n + v) FLOPs more. Up-projection
        # costs 2 read (n + v) FLOPs once per head and token.
        per_head, more = qk_nope_head_dim + v_head_dim, 2 * read - (qk_nope_head_dim + v_head_dim)
        self.absorbs_up_to = read * per_head / more if more > 0 else float("inf")

    def _resolve(self, kv_lora_rank: int) -> LatentLayer:
        """Resolves the channels that this layer stores, mixes and reads."""
        rows = latent_layers(self.plan)
        row = rows[self.layer]

        def part(j: int, segment: Segment) -> _Part:
            """The channels of a segment in the latent of layer j."""
            start, stop = channels(segment.heads, kv_lora_rank)
            position = rows[j].stores_rope * self.rope_dim
            for first, last in (channels(share, kv_lora_rank) for share in rows[j].stores):
                if start < last:
                    return _Part(j, position + start - first, position + stop - first)
                position += last - first
            raise AssertionError(f"layer {j} does not store {segment.heads}")  # checked by the plan

        self._stored = (row.stored_channels(kv_lora_rank), row.stores_rope * self.rope_dim)
        self._cut, self._mix = row.cut, row.mix
        # Sums are over [k_pe ; c], compositions over intervals of c, with k_pe separate.
        key_width = self.rope_dim if row.cut else self.rope_dim + kv_lora_rank
        self._key_parts = [_Part(j, 0, key_width) for j in row.rope.sources]
        if row.cut:
            self._key_parts += [part(j, segment) for segment in row.keys for j in segment.sources]
        self._value_parts = [part(j, segment) for segment in row.values for j in segment.sources]
        self.source_layers = tuple(sorted(row.sources - {self.layer}))
        self.num_sources = len(self.source_layers)
        return row

    @property
    def mixes_before_storing(self) -> bool:
        """Whether this layer needs the new tokens of its sources even if a cache has them."""
        return self._mix is not None

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
    ) -> tuple[Tensor, KV]:
        """Computes attention for the S rows of x, which are the last S tokens of each sequence.

        Arguments and result are those of ``FusedKVAttention.forward``, with three differences. In the KV,
        ``key`` is the latent that this layer stores, [k_pe ; c] (B, S, 1, channels), and ``value`` is None.
        cos and sin are (S, d / 2) or (B, S, d / 2). The cache must have a ``rope_dim``.
        """
        check_call(self, x, sources, cache, last, document_ids)
        if cache is not None and cache.rope_dim != self.rope_dim:
            raise ValueError(
                f"cache must have latents with rope_dim={self.rope_dim}, got rope_dim={cache.rope_dim}"
            )
        if position_embeddings is None and self.rope is not None:
            position_embeddings = self.rope.cos_sin(self._positions(x, sources, cache, document_ids))
        if fusion is None and self.kv_fusion is not None:
            fusion = self.kv_fusion()
        if self.context is None:
            latent = self._latent(x, sources, position_embeddings, fusion)
        else:
            own = [self.context.take_kv(source) for source in sources] if self.mixes_before_storing else ()
            latent = self._latent(x, own, position_embeddings, fusion)
            latent = self.context.gather(KV(latent, None)).key
        if last is not None and last < x.shape[1]:
            x = x[:, -last:]
            if position_embeddings is not None:
                cos, sin = position_embeddings
                position_embeddings = cos[..., -last:, :], sin[..., -last:, :]
        q_nope, q_pe = self._queries(x, position_embeddings)
        if cache is None:
            out = self._attend(q_nope, q_pe, latent, sources, fusion, document_ids)
        else:
            check_no_grad("attention over a cache", {"x": q_nope}, "call under torch.no_grad()")
            if latent is not None:
                cache.append_latent(self.layer, latent)
            absorbs = x.shape[1] <= self.absorbs_up_to
            out = (self._attend_absorbed if absorbs else self._attend_cached)(q_nope, q_pe, cache, fusion)
        return self.o_proj(out.flatten(2)), KV(latent, None)

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
        if self.kv_a_proj_with_mqa is None:
            latent: Any = sources[0].key
            tokens = latent.shape[1]
        return torch.arange(tokens - steps, tokens, device=x.device)

    def _latent(
        self,
        x: Tensor,
        sources: Sequence[KV],
        position_embeddings: tuple[Tensor, Tensor] | None,
        fusion: FusionTensors | None,
    ) -> Tensor | None:
        """The latent to store of the tokens x: [k_pe ; c], rotated and mixed."""
        if self.kv_a_proj_with_mqa is None:
            return None
        c, k_pe = self.kv_a_proj_with_mqa(x).unsqueeze(2).split(self._stored, dim=-1)
        parts = []
        if self._stored[1]:
            parts.append(self._rotated(k_pe, position_embeddings))
        if self.kv_a_layernorm is not None:
            parts.append(self.kv_a_layernorm(c))
        latent = torch.cat(parts, dim=-1)
        if self._mix is None:
            return latent
        available: dict[int, Any] = {j: kv.key for j, kv in zip(self.source_layers, sources, strict=True)}
        available[self.layer] = latent
        return _fused([available[j] for j in self._mix.sources], fusion and fusion.keys[0])

    def _queries(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Queries without positions (B, S, H, n), and rotated queries (B, S, H, d)."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = q.unflatten(-1, (self.num_heads, -1)).split((self.nope_dim, self.rope_dim), dim=-1)
        return q_nope, self._rotated(q_pe, position_embeddings)

    def _rotated(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        return x if position_embeddings is None else apply_rotary(x, *position_embeddings, self.interleaved)

    def _read_weights(self, fusion: FusionTensors | None) -> tuple[Tensor | None, Tensor | None]:
        """Fusion weights of keys (m, 1, d + r) and values (m, 1, r) for reading; None: all ones."""
        if fusion is None or self._mix is not None:
            return None, None
        return fusion.keys[0], fusion.values[0]

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_uk (H, n, channels of the latent) and W_uv (H, v, channels)."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        return weight[:, : self.nope_dim], weight[:, self.nope_dim :]

    def _keys_and_values(
        self, stored: Callable[[int], Tensor], fusion: FusionTensors | None
    ) -> tuple[Tensor, Tensor]:
        """Keys (B, T, H, d + n) and values (B, T, H, v) of stored latents (B, T, 1, channels)."""

        def pick(parts: list[_Part]) -> list[Tensor]:
            return [stored(j)[..., start:stop] for j, start, stop in parts]

        keys, values = pick(self._key_parts), pick(self._value_parts)
        if self._cut:
            key, value = torch.cat(keys, dim=-1), torch.cat(values, dim=-1)
        else:
            key_weights, value_weights = self._read_weights(fusion)
            key, value = _fused(keys, key_weights), _fused(values, value_weights)
        k_pe, key = key.split((self.rope_dim, value.shape[-1]), dim=-1)
        heads = (self.num_heads, -1)
        up_key, up_value = (weight.flatten(0, 1) for weight in self._up_projections())
        k = F.linear(key.squeeze(2), up_key).unflatten(-1, heads)
        v = F.linear(value.squeeze(2), up_value).unflatten(-1, heads)
        return torch.cat((k_pe.expand(-1, -1, self.num_heads, -1), k), dim=-1), v

    def _attend(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        latent: Tensor | None,
        sources: Sequence[KV],
        fusion: FusionTensors | None,
        document_ids: Tensor | Documents | None,
    ) -> Tensor:
        """Up-projected, without a cache: (B, S, H, v)."""
        available: dict[int, Any] = {j: kv.key for j, kv in zip(self.source_layers, sources, strict=True)}
        available[self.layer] = latent
        k, v = self._keys_and_values(available.__getitem__, fusion)
        q = torch.cat((q_pe, q_nope), dim=-1)
        options: dict[str, Any] = {
            "softmax_scale": self.scale,
            "causal": True,
            "window_size": self.window_size,
        }
        if self.context is not None:
            return self.context.attend(q, [k], [v], document_ids=document_ids, **options)
        return cast(Tensor, fused_kv_attn_func(q, k, v, document_ids=document_ids, **options))

    def _attend_cached(
        self, q_nope: Tensor, q_pe: Tensor, cache: KVCache, fusion: FusionTensors | None
    ) -> Tensor:
        """Up-projected, over the cache."""
        tokens = max(cache.lengths)
        k, v = self._keys_and_values(lambda j: _tokens(cache, j, 0, tokens), fusion)
        q = torch.cat((q_pe, q_nope), dim=-1)
        return cached.attend_layer(self._cached_call(q, [k], [v], cache))

    def _cached_call(
        self,
        q: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        cache: KVCache,
        weights: tuple[Tensor | None, Tensor | None] = (None, None),
        block_table: Tensor | None = None,
        schedule: Tensor | None = None,
    ) -> AttentionCall:
        window = (self.scale, self.window_size[0], 0)
        return AttentionCall(
            *(q, keys, values, *weights, cache.seq_lens, block_table, *window, schedule),
            host_seqlens=cache.lengths,
        )

    def _attend_absorbed(
        self, q_nope: Tensor, q_pe: Tensor, cache: KVCache, fusion: FusionTensors | None
    ) -> Tensor:
        """Absorbed, over the cache: the latent is key and value of all heads."""
        up_key, up_value = self._up_projections()
        q_latent = torch.einsum("bshn,hnc->bshc", q_nope, up_key)
        q = torch.cat((q_pe, q_latent), dim=-1)
        key_weights, value_weights = self._read_weights(fusion)
        left = self.window_size[0]
        if not self._cut and native_head_dim(q.shape[-1], up_key.shape[-1]):
            keys = [cache.keys(j) for j, *_ in self._key_parts]
            values = [cache.values(j) for j, *_ in self._value_parts]
            schedule = cache.schedule(q.shape[1], q.shape[2], 1, self.window_size)
            weights = (key_weights, value_weights)
            call = self._cached_call(q, keys, values, cache, weights, cache.block_table, schedule)
            out = cached.attend_layer(call)
        else:
            if self._cut:
                queries = q.split([stop - start for _, start, stop in self._key_parts], dim=-1)
            else:
                queries = [q] * len(self._key_parts) if key_weights is None else [q * a for a in key_weights]
            with torch.autocast(q.device.type, enabled=False):  # keeps the products in float32
                outs = _attend_blocks(queries, self._key_parts, self._value_parts, cache, self.scale, left)
            if value_weights is not None:
                outs = [b * out for b, out in zip(value_weights, outs, strict=True)]
            out = torch.cat(outs, dim=-1) if self._cut else sum(outs[1:], outs[0])
        return torch.einsum("bshc,hvc->bshv", out.to(q.dtype), up_value)


def check_sizes(
    kv_lora_rank: int, qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int, q_lora_rank: int | None
) -> None:
    """Validates the sizes of latent attention.

    Raises:
        ValueError: A size is not a positive int, or qk_rope_head_dim is odd. The message names it.
    """
    sizes = {
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": qk_nope_head_dim,
        "qk_rope_head_dim": qk_rope_head_dim,
        "v_head_dim": v_head_dim,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")
    if qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim must be even, got {qk_rope_head_dim}")
    if q_lora_rank is not None and (not isinstance(q_lora_rank, int) or q_lora_rank < 1):
        raise ValueError(f"q_lora_rank must be a positive int or None, got {q_lora_rank!r}")


def _fused(latents: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """sum_j weights_j (.) latents_j of tensors (B, T, 1, C) with weights (m, 1, C); None: all ones."""
    if len(latents) == 1 and weights is None:
        return latents[0]
    heads = [as_heads(latent) for latent in latents]
    if weights is None:
        weights = heads[0].new_ones(1, 1, 1)
    else:
        weights = weights.reshape(len(heads), *heads[0].shape[2:])
    return fuse_kv(heads, weights).flatten(2).unsqueeze(2)


def _tokens(cache: KVCache, layer: int, first: int, end: int) -> Tensor:
    """Stored tokens first to end - 1 of all sequences: (B, end - first, 1, channels).

    Tokens beyond the length of a sequence are undefined.
    """
    stored, table = cache.keys(layer), cache.block_table
    if table is None:
        return stored[:, first:end]
    tokens = torch.arange(first, end, device=stored.device)
    # Unused entries of the table are -1, which reads the last page; the result is masked.
    return stored[table[:, tokens // stored.shape[1]].long(), tokens % stored.shape[1]]


def _attend_blocks(
    queries: Sequence[Tensor],
    keys: Sequence[_Part],
    values: Sequence[_Part],
    cache: KVCache,
    scale: float,
    left: int,
) -> list[Tensor]:
    """P V_e for each of ``values``; P = softmax(scale sum_j q_j K_j^T), causal and within ``left`` tokens.

    It covers calls that the kernel does not support: other head dims, and one query per source. It is an
    online softmax (arXiv 1805.02867) over blocks of tokens.

    Args:
        queries: (B, S, H, D_j) of the last S tokens.
        keys: The channels D_j in the cache.
        values: The channels D_e in the cache.
        cache: The cache.
        scale: Factor of the scores.
        left: Number of preceding tokens that a row attends to; -1 is unbounded.

    Returns:
        (B, S, H, D_e) for each of ``values``, fp32 (fp64 for fp64). Fully masked rows are zero.
    """
    dtype = torch.promote_types(queries[0].dtype, torch.float32)
    _, steps, heads, _ = queries[0].shape
    rows = [q.to(dtype).flatten(1, 2) * scale for q in queries]  # (B, S H, D_j): all heads read the same
    lengths = cache.seq_lens[:, None]
    position = (lengths + torch.arange(-steps, 0, device=cache.device)).repeat_interleave(heads, dim=1)
    first_seen: Any
    end_seen: Any
    first_seen, end_seen = visible_range(position, cache.max_len, left, 0)
    begin, end = (0, cache.max_len) if _capturing(cache) else _span(cache, steps, left)
    ragged = _capturing(cache) or end > min(cache.lengths)
    peak = torch.full((*position.shape, 1), torch.finfo(dtype).min, dtype=dtype, device=cache.device)
    total, sums = torch.zeros_like(peak), [torch.zeros_like(peak)] * len(values)
    for first in range(begin, end, _BLOCK):
        tokens = torch.arange(first, min(first + _BLOCK, end), device=cache.device)
        visible = (tokens >= first_seen[:, :, None]) & (tokens < end_seen[:, :, None])
        blocks = {}
        for j in {part.layer for part in (*keys, *values)}:
            blocks[j] = _tokens(cache, j, first, first + len(tokens)).squeeze(2).to(dtype)
            if ragged:  # slots beyond a sequence may hold NaN, and 0 * NaN is NaN
                blocks[j] = blocks[j].masked_fill((tokens >= lengths)[:, :, None], 0)
        scores: Any = sum(q @ blocks[j][..., a:b].mT for q, (j, a, b) in zip(rows, keys, strict=True))
        scores = scores.masked_fill(~visible, float("-inf"))
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights, decay = torch.exp(scores - new_peak), torch.exp(peak - new_peak)
        total = total * decay + weights.sum(-1, keepdim=True)
        parts = [weights @ blocks[j][..., a:b] for j, a, b in values]
        sums = [old * decay + part for old, part in zip(sums, parts, strict=True)]
        peak = new_peak
    total = total.clamp_min(torch.finfo(dtype).tiny)
    return [(x / total).unflatten(1, (steps, heads)) for x in sums]


def _span(cache: KVCache, steps: int, left: int) -> tuple[int, int]:
    """The first token that a row attends to, and one past the last."""
    begin = 0 if left < 0 else max(min(cache.lengths) - steps - left, 0)
    return begin, max(*cache.lengths, 1)


def _capturing(cache: KVCache) -> bool:
    """Whether a CUDA graph is being captured, whose replays have other lengths than the host's."""
    return cache.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
