"""A compact Qwen3-style decoder on top of any cache plan: RMSNorm, RoPE, QK-norm, SwiGLU.

Parameters have the names of HF's Qwen3, so that checkpoints are exchangeable. Two things differ from a plain
decoder. Layers hand keys and values to later layers as return values. And a prompt skips part of the layers
(YOCO's early exit, arXiv 2405.05254): layers that store nothing see only the positions whose logits are
wanted. The last layer that stores computes keys and values for all positions, but attends from those only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from fusedkv_ext.ops.packing import IGNORED, check_packing, document_positions, next_tokens
from fusedkv_ext.ops.recompute import Checkpointing, run_again
from fusedkv_ext.ops.rope import RotaryEmbedding
from fusedkv_ext.plan import CachePlan

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer", "OutputHead"]


def _attention(
    config: DecoderConfig, layer: int, rope: RotaryEmbedding
) -> FusedKVAttention | LatentAttention:
    """The attention of one layer: of latents if the config has a kv_lora_rank."""
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
    """x + attention(norm(x)), then x + mlp(norm(x)); takes and returns KV as ``FusedKVAttention`` does.

    The third result is the layer's ``balance_loss``, None for a dense network and in evaluation mode.

    Attributes:
        activation_checkpointing: None, or how training saves the layer's inputs only and runs it again in the
            backward.
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
        document_ids: Tensor | None = None,
        fusion: FusionTensors | None = None,
    ) -> tuple[Tensor, KV, Tensor | None]:
        inputs = (x, tuple(sources), fusion)
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
        self, x: Tensor, sources: Sequence[KV], fusion: FusionTensors | None, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        last = options["last"]
        out, kv = self.self_attn(self.input_layernorm(x), sources, fusion=fusion, **options)
        x = out + (x if last is None else x[:, -last:])
        mlp = self.mlp
        out = mlp(self.post_attention_layernorm(x))
        out, balance = out if isinstance(mlp, MoE) else (out, None)
        return x + out, *kv, balance


class DecoderModel(nn.Module):
    """Embeddings, layers and the final norm: token ids (B, S) -> hidden states (B, S or keep, hidden).

    The second result is the mean ``balance_loss`` of the layers with experts, None if no layer has any. Like
    keys and values it is returned, not stored on a module: FSDP and checkpointing would lose it there.
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
        self.exit_layer = plan.prefill_layers - 1
        self._needs_positions = any(layer.self_attn.needs_positions for layer in self.layers)
        # The layers whose KV each layer takes: without a cache, and with one (only for layers that mix).
        self._sources = [layer.self_attn.source_layers for layer in self.layers]
        # Layers whose keys, and whose values, later layers read. Latents are keys, even if read as values.
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
        """The part of ``kv`` that later layers read: nothing else may keep keys or values alive."""
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
            # Shared by all layers: computed once a step and, with a cache, from the lengths on the device.
            if cache is not None:
                positions = cache.positions(steps)
            elif document_ids is not None:
                positions = document_positions(document_ids)
            else:
                positions = torch.arange(steps, device=ids.device)
            if self.context is not None:
                ids, positions = self.context.take(ids), self.context.take(positions, -1)
            position_embeddings = self.rope.cos_sin(positions)
        wanted = self._sources if cache is None else self._cached_sources
        read_later: set[int] = set().union(*wanted)
        x = self.embed_tokens(ids)
        kvs: list[KV | None] = []
        balances: list[Tensor] = []
        # All at once, before the layers: FSDP2 gathers them together. Like the sources they are arguments.
        fusions = [
            layer.self_attn.kv_fusion() if cache is None and layer.self_attn.kv_fusion is not None else None
            for layer in self.layers
        ]
        for i, layer in enumerate(self.layers):
            last = keep if i == self.exit_layer and 0 < keep < steps else None
            sources = [kvs[j] for j in wanted[i]]
            x, kv, balance = layer(
                x,
                sources,
                position_embeddings=position_embeddings,
                cache=cache,
                last=last,
                document_ids=document_ids,
                fusion=fusions[i],
            )
            if last is not None and position_embeddings is not None:
                cos, sin = position_embeddings
                position_embeddings = cos[..., -last:, :], sin[..., -last:, :]
            kvs.append(self._taken(i, kv) if i in read_later else None)
            if balance is not None:
                balances.append(balance)
        return self.norm(x), torch.stack(balances).mean() if balances else None


class OutputHead(nn.Linear):
    """Hidden states (B, S, C) -> logits (B, S, vocab), or the loss of these without holding them all."""

    def forward(
        self, x: Tensor, targets: Tensor | None = None, num_target_tokens: Tensor | float | None = None
    ) -> Tensor:
        """Logits or, with ``targets`` (B, S), the sum of the cross-entropies over ``num_target_tokens``.

        The loss is a call of the module, so that whatever gathers its weights (FSDP2) does so.
        """
        if targets is None:
            return super().forward(x)
        head = Head(self.weight, self.bias)
        return head_losses(x, head, targets, num_target_tokens=num_target_tokens).loss


class Decoder(nn.Module):
    """A causal language model whose cache follows ``config.plan``.

    State-dict names are those of HF's Qwen3ForCausalLM; with experts those of its Qwen3MoeForCausalLM, with
    latent attention those of DeepseekV3ForCausalLM's attention. ``self_attn.kv_fusion.*`` is added, and
    projections of tensors that the plan does not store are absent.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        self.tp: Any = None  # the DeviceMesh of processes that share the heads (distributed/tensor.py)
        self.reset_parameters()
        self.tie_weights()

    @property
    def plan(self) -> CachePlan:
        return self.config.plan

    def tie_weights(self) -> None:
        """Makes the head and the embeddings one parameter again, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, initializer_range), biases zero, norms one, fusion weights as the plan says."""
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
        """Logits of the next tokens, and with ``labels`` the loss. ``loss`` is the loss alone.

        Args:
            ids: (B, S) integers; with a cache the next S tokens of each sequence.
            labels: (B, S), usually ids themselves: position t predicts labels[t + 1], -100 is left out. The
                loss is the mean cross-entropy in nats, computed in fp32 (fp64 for an fp64 model); 0 without
                any target token. In training mode a model with experts adds router_aux_loss_coef times its
                mean ``balance_loss``. Not together with ``logits_to_keep``.
            document_ids: (B, S) int32 or int64, the document of each token of packed sequences. A token sees
                its own document only, positions restart where the ids change, and the first token of a
                document is no target: the loss is that of separate documents. Not with a cache.
            num_target_tokens: The divisor of the sum of the cross-entropies; default: the target tokens of
                this call. For a batch in parts of unequal counts: the mean of these counts.
            cache: From ``make_cache``; it is advanced and filled. Not differentiable: call under
                ``torch.no_grad`` or ``torch.inference_mode``.
            logits_to_keep: Number of last positions with logits, 0 for all. Layers that only read then run
                for these positions alone, which changes only rounding.
            lengths: With a cache whose sequences are empty, the number of tokens of each row, left-padded to
                S, which the longest must have. None: S each.
            advance: With a cache, whether to make room for the S tokens. If False, the caller has called
                ``cache.advance``, and the rest is device work, which a CUDA graph can capture.
            return_logits: False, with labels: the loss alone, without the logits of all tokens
                (``ops.head_loss``).

        Returns:
            logits (B, S or logits_to_keep, vocab), (logits, loss), or loss. Under context parallelism logits
            of this rank's tokens and the loss of all.

        Raises:
            ValueError: A shape, dtype or combination is wrong, or a position is beyond
                max_position_embeddings.
            CacheFullError: The tokens do not fit into the cache.
        """
        self._check(ids, labels, cache, logits_to_keep, lengths, advance)
        if document_ids is not None:
            check_packing(ids, document_ids)
            if cache is not None:
                raise ValueError("document_ids cannot be used with a cache: it holds one document a sequence")
        if num_target_tokens is not None and (labels is None or not num_target_tokens > 0):
            raise ValueError(f"num_target_tokens must be above 0, and needs labels; got {num_target_tokens}")
        if cache is not None and advance:
            cache.advance(ids.shape[1] if lengths is None else lengths)
        if labels is None and not return_logits:
            raise ValueError("return_logits=False leaves the loss alone, which needs labels")
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
        """The loss of ``forward`` without its logits, which never exist for all tokens at once.

        A vocabulary of 128,000 takes 0.5 MB of logits per token, and a plain loss several times that.
        Differentiable once.

        Args:
            ids, labels, document_ids, num_target_tokens: as in ``forward``.

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
        self, batch_size: int, max_len: int, *, page_size: int | None = None, num_pages: int | None = None
    ) -> KVCache:
        """An empty KVCache for this model, on its device and in its dtype or, within autocast, in that one.

        Under tensor parallelism it has the KV heads of this rank.
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
            temperature, top_k, top_p: See ``Sampling``; temperature 0 is greedy.
            sampling: These three as one value, which then must not be given themselves.
            seed: Of the sampling. None draws from torch's global generator, under tensor parallelism that of
                the first rank.
            stop: Token id or ids after which a sequence is finished; ``pad_token_id`` follows. Generation
                ends when all are finished.
            stream: Called after each step with its tokens, (B,).
            use_cache: False runs every sequence alone and from its start for each token: slow, and the
                definition of the right result.
            attention_mask: (B, S), 0 marks padding in ``ids`` at any place; it is moved to the left.
            page_size: Tokens per page of a paged cache; None: a contiguous one.
            cuda_graph: Whether to capture the decode step in a CUDA graph and replay it: the same tokens,
                without the host's time for launching kernels. True: always, and RuntimeError if it fails.
                None: on CUDA from 17 new tokens on, if no module has forward hooks, which a replay would not
                call; a failed capture warns. (Under tensor parallelism None is False: capturing the messages
                between GPUs is untested.)

        Returns:
            (B, S + new) int64: the prompts left-padded to S (the longest prompt's length, or the width of
            ``ids``), then at most ``max_new_tokens`` new tokens. An empty batch is returned as it came.

        Raises:
            ValueError: An argument is impossible; the message names it.
        """
        if self.model.context is not None:
            raise ValueError("under context parallelism no rank has all tokens: generate with another model")
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
                raise ValueError("labels need all logits; leave logits_to_keep at 0")
        if self.model.context is not None and not (cache is None and logits_to_keep == 0):
            raise ValueError(
                "under context parallelism no rank has all tokens and none keeps a cache; leave out cache "
                "and logits_to_keep"
            )
        if not advance and (cache is None or lengths is not None):
            raise ValueError("advance=False needs a cache, advanced already, and no lengths")
        if cache is None:
            if lengths is not None:
                raise ValueError("lengths needs a cache: without one all rows have S tokens")
            tokens = ids.shape[1]
        else:
            if torch.is_grad_enabled():
                raise ValueError(
                    "cache is not differentiable; call under torch.no_grad() or inference_mode()"
                )
            if cache.batch_size != ids.shape[0]:
                raise ValueError(f"ids has {ids.shape[0]} rows, cache is for {cache.batch_size} sequences")
            if lengths is not None and max(lengths) != ids.shape[1]:
                raise ValueError(f"lengths: the longest must be S={ids.shape[1]}, got {list(lengths)}")
            tokens = max(cache.lengths) + (ids.shape[1] if advance else 0)
        if tokens > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(f"the sequence has {tokens} tokens, more than max_position_embeddings={limit}")
