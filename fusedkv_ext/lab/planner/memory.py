"""Training memory of one GPU, in bytes: what is there all the time, and the three moments of a step that can
be its largest.

FSDP2 keeps a part of every parameter, gradient and moment in fp32. While a layer runs its parameters are
there whole, those of the next one come in meanwhile; what belongs to no layer (embeddings, output head) and
the fusion weights stay whole through the step. Not counted: what CUDA, NCCL and the allocator take for
themselves, and AdamW's temporaries, which come when the activations are gone.
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
    """4 P / N: this GPU's part of the fp32 parameters."""
    return 4 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp)


def moments(job: Job) -> int:
    """8 P / N: AdamW's two."""
    return 8 * sharded(all_shapes(job.config, job.layout.tp), job.fsdp)


def gradients(job: Job) -> int:
    """4 P / N; 4 P, whole, where micro-batches are added up, because only the last of a step is shared."""
    shapes = all_shapes(job.config, job.layout.tp)
    return 4 * (sharded(shapes, job.fsdp) if job.accumulate == 1 else count(shapes))


def whole_weights(job: Job) -> int:
    """e (V h + h), twice V h with a head of its own, and 4 bytes per fusion weight: gathered all the time."""
    return job.element * count(outer_shapes(job.config, job.layout.tp)) + 4 * count(_fusion(job))


def largest_layer(job: Job) -> int:
    """Parameters of the layer that has most of them."""
    layers = range(job.config.num_hidden_layers)
    return max(count(layer_shapes(job.config, i, job.layout.tp)) for i in layers)


def layer_buffers(job: Job) -> int:
    """p (2 e + e + 4) for p parameters of a layer: two layers gathered, the gradient of one, and the fp32
    copy of it that is reduced."""
    return largest_layer(job) * (3 * job.element + 4)


def outer_gradient(job: Job) -> int:
    """e (V h + h), twice V h with a head of its own: it is there from the head's backward to the end."""
    return job.element * count(outer_shapes(job.config, job.layout.tp))


class Memory(NamedTuple):
    """Bytes on one GPU. peak: the largest of the three moments."""

    parameters: int
    gradients: int
    moments: int
    gathered: int  # parameters that FSDP2 has whole while a layer runs, and the layer's gradient
    activations: int  # what autograd keeps
    loss: int  # logits of a chunk of tokens, and the gradients of the last hidden states and the head
    peak: int

    @property
    def state(self) -> int:
        """Parameters, gradients and moments."""
        return self.parameters + self.gradients + self.moments


def memory(job: Job) -> Memory:
    """The three moments: the loss has its gradient; the backward is in the last layer; gradients of
    embeddings and head are reduced at the end."""
    state = parameters(job), gradients(job), moments(job)
    whole, activations = whole_weights(job), kept(job) + ends(job)
    at_loss = whole + activations + loss(job)
    in_layer = whole + outer_gradient(job) + layer_buffers(job) + activations + layer_backward(job)
    at_end = whole + outer_gradient(job) + 4 * count(outer_shapes(job.config, job.layout.tp))
    peak = sum(state) + max(at_loss, in_layer, at_end)
    return Memory(*state, whole + layer_buffers(job), activations, loss(job), peak)
