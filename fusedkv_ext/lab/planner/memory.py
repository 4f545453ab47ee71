"""Training memory of one GPU in bytes: the permanent state, and three candidates for the peak of a step.

FSDP2 keeps an fp32 shard of every parameter, gradient and optimizer moment. It all-gathers the parameters of
the running layer and prefetches the next one. Embeddings, output head and fusion weights stay gathered
through the step.

Not counted: memory of CUDA, NCCL and the allocator, and AdamW's temporaries, which are allocated after the
activations are freed.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedkv_ext.lab.planner.activations import ends, kept, layer_backward, loss
from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.weights import (
    Shape,
    all_shapes,
    count,
    fusion_shapes,
    layer_shapes,
    outer_shapes,
    sharded,
)

__all__ = ["Memory", "memory"]


def _fusion(job: Job) -> list[Shape]:
    layers = range(job.config.num_hidden_layers)
    return [shape for i in layers for shape in fusion_shapes(job.config, i, job.layout.tp)]


def parameters(job: Job) -> int:
    """4 P / N: this GPU's shard of the fp32 parameters."""
    return 4 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp)


def moments(job: Job) -> int:
    """8 P / N: AdamW's two moments."""
    return 8 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp)


def gradients(job: Job) -> int:
    """4 P / N, or 4 P with gradient accumulation, which reduces only after the last micro-batch."""
    shapes = all_shapes(job.config, job.layout.tp)
    return 4 * (sharded(shapes, job.fsdp) if job.accumulate == 1 else count(shapes))


def whole_weights(job: Job) -> int:
    """e (V h + h) + 4 bytes per fusion weight, always gathered; 2 V h with an untied output head."""
    return job.element * count(outer_shapes(job.config, job.layout.tp)) + 4 * count(_fusion(job))


def largest_layer(job: Job) -> int:
    """Number of parameters of the largest layer."""
    layers = range(job.config.num_hidden_layers)
    return max(count(layer_shapes(job.config, i, job.layout.tp)) for i in layers)


def layer_buffers(job: Job) -> int:
    """p (2 e + e + 4) for p parameters of a layer.

    These are two gathered layers, the gradient of one, and its fp32 copy for the reduce-scatter.
    """
    return largest_layer(job) * (3 * job.element + 4)


def outer_gradient(job: Job) -> int:
    """e (V h + h), allocated from the head's backward to the end; 2 V h with an untied output head."""
    return job.element * count(outer_shapes(job.config, job.layout.tp))


class Memory(NamedTuple):
    """Bytes on one GPU."""

    parameters: int
    gradients: int
    moments: int
    gathered: int  # all-gathered parameters while a layer runs, and the layer's gradient
    activations: int  # saved by autograd
    loss: int  # logits of a chunk of tokens, and the gradients of the last hidden states and the head
    peak: int  # largest of the three candidates of `memory`

    @property
    def state(self) -> int:
        """Parameters, gradients and moments."""
        return self.parameters + self.gradients + self.moments


def memory(job: Job) -> Memory:
    """Memory of a training step.

    The candidates for the peak are: the end of the loss, the backward of the last layer, and the reduction of
    the gradients of embeddings and head.
    """
    state = parameters(job), gradients(job), moments(job)
    whole, activations = whole_weights(job), kept(job) + ends(job)
    at_loss = whole + activations + loss(job)
    in_layer = whole + outer_gradient(job) + layer_buffers(job) + activations + layer_backward(job)
    at_end = whole + outer_gradient(job) + 4 * count(outer_shapes(job.config, job.layout.tp))
    peak = sum(state) + max(at_loss, in_layer, at_end)
    return Memory(*state, whole + layer_buffers(job), activations, loss(job), peak)
