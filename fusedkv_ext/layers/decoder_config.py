"""Configuration of a decoder: sizes, validation and serialization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from fusedkv_ext.layers.latent_attention import check_sizes
from fusedkv_ext.plan import CachePlan, check_windows

__all__ = ["DecoderConfig"]

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
    """Sizes of a decoder. Names and meanings are those of HF's Qwen3Config and Qwen3MoeConfig, plus ``plan``.

    With ``kv_lora_rank`` all layers have multi-head latent attention (see ``LatentAttention``). The names and
    meanings of kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim are those of HF's
    DeepseekV3Config. Only q_lora_rank is optional. head_dim is then qk_rope_head_dim, and
    num_key_value_heads, qk_norm and recompute_fusion have no effect.

    Args:
        vocab_size: As in HF.
        hidden_size: As in HF.
        intermediate_size: As in HF.
        num_hidden_layers: As in HF.
        num_attention_heads: As in HF.
        num_key_value_heads: As in HF.
        rms_norm_eps: As in HF.
        tie_word_embeddings: As in HF.
        head_dim: Default hidden_size / num_attention_heads.
        plan: A CachePlan for num_hidden_layers, or its label, such as "fusedkv" or "cla:factor=3".
        rope_theta: Base of RoPE.
        rope_scaling: Scaling of RoPE.
        rope_interleaved: Whether RoPE pairs channels 2j and 2j + 1 instead of j and j + D/2.
        max_position_embeddings: Longest sequence.
        qk_norm: Whether queries and keys are normalized.
        attention_bias: Whether the q, k, v and o projections have biases.
        sliding_window: Number of tokens that a token of a sliding layer attends to, itself included.
        layer_types: "full_attention" or "sliding_attention" for each layer; default: all sliding with a
            sliding_window, else all full. A full layer cannot read the cache of a sliding one, which keeps
            only its window. It can mix with a sliding one before storage, which needs only the new tokens.
        initializer_range: Standard deviation of initial matrices.
        recompute_fusion: Whether the backward recomputes fused keys and values.
        num_experts: Experts per feed-forward network; 0 is a dense one.
        num_experts_per_tok: Experts per token.
        moe_intermediate_size: Intermediate channels of one expert; default intermediate_size /
            num_experts_per_tok, which has the same FLOPs per token as the dense network.
        norm_topk_prob: See ``MoE`` (HF's default is False, its Qwen3 checkpoints have True).
        router_aux_loss_coef: Weight of ``balance_loss`` in the training loss.
        decoder_sparse_step: Layer i, from 0, has experts if i + 1 is a multiple of it.
        mlp_only_layers: Layers without experts.

    Raises:
        ValueError: A field is invalid. The message names it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = None  # type: ignore[assignment]  # argument types are those of __init__ below
    plan: CachePlan = "fusedkv"  # type: ignore[assignment]
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_interleaved: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    qk_norm: bool = True
    attention_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]
    initializer_range: float = 0.02
    recompute_fusion: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = None  # type: ignore[assignment]
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    if TYPE_CHECKING:  # types of the arguments; those of the fields are after defaults are filled in

        def __init__(
            self,
            vocab_size: int,
            hidden_size: int,
            intermediate_size: int,
            num_hidden_layers: int,
            num_attention_heads: int,
            num_key_value_heads: int,
            head_dim: int | None = None,
            plan: CachePlan | str = "fusedkv",
            rope_theta: float = 10000.0,
            rope_scaling: dict[str, Any] | None = None,
            rope_interleaved: bool = False,
            rms_norm_eps: float = 1e-6,
            tie_word_embeddings: bool = False,
            max_position_embeddings: int = 32768,
            qk_norm: bool = True,
            attention_bias: bool = False,
            sliding_window: int | None = None,
            layer_types: Sequence[str] | None = None,
            initializer_range: float = 0.02,
            recompute_fusion: bool = False,
            kv_lora_rank: int | None = None,
            q_lora_rank: int | None = None,
            qk_nope_head_dim: int | None = None,
            qk_rope_head_dim: int | None = None,
            v_head_dim: int | None = None,
            num_experts: int = 0,
            num_experts_per_tok: int = 2,
            moe_intermediate_size: int | None = None,
            norm_topk_prob: bool = True,
            router_aux_loss_coef: float = 0.001,
            decoder_sparse_step: int = 1,
            mlp_only_layers: Sequence[int] = (),
        ) -> None: ...

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
                    f"hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, got "
                    f"{self.hidden_size}; or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if isinstance(self.plan, str):
            object.__setattr__(self, "plan", CachePlan.named(self.plan, self.num_hidden_layers))
        if not isinstance(self.plan, CachePlan):
            raise ValueError(f"plan must be a CachePlan or the name of one, got {type(self.plan).__name__}")
        if self.plan.num_layers != self.num_hidden_layers:
            raise ValueError(
                f"plan must have num_hidden_layers={self.num_hidden_layers} layers, got "
                f"{self.plan.num_layers}"
            )
        if self.kv_lora_rank is not None:  # raises if the plan is not supported on such latents
            self.plan.latent_bytes_per_token(self.kv_lora_rank, self.qk_rope_head_dim or 0, torch.float32)
        self._check_layer_types()
        check_windows(self.plan, self.layer_types, latent=self.kv_lora_rank is not None)
        self._check_experts()

    def _check_latent(self) -> None:
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        if self.kv_lora_rank is None:
            for name in names:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} must be None without kv_lora_rank, got {getattr(self, name)}: it is a size "
                        "of latent attention"
                    )
            return
        if missing := [name for name in names[:3] if getattr(self, name) is None]:
            raise ValueError(f"{' and '.join(missing)} must be given with kv_lora_rank")
        check_sizes(self.kv_lora_rank, *(getattr(self, name) for name in names))
        if self.head_dim not in (None, self.qk_rope_head_dim):
            raise ValueError(
                f"head_dim must be None or qk_rope_head_dim={self.qk_rope_head_dim} with kv_lora_rank, got "
                f"{self.head_dim}"
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
            raise ValueError("sliding_window must be given if layer_types has sliding_attention, got None")

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
                f"a layer must have experts with num_experts={self.num_experts}, got none with "
                f"decoder_sparse_step={self.decoder_sparse_step} and mlp_only_layers={self.mlp_only_layers}; "
                "num_experts=0 is a dense model"
            )

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward network of layer ``layer`` (from 0) is a mixture of experts."""
        sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse and layer not in self.mlp_only_layers

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dict, with the version of this format."""
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
        """KVCache bytes per token and sequence, over all layers."""
        if self.kv_lora_rank is not None:
            return self.plan.latent_bytes_per_token(self.kv_lora_rank, self.qk_rope_head_dim or 0, dtype)
        return self.plan.bytes_per_token(self.num_key_value_heads, self.head_dim, dtype)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: The format is newer, or fields are missing or unknown.
        """
        data = dict(data)
        version = data.pop("format", None)
        if data.pop("model_type", MODEL_TYPE) != MODEL_TYPE or not isinstance(version, int):
            raise ValueError(
                f"config must be that of a fusedkv_ext decoder, with model_type {MODEL_TYPE!r} and a format"
            )
        if version > CONFIG_FORMAT:
            raise ValueError(
                f"config must have format {CONFIG_FORMAT} or older, got {version}; upgrade fusedkv_ext"
            )
        unknown = sorted(data.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"config must have no unknown fields, got {', '.join(unknown)}")
        if isinstance(data.get("plan"), Mapping):
            data["plan"] = CachePlan.from_dict(data["plan"])
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"config is incomplete: {error}") from error


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
