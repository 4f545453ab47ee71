"""A compact Qwen3-style decoder on top of any cache plan: RMSNorm, RoPE, QK-norm, SwiGLU.

Parameters carry the names of HF's Qwen3, so that checkpoints travel. Two things differ from a plain decoder:
layers hand keys and values to later layers as return values, and a prompt does not run through all of it.
Layers that store nothing see only the positions whose logits are wanted, and the last layer that stores makes
keys and values for all positions but attends only from those (YOCO's early exit, arXiv 2405.05254).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedkv_ext.attention import FusedKVAttention, RMSNorm
from fusedkv_ext.cache import KV, KVCache
from fusedkv_ext.fusion import FusionWeights
from fusedkv_ext.generation import Sampling, generate
from fusedkv_ext.mla import LatentAttention, check_sizes
from fusedkv_ext.moe import Experts, MoE
from fusedkv_ext.plan import CachePlan, latent_layers
from fusedkv_ext.rope import RotaryEmbedding

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer"]

MODEL_TYPE = "fusedkv_decoder"
CONFIG_FORMAT = 1
LAYER_TYPES = ("full_attention", "sliding_attention")
POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; field names and meanings as in HF's Qwen3Config and Qwen3MoeConfig, plus ``plan``.

    head_dim: default hidden_size / num_attention_heads. plan: a CachePlan, or the name of one, made for
    num_hidden_layers. sliding_window: tokens that a sliding layer sees, itself included. layer_types: one of
    "full_attention", "sliding_attention" per layer; default: all sliding if sliding_window is given, else all
    full. A full layer may not read the cache of a sliding one, of which serving stacks keep the window only;
    it may mix with a sliding one before it stores, which takes the new tokens alone.
    rope_interleaved: RoPE pairs channels 2j and 2j+1 instead of j and j + D/2. initializer_range:
    standard deviation of initial matrices. attention_bias: of the q, k, v and o projections.
    recompute_fusion: training keeps no fused keys and values for the backward, which fuses again.

    kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: with kv_lora_rank all layers
    have multi-head latent attention; names and meanings as in HF's DeepseekV3Config, see ``LatentAttention``.
    Only q_lora_rank may be left out. head_dim is then qk_rope_head_dim, attention_bias that of the
    projections named there; num_key_value_heads, qk_norm and recompute_fusion mean nothing.

    num_experts: experts per feed-forward network, 0 for a dense one. num_experts_per_tok: experts that each
    token goes through. moe_intermediate_size: of one expert; default intermediate_size /
    num_experts_per_tok, as many products per token as the dense network has. norm_topk_prob: see ``MoE``
    (HF's default is False, its Qwen3 checkpoints have True). router_aux_loss_coef: weight of ``balance_loss``
    in the training loss. Layer i, from 0, has experts if i + 1 is a multiple of decoder_sparse_step and i is
    not in mlp_only_layers.

    Raises ValueError naming the field that cannot be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    plan: CachePlan | str = "fusedkv"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_interleaved: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    qk_norm: bool = True
    attention_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    initializer_range: float = 0.02
    recompute_fusion: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in POSITIVE_FIELDS:
            value = getattr(self, name)
            if name == "head_dim" and value is None:
                continue
            if not _is_int(value, 1):
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        self._check_latent()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"head_dim must be given: hidden_size={self.hidden_size} is no multiple of "
                    f"num_attention_heads={self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if isinstance(self.plan, str):
            object.__setattr__(self, "plan", CachePlan.named(self.plan, self.num_hidden_layers))
        if not isinstance(self.plan, CachePlan):
            raise ValueError(f"plan must be a CachePlan or the name of one, got {type(self.plan).__name__}")
        if self.plan.num_layers != self.num_hidden_layers:
            raise ValueError(
                f"plan has {self.plan.num_layers} layers, but num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.kv_lora_rank is not None:  # raises if the plan cannot be said on such latents
            self.plan.latent_bytes_per_token(self.kv_lora_rank, self.qk_rope_head_dim, torch.float32)
        self._check_layer_types()
        self._check_windows()
        self._check_experts()

    def _check_latent(self) -> None:
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        if self.kv_lora_rank is None:
            for name in names:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs kv_lora_rank: it is a size of latent attention")
            return
        if missing := [name for name in names[:3] if getattr(self, name) is None]:
            raise ValueError(f"{' and '.join(missing)} must be given with kv_lora_rank")
        check_sizes(self.kv_lora_rank, *(getattr(self, name) for name in names))
        if self.head_dim not in (None, self.qk_rope_head_dim):
            raise ValueError(
                "with kv_lora_rank head_dim must be left out or be "
                f"qk_rope_head_dim={self.qk_rope_head_dim}, got {self.head_dim}"
            )
        object.__setattr__(self, "head_dim", self.qk_rope_head_dim)

    def _check_layer_types(self) -> None:
        if self.layer_types is None:
            kind = LAYER_TYPES[self.sliding_window is not None]
            object.__setattr__(self, "layer_types", (kind,) * self.num_hidden_layers)
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - set(LAYER_TYPES):
            raise ValueError(
                f"layer_types must name {' or '.join(LAYER_TYPES)} for each of {self.num_hidden_layers} "
                f"layers, got {self.layer_types}"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("sliding_window must be given when layer_types has sliding_attention")

    def _check_windows(self) -> None:
        """Whether every layer finds in the caches that it reads all that it sees."""
        latent = None if self.kv_lora_rank is None else latent_layers(self.plan)
        for i, layer in enumerate(self.plan.layers):
            # A segment that names the layer itself mixes new tokens with new tokens; the others read caches.
            read = {j for part in (*layer.keys, *layer.values) if i not in part.sources for j in part.sources}
            for j in sorted(read if latent is None else latent[i].read_layers - {i}):
                if (self.layer_types[i], self.layer_types[j]) == LAYER_TYPES:
                    raise ValueError(
                        f"layer_types: layer {i} has full attention but reads the cache of layer {j}, of "
                        f"which servers keep a sliding window of {self.sliding_window} tokens (plan "
                        f"{self.plan.name!r}); make layer {j} full_attention or layer {i} sliding_attention"
                    )

    def _check_experts(self) -> None:
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers or ()))
        if not _is_int(self.num_experts, 0):
            raise ValueError(f"num_experts must be an int, 0 (dense) or more, got {self.num_experts!r}")
        if self.num_experts == 0:
            return
        k, layers = self.num_experts_per_tok, self.num_hidden_layers
        if not _is_int(k, 1) or k > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be an int from 1 to num_experts={self.num_experts}, got {k!r}"
            )
        if self.moe_intermediate_size is None:
            object.__setattr__(self, "moe_intermediate_size", max(1, self.intermediate_size // k))
        for name in ("moe_intermediate_size", "decoder_sparse_step"):
            if not _is_int(getattr(self, name), 1):
                raise ValueError(f"{name} must be a positive int, got {getattr(self, name)!r}")
        coef = self.router_aux_loss_coef
        if not isinstance(coef, (int, float)) or not 0 <= coef < math.inf:
            raise ValueError(f"router_aux_loss_coef must be a finite number, at least 0, got {coef!r}")
        if not all(_is_int(i, 0) and i < layers for i in self.mlp_only_layers):
            raise ValueError(
                f"mlp_only_layers must be layers, from 0 to {layers - 1}, got {self.mlp_only_layers}"
            )
        if not any(map(self.has_experts, range(layers))):
            raise ValueError(
                f"num_experts is {self.num_experts}, but decoder_sparse_step={self.decoder_sparse_step} and "
                f"mlp_only_layers={self.mlp_only_layers} leave no layer with experts; num_experts=0 is dense"
            )

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward network of layer ``layer`` (from 0) is a mixture of experts."""
        sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse and layer not in self.mlp_only_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON; with the version of this format."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            "model_type": MODEL_TYPE,
            "format": CONFIG_FORMAT,
            **data,
            "plan": self.plan.to_dict(),
            "layer_types": list(self.layer_types),
            "mlp_only_layers": list(self.mlp_only_layers),
        }

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """What a KVCache of that dtype holds of one token of one sequence, all layers together."""
        if self.kv_lora_rank is not None:
            return self.plan.latent_bytes_per_token(self.kv_lora_rank, self.qk_rope_head_dim, dtype)
        return self.plan.bytes_per_token(self.num_key_value_heads, self.head_dim, dtype)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """The inverse of ``to_dict``. Raises ValueError for a newer format, missing and unknown fields."""
        data = dict(data)
        version = data.pop("format", None)
        if data.pop("model_type", MODEL_TYPE) != MODEL_TYPE or not isinstance(version, int):
            raise ValueError(
                "this is not the config of a fusedkv_ext decoder: it needs model_type and format"
            )
        if version > CONFIG_FORMAT:
            raise ValueError(
                f"config has format {version}, newer than format {CONFIG_FORMAT} that this version of "
                "fusedkv_ext reads; upgrade fusedkv_ext"
            )
        unknown = sorted(data.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}")
        if isinstance(data.get("plan"), Mapping):
            data["plan"] = CachePlan.from_dict(data["plan"])
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"config is incomplete: {error}") from error


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _attention(
    config: DecoderConfig, layer: int, rope: RotaryEmbedding
) -> FusedKVAttention | LatentAttention:
    """The attention of one layer: of latents if the config has a kv_lora_rank."""
    sliding = config.layer_types[layer] == "sliding_attention"
    shared = {
        "rms_norm_eps": config.rms_norm_eps,
        "bias": config.attention_bias,
        "rope": rope,
        "sliding_window": config.sliding_window if sliding else None,
    }
    place = (config.plan, layer, config.hidden_size, config.num_attention_heads)
    if config.kv_lora_rank is not None:
        return LatentAttention(
            *place,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            **shared,
        )
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

    Third result: the layer's ``balance_loss``, None for a dense network and in evaluation mode.
    """

    def __init__(self, config: DecoderConfig, layer: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.self_attn = _attention(config, layer, rope)
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

    def forward(
        self,
        x: Tensor,
        sources: Sequence[KV] = (),
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, KV, Tensor | None]:
        out, kv = self.self_attn(
            self.input_layernorm(x), sources, position_embeddings=position_embeddings, cache=cache, last=last
        )
        x = out + (x if last is None else x[:, -last:])
        mlp = self.mlp
        out = mlp(self.post_attention_layernorm(x))
        out, balance = out if isinstance(mlp, MoE) else (out, None)
        return x + out, kv, balance


class DecoderModel(nn.Module):
    """Embeddings, layers and the final norm: token ids (B, S) -> hidden states (B, S or keep, hidden).

    Second result: the mean ``balance_loss`` of the layers with experts, None where no layer has one. It is
    returned, like keys and values, and not left on a module, which FSDP and checkpointing would lose.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        plan = config.plan
        self.rope = RotaryEmbedding(
            config.head_dim, config.rope_theta, config.rope_scaling, interleaved=config.rope_interleaved
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, self.rope) for i in range(plan.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.exit_layer = plan.prefill_layers - 1
        self._needs_positions = any(layer.self_attn.needs_positions for layer in self.layers)
        # Whose KV each layer takes as arguments: without a cache, and with one (only mixing layers need any).
        self._sources = [layer.self_attn.source_layers for layer in self.layers]
        self._cached_sources = [
            sources if layer.self_attn.mixes_before_storing else ()
            for sources, layer in zip(self._sources, self.layers, strict=True)
        ]

    def forward(
        self, ids: Tensor, *, cache: KVCache | None = None, keep: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        steps = ids.shape[1]
        position_embeddings = None
        if cache is not None:
            cache.begin_step()
        if cache is None or self._needs_positions:
            # What layers share is made here, once a step and, with a cache, from the lengths on the device.
            positions = torch.arange(steps, device=ids.device) if cache is None else cache.positions(steps)
            position_embeddings = self.rope.cos_sin(positions)
        wanted = self._sources if cache is None else self._cached_sources
        read_later = set().union(*wanted)
        x = self.embed_tokens(ids)
        kvs: list[KV | None] = []
        balances: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            last = keep if i == self.exit_layer and 0 < keep < steps else None
            sources = [kvs[j] for j in wanted[i]]
            x, kv, balance = layer(
                x, sources, position_embeddings=position_embeddings, cache=cache, last=last
            )
            if last is not None and position_embeddings is not None:
                cos, sin = position_embeddings
                position_embeddings = cos[..., -last:, :], sin[..., -last:, :]
            kvs.append(kv if i in read_later else None)
            if balance is not None:
                balances.append(balance)
        return self.norm(x), torch.stack(balances).mean() if balances else None


class Decoder(nn.Module):
    """A causal language model whose cache follows ``config.plan``.

    State-dict names are those of HF's Qwen3ForCausalLM, with experts those of its Qwen3MoeForCausalLM, with
    latent attention those of DeepseekV3ForCausalLM's attention, plus ``self_attn.kv_fusion.*`` and minus
    projections of what the plan does not store.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        self.tie_weights()

    @property
    def plan(self) -> CachePlan:
        return self.config.plan

    def tie_weights(self) -> None:
        """Makes the head and the embeddings one parameter again, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, initializer_range), biases zero, norms one, fusion weights as the plan says."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
                if getattr(module, "bias", None) is not None:
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
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        lengths: Sequence[int] | None = None,
        advance: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next tokens, and with ``labels`` the loss.

        Args:
            ids: (B, S) integers; with a cache the next S tokens of each sequence.
            labels: (B, S), usually ids themselves: position t is judged by labels[t + 1], -100 is left out.
                The loss is the mean cross-entropy in nats, computed in fp32 (fp64 for an fp64 model). In
                training mode a model with experts adds router_aux_loss_coef times its mean ``balance_loss``;
                in evaluation mode the loss is the cross-entropy alone. Not together with
                ``logits_to_keep``.
            cache: from ``make_cache``; it is advanced and filled. Not differentiable: call under
                ``torch.no_grad`` or ``torch.inference_mode``.
            logits_to_keep: logits of the last that many positions only, 0 for all. Layers that only read then
                run for these positions alone, which changes nothing but rounding.
            lengths: with a cache whose sequences are empty, the number of tokens of each row, the rest on its
                left being padding; the longest must be S. None: S each.
            advance: with a cache, make room for the S tokens first. False where the caller has done so, with
                ``cache.advance``: what remains is work of the device alone, to be captured in a CUDA graph.

        Returns:
            logits (B, S or logits_to_keep, vocab), or (logits, loss).

        Raises ValueError for shapes, dtypes or combinations other than these, for positions beyond
        max_position_embeddings, and CacheFullError.
        """
        self._check(ids, labels, cache, logits_to_keep, lengths, advance)
        if cache is not None and advance:
            cache.advance(ids.shape[1] if lengths is None else lengths)
        hidden, balance = self.model(ids, cache=cache, keep=logits_to_keep)
        logits = self.lm_head(hidden)
        if labels is None:
            return logits
        judged = logits[:, :-1].flatten(0, 1)
        judged = judged.to(torch.promote_types(judged.dtype, torch.float32))
        loss = F.cross_entropy(judged, labels[:, 1:].flatten())
        if balance is not None:
            loss = loss + self.config.router_aux_loss_coef * balance
        return logits, loss

    def make_cache(
        self, batch_size: int, max_len: int, *, page_size: int | None = None, num_pages: int | None = None
    ) -> KVCache:
        """An empty KVCache for this model: its device, and its dtype or, within autocast, that one."""
        config, weight = self.config, self.model.embed_tokens.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        latent = config.kv_lora_rank is not None
        return KVCache(
            config.plan,
            batch_size,
            max_len,
            1 if latent else config.num_key_value_heads,
            config.kv_lora_rank if latent else config.head_dim,
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
            temperature, top_k, top_p: see ``Sampling``; temperature 0 is greedy.
            seed: of the sampling; None draws from torch's global generator.
            stop: token id or ids after which a sequence is finished; ``pad_token_id`` follows. Generation
                ends when all are finished.
            stream: called after each step with its tokens, (B,).
            use_cache: False runs every sequence alone and from its start for each token: slow, and the
                definition of the right result.
            attention_mask: (B, S), 0 marks padding in ``ids``, wherever it stands; it is moved to the left.
            page_size: use a paged cache with pages of that many tokens.
            cuda_graph: capture the decode step in a CUDA graph and replay it: the same tokens, without the
                host's time for launching kernels. None: on CUDA, from 17 new tokens on, which pay
                for the capture, if no module has forward hooks, which a replay would not call; should the
                capture fail, a warning and a launch per kernel. True: always, and RuntimeError if it fails.

        Returns:
            (B, S + new) int64: the prompts padded on the left to S (the longest prompt's length, or the width
            of ``ids``), then at most ``max_new_tokens`` new tokens. An empty batch returns as it came.

        Raises ValueError for arguments that cannot be, naming them.
        """
        return generate(
            self,
            ids,
            max_new_tokens,
            vocab_size=self.config.vocab_size,
            max_len=self.config.max_position_embeddings,
            device=self.model.embed_tokens.weight.device,
            sampling=Sampling(temperature, top_k, top_p),
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
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
            raise ValueError(f"ids must be (B, S) integers with S > 0, got {ids.dtype} {tuple(ids.shape)}")
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
