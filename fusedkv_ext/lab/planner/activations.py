"""Activation memory: tensors that autograd saves in the forward, and temporaries of the loss and backward.

All sizes are bytes on one GPU. They follow from the decoder's code and from what torch's CUDA kernels save.
RMSNorm saves its input and one fp32 number per row, a matrix product its input, and FlashAttention q, k, v,
the output and the lse.

t: tokens of this GPU; T: tokens of all cp GPUs that shard its sequences; e: bytes per element. Heads (H, k_i,
v_i) and I are those of one tp GPU. The other letters are as in weights.py.
"""

from __future__ import annotations

from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.weights import segment_heads, shared, stored_heads
from fusedkv_ext.ops.head_loss import chunk_rows
from fusedkv_ext.plan import Segment

__all__ = ["kept", "kept_by_layer", "layer_backward", "loss", "loss_kept"]


def kept_by_layer(job: Job, layer: int) -> int:
    """Saved bytes of a layer without checkpointing: hidden states, attention, feed-forward network."""
    return _hidden(job) + _queries(job, layer) + _stored(job, layer) + _fused(job, layer) + _mlp(job)


def _hidden(job: Job) -> int:
    """t (4 h e + 8): input and output of both norms, and their fp32 numbers."""
    return job.tokens * (4 * job.config.hidden_size * job.element + 8)


def _queries(job: Job, layer: int) -> int:
    """t H (2 D e + 4): queries after RoPE, attention output and lse.

    A q-norm adds t H (D e + 4). Concatenation of several calls (head segments, cp chunks) adds t H D e.
    """
    config, e = job.config, job.element
    size = 2 * config.head_dim * e + 4
    if config.qk_norm:
        size += config.head_dim * e + 4
    if len(config.plan.segments(layer, config.num_key_value_heads)) > 1 or job.layout.cp > 1:
        size += config.head_dim * e
    return job.tokens * shared(config.num_attention_heads, job.layout.tp) * size


def _stored(job: Job, layer: int) -> int:
    """T (k_i + v_i) D e: stored keys and values, gathered over cp.

    A k-norm adds t k_i (D e + 4). Learned mixing before storage adds its inputs: t D e per projected head
    and, with cp, per source.
    """
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
    """T (k + v) D e for the k and v heads that the layer fuses when it reads.

    It is 0 with recomputation of the fusion. Non-reentrant checkpointing replaces that recomputation. With cp
    each of two chunks fuses its own prefix, together (1 + 1 / (2 cp)) T tokens.
    """
    config, cp = job.config, job.layout.cp
    if config.recompute_fusion and job.checkpointing != "non_reentrant":
        return 0
    tokens = job.whole if cp == 1 else job.whole * (2 * cp + 1) // (2 * cp)
    row = config.plan.layers[layer]
    read = [segment for segment in (*row.keys, *row.values) if fuses(segment, layer)]
    heads = sum(shared(segment_heads(config, segment), job.layout.tp) for segment in read)
    return tokens * heads * config.head_dim * job.element


def fuses(segment: Segment, layer: int) -> bool:
    """Whether the layer's attention fuses a segment when it reads."""
    return layer not in segment.sources and (segment.fusion is not None or len(segment.sources) > 1)


def _mlp(job: Job) -> int:
    """4 t I e: gate, silu(gate), up, and their product."""
    return 4 * job.tokens * shared(job.config.intermediate_size, job.layout.tp) * job.element


def kept(job: Job) -> int:
    """Saved bytes of all layers.

    With checkpointing, t h e per layer, and T k_i D e and T v_i D e of layers that later layers read.
    """
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
    """t (h e + 4) for the input and fp32 numbers of the last norm, and 4 D per token of one sequence.

    The latter are cos and sin in fp32.
    """
    config = job.config
    tables = job.context // job.layout.cp * 4 * config.head_dim
    return job.tokens * (config.hidden_size * job.element + 4) + tables


def loss_kept(job: Job) -> int:
    """4 h (t + V): fp32 gradients of the last hidden states and of the head."""
    return 4 * job.config.hidden_size * (job.tokens + vocabulary(job))


def loss(job: Job) -> int:
    """Bytes while the loss is computed: ``loss_kept`` + c V (e + 4) + e h V + 2 e c h + t h e.

    The terms are: logits of c tokens with fp32 log-probabilities, a summand of the head's gradient, hidden
    states of the c tokens with gradients, and the output of the last norm.
    """
    config, words = job.config, vocabulary(job)
    rows = chunk_rows(job.tokens, words, "cuda")
    logits = rows * words * (job.element + 4)
    products = job.element * config.hidden_size * (words + 2 * rows + job.tokens)
    return loss_kept(job) + logits + products


def vocabulary(job: Job) -> int:
    """V: size of this GPU's vocabulary shard, ceil(vocab_size / tp)."""
    return -(-job.config.vocab_size // job.layout.tp)


def layer_backward(job: Job) -> int:
    """Largest gradients inside a layer: t (3 I + 2 h) e in the feed-forward network.

    With checkpointing, the recomputed activations of the layer are added.
    """
    config, layers = job.config, range(job.config.num_hidden_layers)
    width = 3 * shared(config.intermediate_size, job.layout.tp) + 2 * config.hidden_size
    gradients = job.tokens * width * job.element
    if job.checkpointing == "none":
        return gradients
    return gradients + max(kept_by_layer(job, i) for i in layers)
