"""Context parallelism: the ranks shard the tokens of each sequence, and layers gather the KV that they store.

A layer that stores keys and values all-gathers them once. Layers that read them use the gathered tensors and
communicate nothing. So n of L storing layers move n / L of the bytes of vanilla attention
(``context_traffic``). Ring attention would move them in every layer. The backward mirrors this: autograd sums
the gradients of all readers, and one reduce-scatter gives each rank the gradient of its own tokens.

Load balance: the cost of a token in causal attention is proportional to the tokens before it. The sequence is
divided into 2 N chunks for N ranks, and rank r has chunks r and 2 N - 1 - r. An early and a late chunk
together mean equal work for all ranks.

Overlap: none by itself. The copy that orders the gathered chunks waits for the gather, on the device's stream
and not on the host. The backward waits for its reduce-scatter. FSDP's own prefetching continues on another
stream.
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
from fusedkv_ext.ops.packing import Documents, read_documents
from fusedkv_ext.plan import CachePlan

__all__ = ["ContextParallel", "context_traffic", "apply_cp"]


class ContextParallel:
    """One rank of ``mesh`` and its tokens of each sequence: chunks r and 2 N - 1 - r of 2 N.

    All ranks call the same methods in the same order. T is the number of all tokens of a sequence, and S = T
    / N that of this rank.

    Args:
        mesh: 1-D, the N ranks that shard each sequence.

    Raises:
        ValueError: the mesh has several dimensions.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, the ranks that shard a sequence, got {mesh}")
        self.mesh, self.size, self.rank = mesh, mesh.size(), mesh.get_local_rank()
        # A graph of torch.compile would hold the mask of S < T rows, S T elements; FlashAttention needs none.
        self._attend = torch.compiler.disable(fused_kv_attn_func)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's T / N of the T tokens along ``dim``.

        Raises:
            ValueError: T is not a multiple of 2 N.
        """
        chunks = x.split(self._chunk(x.shape[dim]), dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def take_kv(self, kv: KV) -> KV:
        """This rank's tokens of a result of ``gather``."""
        return KV(*(None if tensor is None else self.take(tensor) for tensor in kv))

    def positions(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """The positions of this rank's tokens in a sequence of ``tokens``: (tokens / N,) int64."""
        return self.take(torch.arange(tokens, device=device), 0)

    def gather(self, kv: KV) -> KV:
        """Gathers this rank's keys and values (B, S, heads, D) to all tokens in order: (B, T, heads, D).

        One all-gather moves both. The backward is one reduce-scatter in their dtype.
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
        document_ids: Tensor | Documents | None = None,
        **options: Any,
    ) -> Tensor:
        """Causal ``fused_kv_attn_func`` of this rank's rows over gathered keys and values: (B, S, H, Dv).

        There is one call per chunk, on the keys up to its end. ``causal`` is aligned at the bottom right, so
        this is exact. With a window the keys also start at the first one that the chunk sees. Each call fuses
        its own keys, together 1 + 1 / (2 N) of the sequence on every rank. Fusing once for the later chunk
        would be the whole sequence on rank 0, for which the others wait. The gain is too small for a separate
        code path.

        Args:
            q: (B, S, H, D), this rank's tokens.
            keys: (B, T, G, D), all tokens.
            values: (B, T, G, Dv), all tokens.
            key_weights: see ``fused_kv_attn_func``.
            value_weights: see ``fused_kv_attn_func``.
            causal: must be True.
            window_size: see ``fused_kv_attn_func``.
            document_ids: (B, T), of all tokens.
            options: of ``fused_kv_attn_func``.

        Raises:
            ValueError: ``causal`` is False, or q has another number of tokens.
        """
        if not causal:
            raise ValueError("causal must be True under context parallelism, got False")
        chunk, left = self._chunk(keys[0].shape[1]), window_size[0]
        chunks = self.rank, 2 * self.size - 1 - self.rank
        if 2 * chunk != q.shape[1]:
            raise ValueError(
                f"q must have {2 * chunk} tokens, 1/{self.size} of keys' {keys[0].shape[1]}, got {q.shape[1]}"
            )
        documents = document_ids
        if isinstance(documents, Tensor):
            documents = read_documents(documents)
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
                document_ids=None if documents is None else documents.tokens(seen.start, seen.stop),
                **options,
            )
            outs.append(out)
        return torch.cat(outs, dim=1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, on all ranks.

        The backward is the identity. Each rank's parameters get the gradient of its own x. The sum of these
        gradients over the ranks is the gradient of the result.
        """
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
    """Shards the tokens of each sequence over the ranks of ``cp``; for calls without a cache.

    All ranks call the model with the same whole sequences. Each rank gets the logits of its own tokens and
    the loss of all tokens. The sum of the gradients over the ranks is the gradient of that loss. A call with
    a cache raises ValueError.

    Args:
        model: the decoder.
        cp: a 1-D mesh.
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
    """Bytes that one rank receives in one forward; it sends the same number in one backward.

    That is (cp - 1) / cp of the cache size of these tokens (``CachePlan.bytes_per_token``): keys and values
    are gathered once, when a layer stores them. Relative to vanilla attention it is ``plan.cache_ratio``, n /
    L if n of L layers store. Activation checkpointing gathers again in the backward of each checkpointed
    layer that stores. All-reduces of the loss and of the experts' statistics, a few numbers each, are not
    counted.

    Args:
        plan: the cache plan.
        num_kv_heads: the KV heads of one rank; under tensor parallelism its shard, at least 1.
        head_dim: D.
        tokens: B * T of whole sequences, those of all cp ranks together; a multiple of cp.
        cp: the number of ranks that shard each sequence; 1 gives 0.
        dtype: of keys and values.

    Raises:
        ValueError: ``bytes_per_token`` raises it, or tokens are not a multiple of cp.
    """
    if cp < 1 or tokens % cp:
        raise ValueError(f"tokens must be a multiple of cp, got tokens={tokens} and cp={cp}")
    return plan.bytes_per_token(num_kv_heads, head_dim, dtype) * (tokens // cp) * (cp - 1)
