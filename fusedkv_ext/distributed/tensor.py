"""Tensor parallelism: the ranks of a mesh shard the heads of every layer, the widths and the vocabulary.

Projections into heads and widths are split by outputs, projections back by inputs, and embeddings and output
head over the vocabulary. In between there are only this rank's heads: in the KV that layers pass on, the
fusion weights per head, and the cache. A layer communicates one sum after the attention and one after the
MLP, and the same two in the backward (Megatron-LM, arXiv 1909.08053, section 3).

Some parameters are whole on all ranks: norms of queries and keys, fusion weights that heads share, and KV
projections if there are fewer KV heads than ranks. Each rank computes the part of their gradient that belongs
to its heads. These gradients are summed (``shards.local``).

Parameters, sums and gathers are torch's DTensors; products use ordinary tensors. Torch's ColwiseParallel and
RowwiseParallel make every product a DTensor operation, whose dispatch takes longer than the rest of decoding
a token. With them a token took a CPU two to three times as long (four layers, two processes).
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fusedkv_ext.layers.attention import FusedKVAttention
from fusedkv_ext.layers.decoder import Decoder, DecoderConfig, OutputHead
from fusedkv_ext.layers.fusion import FusionWeights
from fusedkv_ext.layers.mlp import MLP
from fusedkv_ext.layers.norm import RMSNorm
from fusedkv_ext.layers.shards import for_all_ranks, local
from fusedkv_ext.ops.head_loss import Head, VocabShard, head_losses
from fusedkv_ext.plan import CachePlan

__all__ = ["HeadOrder", "check_shares", "head_order", "head_orders", "apply_tp"]


def apply_tp(model: Decoder, tp: DeviceMesh) -> None:
    """Shards a decoder over the ranks of a 1-D mesh, in place. Call it before FSDP2.

    All parameters become DTensors on ``tp``, sharded or replicated, with the values of its first rank. All
    ranks use ``forward``, ``generate`` and ``make_cache`` as before, with the same arguments. Logits are
    whole; the cache has the KV heads of this rank. With fewer KV heads than ranks each head is on several
    ranks, which shard its query heads.

    If the plan treats KV heads differently, the heads are permuted (``head_orders``), so that all ranks get
    the same share of each kind.

    Args:
        model: the decoder.
        tp: a 1-D mesh.

    Raises:
        ValueError: ``check_shares`` rejects the model, the model is sharded already, or the mesh has several
            dimensions.
    """
    config, ranks = model.config, tp.size()
    if tp.ndim != 1:
        raise ValueError(f"tp must be a mesh of one dimension, got {tp.ndim}; select a dimension by name")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("parameters must be ordinary tensors, got DTensors; call apply_tp first, and once")
    check_shares(config, ranks)
    with torch.no_grad():
        for name, order in head_orders(model, ranks).items():
            parameter = model.get_parameter(name)
            parameter.copy_(order.shared(parameter))
    for layer in model.model.layers:
        _share_attention(cast(FusedKVAttention, layer.self_attn), tp)
        _share_mlp(cast(MLP, layer.mlp), tp)
    model.model.embed_tokens, model.lm_head = (
        VocabParallelEmbedding(model.model.embed_tokens, tp),
        VocabParallelHead(model.lm_head, tp),
    )
    model.tie_weights()
    model.tp = tp
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.shared = True
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                _distribute(module, name, tp, Replicate())


def check_shares(config: DecoderConfig, ranks: int) -> None:
    """Checks that ``ranks`` processes can shard the heads of a decoder.

    Raises:
        ValueError: the model has latent attention or experts, or heads or widths do not divide.
    """
    instead = "share the weights (dp_shard) or the tokens (cp) instead"
    if config.kv_lora_rank is not None:
        raise ValueError(f"latent attention stores one latent for all heads, so tp must be 1; {instead}")
    if config.num_experts:
        raise ValueError(f"a model with num_experts={config.num_experts} needs tp = 1; {instead}")
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"{name} ({getattr(config, name)}) must be a multiple of tp ({ranks}); make tp smaller"
            )
    vocab = config.vocab_size
    if -(-vocab // ranks) * (ranks - 1) >= vocab:
        raise ValueError(
            f"vocab_size ({vocab}) leaves some of tp={ranks} ranks without tokens; make tp smaller"
        )
    head_order(config.plan, config.num_key_value_heads, ranks)


def head_order(plan: CachePlan, num_kv_heads: int, ranks: int) -> tuple[int, ...]:
    """The KV heads in the order of the ranks: of equal parts of it, rank r has part r.

    The order is 0, 1, 2, ... unless the plan treats heads of a layer differently. Then each rank has the same
    share of every range of heads that all layers treat alike, with the ranges in order. With fewer heads than
    ranks each rank has one head, and ranks / num_kv_heads neighbors have the same one.

    Raises:
        ValueError: a share is not a whole number of heads.
    """
    bounds = {b for row in plan.layers for part in (*row.keys, *row.values) for b in part.heads}
    starts = sorted(int(bound * num_kv_heads) for bound in {Fraction(0), *bounds})
    ranges = list(zip(starts, starts[1:], strict=False))
    if num_kv_heads < ranks:
        if ranks % num_kv_heads:
            raise ValueError(
                f"num_key_value_heads ({num_kv_heads}) must divide tp ({ranks}), or be a multiple of it; "
                "make tp smaller"
            )
        if len(ranges) > 1:
            raise ValueError(
                f"plan {plan.name!r} does not treat all KV heads alike, so that each rank must have some of "
                f"each kind, but there are num_key_value_heads={num_kv_heads} for tp={ranks}; make tp smaller"
            )
        return tuple(range(num_kv_heads))
    for start, stop in ranges:
        if (stop - start) % ranks:
            what = f"num_key_value_heads ({num_kv_heads})"
            if len(ranges) > 1:
                what = f"of {what} the heads {start}..{stop - 1}, which plan {plan.name!r} treats alike,"
            raise ValueError(f"{what} must be a multiple of tp ({ranks}); make tp smaller")
    return tuple(
        head
        for rank in range(ranks)
        for start, stop in ranges
        for head in range(
            start + rank * (stop - start) // ranks, start + (rank + 1) * (stop - start) // ranks
        )
    )


class HeadOrder(NamedTuple):
    """The order of one parameter of a sharded model.

    index[i] is the position of slice i of dim ``dim`` in the model of one process. It also applies to tensors
    with the shape of the parameter, such as the moments of an optimizer.
    """

    dim: int
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name

    def shared(self, tensor: Tensor) -> Tensor:
        """From the order of one process to that of the sharded model; a DTensor keeps its placements."""
        return self._taken(tensor, self.index)

    def canonical(self, tensor: Tensor) -> Tensor:
        """From the order of the sharded model to that of one process; a DTensor keeps its placements."""
        return self._taken(tensor, self.index.argsort())

    def _taken(self, tensor: Tensor, index: Tensor) -> Tensor:
        index = index.to(tensor.device)
        if not isinstance(tensor, DTensor):
            return tensor.index_select(self.dim, index)
        whole = cast(DTensor, tensor.detach()).full_tensor().index_select(self.dim, index)
        mesh = tensor.device_mesh
        taken = torch.empty_like(tensor)
        return taken.copy_(DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False))


def head_orders(model: Decoder, ranks: int) -> dict[str, HeadOrder]:
    """The order of each parameter that ``apply_tp`` must permute, by its name; usually there is none.

    Args:
        model: the decoder, before it is sharded or after.

    Raises:
        ValueError: as ``head_order``.
    """
    config = model.config
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    heads = head_order(config.plan, kv_heads, ranks)
    if heads == tuple(range(kv_heads)):
        return {}
    orders = {}
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        prefix = f"model.layers.{i}.self_attn"
        stored = {
            "k_proj": config.plan.stored_key_heads(i, kv_heads),
            "v_proj": config.plan.stored_value_heads(i, kv_heads),
        }
        queries = _index(heads, range(kv_heads), group * config.head_dim)
        rows = {name: _index(heads, found, config.head_dim) for name, found in stored.items() if found}
        for name, index in {"q_proj": queries, **rows}.items():
            for parameter, _ in getattr(attention, name).named_parameters():
                orders[f"{prefix}.{name}.{parameter}"] = HeadOrder(0, index)
        orders[f"{prefix}.o_proj.weight"] = HeadOrder(1, queries)
        for fused in () if attention.kv_fusion is None else attention.kv_fusion.fused_segments:
            if not fused.shared:
                start, stop = (int(bound * kv_heads) for bound in fused.segment.heads)
                index = _index(heads, range(start, stop), 1)
                orders.update({f"{prefix}.kv_fusion.{name}": HeadOrder(0, index) for name in fused.names})
    return {name: order for name, order in orders.items() if order.index.diff().ne(1).any()}


def _index(order: tuple[int, ...], heads: range | tuple[int, ...], width: int) -> Tensor:
    """Rows of a parameter that has ``width`` rows for each of ``heads``, in the order ``order``."""
    places = [heads.index(head) for head in order if head in heads]
    return (torch.tensor(places)[:, None] * width + torch.arange(width)).flatten()


class ColumnParallelLinear(nn.Linear):
    """A projection into sharded features: each rank has some of the outputs, as in torch's ColwiseParallel.

    Args:
        rows: every rank has the projection whole and uses these rows.
    """

    def __init__(self, whole: nn.Linear, tp: DeviceMesh, rows: slice | None = None) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.weight, self.bias, self.tp, self.rows = whole.weight, whole.bias, tp, rows
        for name, _ in whole.named_parameters():
            _distribute(self, name, tp, Shard(0) if rows is None else Replicate())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._own(self.weight), None if self.bias is None else self._own(self.bias))

    def _own(self, parameter: Tensor) -> Tensor:
        return local(parameter) if self.rows is None else local(parameter, summed=True)[self.rows]


class RowParallelLinear(nn.Linear):
    """A projection from sharded features: each rank has some of the inputs, as in torch's RowwiseParallel."""

    def __init__(self, whole: nn.Linear, tp: DeviceMesh) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.weight, self.bias, self.tp = whole.weight, whole.bias, tp
        _distribute(self, "weight", tp, Shard(1))
        if self.bias is not None:
            _distribute(self, "bias", tp, Replicate())

    def forward(self, x: Tensor) -> Tensor:
        out = _summed(F.linear(x, local(self.weight)), self.tp)
        return out if self.bias is None else out + local(self.bias)


class VocabParallelEmbedding(nn.Embedding):
    """Embeddings with a part of the vocabulary on each rank."""

    def __init__(self, whole: nn.Embedding, tp: DeviceMesh) -> None:
        super().__init__(whole.num_embeddings, whole.embedding_dim, device="meta")
        self.weight, self.tp = whole.weight, tp
        _distribute(self, "weight", tp, Shard(0))

    def forward(self, ids: Tensor) -> Tensor:
        ranks, rank = self.tp.size(), self.tp.get_local_rank()
        entries = -(-self.num_embeddings // ranks)
        # Ids outside the vocabulary belong to the first or last rank, where the lookup fails.
        elsewhere = (ids // entries).clamp(0, ranks - 1) != rank
        found = F.embedding((ids - rank * entries).masked_fill(elsewhere, 0), local(self.weight))
        return _summed(found.masked_fill(elsewhere[..., None], 0), self.tp)


class VocabParallelHead(ColumnParallelLinear, OutputHead):
    """Computes the logits of a part of the vocabulary on each rank, then gathers them on all; or the loss.

    For the loss the ranks exchange three numbers per position.
    """

    def forward(
        self, x: Tensor, targets: Tensor | None = None, num_target_tokens: Tensor | float | None = None
    ) -> Tensor:
        x = for_all_ranks(x, self.tp)
        if targets is not None:
            head = Head(local(self.weight), None if self.bias is None else local(self.bias), self._shard())
            return head_losses(x, head, targets, num_target_tokens=num_target_tokens).loss
        some = super().forward(x)
        shape = torch.Size((*some.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        placement = Shard(some.dim() - 1)
        logits = DTensor.from_local(some, self.tp, [placement], run_check=False, shape=shape, stride=stride)
        return logits.redistribute(placements=[Replicate()]).to_local()

    def _shard(self) -> VocabShard:
        group, ranks = self.tp.get_group(), self.tp.size()
        return VocabShard(
            rank=self.tp.get_local_rank(),
            ranks=ranks,
            size=-(-self.out_features // ranks),
            maximum=lambda x: dist.all_reduce(x, dist.ReduceOp.MAX, group=group),
            total=lambda x: dist.all_reduce(x, group=group),
        )


def _summed(x: Tensor, tp: DeviceMesh) -> Tensor:
    """The sum of the ranks' tensors, on all ranks; the gradient of each tensor is that of the sum."""
    parts = DTensor.from_local(x, tp, [Partial()], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()


def _share_attention(attention: FusedKVAttention, tp: DeviceMesh) -> None:
    ranks, rank, dim = tp.size(), tp.get_local_rank(), attention.head_dim
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    first = rows = None
    if kv_heads < ranks:
        first = rank * kv_heads // ranks
        rows = slice(first * dim, (first + 1) * dim)
    attention.q_proj = ColumnParallelLinear(attention.q_proj, tp)
    for name in ("k_proj", "v_proj"):
        if getattr(attention, name) is not None:
            setattr(attention, name, ColumnParallelLinear(getattr(attention, name), tp, rows))
    attention.o_proj = RowParallelLinear(attention.o_proj, tp)
    fusion = attention.kv_fusion
    for fused in () if fusion is None else fusion.fused_segments:
        for name in fused.names:
            _distribute(
                cast(FusionWeights, fusion),
                name,
                tp,
                Replicate() if fused.shared or first is not None else Shard(0),
            )
    attention.shard_heads(heads // ranks, max(kv_heads // ranks, 1), first)
    _enter(attention, tp)


def _share_mlp(mlp: MLP, tp: DeviceMesh) -> None:
    mlp.gate_proj, mlp.up_proj = (
        ColumnParallelLinear(mlp.gate_proj, tp),
        ColumnParallelLinear(mlp.up_proj, tp),
    )
    mlp.down_proj = RowParallelLinear(mlp.down_proj, tp)
    _enter(mlp, tp)


def _enter(module: nn.Module, tp: DeviceMesh) -> None:
    """Sums the ranks' gradients of the input of ``module``, once for all its projections."""
    module.register_forward_pre_hook(lambda _, inputs: (for_all_ranks(inputs[0], tp), *inputs[1:]))


def _distribute(module: nn.Module, name: str, tp: DeviceMesh, placement: Replicate | Shard) -> None:
    parameter = module.get_parameter(name)
    shared = distribute_tensor(parameter.detach(), tp, [placement])
    module.register_parameter(name, nn.Parameter(shared, parameter.requires_grad))
