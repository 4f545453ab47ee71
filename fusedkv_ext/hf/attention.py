"""Attention of one layer of a plan in a transformers model.

Tensors of transformers are (B, heads, T, D); ours are views of them, (B, T, heads, D). Layers pass their keys
and values to later layers in one object per forward pass, ``SharedKV``. It is not a dict: FSDP2 rebuilds
dicts and loses what a layer puts in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusedkv_ext.cache.codec import RAW, CodecPlan, Coding, TensorCodec
from fusedkv_ext.hf.cache import KVSharingDict, LayerCache
from fusedkv_ext.hf.coded_cache import CodedDynamicLayer
from fusedkv_ext.hf.interface import NAME, attend, folds, prefix, ranges_if_folding
from fusedkv_ext.hf.parallel import check_parallel
from fusedkv_ext.hf.versions import check_keywords, takes_cache
from fusedkv_ext.layers.fusion import FusionWeights
from fusedkv_ext.layers.layer_io import SidePlan, WeightedSum, mixed
from fusedkv_ext.layers.shards import for_all_ranks
from fusedkv_ext.ops.visibility import visible

__all__ = ["PlanAttention", "SharedKV"]


class SharedKV(KVSharingDict):
    """The keys and values that layers pass to later layers within one forward pass.

    It maps layer -> (keys, values), each (B, heads, T, D) as attention reads them. "layer new" maps to those
    of the tokens of this pass alone.

    Attributes:
        steps: tokens of this pass.
        keep: the number of last tokens that the layers that store nothing compute; None means all.
        window_start: the position of the first column of the masks of layers with a window.
        cached: True once a layer has stored its new tokens in the cache.
    """

    steps: int = 0
    keep: int | None = None
    window_start: int = 0
    cached: bool = False
    _cut: tuple[Tensor, Tensor] | None = None

    def kept_rows(self, mask: Tensor | None) -> Tensor | None:
        """The last ``keep`` rows of a mask (B, 1, S, T): one tensor for all layers that share the mask."""
        if mask is None:
            return None
        if self._cut is None or self._cut[0] is not mask:
            self._cut = mask, mask[:, :, -self.keep :]
        return self._cut[1]


class PlanAttention(nn.Module):
    """Mixin for an attention class of transformers: projects what the plan stores and reads the rest.

    Attributes:
        _family: the modeling module of transformers. Its functions are looked up at every call, so that
            patches of it (liger-kernel) apply to this class too.
        key_codec, value_codec: how keys and values are stored; None as they are.
        k_heads: the number of key heads that the layer stores.
        v_heads: the number of value heads that it stores.
    """

    _family: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        plan, heads = config.plan, config.num_key_value_heads
        self.plan = plan
        self._keys = SidePlan.resolve(plan, layer_idx, heads, "key")
        self._values = SidePlan.resolve(plan, layer_idx, heads, "value")
        self.k_heads, self.v_heads = self._keys.num_stored, self._values.num_stored
        self._sources = plan.source_layers(layer_idx)
        later = range(layer_idx + 1, plan.num_layers)
        self._is_source = any(layer_idx in plan.source_layers(i) for i in later)
        group, parts = self.num_key_value_groups, plan.segments(layer_idx, heads)
        bounds = [slice(part.start * group, part.stop * group) for part in parts]
        self._reads = list(zip(bounds, self._keys.reads, self._values.reads, strict=True))
        for name, stored in (("k_proj", self.k_heads), ("v_proj", self.v_heads)):
            if stored < heads:
                setattr(self, name, self._projection(config, stored))
        if self.k_heads == 0 and hasattr(self, "k_norm"):
            self.k_norm = None
        self.kv_fusion = None
        if plan.layers[layer_idx].has_fusion:
            self.kv_fusion = FusionWeights(plan, layer_idx, heads, self.head_dim)
        self.make_codecs(config.codecs)

    def make_codecs(self, codecs: CodecPlan | None) -> None:
        """Makes the codecs of what this layer stores, not fitted yet."""
        coding = Coding(RAW, RAW) if codecs is None else codecs.layers[int(self.layer_idx)]
        self.key_codec, self.value_codec = (
            None if codec.is_raw else TensorCodec(codec, heads, self.head_dim)
            for codec, heads in zip(coding, (self.k_heads, self.v_heads), strict=True)
        )

    def _projection(self, config: Any, heads: int) -> nn.Linear | None:
        if heads == 0:
            return None
        return nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        shared_kv_states: SharedKV | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The interface of transformers' attention. The model creates ``shared_kv_states`` for each pass.

        Raises:
            ValueError: a keyword is unknown and not None.
        """
        check_keywords(kwargs, f"{type(self).__name__} (plan {self.plan.name!r})")
        shared = SharedKV() if shared_kv_states is None else shared_kv_states
        cache = None
        if past_key_values is not None:
            coded = None if self.key_codec is None and self.value_codec is None else self._coded_layer
            cache = LayerCache(past_key_values, self.layer_idx, self.plan.name, kwargs, coded)
        query, keys, values = self._states(hidden_states, position_embeddings, cache, shared)
        steps = shared.steps or hidden_states.shape[1]
        out, weights = self._attend(query, keys, values, attention_mask, steps, shared.window_start, kwargs)
        return self.o_proj(out.flatten(2)), weights

    def _coded_layer(self) -> CodedDynamicLayer:
        return CodedDynamicLayer(self.config.codecs, self.key_codec, self.value_codec)

    def _states(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        shared: SharedKV,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """Rotated queries (B, H, S, D), and keys and values (B, T, heads, D) of (*sources, this layer)."""
        query = self._heads(self.q_proj(x), getattr(self, "q_norm", None))
        self._check_ranks(query.shape[1])
        if self.k_proj is None:  # rotary functions take both, and some work in place: the first head's copy
            key = query[:, :1].clone()
        else:
            key = self._heads(self.k_proj(x), getattr(self, "k_norm", None))
        query, key = self._family.apply_rotary_pos_emb(query, key, *position_embeddings)
        own: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.k_proj is not None or self.v_proj is not None:
            nothing = query.new_empty(query.shape[0], 0, *query.shape[2:])
            value = nothing if self.v_proj is None else self._heads(self.v_proj(x), None)
            key = nothing if self.k_proj is None else key
            key = self._mixed(key, self._keys.mixes, 0, shared, query)
            value = self._mixed(value, self._values.mixes, 1, shared, query)
            own = key, value
            if cache is not None:
                own = cache.store(key, value, query.shape[1] // self.num_key_value_groups)
                shared.cached = True
            if self._is_source:
                shared[f"{self.layer_idx}"], shared[f"{self.layer_idx} new"] = own, (key, value)
        elif cache is not None:
            cache.store_nothing()
        pairs = [*(self._source(shared, f"{j}") for j in self._sources), own]
        sides = zip(*pairs, strict=True)
        keys, values = ([None if x is None else x.transpose(1, 2) for x in side] for side in sides)
        return query, keys, values

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, S, heads * D) -> (B, heads, S, D)."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _check_ranks(self, heads: int) -> None:
        """Checks that the plan treats all heads alike: under tensor parallelism a rank has some of them."""
        total = self.config.num_attention_heads
        if heads != total and (heads % self.num_key_value_groups or len(self._reads) > 1):
            check_parallel(self.plan, self.config.num_key_value_heads, tp_size=total // heads)

    def _source(self, shared: SharedKV, name: str) -> tuple[Tensor, Tensor]:
        if name not in shared:
            raise ValueError(
                f"layer {self.layer_idx} of plan {self.plan.name!r} needs keys and values of layer {name}, "
                "which has not run before it; run all layers of a plan in one pass of the model"
            )
        return shared[name]

    def _mixed(
        self, states: Tensor, mixes: tuple[WeightedSum, ...], index: int, shared: SharedKV, query: Tensor
    ) -> Tensor:
        """What is stored, (B, heads, S, D): mixed with the sources' new tokens if the plan says so."""
        if not mixes:
            return states
        available = [self._source(shared, f"{j} new")[index].transpose(1, 2) for j in self._sources]
        available.append(states.transpose(1, 2))
        return mixed(available, mixes, self._weights(index, query)).transpose(1, 2)

    def _weights(self, index: int, query: Tensor) -> list[Tensor | None]:
        """Fusion weights by segment, of keys (0) or values (1): fp32 (m, g, D), g the heads of this rank."""
        if self.kv_fusion is None:
            return []
        heads = query.shape[1] // self.num_key_value_groups
        return [
            found
            if found is None or found.shape[1] <= heads
            else for_all_ranks(found[:, :heads].contiguous(), self.q_proj.weight.device_mesh)
            for found in self.kv_fusion()[index]
        ]

    def _attend(
        self,
        query: Tensor,
        keys: list[Tensor | None],
        values: list[Tensor | None],
        mask: Tensor | None,
        steps: int,
        window_start: int,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, H, D), and the second result of the attention implementation."""
        name = self.config._attn_implementation
        window = getattr(self, "sliding_window", None)
        dropout = self.attention_dropout if self.training else 0.0
        if name in ("sdpa", NAME) and mask is None:
            keys, values = prefix(keys, steps), prefix(values, steps)
        if window is not None and mask is not None:
            keys, values = (self._masked_tokens(side, mask, window_start) for side in (keys, values))
        if name == NAME and not dropout and kwargs.get("is_causal", True) and folds(self.head_dim):
            out = self._attend_sources(query, keys, values, mask, window)
            if out is not None:
                return out, None
        rows = query.shape[2]
        if mask is None and 1 < rows < steps:  # the implementations would align them with the first rows
            left = -1 if window is None else window - 1
            mask = visible(rows, steps, steps - rows, left, 0, query.device)[None, None]
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            "sdpa" if name == NAME else name, self._family.eager_attention_forward
        )
        key = mixed(keys, self._keys.reads, self._weights(0, query)).transpose(1, 2)
        value = mixed(values, self._values.reads, self._weights(1, query)).transpose(1, 2)
        if window is not None:
            kwargs = {**kwargs, "sliding_window": window}
        return interface(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _masked_tokens(self, side: list[Tensor | None], mask: Tensor, start: int) -> list[Tensor | None]:
        """For a layer with a window: the tokens of each source that its mask has columns for.

        A source without a window stores all tokens, and a static one has free slots after them.

        Args:
            start: the position of the first column.
        """
        wanted = mask.shape[-1]
        if any(x is not None and x.shape[1] < wanted for x in side):
            raise ValueError(
                f"layer {self.layer_idx} of plan {self.plan.name!r} has a window and a mask for {wanted} "
                f"tokens, but reads caches of {[x.shape[1] for x in side if x is not None]}; pass a cache "
                "made for this config, or none"
            )
        begins = [0 if x is None else min(start, x.shape[1] - wanted) for x in side]
        return [x if x is None else x[:, i : i + wanted] for x, i in zip(side, begins, strict=True)]

    def _attend_sources(
        self,
        query: Tensor,
        keys: list[Tensor | None],
        values: list[Tensor | None],
        mask: Tensor | None,
        window: int | None,
    ) -> Tensor | None:
        """Causal attention over the tensors of the sources, one call per segment of heads: (B, S, H, D).

        None if the mask is anything but a range of valid tokens per sequence.
        """
        ranges = None
        if mask is not None:
            some = next(x for x in keys if x is not None and x.shape[2])
            ranges = ranges_if_folding(query.transpose(1, 2), some, mask)
            if ranges is None:
                return None
        key_weights, value_weights = self._weights(0, query), self._weights(1, query)
        query = query.transpose(1, 2)
        outs = [
            attend(
                query[:, :, heads],
                [part.of(keys[part.index]) for part in key.tensors],
                [part.of(values[part.index]) for part in value.tensors],
                None if key.segment is None else key_weights[key.segment],
                None if value.segment is None else value_weights[value.segment],
                self.scaling,
                window,
                ranges,
            )
            for heads, key, value in self._reads
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
