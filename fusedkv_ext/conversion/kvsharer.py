"""KVSharer (arXiv:2410.18517): finds layers that read the whole cache of another layer.

Pairs of layers are ranked by the Euclidean distance of their caches, averaged over the texts, most dissimilar
first. For one pair after the other, the later layer reads the earlier one's cache. The change is kept if the
last hidden states still have a cosine similarity above a threshold with the original's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusedkv_ext.conversion.layer_sharing import LayerSharing, layers_share
from fusedkv_ext.conversion.plan_search import readable_sources
from fusedkv_ext.plan import CachePlan, LayerPlan, Segment

__all__ = ["kvsharer"]


@torch.no_grad()
def kvsharer(
    model: PreTrainedModel,
    ids: Tensor,
    storage_layers: int,
    *,
    threshold: float = 0.5,
    similar_first: bool = False,
) -> CachePlan:
    """The plan that KVSharer finds for a plain model.

    Args:
        model: the plain model.
        ids: (N, S) int64 texts; the paper uses 30 of 64 tokens.
        storage_layers: stop at this number of storage layers. The plan has more if no further pair passes.
        threshold: for the mean cosine similarity of the flattened last hidden states of each text; 0.5 in the
            paper.
        similar_first: True reverses the order, for comparison.

    Raises:
        ValueError: ``storage_layers`` is out of range.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= storage_layers <= layers:
        raise ValueError(f"storage_layers must be in 1..{layers}, got {storage_layers}")
    with layers_share(model):
        sources = list(range(layers))
        expected, caches = _run(model, ids, sources)
        distances = _distances(caches)
        order = sorted(
            ((i, j) for i in range(layers) for j in range(i) if readable_sources(model, i, (j,))),
            key=lambda pair: distances[pair] if similar_first else -distances[pair],
        )
        for i, j in order:
            if len(set(sources)) <= storage_layers:
                break
            if sources[i] != i:
                continue
            # Whoever read layer i, and layer i itself, now read what layer j reads.
            tried = [sources[j] if source == i else source for source in sources]
            hidden, _ = _run(model, ids, tried)
            similarity = torch.cosine_similarity(hidden.flatten(1), expected.flatten(1)).mean()
            if similarity > threshold:
                sources = tried
    return CachePlan("kvsharer", tuple(LayerPlan(Segment((j,)), Segment((j,))) for j in sources))


def _run(
    model: PreTrainedModel, ids: Tensor, sources: list[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Last hidden states (N, S, hidden) and the caches of each layer, (N, G, S, D)."""
    sharing = LayerSharing(sources)
    out = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False, kv_sharing=sharing)
    return out.last_hidden_state.float(), sharing.caches


def _distances(caches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(L, L): distances of the averaged caches, averaged over keys and values, heads and positions."""
    layers = len(caches)
    distances = torch.zeros(layers, layers)
    for side in range(2):
        mean = torch.stack([cache[side].float().mean(0) for cache in caches])  # (L, G, S, D)
        for i in range(layers):
            distances[i] += (mean - mean[i]).norm(dim=-1).mean((1, 2)).cpu() / 2
    return distances
