"""The attention backend: each layer reads the paged caches of its sources where vLLM has put them.

For vLLM a layer's cache is (blocks, 1, tokens, (g + gv) D): one vector per token, the g stored key heads and
then the gv stored value heads. The kernels read views of it. Layers of one cache group share block table,
lengths and slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from fusedkv_ext.cache.codec import TensorCodec
from fusedkv_ext.cache.codec.kernel_codes import code_dtype, fold
from fusedkv_ext.layers.layer_io import WeightedSum, mixed
from fusedkv_ext.ops import cached
from fusedkv_ext.ops.call import AppendCall, AttentionCall

__all__ = ["PlanAttentionBackend", "Reads", "cache_views"]

_FEW_ROWS = 16  # per request: decoding, and drafts of speculative decoding


class PlanAttentionBackend(AttentionBackend):
    """What vLLM asks a backend for. It is passed to the layers and never chosen by name."""

    forward_includes_kv_cache_update = False  # vllm::unified_kv_cache_update writes before attention
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # a member of AttentionBackendEnum

    @staticmethod
    def get_impl_cls() -> type:
        return PlanAttentionImpl

    @staticmethod
    def get_builder_cls() -> type:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        return (KVCacheLayout.LBNHC,)  # each layer in memory of its own


@dataclass
class Step:
    """One step of the engine, as the layers of a cache group see it.

    Attributes:
        num_tokens: Rows of the step without padding.
        query_length: Rows of each request if all have as many, else 0.
        max_query_length: The most rows of a request.
        query_start_loc: (B + 1,) int32, where the rows of each request begin.
        seq_lens: (B,) int32, lengths with the rows of this step.
        block_table: (B, blocks) int32.
        slot_mapping: (rows,) int64, where each row is stored; -1: nowhere.
        block_size: Tokens of a block.
        made: What layers have computed of the step for those after them.
    """

    num_tokens: int
    query_length: int
    max_query_length: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    block_size: int
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """``make(*arguments)``, computed by the first layer of a step that asks.

        What a CUDA graph captures is computed within it, so that a replay computes it again.
        """
        capturing = self.seq_lens.is_cuda and torch.cuda.is_current_stream_capturing()
        key = (name, arguments, capturing)
        if key not in self.made:
            self.made[key] = make(*arguments)
        return self.made[key]

    def slots(self) -> tuple[Tensor, Tensor]:
        """The slot of each row as ``append_kvcache`` takes it: lengths (rows,) and pages (rows, 1), int32."""
        return self.once("slots", self._slots)

    def _slots(self) -> tuple[Tensor, Tensor]:
        slots, size = self.slot_mapping, self.block_size
        lengths = (slots % size + 1).masked_fill(slots < 0, 0)  # 0: skipped
        return lengths.int(), (slots // size).int()[:, None]

    def host_lengths(self) -> list[int] | None:
        """``seq_lens`` where kernels of prompts want them. The host waits for a GPU, once for all layers."""
        if not self.seq_lens.is_cuda or self.max_query_length <= _FEW_ROWS:
            return None
        return self.once("host_lengths", self.seq_lens.tolist)

    def schedule(self, num_heads: int, num_kv_heads: int, left: int) -> Tensor | None:
        """The schedule of the step's layers with these heads and window; the CPU needs none."""
        if not self.seq_lens.is_cuda or not 0 < self.query_length <= _FEW_ROWS:
            return None
        return self.once("schedule", self._schedule, num_heads, num_kv_heads, left)

    def _schedule(self, num_heads: int, num_kv_heads: int, left: int) -> Tensor:
        sizes = (self.query_length, num_heads, num_kv_heads, self.block_size * self.block_table.shape[1])
        return cached.make_schedule(self.seq_lens, *sizes, left, False)


class StepBuilder(AttentionMetadataBuilder):
    """Makes a :class:`Step` of what vLLM knows of a batch."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH  # with equally many rows the host reads nothing
    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        m = common_attn_metadata
        uniform = m.num_reqs * m.max_query_len == m.num_actual_tokens
        return Step(
            m.num_actual_tokens,
            m.max_query_len if uniform else 0,
            m.max_query_len,
            m.query_start_loc[: m.num_reqs + 1],
            m.seq_lens[: m.num_reqs],
            m.block_table_tensor[: m.num_reqs],
            m.slot_mapping[: m.num_actual_tokens],
            self.kv_cache_spec.block_size,
        )


@dataclass
class Reads:
    """What one layer stores and attends to, by its plan.

    Attributes:
        names: The layers whose caches it reads, itself last.
        stored: The number of key heads and of value heads that it stores.
        parts: For each segment of query heads the heads (None: all), and the sums of keys and of values over
            ``names``.
        mixes: The sums of keys and of values that the layer stores; empty: its own projections.
        weights: Of keys and of values, by segment: float32 (m, heads, D) or None.
        coded: Whether the model has codecs. Caches are then bytes.
        codecs: Of the keys and the values that the layer stores; None: as they are.
        folded: By segment, weights over codes and the constant of the output.
    """

    names: list[str]
    stored: tuple[int, int]
    parts: list[tuple[slice | None, WeightedSum, WeightedSum]]
    mixes: tuple[tuple[WeightedSum, ...], tuple[WeightedSum, ...]] = ((), ())
    weights: tuple[Sequence[Tensor | None], Sequence[Tensor | None]] = ((), ())
    coded: bool = False
    codecs: tuple[TensorCodec | None, TensorCodec | None] = (None, None)
    folded: dict[int, tuple[Tensor | None, Tensor | None, Tensor | None]] = field(default_factory=dict)


def code_bytes(reads: Reads, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the keys and of the values of a token in a layer of a coded model."""
    keys, values = (
        heads * (head_dim * dtype.itemsize if codec is None else codec.codec.code_bytes(head_dim, 1))
        for heads, codec in zip(reads.stored, reads.codecs, strict=True)
    )
    return keys, values


def cache_views(cache: Tensor, reads: Reads, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values (blocks, tokens, heads, D) of a layer's cache, which may have no heads on a side.

    Args:
        cache: The layer's cache as vLLM has it.
        reads: Of the layer.
        head_dim: D.
        dtype: Of keys and values that are not coded.
    """
    stored = reads.stored
    if not reads.coded:
        heads = sum(stored)
        keys, values = (
            cache[:, 0, :, : heads * head_dim].unflatten(-1, (heads, head_dim)).split(stored, dim=2)
        )
        return keys, values
    sizes = code_bytes(reads, head_dim, dtype)
    parts = cache[:, 0, :, : sum(sizes)].split(sizes, dim=-1)
    found = [
        part.view(dtype if codec is None else code_dtype(codec.codec)).unflatten(-1, (heads, -1))
        if heads
        else part.new_empty(*part.shape[:2], 0, head_dim, dtype=dtype)
        for part, heads, codec in zip(parts, stored, reads.codecs, strict=True)
    ]
    return found[0], found[1]


class PlanAttentionImpl(AttentionImpl):
    """Attention and cache writes of one layer. ``layer.reads`` is its :class:`Reads`.

    Raises:
        NotImplementedError: An option of vLLM's attention has no kernel here.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: Any = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        # vLLM asks no supports_* method of a backend that is passed to a layer.
        others = {"alibi_slopes": alibi_slopes, "logits_soft_cap": logits_soft_cap, **kwargs}
        wrong = [name for name, value in others.items() if value]
        if kv_cache_dtype.startswith(("fp8", "int", "nvfp4", "turboquant")):
            wrong.append(f"kv_cache_dtype {kv_cache_dtype}")
        if attn_type != AttentionType.DECODER:
            wrong.append(f"attn_type {attn_type}")
        if wrong:
            raise NotImplementedError(f"fusedkv models have no {' and no '.join(wrong)}, got it")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
        self.left, self.right = -1 if sliding_window is None else sliding_window - 1, 0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes the step's keys and values (rows, heads, D). vLLM calls it for layers that store only."""
        steps = get_forward_context().attn_metadata
        if kv_cache.numel() == 0 or steps is None:
            return
        step = steps[layer.layer_name]
        reads = layer.reads
        new = [
            x.reshape(-1, max(heads, 1), self.head_size)[: step.num_tokens, :heads]  # 0 heads: not stored
            for x, heads in zip((key, value), reads.stored, strict=True)
        ]
        if any(reads.mixes):
            new = self._mixed(reads, step, new)
        rows, caches = [x[:, None] for x in new], layer.cache_views()
        call = AppendCall(*rows, *caches, *step.slots())
        if reads.coded:
            scales = [(None, None) if x is None else (x.scale, x.center) for x in reads.codecs]
            (key_scale, key_center), (value_scale, value_center) = scales
            call = call._replace(
                key_scale=key_scale,
                key_center=key_center,
                value_scale=value_scale,
                value_center=value_center,
            )
        cached.append(call)

    def _mixed(self, reads: Reads, step: Step, new: Sequence[Tensor]) -> list[Tensor]:
        """What is stored, (rows, heads, D): mixed with what the sources have stored for the same rows."""
        lengths, pages = step.slots()
        page, at = pages[:, 0].long().clamp(min=0), lengths.long().sub(1).clamp(min=0)
        sources = self._caches(reads, step)[:-1]
        found = []
        for side, (own, mixes, weights) in enumerate(zip(new, reads.mixes, reads.weights, strict=True)):
            available = [caches[side][page, at][None] for caches in sources] + [own[None]]
            found.append(mixed(available, mixes, weights)[0] if mixes else own)
        return found

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Tensor:
        """Attention of the step's rows, (rows, H, D), into ``output``; rows of padding are not written."""
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        step = attn_metadata
        reads, sides = layer.reads, self._caches(layer.reads, step)
        q, out = query[: step.num_tokens], output[: step.num_tokens]
        if step.query_length:
            q, out = (x.unflatten(0, (-1, step.query_length)) for x in (q, out))
            packed: dict[str, Any] = {}
        else:
            q, out = q[None], out[None]
            packed = {"cu_seqlens_q": step.query_start_loc, "max_seqlen_q": step.max_query_length}
        lengths = step.host_lengths()
        for segment, (heads, keys, values) in enumerate(reads.parts):
            if segment not in reads.folded:
                reads.folded[segment] = self._folded(reads, segment, keys, values)
            key_weights, value_weights, value_bias = reads.folded[segment]
            own_q, own_out = (x if heads is None else x[:, :, heads] for x in (q, out))
            key_caches = [part.of(sides[part.index][0]) for part in keys.tensors]
            call = AttentionCall(
                own_q,
                key_caches,
                [part.of(sides[part.index][1]) for part in values.tensors],
                key_weights,
                value_weights,
                *(step.seq_lens, step.block_table, self.scale, self.left, self.right),
                schedule=step.schedule(own_q.shape[2], key_caches[0].shape[2], self.left),
                value_bias=value_bias,
                host_seqlens=lengths,
                out=own_out if own_out.is_contiguous() else None,
                **packed,
            )
            result, _ = cached.attend(call)
            if result is not call.out:
                own_out.copy_(result)
        return output

    def _folded(
        self, reads: Reads, segment: int, *sides: WeightedSum
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Weights of keys and of values over what is stored, and the constant of the output."""
        weights = [
            None if x.segment is None else side[segment] for x, side in zip(sides, reads.weights, strict=True)
        ]
        if not reads.coded:
            return weights[0], weights[1], None
        layers = get_forward_context().no_compile_layers
        (key_weights, _), (value_weights, bias) = (
            fold([(layers[reads.names[x.index]].reads.codecs[i], x.heads) for x in side.tensors], weights[i])
            for i, side in enumerate(sides)
        )
        return key_weights, value_weights, bias

    def _caches(self, reads: Reads, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the layers that one reads.

        Raises:
            RuntimeError: vLLM has put two of them into cache groups with different block tables.
        """
        context = get_forward_context()
        found = []
        for name in reads.names:
            table = context.attn_metadata[name].block_table
            if table.data_ptr() != step.block_table.data_ptr():
                raise RuntimeError(
                    f"{reads.names[-1]} reads the cache of {name}, which vLLM has put into another cache "
                    "group; start with --disable-hybrid-kv-cache-manager"
                )
            found.append(context.no_compile_layers[name].cache_views())
        return found
