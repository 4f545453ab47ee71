"""Messages of a training step: bytes that one GPU receives. It sends as many.

N GPUs that gather parts of x bytes each receive (N - 1) x; reducing and scattering them is the same the other
way, and an all-reduce of y bytes is one after the other, 2 (N - 1) / N y. Not counted, a few numbers each:
the loss (three numbers per token under tp), the norm of the gradient, the gradients of q- and k-norms and of
whole fusion weights under tp.
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
    """Per micro-batch (N - 1) / N e P: layers once forward and once backward, what is in none of them once;
    fusion weights once, in fp32."""
    config, (tp, N) = job.config, (job.layout.tp, job.fsdp)
    layers = range(config.num_hidden_layers)
    in_layers = sum(sharded(layer_shapes(config, i, tp), N) for i in layers)
    fusion = sum(sharded(fusion_shapes(config, i, tp), N) for i in layers)
    outer = sharded(outer_shapes(config, tp), N)
    return job.accumulate * (N - 1) * (job.element * (2 * in_layers + outer) + 4 * fusion)


def scattered_gradients(job: Job) -> int:
    """Per step (N - 1) / N 4 P: fp32, after the last micro-batch."""
    return (job.fsdp - 1) * 4 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp)


def copied_gradients(job: Job) -> int:
    """Per step 2 (R - 1) / R 4 P / N: the all-reduce of this GPU's part over dp_replicate = R copies."""
    return _all_reduce(4 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp), job.layout.dp_replicate)


def sums_over_heads(job: Job) -> int:
    """Per micro-batch and layer 4 all-reduces of t h e under tp: after attention and feed-forward network,
    and the gradients of what they read. Checkpointing runs the first two again, non-reentrant one but the
    last, whose result nobody keeps. Then one for the embeddings and one for what the head reads: its logits
    stay where they are. Where tp > G the gradients of the k and v projections are summed too."""
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
    """Per micro-batch what the layers store, (cp - 1) / cp of it (`context_traffic`): gathered in the
    forward, reduced and scattered in the backward, and gathered once more with checkpointing."""
    config, layout = job.config, job.layout
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    sizes = (config.num_key_value_heads, config.head_dim, job.whole, layout.cp, dtype)
    once = context_traffic(config.plan, *sizes) // min(layout.tp, config.num_key_value_heads)
    return job.accumulate * once * (2 if job.checkpointing == "none" else 3)


def _all_reduce(size: int, ranks: int) -> int:
    return 2 * (ranks - 1) * size // ranks


class Traffic(NamedTuple):
    """Bytes that one GPU receives in a step, by the dimension of the layout over which they go."""

    dp_shard: int
    dp_replicate: int
    cp: int
    tp: int

    @property
    def total(self) -> int:
        return sum(self)


def traffic(job: Job) -> Traffic:
    """Of one optimizer step, all micro-batches together. Weights are shared by dp_shard x cp GPUs; that
    traffic is ``dp_shard``."""
    weights = gathered_weights(job) + scattered_gradients(job)
    return Traffic(weights, copied_gradients(job), gathered_tokens(job), sums_over_heads(job))
