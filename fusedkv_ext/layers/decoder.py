"""A compact Qwen3-style decoder on top of any cache plan: RMSNorm, RoPE, QK-norm, SwiGLU.

Parameter names are those of HF's Qwen3, so checkpoints are exchangeable. Two things differ from a plain
decoder. Layers pass keys and values to later layers as return values. Prefill has YOCO's early exit (arXiv
2405.05254): layers without storage run only for the positions whose logits are requested. The last storage
layer computes keys and values for all positions, and its attention output for the requested positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedkv_ext.cache.cache_codecs import CacheCodecs
from fusedkv_ext.cache.kv_cache import KV, KVCache
from fusedkv_ext.generation.generate import generate
from fusedkv_ext.generation.sampling import Sampling
from fusedkv_ext.layers.attention import FusedKVAttention
from fusedkv_ext.layers.decoder_config import DecoderConfig
from fusedkv_ext.layers.fusion import FusionTensors, FusionWeights
from fusedkv_ext.layers.latent_attention import LatentAttention
from fusedkv_ext.layers.mlp import MLP
from fusedkv_ext.layers.moe import Experts, MoE
from fusedkv_ext.layers.norm import RMSNorm
from fusedkv_ext.layers.shards import common_seed
from fusedkv_ext.ops.head_loss import Head, head_losses
from fusedkv_ext.ops.packing import (
    IGNORED,
    Documents,
    check_packing,
    document_positions,
    next_tokens,
    read_documents,
)
from fusedkv_ext.ops.recompute import Checkpointing, run_again
from fusedkv_ext.ops.rope import RotaryEmbedding
from fusedkv_ext.plan import CachePlan

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer", "OutputHead"]


def _attention(
    config: DecoderConfig, layer: int, rope: RotaryEmbedding
) -> FusedKVAttention | LatentAttention:
    """The attention module of one layer: latent attention if the config has a kv_lora_rank."""
    sliding = config.layer_types[layer] == "sliding_attention"
    shared: dict[str, Any] = {
        "rms_norm_eps": config.rms_norm_eps,
        "bias": config.attention_bias,
        "rope": rope,
        "sliding_window": config.sliding_window if sliding else None,
    }
    place = (config.plan, layer, config.hidden_size, config.num_attention_heads)
    if config.kv_lora_rank is not None:
        names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        shared |= {name: getattr(config, name) for name in names}
        return LatentAttention(*place, **shared)
    return FusedKVAttention(
        *place,
        config.num_key_value_heads,
        config.head_dim,
        qk_norm=config.qk_norm,
        recompute_fusion=config.recompute_fusion,
        **shared,
    )


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with the KV of ``FusedKVAttention``.

    The third result is the layer's ``balance_loss``; None for a dense network and in evaluation mode.

    Attributes:
        activation_checkpointing: None, or the kind of activation checkpointing in training: only the layer's
            inputs are saved, and the backward recomputes the layer.
    """

    def __init__(self, config: DecoderConfig, layer: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.self_attn = _attention(config, layer, rope)
        self.mlp: MoE | MLP
        if config.has_experts(layer):
            self.mlp = MoE(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                config.norm_topk_prob,
            )
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing: Checkpointing | None = None

    def forward(
        self,
        x: Tensor,
        sources: Sequence[KV] = (),
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
        document_ids: Tensor | Documents | None = None,
        fusion: FusionTensors | None = None,
        read: KV | None = None,
    ) -> tuple[Tensor, KV, Tensor | None]:
        inputs = (x, tuple(sources), fusion, read)
        options: dict[str, Any] = {
            "position_embeddings": position_embeddings,
            "cache": cache,
            "last": last,
            "document_ids": document_ids,
        }
        run: Callable[..., Any] = partial(self._run, **options)
        how = self.activation_checkpointing
        if how is None or cache is not None or not torch.is_grad_enabled():
            x, key, value, balance = run(*inputs)
        else:
            again: Callable[..., Any] = run_again
            x, key, value, balance = again(run, how, *inputs)
        return x, KV(key, value), balance

    def _run(
        self,
        x: Tensor,
        sources: Sequence[KV],
        fusion: FusionTensors | None,
        read: KV | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        last = options["last"]
        if read is not None:
            options["read"] = read
        out, kv = self.self_attn(self.input_layernorm(x), sources, fusion=fusion, **options)
        x = out + (x if last is None else x[:, -last:])
        mlp = self.mlp
        out = mlp(self.post_attention_layernorm(x))
        out, balance = out if isinstance(mlp, MoE) else (out, None)
        return x + out, *kv, balance


class DecoderModel(nn.Module):
    """Embeddings, layers and the final norm: token ids (B, S) -> hidden states (B, S or keep, hidden).

    The second result is the mean ``balance_loss`` of the layers with experts; None without experts. It is
    returned instead of stored on a module, which works with FSDP and activation checkpointing.

    Attributes:
        random_sources: In training mode, the layer whose keys and values each layer attends to; None: those
            of the plan. Only for the plan "vanilla" (``training.random_sources``).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        plan = config.plan
        self.rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, interleaved=config.rope_interleaved
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, i, self.rope) for i in range(plan.num_layers)]
        self.layers = cast("Sequence[DecoderLayer]", nn.ModuleList(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.context: Any = None  # a ContextParallel, from distributed.context.apply_cp
        self.random_sources: list[int] | None = None
        self.exit_layer = plan.prefill_layers - 1
        self._needs_positions = any(layer.self_attn.needs_positions for layer in self.layers)
        # Layers whose KV each layer needs: here without a cache, below with one (only for layers that mix).
        self._sources = [layer.self_attn.source_layers for layer in self.layers]
        # Layers whose keys, and whose values, later layers read. Latents are keys, even if used as values.
        latent = config.kv_lora_rank is not None
        sides: tuple[Callable[[int], tuple[int, ...]], ...] = (plan.key_sources, plan.value_sources)
        if latent:
            sides = (self._sources.__getitem__,) * 2
        self._taken_sides = [
            {j for i in range(plan.num_layers) for j in sources(i) if j != i} for sources in sides
        ]
        self._cached_sources = [
            sources if layer.self_attn.mixes_before_storing else ()
            for sources, layer in zip(self._sources, self.layers, strict=True)
        ]

    def _taken(self, layer: int, kv: KV) -> KV:
        """The part of ``kv`` that later layers read, so that the other tensors are freed."""
        keys, values = self._taken_sides
        return KV(kv.key if layer in keys else None, kv.value if layer in values else None)

    def forward(
        self,
        ids: Tensor,
        *,
        cache: KVCache | None = None,
        keep: int = 0,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        steps = ids.shape[1]
        position_embeddings = None
        if cache is not None:
            cache.begin_step()
        if cache is None or self._needs_positions:
            # Computed once per step for all layers; with a cache from the lengths on the device.
            if cache is not None:
                positions = cache.positions(steps)
            elif document_ids is not None:
                positions = document_positions(document_ids)
            else:
                positions = torch.arange(steps, device=ids.device)
            if self.context is not None:
                ids, positions = self.context.take(ids), self.context.take(positions, -1)
            position_embeddings = self.rope.cos_sin(positions)
        documents = None if document_ids is None else read_documents(document_ids)
        wanted = self._sources if cache is None else self._cached_sources
        read_later: set[int] = set().union(*wanted)
        x = self.embed_tokens(ids)
        kvs: list[KV | None] = []
        balances: list[Tensor] = []
        # All before the layers, because FSDP2 gathers them together. Like sources they are arguments.
        fusions = [
            layer.self_attn.kv_fusion() if cache is None and layer.self_attn.kv_fusion is not None else None
            for layer in self.layers
        ]
        drawn = self.random_sources if self.training and cache is None else None
        for i, layer in enumerate(self.layers):
            last = keep if i == self.exit_layer and 0 < keep < steps else None
            sources = [kvs[j] for j in wanted[i]]
            read = None if drawn is None or drawn[i] == i else kvs[drawn[i]]
            x, kv, balance = layer(
                x,
                sources,
                position_embeddings=position_embeddings,
                cache=cache,
                last=last,
                document_ids=documents,
                fusion=fusions[i],
                read=read,
            )
            if last is not None and position_embeddings is not None:
                cos, sin = position_embeddings
                position_embeddings = cos[..., -last:, :], sin[..., -last:, :]
            if drawn is not None and i in drawn[i + 1 :]:
                kvs.append(kv)
            else:
                kvs.append(self._taken(i, kv) if i in read_later else None)
            if balance is not None:
                balances.append(balance)
        return self.norm(x), torch.stack(balances).mean() if balances else None


class OutputHead(nn.Linear):
    """Hidden states (B, S, C) -> logits (B, S, vocab), or the loss without materializing all logits."""

    def forward(
        self, x: Tensor, targets: Tensor | None = None, num_target_tokens: Tensor | float | None = None
    ) -> Tensor:
        """Logits or, with ``targets`` (B, S), the sum of the cross-entropies over ``num_target_tokens``.

        The loss is part of the module's call, so that FSDP2 all-gathers the weights for it.
        """
        if targets is None:
            return super().forward(x)
        head = Head(self.weight, self.bias)
        return head_losses(x, head, targets, num_target_tokens=num_target_tokens).loss


class Decoder(nn.Module):
    """A causal language model whose cache follows ``config.plan``.

    State-dict names are those of HF's Qwen3ForCausalLM. With experts they are those of Qwen3MoeForCausalLM,
    with latent attention those of DeepseekV3ForCausalLM's attention. ``self_attn.kv_fusion.*`` is added, and
    projections of tensors that the plan does not store are absent.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        self.tp: Any = None  # the DeviceMesh of tensor parallelism (distributed/tensor.py)
        self.reset_parameters()
        self.tie_weights()

    @property
    def plan(self) -> CachePlan:
        return self.config.plan

    def tie_weights(self) -> None:
        """Ties the head to the embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initializes matrices from N(0, initializer_range), biases 0, norms 1, fusion weights by plan."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, Experts):
                module.reset_parameters(self.config.initializer_range, generator)
            elif isinstance(module, FusionWeights):
                module.reset_parameters(generator)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        num_target_tokens: float | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        lengths: Sequence[int] | None = None,
        advance: bool = True,
        return_logits: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next tokens, and with ``labels`` the loss. See ``loss`` for the loss alone.

        Args:
            ids: (B, S) integers; with a cache the next S tokens of each sequence.
            labels: (B, S), usually the ids: position t predicts labels[t + 1], and -100 is ignored. The loss
                is the mean cross-entropy in nats, computed in fp32 (fp64 for an fp64 model); 0 without target
                tokens. In training mode a model with experts adds router_aux_loss_coef times its mean
                ``balance_loss``. Not supported with ``logits_to_keep``.
            document_ids: (B, S) int32 or int64, the document of each token of packed sequences. A token
                attends to its own document only. Positions restart where the ids change, and the first token
                of a document is not a target. Not supported with a cache.
            num_target_tokens: Divisor of the sum of the cross-entropies. Default: the target tokens of this
                call. For micro-batches with different counts, pass the mean count.
            cache: A cache from ``make_cache``, which is advanced and filled. Not differentiable: call under
                ``torch.no_grad`` or ``torch.inference_mode``.
            logits_to_keep: Number of last positions with logits; 0 means all. Layers without storage then run
                for these positions only. The results differ in rounding at most.
            lengths: Number of tokens of each left-padded row, for a cache with empty sequences. The longest
                must be S. None: S each.
            advance: With a cache, whether to call ``cache.advance`` for the S tokens. If False, the caller
                has called it. The rest is device work, which a CUDA graph can capture.
            return_logits: If False, with labels, only the loss is computed, without the logits of all tokens
                (``ops.head_loss``).

        Returns:
            logits (B, S or logits_to_keep, vocab), (logits, loss), or loss. Under context parallelism, the
            logits of this rank's tokens and the loss of all tokens.

        Raises:
            ValueError: A shape, dtype or combination is wrong, or a position is beyond
                max_position_embeddings.
            CacheFullError: The tokens do not fit into the cache.
        """
        self._check(ids, labels, cache, logits_to_keep, lengths, advance)
        if document_ids is not None:
            check_packing(ids, document_ids)
            if cache is not None:
                raise ValueError("document_ids must be None with a cache: it holds one document per sequence")
        if num_target_tokens is not None and (labels is None or not num_target_tokens > 0):
            raise ValueError(f"num_target_tokens must be above 0, with labels, got {num_target_tokens}")
        if cache is not None and advance:
            cache.advance(ids.shape[1] if lengths is None else lengths)
        if labels is None and not return_logits:
            raise ValueError("return_logits must be True without labels, got False; give labels for the loss")
        hidden, balance = self.model(ids, cache=cache, keep=logits_to_keep, document_ids=document_ids)
        logits: Any = None
        if return_logits or not isinstance(self.lm_head, OutputHead):  # another head gives logits only
            logits = self.lm_head(hidden)
        if labels is None:
            return logits
        context, targets = self.model.context, next_tokens(labels, document_ids)
        count: Any = num_target_tokens
        if count is None:
            count = (targets != IGNORED).sum().clamp(min=1)
        if context is not None:
            targets = context.take(targets)
        if logits is None:
            loss = self.lm_head(hidden, targets, count)
        else:
            rows = logits.flatten(0, 1)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            loss = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED, reduction="sum")
            loss = loss / count
        if balance is not None:
            loss = loss + self.config.router_aux_loss_coef * balance
        loss = loss if context is None else context.sum(loss)
        return (logits, loss) if return_logits else loss

    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        *,
        document_ids: Tensor | None = None,
        num_target_tokens: float | None = None,
    ) -> Tensor:
        """The loss of ``forward``, computed in chunks without materializing all logits.

        With a vocabulary of 128,000, logits take 0.5 MB per token, and a plain loss several times that. The
        result is differentiable once.

        Args:
            ids: As in ``forward``.
            labels: As in ``forward``.
            document_ids: As in ``forward``.
            num_target_tokens: As in ``forward``.

        Returns:
            The loss, a scalar in fp32 (fp64 for an fp64 model).
        """
        return self(
            ids,
            labels,
            document_ids=document_ids,
            num_target_tokens=num_target_tokens,
            return_logits=False,
        )

    def make_cache(
        self,
        batch_size: int,
        max_len: int,
        *,
        page_size: int | None = None,
        num_pages: int | None = None,
        codecs: CacheCodecs | None = None,
    ) -> KVCache:
        """Creates an empty KVCache on the model's device, in its dtype or that of autocast.

        Under tensor parallelism it has the KV heads of this rank.

        Args:
            batch_size: Number of sequences.
            max_len: Largest number of tokens per sequence.
            page_size: Tokens per page; None for a contiguous cache.
            num_pages: Pages of the pool; by default enough for all sequences at full length.
            codecs: Fitted codecs (``CacheCodecs.fit``); None stores keys and values as they are.
        """
        config, weight = self.config, self.model.embed_tokens.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        latent = config.kv_lora_rank is not None
        return KVCache(
            config.plan,
            batch_size,
            max_len,
            1 if latent else cast(FusedKVAttention, self.model.layers[0].self_attn).num_kv_heads,
            config.head_dim if config.kv_lora_rank is None else config.kv_lora_rank,
            dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
            device=weight.device,
            page_size=page_size,
            num_pages=num_pages,
            rope_dim=config.qk_rope_head_dim,
            codecs=codecs,
        )

    def generate(
        self,
        ids: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: int | Sequence[int] | None = None,
        stream: Callable[[Tensor], None] | None = None,
        use_cache: bool = True,
        attention_mask: Tensor | None = None,
        page_size: int | None = None,
        pad_token_id: int = 0,
        cuda_graph: bool | None = None,
    ) -> Tensor:
        """Continues each prompt.

        Args:
            ids: (B, S), or a list of 1-D prompts of any lengths. No prompt may be empty.
            max_new_tokens: Largest number of new tokens.
            temperature: See ``Sampling``; 0 is greedy.
            top_k: See ``Sampling``.
            top_p: See ``Sampling``.
            sampling: Replaces temperature, top_k and top_p, which must then be left at their defaults.
            seed: Seed of the sampling. None draws from torch's global generator, under tensor parallelism
                that of the first rank.
            stop: Token id or ids that finish a sequence; ``pad_token_id`` follows. Generation ends when all
                sequences are finished.
            stream: Called after each step with its tokens, (B,).
            use_cache: If False, each step recomputes every sequence from its start: the slow reference.
            attention_mask: (B, S), 0 marks padding anywhere in ``ids``. Padding is moved to the left.
            page_size: Tokens per page of a paged cache; None for a contiguous cache.
            pad_token_id: Token id of padding and of positions after a stop token.
            cuda_graph: Whether to capture the decode step in a CUDA graph and replay it. The tokens are the
                same, without launch overhead. True: always; a failed capture raises RuntimeError. None: on
                CUDA from 17 new tokens on, if no module has forward hooks, which a replay does not call; a
                failed capture warns. Under tensor parallelism None is False, because capture of collectives
                is untested.

        Returns:
            (B, S + new) int64: the prompts left-padded to S (the longest prompt's length, or the width of
            ``ids``), then at most ``max_new_tokens`` new tokens. An empty batch is returned unchanged.

        Raises:
            ValueError: An argument is invalid. The message names it.
        """
        if self.model.context is not None:
            raise ValueError(
                "generation needs a model without context parallelism; generate with another model"
            )
        separate = Sampling(temperature, top_k, top_p)
        if sampling is not None and separate != Sampling():
            raise ValueError(
                f"sampling must be given instead of temperature, top_k and top_p, got both: {sampling} and "
                f"{separate}"
            )
        sampling = separate if sampling is None else sampling
        if self.tp is not None:
            cuda_graph = bool(cuda_graph)
            seed = common_seed(self.tp) if seed is None and sampling.temperature else seed
        return generate(
            self,
            ids,
            max_new_tokens,
            vocab_size=self.config.vocab_size,
            max_len=self.config.max_position_embeddings,
            device=self.model.embed_tokens.weight.device,
            sampling=sampling,
            seed=seed,
            stop=stop,
            stream=stream,
            use_cache=use_cache,
            attention_mask=attention_mask,
            page_size=page_size,
            pad_token_id=pad_token_id,
            cuda_graph=cuda_graph,
        )

    def _check(
        self,
        ids: Tensor,
        labels: Tensor | None,
        cache: KVCache | None,
        logits_to_keep: int,
        lengths: Sequence[int] | None,
        advance: bool,
    ) -> None:
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be (B, S) integers, got {ids.dtype} {tuple(ids.shape)}")
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0 (all), got {logits_to_keep}")
        if labels is not None:
            if labels.shape != ids.shape or ids.shape[1] < 2:
                raise ValueError(
                    "labels must have the shape of ids and at least two positions, got "
                    f"{tuple(labels.shape)} for ids {tuple(ids.shape)}"
                )
            if logits_to_keep:
                raise ValueError(f"logits_to_keep must be 0 with labels, got {logits_to_keep}")
        if self.model.context is not None and not (cache is None and logits_to_keep == 0):
            raise ValueError(
                "cache must be None and logits_to_keep 0 under context parallelism, where no rank has all "
                "tokens"
            )
        if not advance and (cache is None or lengths is not None):
            raise ValueError("advance=False needs a cache that has advanced already, and no lengths")
        if cache is None:
            if lengths is not None:
                raise ValueError("lengths must be None without a cache: all rows then have S tokens")
            tokens = ids.shape[1]
        else:
            if torch.is_grad_enabled():
                raise ValueError(
                    "cache is not differentiable; call under torch.no_grad() or inference_mode()"
                )
            if cache.batch_size != ids.shape[0]:
                raise ValueError(
                    f"ids must have a row for each of the cache's {cache.batch_size} sequences, got "
                    f"{ids.shape[0]}"
                )
            if lengths is not None and max(lengths) != ids.shape[1]:
                raise ValueError(f"lengths: the longest must be S={ids.shape[1]}, got {list(lengths)}")
            tokens = max(cache.lengths) + (ids.shape[1] if advance else 0)
        if tokens > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(
                f"sequences must have at most max_position_embeddings={limit} tokens, got {tokens}; shorten "
                "them, or use a model with more positions"
            )
