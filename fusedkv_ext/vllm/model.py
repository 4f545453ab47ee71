"""Llama and Qwen3 with a cache plan in vLLM: its own Llama with another attention module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import ignore_torch_compile, support_torch_compile
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index, is_pp_missing_parameter

from fusedkv_ext.cache.codec import TensorCodec
from fusedkv_ext.layers.fusion import FusionWeights
from fusedkv_ext.layers.layer_io import SidePlan
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.vllm.attention import PlanAttentionBackend, Reads, cache_views, code_bytes
from fusedkv_ext.vllm.config import stores_whole_layers

__all__ = ["PlanForCausalLM"]

# Projections of the checkpoint that vLLM keeps in one parameter: its name, and which part they are.
_STACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class SourceAttention(Attention):
    """vLLM's attention layer over the caches of several layers.

    A layer that stores nothing names its last source as ``kv_sharing_target_layer_name``. vLLM then gives it
    no blocks, and the metadata of that source's cache group.
    """

    def __init__(self, *args: Any, reads: Reads, fusion: FusionWeights | None, **kwargs: Any) -> None:
        super().__init__(*args, attn_backend=PlanAttentionBackend, **kwargs)
        self.dtype = torch.get_default_dtype()  # of the model
        self.reads = reads
        self._fusion = [fusion]  # in a list: it is a submodule of the layer, under the checkpoint's name
        self._viewed: Tensor | None = None  # the cache of the views

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """A page of the layer: one vector per token with the heads that it stores.

        Where pages differ vLLM asks for a page of each layer, so one that stores nothing has one element.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        keys, values = (heads * self.head_size for heads in self.reads.stored)
        dtype = spec.dtype
        if self.reads.coded:
            keys, values = code_bytes(self.reads, self.head_size, dtype)
            dtype = torch.uint8
        size = vllm_config.cache_config.block_size
        if keys + values == 0:
            keys = 1
        sizes = {"num_kv_heads": 1, "head_size": keys, "head_size_v": values}
        return replace(spec, block_size=size, dtype=dtype, **sizes)

    def cache_views(self) -> tuple[Tensor, Tensor]:
        """Keys and values (blocks, tokens, heads, D) that the layer stores."""
        if self._viewed is not self.kv_cache:
            self._views = cache_views(self.kv_cache, self.reads, self.head_size, self.dtype)
            self._viewed = self.kv_cache
        return self._views

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        (fusion,) = self._fusion
        self.reads.folded.clear()
        if fusion is None:
            return
        with torch.no_grad():
            keys, values = ([None if x is None else x.detach().clone() for x in side] for side in fusion())
        self.reads.weights = keys, values


def reads_of(
    plan: CachePlan, layer: int, prefix: str, num_heads: int, num_kv_heads: int, ranks: int
) -> Reads:
    """What a rank's part of a layer stores and reads. ``prefix`` is the name of its attention module."""
    keys, values = (SidePlan.resolve(plan, layer, num_kv_heads, side) for side in ("key", "value"))
    head, _, tail = f"{prefix}.attn".rpartition(f".{layer}.")
    group = num_heads // num_kv_heads
    bounds: list[slice | None] = [
        slice(part.start * group, part.stop * group) for part in plan.segments(layer, num_kv_heads)
    ]
    if len(bounds) == 1:
        bounds = [None]  # all that a rank has
    return Reads(
        [f"{head}.{j}.{tail}" for j in (*plan.source_layers(layer), layer)],
        (-(-keys.num_stored // ranks), -(-values.num_stored // ranks)),
        list(zip(bounds, keys.reads, values.reads, strict=True)),
        (keys.mixes, values.mixes),
    )


class PlanAttention(nn.Module):
    """Projections, norms and RoPE of one layer, with the names of vLLM's ``LlamaAttention``."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: Any = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: Any = None,
        prefix: str = "",
        attn_type: str = "decoder",
    ) -> None:
        super().__init__()
        layer, plan = extract_layer_index(prefix), config.plan
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.num_heads, self.num_kv_heads = num_heads // ranks, max(1, num_kv_heads // ranks)
        reads = reads_of(plan, layer, prefix, num_heads, num_kv_heads, ranks)
        self.stores_keys, self.stores_values = (heads > 0 for heads in reads.stored)
        linear = {"bias": bias, "quant_config": quant_config}
        self.qkv_proj = None
        if reads.stored == (self.num_kv_heads, self.num_kv_heads):
            sizes = (hidden_size, self.head_dim, num_heads, num_kv_heads)
            self.qkv_proj = QKVParallelLinear(*sizes, prefix=f"{prefix}.qkv_proj", **linear)
        else:
            heads = (num_heads, *(stored * ranks for stored in reads.stored))
            for name, count in zip(("q_proj", "k_proj", "v_proj"), heads, strict=True):
                if count:
                    sizes = (hidden_size, count * self.head_dim)
                    setattr(self, name, ColumnParallelLinear(*sizes, prefix=f"{prefix}.{name}", **linear))
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = self.k_norm = None
        if "qwen3" in config.model_type:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if self.stores_keys else None
        self.rotary_emb = get_rope(
            self.head_dim, max_position=max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.kv_fusion = None
        if plan.layers[layer].has_fusion:
            self.kv_fusion = FusionWeights(plan, layer, num_kv_heads, self.head_dim)
            if ranks > 1:  # loaded whole; ranks that share a KV head use the same rows
                copies = max(1, ranks // num_kv_heads)
                self.kv_fusion.shard_heads(self.num_kv_heads, rank // copies * self.num_kv_heads)
        self.key_codec = self.value_codec = None
        if config.codecs is not None:
            coding = zip(config.codecs.layers[layer], reads.stored, strict=True)
            self.key_codec, self.value_codec = (
                None if codec.is_raw else TensorCodec(codec, count, self.head_dim) for codec, count in coding
            )
            reads.coded, reads.codecs = True, (self.key_codec, self.value_codec)
        # vLLM lets layers share a group's pages only if all pages of the group are alike.
        shares = not any(reads.stored) and stores_whole_layers(plan, num_kv_heads, config.codecs)
        types = getattr(config, "layer_types", None)
        slides = types and types[layer] == "sliding_attention"
        self.attn = SourceAttention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=1 if self.qkv_proj is None else self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if slides else None,
            kv_sharing_target_layer_name=reads.names[-2] if shares else None,
            prefix=reads.names[-1],
            reads=reads,
            fusion=self.kv_fusion,
        )

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        return x if norm is None else norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        k = v = None
        if self.qkv_proj is not None:
            qkv, _ = self.qkv_proj(hidden_states)
            heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
            q, k, v = qkv.split([count * self.head_dim for count in heads], dim=-1)
        else:
            q, _ = self.q_proj(hidden_states)
            if self.stores_keys:
                k, _ = self.k_proj(hidden_states)
            if self.stores_values:
                v, _ = self.v_proj(hidden_states)
        if k is not None:
            k = self._normed(self.k_norm, k)
        q, k = self.rotary_emb(positions, self._normed(self.q_norm, q), k)
        # vLLM writes only where there are keys and values; a side that is not stored is not looked at.
        out, _ = self.o_proj(self.attn(q, v if k is None else k, k if v is None else v))
        return out


class PlanDecoderLayer(LlamaDecoderLayer):
    """vLLM's layer of Llama with a :class:`PlanAttention`."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=PlanAttention)


def _exits_early(vllm_config: Any) -> bool:
    return vllm_config.cache_config.kv_sharing_fast_prefill


@support_torch_compile(
    dynamic_arg_dims={"positions": 0, "hidden_states": 0, "residual": 0}, enable_if=_exits_early
)
class LayerRange(nn.Module):
    """Some adjacent layers, compiled on their own: the two parts of a model see other numbers of rows."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


@ignore_torch_compile
class EarlyExitModel(LlamaModel):
    """Layers above the last one that stores see only the rows whose logits are wanted.

    It is for ``--kv-sharing-fast-prefill``, with which vLLM gives these layers metadata of those rows.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        from vllm.compilation.backends import set_model_tag

        first = self.config.plan.prefill_layers  # that stores nothing, as none after it
        with set_model_tag("storing"):
            self.storing = LayerRange(
                vllm_config=vllm_config, prefix=f"{prefix}.storing", layers=self.layers[:first]
            )
        with set_model_tag("reading"):
            self.reading = LayerRange(
                vllm_config=vllm_config, prefix=f"{prefix}.reading", layers=self.layers[first:]
            )
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        weight = next(self.layers.parameters())
        # CUDA graphs read their inputs where they were.
        self._positions = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self._hidden, self._residual = (weight.new_zeros(rows, self.config.hidden_size) for _ in range(2))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, residual = self.storing(_copied(self._positions, positions), hidden, None)
        steps = get_forward_context().attn_metadata
        step = steps[self.layers[-1].self_attn.attn.layer_name] if steps else None
        rows = getattr(step, "logits_indices_padded", None)  # None: all rows
        if rows is not None and step.num_logits_indices == len(hidden):  # nothing but decoding
            rows = None
        inputs = [x if rows is None else x[rows] for x in (positions, hidden, residual)]
        buffers = (self._positions, self._hidden, self._residual)
        wanted, residual = self.reading(*map(_copied, buffers, inputs))
        wanted, _ = self.norm(wanted, residual)
        if rows is None:
            return wanted
        count = step.num_logits_indices  # without padding
        return torch.zeros_like(hidden).index_copy_(0, rows[:count].long(), wanted[:count])


def _copied(buffer: Tensor, x: Tensor) -> Tensor:
    """``x`` at the address of a buffer."""
    return buffer[: len(x)].copy_(x)


class PlanForCausalLM(LlamaForCausalLM):
    """``FusedKVLlamaForCausalLM`` and ``FusedKVQwen3ForCausalLM`` for vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: Any = PlanDecoderLayer) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: Any = PlanDecoderLayer) -> Any:
        plan = vllm_config.model_config.hf_config.plan
        early = _exits_early(vllm_config) and plan.prefill_layers < plan.num_layers
        kind = EarlyExitModel if early else LlamaModel
        return kind(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint of transformers.

        Returns:
            The parameters that were loaded.
        """
        parameters, loaded = {**dict(self.named_parameters()), **_codec_buffers(self)}, set()
        for name, tensor in weights:
            if name.startswith("lm_head.") and self.config.tie_word_embeddings:
                continue
            target, shard = _target(name, parameters)
            if is_pp_missing_parameter(target, self):  # of another pipeline stage
                continue
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor, *shard)
            loaded.add(target)
        return loaded


def _codec_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The numbers of the codecs, which are no parameters."""
    return {name: x for name, x in model.named_buffers() if "_codec." in name}


def _target(name: str, parameters: dict[str, Any]) -> tuple[str, tuple[str | int, ...]]:
    """The parameter for a tensor of the checkpoint, and which part of it.

    A layer that stores nothing has a parameter q_proj of its own.
    """
    for part, (stacked, shard) in _STACKED.items():
        target = name.replace(f".{part}.", f".{stacked}.")
        if target != name and target in parameters:
            return target, (shard,)
    return name, ()
