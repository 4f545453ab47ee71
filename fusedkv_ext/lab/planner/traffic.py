"""Traffic of a training step: bytes that one GPU receives. It sends as many.

An all-gather of shards of x bytes over N GPUs receives (N - 1) x, and so does the reduce-scatter. An
all-reduce of y bytes is one of each, 2 (N - 1) / N y.

Not counted, because they are small: the loss (three numbers per token with tp), the gradient norm, and the
gradients of q-norms, k-norms and replicated fusion weights with tp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedkv_ext.distributed.context import context_traffic
from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.weights import (
    all_shapes,
    count,
    fusion_shapes,
    kv_shapes,
    layer_shapes,
    outer_shapes,
    sharded,
)

__all__ = ["Traffic", "traffic"]


def gathered_weights(job: Job) -> int:
    """Per micro-batch (N - 1) / N e P for each all-gather.

    Layers are gathered in the forward and in the backward, the other parameters once. Fusion weights are
    gathered once, in fp32.
    """
    config, (tp, N) = job.config, (job.layout.tp, job.fsdp)
    layers = range(config.num_hidden_layers)
    in_layers = sum(sharded(layer_shapes(config, i, tp), N) for i in layers)
    fusion = sum(sharded(fusion_shapes(config, i, tp), N) for i in layers)
    outer = sharded(outer_shapes(config, tp), N)
    return job.accumulate * (N - 1) * (job.element * (2 * in_layers + outer) + 4 * fusion)


def scattered_gradients(job: Job) -> int:
    """Per step (N - 1) / N 4 P: the fp32 reduce-scatter after the last micro-batch."""
    return (job.fsdp - 1) * 4 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp)


def copied_gradients(job: Job) -> int:
    """Per step 2 (R - 1) / R 4 P / N: the all-reduce of this GPU's shard over dp_replicate = R replicas."""
    return _all_reduce(4 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp), job.layout.dp_replicate)


def sums_over_heads(job: Job) -> int:
    """Per micro-batch and layer 4 all-reduces of t h e with tp, plus two outside the layers.

    The 4 are after attention and feed-forward network, and for the gradients of their inputs. Recomputation
    repeats the first two; non-reentrant checkpointing skips the last, whose result is unused. The other two
    are for the embeddings and for the gradient of the head's input; logits stay sharded. If tp > G, the
    gradients of the k and v projections are reduced too.
    """
    config, tp = job.config, job.layout.tp
    if tp == 1:
        return 0
    layers = range(config.num_hidden_layers)
    hidden = job.tokens * config.hidden_size * job.element
    per_layer = {"none": 4, "non_reentrant": 5, "reentrant": 6}[job.checkpointing]
    received = (per_layer * len(layers) + 2) * _all_reduce(hidden, tp)
    if tp > config.num_key_value_heads:
        whole = sum(count(kv_shapes(config, i, tp)) for i in layers)
        received += _all_reduce(whole * job.element, tp)
    return job.accumulate * received


def gathered_tokens(job: Job) -> int:
    """Per micro-batch and transfer (cp - 1) / cp of the stored keys and values (`context_traffic`).

    The transfers are an all-gather in the forward and a reduce-scatter in the backward. Checkpointing adds
    another all-gather.
    """
    config, layout = job.config, job.layout
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    sizes = (config.num_key_value_heads, config.head_dim, job.whole, layout.cp, dtype)
    once = context_traffic(config.plan, *sizes) // min(layout.tp, config.num_key_value_heads)
    return job.accumulate * once * (2 if job.checkpointing == "none" else 3)


def _all_reduce(size: int, ranks: int) -> int:
    return 2 * (ranks - 1) * size // ranks


class Traffic(NamedTuple):
    """Bytes that one GPU receives in a step, by dimension of the layout."""

    dp_shard: int
    dp_replicate: int
    cp: int
    tp: int

    @property
    def total(self) -> int:
        return sum(self)


def traffic(job: Job) -> Traffic:
    """Traffic of one optimizer step over all micro-batches.

    The weights are sharded over dp_shard x cp GPUs. Their traffic is counted as ``dp_shard``.
    """
    weights = gathered_weights(job) + scattered_gradients(job)
    return Traffic(weights, copied_gradients(job), gathered_tokens(job), sums_over_heads(job))
