"""vLLM plugin: serves the folders of ``fusedkv convert``, ``fusedkv uptrain`` and ``fusedkv export --hf``.

vLLM finds :func:`register` by its entry point and calls it in every process. Nothing is imported from vLLM
before that. docs/serving.md says what is supported.
"""

from __future__ import annotations

__all__ = ["ARCHITECTURES", "register"]

ARCHITECTURES = ("FusedKVLlamaForCausalLM", "FusedKVQwen3ForCausalLM")


def register() -> None:
    """Registers the model types with transformers, and the models and their attention with vLLM.

    vLLM calls it several times. Models and attention are named here, and imported when a model is made.

    Raises:
        ImportError: This vLLM lacks what the plugin needs.
    """
    from fusedkv_ext.vllm.versions import needed, warn_if_untested

    warn_if_untested()
    with needed():
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import fusedkv_ext.hf  # noqa: F401  AutoConfig knows the model types then
    from fusedkv_ext.vllm.config import EngineChecks

    for name in ARCHITECTURES:
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, "fusedkv_ext.vllm.model:PlanForCausalLM")
        MODELS_CONFIG_MAP[name] = EngineChecks
    register_backend(AttentionBackendEnum.CUSTOM, "fusedkv_ext.vllm.attention.PlanAttentionBackend")
