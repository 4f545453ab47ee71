"""Codecs for a trained model: statistics of what its layers store, fitting, and evaluation in one pass."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusedkv_ext.cache.codec import CodecPlan
from fusedkv_ext.cache.codec.fit import FIRST_TOKENS, fit
from fusedkv_ext.cache.codec.simulation import coded_attention, decoded
from fusedkv_ext.checkpoint import checked_files
from fusedkv_ext.conversion.least_squares import output_metric
from fusedkv_ext.conversion.second_moments import watched_shares
from fusedkv_ext.hf.attention import PlanAttention
from fusedkv_ext.hf.config import cache_bytes_per_token, check_codecs, config_for, head_dim_of, named_codecs
from fusedkv_ext.hf.loading import COMPRESSION, new_folder, save_like
from fusedkv_ext.layers.layer_io import WeightedSum, mixed
from fusedkv_ext.ops.visibility import visible
from fusedkv_ext.plan.pieces import SIDES, Side
from fusedkv_ext.training.data.tokenizer import FileTokenizer

__all__ = ["StoredSample", "code_model", "collect_stored", "save_coded", "simulated"]


class StoredSample(NamedTuple):
    """A tensor that a layer stores, on the calibration text.

    Attributes:
        vectors: float32 (N, g, D), without the first tokens of a text.
        metric: float64 (g, D, D), the cost of an error, summed over the layers that read the tensor: of keys
            diag(a) E[q q^T] diag(a) with the fusion weights a, of values diag(b) O^T O diag(b). Each layer
            counts with the size of its attention in the residual stream.
        first: float32 (N, g, D), vectors of the first 4 tokens of each sequence.
    """

    vectors: Tensor
    metric: Tensor
    first: Tensor


def _attentions(model: PreTrainedModel) -> list[Any]:
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    if not all(isinstance(attention, PlanAttention) for attention in attentions):
        raise TypeError(
            f"model must have a cache plan, got {type(model).__name__}; convert it first, to the plan "
            "'vanilla' if its layers are to store as before"
        )
    return attentions


@contextmanager
def _attending(attentions: list[Any], attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Calls ``attend(attention, query, keys, values, ...)`` in place of the layers' own attention."""
    try:
        for attention in attentions:
            attention._attend = partial(attend, attention)
        yield
    finally:
        for attention in attentions:
            attention.__dict__.pop("_attend", None)


@torch.no_grad()
def collect_stored(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    positions: int | None = None,
    rows: int = 4096,
    batch_size: int = 4,
) -> dict[tuple[int, Side], StoredSample]:
    """Runs a model with a cache plan over a text and samples what its layers store.

    Args:
        model: A model of ``fusedkv_ext.hf``.
        ids: (N, S) int64 token ids, S above 4.
        positions: Positions at which the model will be used; None: ``max_position_embeddings``. The sequences
            are shifted evenly over them. Attention does not change, but stored keys do: RoPE turns a pair of
            channels that is slow by less than its range within a short text.
        rows: Vectors to keep of each tensor, spread evenly over the text.
        batch_size: Sequences per forward pass.

    Returns:
        A sample for each (layer, "keys" or "values") that is stored.

    Raises:
        TypeError: The model has no cache plan.
        ValueError: Sequences are too short.
    """
    attentions, layers = _attentions(model), model.get_decoder().layers
    if ids.shape[1] <= FIRST_TOKENS + 1:
        raise ValueError(
            f"ids must have more than {FIRST_TOKENS + 1} tokens per sequence, got {ids.shape[1]}"
        )
    positions = model.config.max_position_embeddings if positions is None else positions
    if positions < ids.shape[1]:
        raise ValueError(f"positions must be at least the {ids.shape[1]} of a sequence, got {positions}")
    starts = torch.linspace(0, positions - ids.shape[1], ids.shape[0], dtype=torch.float64).long()
    total = ids.shape[0] * (ids.shape[1] - FIRST_TOKENS)
    step = max(1, total // rows)
    vectors: dict[tuple[int, Side], list[Tensor]] = {}
    firsts: dict[tuple[int, Side], list[Tensor]] = {}
    queries: dict[int, Tensor] = {}
    shares = torch.zeros(len(attentions), dtype=torch.float64)

    def attend(layer: Any, query: Tensor, keys: Any, values: Any, *rest: Any) -> Any:
        i = layer.layer_idx
        for side, tensors in zip(SIDES, (keys, values), strict=True):
            own = tensors[-1]
            if own is not None and own.shape[2]:
                kept = own[:, FIRST_TOKENS:].flatten(0, 1)[::step]
                vectors.setdefault((i, side), []).append(kept.float().cpu())
                firsts.setdefault((i, side), []).append(own[:, :FIRST_TOKENS].flatten(0, 1).float().cpu())
        x = query.unflatten(1, (layer.config.num_key_value_heads, -1)).permute(1, 0, 2, 3, 4)
        x = x.flatten(1, 3).float()
        seen = (x.mT @ x).double().cpu()
        queries[i] = queries[i] + seen if i in queries else seen
        return PlanAttention._attend(layer, query, keys, values, *rest)

    with _attending(attentions, attend), watched_shares(layers, shares):
        for part, first in zip(ids.split(batch_size), starts.split(batch_size), strict=True):
            where = (first[:, None] + torch.arange(ids.shape[1])).to(model.device)
            model.get_decoder()(input_ids=part.to(model.device), position_ids=where, use_cache=False)
    metrics = {side: _metrics(attentions, queries, shares / ids.numel(), side, ids.numel()) for side in SIDES}
    return {
        (i, side): StoredSample(torch.cat(parts), metrics[side][i], torch.cat(firsts[i, side]))
        for (i, side), parts in vectors.items()
    }


def _metrics(
    attentions: list[Any], queries: dict[int, Tensor], shares: Tensor, side: Side, tokens: int
) -> dict[int, Tensor]:
    """The metric of what each layer stores on one side: summed over the layers that read it."""
    found: dict[int, Tensor] = {}
    for i, layer in enumerate(attentions):
        stored = layer.k_heads if side == "keys" else layer.v_heads
        if stored:
            dim = layer.head_dim
            found[i] = torch.zeros(stored, dim, dim, dtype=torch.float64)
    for i, layer in enumerate(attentions):
        heads = layer.config.num_key_value_heads
        if side == "keys":
            own = queries[i] / tokens
        else:
            own = torch.stack([output_metric(layer.o_proj, g, heads, layer.head_dim) for g in range(heads)])
        reads = layer._keys.reads if side == "keys" else layer._values.reads
        weights = layer.kv_fusion()[side == "values"] if layer.kv_fusion is not None else []
        start = 0
        for read in reads:
            stop = start + _width(read, found)
            for j, part in enumerate(read.tensors):
                cost = own[start:stop]
                if read.segment is not None and weights[read.segment] is not None:
                    a = weights[read.segment][j].detach().double().cpu()
                    cost = a[:, :, None] * cost * a[:, None, :]
                place = part.heads or slice(0, stop - start)
                found[part.layer][place] += float(shares[i]) * cost
            start = stop
    return found


def _width(read: WeightedSum, stored: dict[int, Tensor]) -> int:
    """KV heads of one segment."""
    part = read.tensors[0]
    return len(stored[part.layer]) if part.heads is None else part.heads.stop - part.heads.start


def code_model(
    model: PreTrainedModel, codecs: CodecPlan | str, samples: dict[tuple[int, Side], StoredSample]
) -> CodecPlan:
    """Gives a model fitted codecs, in its config and its attention layers. Replaces those that it has.

    Args:
        model: A model of ``fusedkv_ext.hf``; changed in place.
        codecs: The codecs, or the label of a scheme (``CodecPlan.named``). A label leaves layers with a
            sliding window raw: they keep few tokens, which the cache drops one by one.
        samples: Of ``collect_stored``.

    Returns:
        The codecs.

    Raises:
        ValueError: The codecs do not fit the plan, or a sample is not finite.
    """
    config = model.config
    if isinstance(codecs, str):
        codecs = named_codecs(codecs, config)
    check_codecs(codecs, config)
    attentions = _attentions(model)
    before = [(layer.key_codec, layer.value_codec) for layer in attentions]
    try:
        for i, layer in enumerate(attentions):
            layer.make_codecs(codecs)
            for side, codec in zip(SIDES, (layer.key_codec, layer.value_codec), strict=True):
                if codec is not None:
                    fit(codec, *samples[i, side]).to(layer.o_proj.weight.device)
    except BaseException:  # the model stays as it was
        for layer, (key, value) in zip(attentions, before, strict=True):
            layer.key_codec, layer.value_codec = key, value
        raise
    config.cache_codecs = codecs.to_dict()
    return codecs


def _check_causal(mask: Tensor | None, window: int | None) -> None:
    """Checks that a mask (B, 1, S, T) hides nothing but what causality and the window hide."""
    if mask is None:
        return
    rows, tokens = mask.shape[-2:]
    left = -1 if window is None else window - 1
    expected = visible(rows, tokens, tokens - rows, left, 0, mask.device)
    if not (expected == (mask if mask.dtype == torch.bool else mask == 0)).all():
        raise ValueError("attention_mask must be all ones in a simulated pass, got padding")


@contextmanager
def simulated(model: PreTrainedModel) -> Iterator[None]:
    """Passes of ``model`` without a cache compute what decoding token by token over coded caches would.

    Raises:
        ValueError: The model has no codecs. In a pass: the mask hides padding.
    """
    codecs = model.config.codecs
    if codecs is None:
        raise ValueError("model must have codecs, got a config without cache_codecs; call code_model first")
    stored: dict[tuple[int, Side], Tensor] = {}

    def attend(
        layer: Any, query: Tensor, keys: list[Any], values: list[Any], mask: Tensor | None, *rest: Any
    ) -> tuple[Tensor, None]:
        i, sides = layer.layer_idx, []
        window = getattr(layer, "sliding_window", None)
        _check_causal(mask, window)
        sources = (*layer._sources, i)
        own = (layer.key_codec, layer.value_codec)
        for index, (side, tensors, codec) in enumerate(zip(SIDES, (keys, values), own, strict=True)):
            if tensors[-1] is not None:
                stored[i, side] = decoded(codec, tensors[-1], codecs)
            reads = (layer._keys if side == "keys" else layer._values).reads
            weights = layer._weights(index, query)
            others: list[Any] = [stored.get((j, side)) for j in sources]
            sides.append((mixed(tensors, reads, weights), mixed(others, reads, weights)))
        k, v = sides
        out = coded_attention(query.transpose(1, 2), k, v, codecs, layer.scaling, window)
        return out.to(query.dtype), None

    with _attending(_attentions(model), attend):
        yield


def save_coded(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    original: str | os.PathLike[str],
    report: dict[str, Any],
    tokenizer: FileTokenizer | None = None,
) -> dict[str, Any]:
    """Writes a Hugging Face folder atomically: the model, small files of ``original``, compression.json.

    Args:
        model: A model of ``code_model``.
        out: The new folder.
        original: The folder of the original, from which the tokenizer and other small files are copied.
        report: Further entries of compression.json.
        tokenizer: Replaces the tokenizer of the original.

    Returns:
        What compression.json has. ``bytes_per_token`` is that of the cache before and after, in the model's
        dtype; ``raw_bytes`` that of a sequence's first and last tokens, which stay raw.

    Raises:
        FileExistsError: ``out`` exists.
        OSError: The disk is full; the message names the file.
        ValueError: The model has no codecs.
    """
    out, original = Path(out), Path(original)
    config, codecs, dtype = model.config, model.config.codecs, model.dtype
    if codecs is None:
        raise ValueError("model must have codecs, got a config without cache_codecs; call code_model first")
    sizes = config.plan, config.num_key_value_heads, head_dim_of(config), dtype
    record = {
        "original": str(original.resolve()),
        "plan": config.plan.name,
        "codecs": codecs.to_dict(),
        "bytes_per_token": {
            "before": cache_bytes_per_token(config_for(config, config.plan), dtype),
            "after": cache_bytes_per_token(config, dtype),
        },
        "raw_bytes": codecs.raw_bytes(*sizes),
        **report,
    }
    with new_folder(out) as scratch:
        with checked_files.naming(out):
            save_like(model, original, scratch)
            if tokenizer is not None:
                tokenizer.save(scratch)
        with checked_files.naming(out / COMPRESSION):
            (scratch / COMPRESSION).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record
