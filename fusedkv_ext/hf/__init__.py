"""Llama and Qwen3 of HuggingFace transformers on any cache plan.

Importing this package registers the model types ``fusedkv_llama`` and ``fusedkv_qwen3`` with AutoConfig,
AutoModel and AutoModelForCausalLM, and the attention implementation "fusedkv". Nothing is patched.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fusedkv_ext.hf.config import (
    FusedKVLlamaConfig,
    FusedKVQwen3Config,
    cache_bytes_per_token,
    config_for,
)
from fusedkv_ext.hf.convert import Conversion, calibration_windows, convert_model, save_conversion
from fusedkv_ext.hf.interface import register_attention
from fusedkv_ext.hf.modeling import (
    FusedKVLlamaForCausalLM,
    FusedKVLlamaModel,
    FusedKVQwen3ForCausalLM,
    FusedKVQwen3Model,
)
from fusedkv_ext.hf.uptrain import uptrain
from fusedkv_ext.hf.uptrain_settings import UptrainSettings

__all__ = [
    "Conversion",
    "FusedKVLlamaConfig",
    "FusedKVLlamaForCausalLM",
    "FusedKVLlamaModel",
    "FusedKVQwen3Config",
    "FusedKVQwen3ForCausalLM",
    "FusedKVQwen3Model",
    "UptrainSettings",
    "cache_bytes_per_token",
    "calibration_windows",
    "config_for",
    "convert_model",
    "save_conversion",
    "uptrain",
]

register_attention()
for _config, _model, _causal in (
    (FusedKVLlamaConfig, FusedKVLlamaModel, FusedKVLlamaForCausalLM),
    (FusedKVQwen3Config, FusedKVQwen3Model, FusedKVQwen3ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
