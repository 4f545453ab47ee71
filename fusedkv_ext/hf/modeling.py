"""Llama and Qwen3 with any cache plan: subclasses of transformers' models, which run their loop over layers.

Each module is built once and has the name of transformers' own, so checkpoints of the plain model load.
``Model.forward`` adds one ``SharedKV`` to the keyword arguments that transformers passes to every layer.
Layers after the last one that stores compute only the positions whose logits are requested (the early exit of
YOCO, arXiv:2405.05254).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from fusedkv_ext.cache.codec import TensorCodec
from fusedkv_ext.hf.attention import PlanAttention, SharedKV
from fusedkv_ext.hf.cache import cached_tokens, check_growth, window_start
from fusedkv_ext.hf.config import FusedKVLlamaConfig, FusedKVQwen3Config
from fusedkv_ext.hf.interface import NAME
from fusedkv_ext.hf.parallel import check_parallel
from fusedkv_ext.hf.versions import CACHE, takes_cache
from fusedkv_ext.layers.fusion import FusionWeights

__all__ = [
    "FusedKVLlamaForCausalLM",
    "FusedKVLlamaForQuestionAnswering",
    "FusedKVLlamaForSequenceClassification",
    "FusedKVLlamaForTokenClassification",
    "FusedKVLlamaModel",
    "FusedKVQwen3ForCausalLM",
    "FusedKVQwen3ForQuestionAnswering",
    "FusedKVQwen3ForSequenceClassification",
    "FusedKVQwen3ForTokenClassification",
    "FusedKVQwen3Model",
]


class _Llama:
    """The classes of a Llama's parts.

    They are looked up when a model is created, so that replacements in transformers' module (liger-kernel)
    apply here.
    """

    _family, _prefix = modeling_llama, "Llama"

    @classmethod
    def _part(cls, name: str) -> Any:
        return getattr(cls._family, cls._prefix + name)


class _Qwen3(_Llama):
    """The classes of a Qwen3's parts."""

    _family, _prefix = modeling_qwen3, "Qwen3"


class _PlanLayer:
    """Mixin of decoder layers: computes only the kept rows once all layers that store have run."""

    _attention: type[nn.Module]

    def __init__(self, config: Any, layer_idx: int) -> None:
        nn.Module.__init__(self)  # transformers' own would create another attention
        self.hidden_size = config.hidden_size
        self.self_attn = self._attention(config, layer_idx)
        self.mlp = self._part("MLP")(config)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, self._part("RMSNorm")(config.hidden_size, eps=config.rms_norm_eps))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        shared = kwargs.get("shared_kv_states")
        attention = self.self_attn
        if (
            shared is not None
            and shared.keep is not None
            and attention.layer_idx >= attention.plan.prefill_layers
        ):
            hidden_states = hidden_states[:, -shared.keep :]
            attention_mask = shared.kept_rows(attention_mask)
            kwargs["position_embeddings"] = tuple(x[:, -shared.keep :] for x in kwargs["position_embeddings"])
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


class _PlanPreTrained:
    """Mixin of all models."""

    _skip_keys_device_placement = [CACHE, "shared_kv_states"]
    _keep_in_fp32_modules_strict = ["kv_fusion"]

    def post_init(self) -> None:
        """Same as in transformers. Codecs stay in float32 as fusion weights do."""
        if self.config.codecs is not None:
            kept = self._keep_in_fp32_modules_strict or ()
            self._keep_in_fp32_modules_strict = {*kept, "key_codec", "value_codec"}
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FusionWeights):
            missing = {
                name
                for name, weight in module.named_parameters()
                if not getattr(weight, "_is_hf_initialized", False)
            }
            module.reset_parameters(names=missing)
        else:
            super()._init_weights(module)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Selects our own implementation unless another is requested."""
        return super()._check_and_adjust_attn_implementation(attn_implementation or NAME, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Same as in transformers. A checkpoint of the plain model loads too.

        Then only fusion weights are missing; they start at the plan's initial values.

        Raises:
            ValueError: the plan stores only some heads of a layer. Which heads of the plain model these are
                is a question of conversion. Or the config names codecs whose numbers the checkpoint lacks.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error) or not _is_plain(pretrained_model_name_or_path):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} has other sizes than this config. Where a plan stores only "
                "some KV heads of a layer (skipv1 and others), a checkpoint of the plain model must be "
                "converted: fkv.conversion.convert_model, or the command fusedkv convert"
            ) from error
        _check_fitted(pretrained_model_name_or_path, model, report)
        for module in model.modules():
            if isinstance(module, FusionWeights):  # loading makes new parameters, all with gradients
                module.freeze_constants()
            elif isinstance(module, TensorCodec):  # loading casts buffers to float64
                module.float()
        return (model, report) if wants_report else model

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Same as in transformers, before it loads any weight.

        Raises:
            ValueError: the ranks cannot shard the plan.
        """
        if distributed_config is not None:
            sizes = {name: getattr(distributed_config, name, None) or 1 for name in ("tp_size", "pp_size")}
            if model.config.codecs is not None and max(sizes.values()) > 1:
                raise ValueError(
                    f"a model with codecs must be on one process, got {sizes}: codecs are not sharded; start "
                    "one process, or load a folder without cache_codecs"
                )
            check_parallel(model.config.plan, model.config.num_key_value_heads, **sizes)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        if enable:
            options = getattr(gradient_checkpointing_func, "keywords", {})
            if options.get("use_reentrant", True) is not False:
                raise ValueError(
                    "activation checkpointing with use_reentrant=True gives wrong gradients where layers "
                    'share keys and values; pass {"use_reentrant": False}, or no options at all'
                )
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, **kwargs)


def _is_plain(folder: Any) -> bool:
    """True if a checkpoint is of a model of transformers, not of this package."""
    if folder is None:  # from_pretrained(None, state_dict=...)
        return False
    fields, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    return not fields.get("model_type", "").startswith("fusedkv_")


def _check_fitted(folder: Any, model: Any, report: dict[str, Any]) -> None:
    """Raises ValueError if the codecs of the config were not among the weights, or of another shape."""
    wrong = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    found = sorted(name for name in wrong if re.search(r"\.(key|value)_codec\.", name))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"{folder} must have the numbers of the codecs {model.config.codecs.name!r} that its config "
            f"names, got weights without {found[0]}{more}; fit them with the command fusedkv compress, or "
            "remove cache_codecs from its config.json"
        )


class _PlanModel(_PlanPreTrained):
    """Mixin of the models without a head."""

    _layer: type[nn.Module]

    def __init__(self, config: Any) -> None:
        dropped = _dropped(config)  # raises where there is no plan, before anything large is made
        PreTrainedModel.__init__(self, config)  # transformers' own would create other layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self._layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = self._part("RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self._part("RotaryEmbedding")(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *dropped}
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        rows_to_keep: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Same as the model of transformers.

        Args:
            rows_to_keep: computes only that many last positions after the last layer that stores. If there is
                such a layer, the result has no other positions.

        Raises:
            RuntimeError: transformers did not pass its cache to the layers.
        """
        shared = SharedKV()
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        shared.steps = 0 if inputs is None else inputs.shape[1]
        if rows_to_keep is not None and self._exits_early(kwargs) and rows_to_keep < shared.steps:
            shared.keep = rows_to_keep
        if self.has_sliding_layers and past_key_values is not None:
            shared.window_start = window_start(past_key_values, shared.steps)
        # Of prompts only, which is once per generate: static caches count on the device.
        counts = shared.steps > 1 and not torch.compiler.is_compiling()
        length = cached_tokens(past_key_values) if counts else None
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            shared_kv_states=shared,
            **{CACHE: past_key_values},
            **kwargs,
        )
        cache = getattr(out, CACHE, None) if past_key_values is None else past_key_values
        if cache is not None and not (self.training and any(x.gradient_checkpointing for x in self.layers)):
            check_growth(cache, shared.cached, None if length is None else length + shared.steps)
        return out

    def _exits_early(self, kwargs: dict[str, Any]) -> bool:
        """False if all positions of the hidden states are requested, or masks have no rows to cut."""
        wanted = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name) or getattr(self.config, name, False) for name in wanted):
            return False
        return self.config._attn_implementation in ("sdpa", "eager", NAME)


def _dropped(config: Any) -> list[str]:
    """Patterns of parameters that the plain model has and this one does not."""
    plan, patterns = config.plan, []
    for i in range(plan.num_layers):
        for heads, names in (
            (plan.stored_key_heads(i, config.num_key_value_heads), "k_proj|k_norm"),
            (plan.stored_value_heads(i, config.num_key_value_heads), "v_proj"),
        ):
            if not heads:
                patterns.append(rf"layers\.{i}\.self_attn\.({names})\.")
    return patterns


class _PlanCausalLM(_PlanPreTrained):
    """Mixin of the models with a language modeling head."""

    _model: type[nn.Module]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # transformers' own would create a plain model
        self.model = self._model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_static_cache_init_shape(self) -> Any:
        """None if layers have unequal key and value heads: allocate when something is stored."""
        attentions = [layer.self_attn for layer in self.model.layers]
        even = all(x.k_heads == x.v_heads for x in attentions)
        return super()._get_static_cache_init_shape() if even else None

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Same as the model of transformers.

        With a number as ``logits_to_keep`` (``generate`` passes 1) layers after the last one that stores
        compute only those positions.
        """
        if labels is None and type(logits_to_keep) is int and logits_to_keep > 0:
            kwargs["rows_to_keep"] = logits_to_keep
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE: past_key_values},
            **kwargs,
        )


class FusedKVLlamaAttention(_Llama, PlanAttention, modeling_llama.LlamaAttention):
    """LlamaAttention of one layer of a plan."""


class FusedKVLlamaDecoderLayer(_Llama, _PlanLayer, modeling_llama.LlamaDecoderLayer):
    """LlamaDecoderLayer of one layer of a plan."""

    _attention = FusedKVLlamaAttention


class FusedKVLlamaPreTrainedModel(_Llama, _PlanPreTrained, modeling_llama.LlamaPreTrainedModel):
    """Common part of the Llama models of this package."""

    config: FusedKVLlamaConfig
    config_class = FusedKVLlamaConfig
    _no_split_modules = ["FusedKVLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": FusedKVLlamaDecoderLayer, "attentions": FusedKVLlamaAttention}


class FusedKVLlamaModel(_PlanModel, FusedKVLlamaPreTrainedModel, modeling_llama.LlamaModel):
    """LlamaModel with a cache plan."""

    _layer = FusedKVLlamaDecoderLayer


class FusedKVLlamaForCausalLM(_PlanCausalLM, FusedKVLlamaPreTrainedModel, modeling_llama.LlamaForCausalLM):
    """LlamaForCausalLM with a cache plan."""

    _model = FusedKVLlamaModel


class FusedKVLlamaForSequenceClassification(GenericForSequenceClassification, FusedKVLlamaPreTrainedModel):
    """LlamaForSequenceClassification with a cache plan: reward models and other classifiers."""


class FusedKVLlamaForTokenClassification(GenericForTokenClassification, FusedKVLlamaPreTrainedModel):
    """LlamaForTokenClassification with a cache plan."""


class FusedKVLlamaForQuestionAnswering(GenericForQuestionAnswering, FusedKVLlamaPreTrainedModel):
    """LlamaForQuestionAnswering with a cache plan."""

    base_model_prefix = modeling_llama.LlamaForQuestionAnswering.base_model_prefix


class FusedKVQwen3Attention(_Qwen3, PlanAttention, modeling_qwen3.Qwen3Attention):
    """Qwen3Attention of one layer of a plan."""


class FusedKVQwen3DecoderLayer(_Qwen3, _PlanLayer, modeling_qwen3.Qwen3DecoderLayer):
    """Qwen3DecoderLayer of one layer of a plan."""

    _attention = FusedKVQwen3Attention


class FusedKVQwen3PreTrainedModel(_Qwen3, _PlanPreTrained, modeling_qwen3.Qwen3PreTrainedModel):
    """Common part of the Qwen3 models of this package."""

    config: FusedKVQwen3Config
    config_class = FusedKVQwen3Config
    _no_split_modules = ["FusedKVQwen3DecoderLayer"]
    _can_record_outputs = {"hidden_states": FusedKVQwen3DecoderLayer, "attentions": FusedKVQwen3Attention}


class FusedKVQwen3Model(_PlanModel, FusedKVQwen3PreTrainedModel, modeling_qwen3.Qwen3Model):
    """Qwen3Model with a cache plan."""

    _layer = FusedKVQwen3DecoderLayer


class FusedKVQwen3ForCausalLM(_PlanCausalLM, FusedKVQwen3PreTrainedModel, modeling_qwen3.Qwen3ForCausalLM):
    """Qwen3ForCausalLM with a cache plan."""

    _model = FusedKVQwen3Model


class FusedKVQwen3ForSequenceClassification(GenericForSequenceClassification, FusedKVQwen3PreTrainedModel):
    """Qwen3ForSequenceClassification with a cache plan: reward models and other classifiers."""


class FusedKVQwen3ForTokenClassification(GenericForTokenClassification, FusedKVQwen3PreTrainedModel):
    """Qwen3ForTokenClassification with a cache plan."""


class FusedKVQwen3ForQuestionAnswering(GenericForQuestionAnswering, FusedKVQwen3PreTrainedModel):
    """Qwen3ForQuestionAnswering with a cache plan."""

    base_model_prefix = modeling_qwen3.Qwen3ForQuestionAnswering.base_model_prefix
