"""Llama and Qwen3 of Hugging Face transformers with any cache plan.

Importing this package registers the model types ``fusedkv_llama`` and ``fusedkv_qwen3`` with the Auto
classes, and the attention implementation "fusedkv". Nothing is patched. Untested releases of transformers,
PEFT, accelerate and torch give a warning.
"""

from fusedkv_ext.extras import need

need("transformers", "fusedkv_ext.hf", "hf")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fusedkv_ext.hf.config import FusedKVLlamaConfig, FusedKVQwen3Config, cache_bytes_per_token, config_for
from fusedkv_ext.hf.decoder_export import from_decoder
from fusedkv_ext.hf.interface import register_attention
from fusedkv_ext.hf.modeling import (
    FusedKVLlamaForCausalLM,
    FusedKVLlamaForQuestionAnswering,
    FusedKVLlamaForSequenceClassification,
    FusedKVLlamaForTokenClassification,
    FusedKVLlamaModel,
    FusedKVQwen3ForCausalLM,
    FusedKVQwen3ForQuestionAnswering,
    FusedKVQwen3ForSequenceClassification,
    FusedKVQwen3ForTokenClassification,
    FusedKVQwen3Model,
)
from fusedkv_ext.hf.versions import warn_if_untested

__all__ = [
    "FusedKVLlamaConfig",
    "FusedKVLlamaForCausalLM",
    "FusedKVLlamaForQuestionAnswering",
    "FusedKVLlamaForSequenceClassification",
    "FusedKVLlamaForTokenClassification",
    "FusedKVLlamaModel",
    "FusedKVQwen3Config",
    "FusedKVQwen3ForCausalLM",
    "FusedKVQwen3ForQuestionAnswering",
    "FusedKVQwen3ForSequenceClassification",
    "FusedKVQwen3ForTokenClassification",
    "FusedKVQwen3Model",
    "cache_bytes_per_token",
    "config_for",
    "from_decoder",
]

warn_if_untested()
register_attention()
for _config, *_models in (
    (
        FusedKVLlamaConfig,
        FusedKVLlamaModel,
        FusedKVLlamaForCausalLM,
        FusedKVLlamaForSequenceClassification,
        FusedKVLlamaForTokenClassification,
        FusedKVLlamaForQuestionAnswering,
    ),
    (
        FusedKVQwen3Config,
        FusedKVQwen3Model,
        FusedKVQwen3ForCausalLM,
        FusedKVQwen3ForSequenceClassification,
        FusedKVQwen3ForTokenClassification,
        FusedKVQwen3ForQuestionAnswering,
    ),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _model in zip(
        (
            AutoModel,
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
            AutoModelForQuestionAnswering,
        ),
        _models,
        strict=True,
    ):
        _auto.register(_config, _model, exist_ok=True)
