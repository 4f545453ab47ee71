"""Activations: what autograd keeps of a forward, and what its largest moment needs beside that.

All in bytes on one GPU, from the code of the decoder and from what torch's CUDA kernels save: RMSNorm its
input and one fp32 number per row, a matrix product its input, FlashAttention q, k, v, its output and the lse.
t: tokens of this GPU; T: those of all cp GPUs that share its sequences; e: bytes of an element; heads (H,
k_i, v_i) and I are those of one tp GPU, other letters as in weights.py.
"""

from __future__ import annotations

from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.weights import segment_heads, shared, stored_heads
from fusedkv_ext.ops.head_loss import chunk_rows
from fusedkv_ext.plan import Segment

__all__ = ["kept", "kept_by_layer", "layer_backward", "loss", "loss_kept"]


def kept_by_layer(job: Job, layer: int) -> int:
    """A layer without checkpointing: hidden states, attention, feed-forward network."""
    return _hidden(job) + _queries(job, layer) + _stored(job, layer) + _fused(job, layer) + _mlp(job)


def _hidden(job: Job) -> int:
    """t (4 h e + 8): input and result of both norms, and their fp32 numbers."""
    return job.tokens * (4 * job.config.hidden_size * job.element + 8)


def _queries(job: Job, layer: int) -> int:
    """t H (2 D e + 4): rotated queries, attention's result and lse; D e + 4 more before a q-norm; D e more
    where results of several calls are joined (head segments, chunks of cp)."""
    config, e = job.config, job.element
    size = 2 * config.head_dim * e + 4
    if config.qk_norm:
        size += config.head_dim * e + 4
    if len(config.plan.segments(layer, config.num_key_value_heads)) > 1 or job.layout.cp > 1:
        size += config.head_dim * e
    return job.tokens * shared(config.num_attention_heads, job.layout.tp) * size


def _stored(job: Job, layer: int) -> int:
    """T (k_i + v_i) D e: what the layer stores, gathered over cp; t k_i (D e + 4) more before a k-norm.
    Learned mixing before storing keeps what it mixes: t D e for each head that was projected and, with cp,
    for this GPU's tokens of each source."""
    config, (cp, tp) = job.config, (job.layout.cp, job.layout.tp)
    row, channels = config.plan.layers[layer], config.head_dim * job.element
    size = stored_bytes(job, layer)
    if config.qk_norm:
        size += job.tokens * stored_heads(config, layer, tp)[0] * (channels + 4)
    for segment in (*row.keys, *row.values):
        if layer in segment.sources and segment.fusion is not None and segment.fusion.learnable:
            mixed = 1 if cp == 1 else len(segment.sources)
            size += job.tokens * mixed * shared(segment_heads(config, segment), tp) * channels
    return size


def stored_bytes(job: Job, layer: int) -> int:
    """T (k_i + v_i) D e."""
    return job.whole * sum(stored_heads(job.config, layer, job.layout.tp)) * job.config.head_dim * job.element


def _fused(job: Job, layer: int) -> int:
    """T (k + v) D e for the k and v heads that the layer fuses as it reads, unless the backward fuses again,
    which it leaves to non-reentrant checkpointing. With cp each of two chunks fuses its own prefix, together
    1 + 1 / (2 cp) of T."""
    config, cp = job.config, job.layout.cp
    if config.recompute_fusion and job.checkpointing != "non_reentrant":
        return 0
    tokens = job.whole if cp == 1 else job.whole * (2 * cp + 1) // (2 * cp)
    row = config.plan.layers[layer]
    read = [segment for segment in (*row.keys, *row.values) if fuses(segment, layer)]
    heads = sum(shared(segment_heads(config, segment), job.layout.tp) for segment in read)
    return tokens * heads * config.head_dim * job.element


def fuses(segment: Segment, layer: int) -> bool:
    """Whether attention of the layer fuses a segment as it reads."""
    return layer not in segment.sources and (segment.fusion is not None or len(segment.sources) > 1)


def _mlp(job: Job) -> int:
    """4 t I e: gate, silu(gate), up and their product."""
    return 4 * job.tokens * shared(job.config.intermediate_size, job.layout.tp) * job.element


def kept(job: Job) -> int:
    """All layers. With checkpointing t h e each, and T k_i D e and T v_i D e where later layers read them."""
    config = job.config
    layers = range(config.num_hidden_layers)
    if job.checkpointing == "none":
        return sum(kept_by_layer(job, i) for i in layers)
    inputs = len(layers) * job.tokens * config.hidden_size * job.element
    heads = 0
    for side, sources in enumerate((config.plan.key_sources, config.plan.value_sources)):
        read = {j for i in layers for j in sources(i) if j != i}
        heads += sum(stored_heads(config, j, job.layout.tp)[side] for j in read)
    return inputs + job.whole * heads * config.head_dim * job.element


def ends(job: Job) -> int:
    """t (h e + 4) and 4 D per token of one sequence: the last norm's input and one fp32 number per row; cos
    and sin in fp32."""
    config = job.config
    tables = job.context // job.layout.cp * 4 * config.head_dim
    return job.tokens * (config.hidden_size * job.element + 4) + tables


def loss_kept(job: Job) -> int:
    """4 h (t + V): gradients of the last hidden states and of the head, in fp32."""
    return 4 * job.config.hidden_size * (job.tokens + vocabulary(job))


def loss(job: Job) -> int:
    """c V (e + 4) + e h V and 2 e c h beside ``loss_kept``, while the loss is computed: logits of c tokens
    and their log-probabilities in fp32, the part of the head's gradient that is added up, and the hidden
    states of these tokens and their gradient. t h e: the result of the last norm, which nothing keeps."""
    config, words = job.config, vocabulary(job)
    rows = chunk_rows(job.tokens, words, "cuda")
    logits = rows * words * (job.element + 4)
    products = job.element * config.hidden_size * (words + 2 * rows + job.tokens)
    return loss_kept(job) + logits + products


def vocabulary(job: Job) -> int:
    """V: tokens of the vocabulary that this GPU has logits of, one tp-th, rounded up."""
    return -(-job.config.vocab_size // job.layout.tp)


def layer_backward(job: Job) -> int:
    """Gradients inside a layer, at most: t (3 I + 2 h) e in the feed-forward network; with checkpointing
    the layer's own activations too, which are there again."""
    config, layers = job.config, range(job.config.num_hidden_layers)
    width = 3 * shared(config.intermediate_size, job.layout.tp) + 2 * config.hidden_size
    gradients = job.tokens * width * job.element
    if job.checkpointing == "none":
        return gradients
    return gradients + max(kept_by_layer(job, i) for i in layers)
