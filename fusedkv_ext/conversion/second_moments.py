"""Second moments of the keys, values and queries of a causal language model over a calibration text.

Keys are taken after RoPE, as a cache stores them. Per KV head the vectors of all layers are concatenated. One
matrix per head then gives the fraction of any layer that any other layers explain:

    keys[g]   = sum over tokens of  k k^T,  k = [k_0; ...; k_{L-1}] of head g, centered in its sequence
    values[g] = sum over tokens of  v v^T,  v = [v_0; ...; v_{L-1}] of head g

Keys are centered because softmax is invariant to what all keys of a sequence have in common. Sums are
accumulated batch by batch; activations are not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fusedkv_ext.hf.config import head_dim_of

__all__ = ["SecondMoments", "collect"]

NAME = "fusedkv_moments"


@dataclass
class SecondMoments:
    """Sums over ``tokens`` tokens, float64, on the CPU. L layers, G KV heads, D head dim.

    Attributes:
        keys: (G, L * D, L * D).
        values: (G, L * D, L * D).
        queries: (L, G, D, D), summed over the query heads of each KV head.
        shares: (L,) the ratio |y|^2 / |h|^2, with y the output of attention and h the residual stream before
            it. The ratio is taken per token: a few tokens at the start of a text have norms that would
            dominate the sum.
        tokens: the number of tokens.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens: int = 0
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    queries: Tensor = field(init=False)
    shares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layers, heads, dim = self.num_layers, self.num_kv_heads, self.head_dim
        self.keys = torch.zeros(heads, layers * dim, layers * dim, dtype=torch.float64)
        self.values = torch.zeros_like(self.keys)
        self.queries = torch.zeros(layers, heads, dim, dim, dtype=torch.float64)
        self.shares = torch.zeros(layers, dtype=torch.float64)

    def covariance(self, side: str, head: int, rows: int, columns: int) -> Tensor:
        """E[x_rows x_columns^T] of one KV head for the side "key" (centered) or "value": (D, D) float64."""
        every = self.keys if side == "key" else self.values
        dim = self.head_dim
        return every[head, rows * dim : (rows + 1) * dim, columns * dim : (columns + 1) * dim] / self.tokens

    def query_metric(self, layer: int, head: int) -> Tensor:
        """E[q q^T] of the query heads of one KV head, (D, D) float64.

        With this metric M, a key error e costs e^T M e in squared scores.
        """
        return self.queries[layer, head] / self.tokens

    def share_of_stream(self, layer: int) -> float:
        """The relative size of the attention output of a layer in the residual stream: E[|y|^2 / |h|^2]."""
        return float(self.shares[layer] / self.tokens)

    def _add(self, queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> None:
        """One batch, a tensor (B, heads, T, D) per layer."""
        self.tokens += keys[0].shape[0] * keys[0].shape[2]
        keys = [k - k.mean(2, keepdim=True) for k in keys]
        for every, total in ((keys, self.keys), (values, self.values)):
            x = torch.cat([k.permute(1, 0, 2, 3).flatten(1, 2) for k in every], dim=-1).float()
            total += (x.mT @ x).double().cpu()
        for layer, q in enumerate(queries):
            x = q.unflatten(1, (self.num_kv_heads, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3).float()
            self.queries[layer] += (x.mT @ x).double().cpu()


class _Batch:
    """The activations of the layers during one forward pass."""

    def __init__(self) -> None:
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []


def _seeing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kv_moments: _Batch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA that records its inputs in ``kv_moments``, which travels as an argument of the model."""
    if kv_moments is not None:
        kv_moments.queries.append(query)
        kv_moments.keys.append(key)
        kv_moments.values.append(value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _seeing_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def _seeing(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def watched_shares(layers: Iterable[nn.Module], shares: Tensor) -> Iterator[None]:
    """Adds to ``shares`` (L,) the ratio |y|^2 / |h|^2 of each layer, summed over the tokens of a pass.

    y is the output of attention, and h the residual stream before it.
    """
    stream: dict[int, Tensor] = {}

    def see_stream(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stream[layer] = args[0].double().square().sum(-1)

        return hook

    def see_output(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Any]) -> None:
            energy = output[0].double().square().sum(-1)
            shares[layer] += (energy / stream.pop(layer)).nan_to_num(0.0, 0.0).sum().cpu()

        return hook

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            attention: Any = layer.self_attn
            stack.callback(attention.register_forward_hook(see_output(i)).remove)
            stack.callback(layer.register_forward_pre_hook(see_stream(i)).remove)
        yield


@torch.no_grad()
def collect(model: PreTrainedModel, ids: Tensor, batch_size: int = 4) -> SecondMoments:
    """Runs a Llama or Qwen3 of transformers over a text and sums its second moments.

    Args:
        model: a plain model: every layer must store its own keys and values.
        ids: (N, S) int64 token ids.
        batch_size: sequences per forward pass.
    """
    config, decoder = model.config, model.get_decoder()
    layers = decoder.layers
    second_moments = SecondMoments(len(layers), config.num_key_value_heads, head_dim_of(config))

    with _seeing(model), watched_shares(layers, second_moments.shares):
        for part in ids.split(batch_size):
            batch = _Batch()
            decoder(input_ids=part.to(model.device), use_cache=False, kv_moments=batch)
            second_moments._add(batch.queries, batch.keys, batch.values)
    return second_moments
