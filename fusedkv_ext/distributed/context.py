"""Context parallelism: the ranks share the tokens of each sequence, and layers gather what they store.

A layer that stores keys and values all-gathers them, once; layers that read them read the gathered ones and
communicate nothing. So n of L storing layers move n / L of vanilla attention's bytes (``context_traffic``),
where attention that passes keys and values round a ring moves them in every layer. The backward mirrors it:
autograd adds up what all readers say about a gathered tensor, and one reduce-scatter brings each rank the
gradient of its own tokens.

Balance: causal attention costs a token what stands before it. The sequence is cut into 2 N chunks for N
ranks, and rank r has chunks r and 2 N - 1 - r: a late one with an early one, equal work for all.

What overlaps: nothing by itself. The copy that puts the gathered chunks in order waits for the gather, on the
device's stream and not on the host, and the backward for its reduce-scatter. FSDP's own prefetching goes on
beside it on another stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from fusedkv_ext.cache.kv_cache import KV
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.layers.moe import MoE
from fusedkv_ext.ops.functional import fused_kv_attn_func
from fusedkv_ext.plan import CachePlan

__all__ = ["ContextParallel", "context_traffic", "apply_cp"]


class ContextParallel:
    """What one rank of ``mesh`` does with its tokens of each sequence: chunks r and 2 N - 1 - r of 2 N.

    mesh: 1-D, the N ranks that share each sequence. All of them call the same methods in the same order.
    T is the number of all tokens of a sequence, S = T / N that of this rank's.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, the ranks that share a sequence, got {mesh}")
        self.mesh, self.size, self.rank = mesh, mesh.size(), mesh.get_local_rank()
        # A graph of torch.compile would hold the mask of S < T rows, S T elements; FlashAttention needs none.
        self._attend = torch.compiler.disable(fused_kv_attn_func)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's T / N of the T tokens along ``dim``. Raises ValueError if T cannot be cut into 2 N."""
        chunks = x.split(self._chunk(x.shape[dim]), dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def take_kv(self, kv: KV) -> KV:
        """This rank's tokens of what ``gather`` returned."""
        return KV(*(None if tensor is None else self.take(tensor) for tensor in kv))

    def positions(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """The positions of this rank's tokens in a sequence of ``tokens``: (tokens / N,) int64."""
        return self.take(torch.arange(tokens, device=device), 0)

    def gather(self, kv: KV) -> KV:
        """All tokens, in order, of keys and values (B, S, heads, D) of this rank's: (B, T, heads, D).

        One all-gather for both. Backward: one reduce-scatter, in their dtype.
        """
        stored = [tensor for tensor in kv if tensor is not None]
        if not stored:
            return kv
        # Side by side, so that one collective takes both, whatever their numbers of heads.
        local, heads = torch.cat(stored, dim=2), [tensor.shape[2] for tensor in stored]
        whole = DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False)
        ranks = whole.full_tensor(grad_placements=[Partial()]).split(local.shape[0])
        # split and cat, not slices: the backward of each slice would fill a whole tensor with zeros.
        chunks = [rank.split(local.shape[1] // 2, dim=1) for rank in ranks]
        ordered = [*(early for early, _ in chunks), *(late for _, late in reversed(chunks))]
        parts = zip(*(chunk.split(heads, dim=2) for chunk in ordered), strict=True)
        return KV(*(None if tensor is None else torch.cat(next(parts), dim=1) for tensor in kv))

    def attend(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        key_weights: Tensor | None = None,
        value_weights: Tensor | None = None,
        *,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        document_ids: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``fused_kv_attn_func``, causal, of this rank's rows over gathered keys and values: (B, S, H, Dv).

        One call per chunk on the keys up to its end: ``causal`` is aligned at the bottom right, so that is
        exact. With a window also from the first key that the chunk sees on. Each call fuses its own keys,
        both together 1 + 1 / (2 N) of the sequence, on every rank. Fusing once, for the later chunk, is the
        whole sequence on rank 0, for which the others wait: too little gain for a way of its own.

        Args:
            q: (B, S, H, D), this rank's tokens.
            keys, values: (B, T, G, D) and (B, T, G, Dv), all tokens.
            causal: must be True.
            document_ids: (B, T), of all tokens.
            options: of ``fused_kv_attn_func``.
        """
        if not causal:
            raise ValueError("attention must be causal: each chunk sees the keys up to its end")
        chunk, left = self._chunk(keys[0].shape[1]), window_size[0]
        chunks = self.rank, 2 * self.size - 1 - self.rank
        if 2 * chunk != q.shape[1]:
            raise ValueError(
                f"q must have {2 * chunk} tokens, 1/{self.size} of keys' {keys[0].shape[1]}, got {q.shape[1]}"
            )
        outs = []
        for rows, index in zip(q.split(chunk, dim=1), chunks, strict=True):
            seen = slice(0 if left < 0 else max(index * chunk - left, 0), (index + 1) * chunk)
            out = self._attend(
                rows,
                [key[:, seen] for key in keys],
                [value[:, seen] for value in values],
                key_weights,
                value_weights,
                causal=causal,
                window_size=window_size,
                document_ids=None if document_ids is None else document_ids[:, seen],
                **options,
            )
            outs.append(out)
        return torch.cat(outs, dim=1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, on all of them. Backward: the identity, so that each rank's parameters get
        the gradient of its own x, and their sum over the ranks is that of the result."""
        total = DTensor.from_local(x, self.mesh, [Partial()], run_check=False).full_tensor()
        return total.clone()  # it is a view, which FSDP2 warns of when a model returns it

    def _chunk(self, tokens: int) -> int:
        """Tokens of one of the 2 N chunks."""
        if tokens < 1 or tokens % (2 * self.size):
            raise ValueError(
                f"context parallelism cuts a sequence into 2 x cp = {2 * self.size} equal chunks, but "
                f"seq_len is {tokens}: make it a multiple of {2 * self.size}, or use fewer cp ranks"
            )
        return tokens // (2 * self.size)


def apply_cp(model: Decoder, cp: DeviceMesh) -> None:
    """Makes the ranks of ``cp`` share the tokens of each sequence that ``model`` is called with.

    All of them call it with the same sequences, whole. Each gets the logits of its own tokens, the loss of
    all, and gradients whose sum over the ranks is the gradient of that loss. It is for training and
    evaluation without a cache: a call with one raises ValueError.

    cp: 1-D.
    """
    context = ContextParallel(cp)
    model.model.context = context
    for layer in model.model.layers:
        layer.self_attn.context = context
        if isinstance(layer.mlp, MoE):
            layer.mlp.context = context


def context_traffic(
    plan: CachePlan, num_kv_heads: int, head_dim: int, tokens: int, cp: int, dtype: torch.dtype
) -> int:
    """Bytes that one rank receives in one forward, which are also those that it sends in one backward.

    (cp - 1) / cp of what a cache of these tokens holds (``CachePlan.bytes_per_token``): keys and values are
    gathered when a layer stores them and never again. Relative to vanilla attention that is
    ``plan.cache_ratio``, n / L where n of L layers store. Activation checkpointing gathers once more in the
    backward of each checkpointed layer that stores. Not counted: all-reduces of the loss and of the experts'
    statistics, a few numbers each.

    Args:
        num_kv_heads: those of one rank: under tensor parallelism its share, at least 1.
        tokens: B * T, of whole sequences: those of all cp ranks together. A multiple of cp.
        cp: number of ranks that share each sequence; 1 gives 0.
        dtype: of keys and values.

    Raises ValueError where ``bytes_per_token`` does, and for tokens that are no multiple of cp.
    """
    if cp < 1 or tokens % cp:
        raise ValueError(f"tokens must be a multiple of cp, got tokens={tokens} and cp={cp}")
    return plan.bytes_per_token(num_kv_heads, head_dim, dtype) * (tokens // cp) * (cp - 1)
