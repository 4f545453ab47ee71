"""Configs of Llama and Qwen3 with a cache plan.

``cache_plan`` is authoritative. ``k_source_layers`` and ``v_source_layers`` show it in config.json, and must
agree with it when they are read.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from fusedkv_ext.cache.codec import RAW, CodecPlan, Coding
from fusedkv_ext.hf.cache import HAS_DUMMY_LAYER
from fusedkv_ext.plan import CachePlan, check_windows
from fusedkv_ext.plan.latent import WHOLE
from fusedkv_ext.plan.pieces import SIDES

__all__ = [
    "FusedKVLlamaConfig",
    "FusedKVQwen3Config",
    "PlanConfig",
    "cache_bytes_per_token",
    "check_codecs",
    "config_for",
    "named_codecs",
]


@lru_cache(maxsize=64)
def _plan(text: str) -> CachePlan:
    return CachePlan.from_dict(json.loads(text))


@lru_cache(maxsize=64)
def _codecs(text: str) -> CodecPlan:
    return CodecPlan.from_dict(json.loads(text))


class PlanConfig:
    """Common part of the configs of all model families."""

    # No remote code. TRL reads this of every config class that transformers does not have by name.
    auto_map: ClassVar[dict[str, str]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.cache_plan, str):
            self.cache_plan = CachePlan.named(self.cache_plan, self.num_hidden_layers).to_dict()
        if self.cache_plan is None:
            if self.cache_codecs is not None:
                raise ValueError("cache_codecs must be None without cache_plan, got codecs")
            return
        if not isinstance(self.cache_plan, dict):
            raise TypeError(
                "cache_plan must be what CachePlan.to_dict gives or the name of a plan, got "
                f"{type(self.cache_plan).__name__}"
            )
        plan = self.plan
        if plan.num_layers != self.num_hidden_layers:
            raise ValueError(
                f"cache_plan {plan.name!r} has {plan.num_layers} layers, but num_hidden_layers is "
                f"{self.num_hidden_layers}; make the plan for that many"
            )
        for i in range(plan.num_layers):
            plan.segments(i, self.num_key_value_heads)  # raises for shares that are no whole heads
        _check_layer_types(self, plan)
        layers = range(plan.num_layers)
        self._check_sources("k_source_layers", [list(plan.key_sources(i)) for i in layers])
        self._check_sources("v_source_layers", [list(plan.value_sources(i)) for i in layers])
        if isinstance(self.cache_codecs, str):
            self.cache_codecs = named_codecs(self.cache_codecs, self).to_dict()
        if self.cache_codecs is not None:
            check_codecs(self.codecs, self)
        self.base_model_tp_plan = {**(self.base_model_tp_plan or {}), **_tp_plan(plan)}

    def _check_sources(self, name: str, expected: list[list[int]]) -> None:
        given = getattr(self, name)
        if given is not None and [list(sources) for sources in given] != expected:
            i = next((i for i, (a, b) in enumerate(zip(given, expected, strict=False)) if list(a) != b), None)
            where = "" if i is None else f", in layer {i} {given[i]} for {expected[i]}"
            raise ValueError(
                f"{name} contradicts cache_plan{where}; that decides: leave {name} out, or make it agree"
            )
        setattr(self, name, expected)

    @property
    def plan(self) -> CachePlan:
        """The cache plan.

        Raises:
            ValueError: the config has none.
        """
        if self.cache_plan is None:
            raise ValueError(
                f"{type(self).__name__} has no cache_plan; expected what CachePlan.to_dict gives, or the "
                "name of a plan, such as cache_plan='fusedkv-lite'"
            )
        return _plan(json.dumps(self.cache_plan))

    @property
    def codecs(self) -> CodecPlan | None:
        """The codecs of the caches; None: keys and values are stored as they are."""
        return None if self.cache_codecs is None else _codecs(json.dumps(self.cache_codecs))

    def bytes_per_token(self, dtype: torch.dtype) -> int | float:
        """Bytes of one token of one sequence in the caches of all layers; see ``cache_bytes_per_token``."""
        heads, dim = self.num_key_value_heads, head_dim_of(self)
        if self.codecs is None:
            return self.plan.bytes_per_token(heads, dim, dtype)
        size = self.codecs.bytes_per_token(self.plan, heads, dim, dtype)
        return int(size) if size.denominator == 1 else float(size)

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """For the caches of transformers 5.23 and later, per layer.

        "store" if later layers read what the layer stores, "reuse" if it stores nothing, else None.
        """
        if self.cache_plan is None:
            return None
        plan = self.plan
        read = {j for i in range(plan.num_layers) for j in plan.source_layers(i)}
        return [
            "reuse" if plan.reads_only(i) else "store" if i in read else None for i in range(plan.num_layers)
        ]

    @property
    def num_kv_shared_layers(self) -> int:
        """For the caches of transformers before 5.23: the number of layers at the end that store nothing."""
        return 0 if self.cache_plan is None else self.plan.num_layers - self.plan.prefill_layers


def _check_layer_types(config: Any, plan: CachePlan) -> None:
    """Checks that the layers' windows fit the plan and this version of transformers."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return
    check_windows(plan, types)
    # Masks are sized by the first layer of a type, which before 5.23 may be one that stores nothing.
    for first in {types.index(kind) for kind in types}:
        if not HAS_DUMMY_LAYER and plan.reads_only(first) and first < plan.prefill_layers:
            raise ValueError(
                f"layer_types: layer {first} is the first with {types[first]} and stores nothing (plan "
                f"{plan.name!r}); that needs transformers 5.23 or later"
            )


def _tp_plan(plan: CachePlan) -> dict[str, str]:
    """Fusion weights are sharded on their first dim, like the KV heads that they scale."""
    parts = [part for layer in plan.layers for part in (*layer.keys, *layer.values)]
    if any(part.heads != WHOLE for part in parts):
        return {}  # ranks would hold different segments; attention refuses
    names = {
        f"{side}_{j}"
        for layer in plan.layers
        for side, (part,) in (("key", layer.keys), ("value", layer.values))
        if part.fusion is not None and part.fusion.granularity in ("channel", "head")
        for j in range(len(part.sources))
    }
    return {f"layers.*.self_attn.kv_fusion.{name}": "colwise" for name in sorted(names)}


@strict
class FusedKVLlamaConfig(PlanConfig, LlamaConfig):
    """A LlamaConfig with ``cache_plan``: what ``CachePlan.to_dict`` returns, or the name of a plan.

    ``cache_codecs`` is what ``CodecPlan.to_dict`` returns, or the label of a scheme; None stores keys and
    values as they are.

    Raises:
        ValueError: the plan has another depth, shares of heads are not whole, or source lists contradict the
            plan.
    """

    model_type = "fusedkv_llama"

    cache_plan: dict[str, Any] | str | None = None
    cache_codecs: dict[str, Any] | str | None = None
    k_source_layers: list[list[int]] | None = None
    v_source_layers: list[list[int]] | None = None


@strict
class FusedKVQwen3Config(PlanConfig, Qwen3Config):
    """A Qwen3Config with ``cache_plan``: what ``CachePlan.to_dict`` returns, or the name of a plan.

    ``cache_codecs`` is what ``CodecPlan.to_dict`` returns, or the label of a scheme; None stores keys and
    values as they are.

    Raises:
        ValueError: the plan has another depth, shares of heads are not whole, source lists contradict the
            plan, or a layer with full attention reads the cache of one with a sliding window.
    """

    model_type = "fusedkv_qwen3"

    cache_plan: dict[str, Any] | str | None = None
    cache_codecs: dict[str, Any] | str | None = None
    k_source_layers: list[list[int]] | None = None
    v_source_layers: list[list[int]] | None = None


_CONFIGS = {"llama": FusedKVLlamaConfig, "qwen3": FusedKVQwen3Config}


def named_codecs(label: str, config: Any) -> CodecPlan:
    """The codecs of a scheme for a model. Layers with a sliding window stay raw.

    Such a layer keeps few tokens, so codes would save little, and the cache drops its tokens one by one.

    Args:
        label: As in ``CodecPlan.named``.
        config: A config with a cache plan.

    Raises:
        ValueError: As ``CodecPlan.named``.
    """
    codecs = CodecPlan.named(label, config.plan)
    windows = _windows(config)
    if not any(windows):
        return codecs
    layers = [
        Coding(RAW, RAW) if sees_window else layer
        for layer, sees_window in zip(codecs.layers, windows, strict=True)
    ]
    return CodecPlan(codecs.name, layers, codecs.sinks, codecs.tail)


def check_codecs(codecs: CodecPlan, config: Any) -> None:
    """Checks that codecs fit a model.

    Raises:
        ValueError: They do not fit the plan or the head dim, or code a layer with a sliding window.
    """
    codecs.check(config.plan, config.num_key_value_heads, head_dim_of(config))
    for i, sees_window in enumerate(_windows(config)):
        for side, codec in zip(SIDES, codecs.layers[i], strict=True):
            if sees_window and not codec.is_raw:
                raise ValueError(
                    f"layer {i} {side}: the codec must be raw, got {codec}: the layer has a sliding window, "
                    "and caches drop its tokens one by one"
                )


def _windows(config: Any) -> list[bool]:
    """Whether each layer has a sliding window."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in types]


def config_for(config: PreTrainedConfig, plan: CachePlan | str) -> FusedKVLlamaConfig | FusedKVQwen3Config:
    """The config of the same model with another cache plan.

    Args:
        config: a LlamaConfig, a Qwen3Config, or one of ours, whose plan is replaced. Codecs are left out.
        plan: the cache plan, or the name of one.

    Raises:
        TypeError: ``config`` or ``plan`` has the wrong type.
        ValueError: the model has another type, the plan another depth, or shares of heads are not whole.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config must be a config of transformers, got {type(config).__name__}")
    kind = config.model_type.removeprefix("fusedkv_")
    if kind not in _CONFIGS:
        what = "an encoder-decoder" if config.is_encoder_decoder else "another model"
        raise ValueError(
            f"model_type {config.model_type!r} is {what}; cache plans are made for the decoders "
            f"{' and '.join(_CONFIGS)}"
        )
    if isinstance(plan, str):
        plan = CachePlan.named(plan, config.num_hidden_layers)
    if not isinstance(plan, CachePlan):
        raise TypeError(f"plan must be a CachePlan or the name of one, got {type(plan).__name__}")
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "k_source_layers", "v_source_layers"):
        fields.pop(name, None)
    fields.pop("cache_codecs", None)  # they belong to the plan that is replaced
    return _CONFIGS[kind](**{**fields, "cache_plan": plan.to_dict()})


def head_dim_of(config: Any) -> int:
    """D of a config of transformers, which may leave it out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int | float:
    """Bytes of one token of one sequence in the caches of all layers.

    With codecs these are the codes and scales of a token that is coded; the first and last tokens that stay
    raw take more. A fraction is possible where groups of tokens share scales.

    Args:
        config: one of ours, or a plain LlamaConfig or Qwen3Config, in which all layers store.
        dtype: of the cache.
    """
    if isinstance(config, PlanConfig):
        return config.bytes_per_token(dtype)
    plan = CachePlan.named("vanilla", config.num_hidden_layers)
    return plan.bytes_per_token(config.num_key_value_heads, head_dim_of(config), dtype)
