"""What vLLM can serve of a cache plan: checked when the engine's configuration is made, before any weight."""

from __future__ import annotations

import warnings
from typing import Any

from fusedkv_ext.cache.codec import CodecPlan
from fusedkv_ext.cache.codec.kernel_codes import check_codes
from fusedkv_ext.layers.layer_io import SidePlan, mixes_any
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.plan.latent import WHOLE
from fusedkv_ext.vllm.versions import minor_release, needed, vllm_version

__all__ = [
    "EngineChecks",
    "check_drafts",
    "check_stages",
    "check_tensor_parallel",
    "stores_whole_layers",
    "storing_windows",
]


class EngineChecks:
    """The entry of our architectures in vLLM's ``MODELS_CONFIG_MAP``."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuses what would give wrong tokens, and chooses how vLLM manages the cache.

        Raises:
            ValueError: The plan, the parallelism or the dtype of the cache cannot be served.
        """
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        plan, heads = config.plan, config.num_key_value_heads
        check_tensor_parallel(plan, heads, parallel.tensor_parallel_size)
        if parallel.pipeline_parallel_size > 1:
            with needed():
                from vllm.distributed.utils import get_pp_indices
            if vllm_config.cache_config.kv_sharing_fast_prefill:
                raise ValueError("kv_sharing_fast_prefill must be off with pipeline parallelism, got both")
            stages = parallel.pipeline_parallel_size
            check_stages(plan, [get_pp_indices(plan.num_layers, i, stages) for i in range(stages)])
        on_cpu = vllm_config.device_config.device_type == "cpu"
        if on_cpu and vllm_config.speculative_config is not None:
            check_drafts(vllm_version())
        if on_cpu and vllm_config.lora_config is not None:
            warnings.warn(
                "on CPUs vLLM computes requests without an adapter with the adapter in its last slot; set "
                "max_loras to one more than the adapters that you use",
                stacklevel=2,
            )
        if config.codecs is not None:
            check_codecs(config.codecs, plan, heads, parallel.tensor_parallel_size)
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        if vllm_config.cache_config.cache_dtype not in ("auto", dtype):
            raise ValueError(
                f"kv_cache_dtype must be auto or {dtype}, the dtype of the model, got "
                f"{vllm_config.cache_config.cache_dtype!r}: codes need scales that fit the model; leave "
                "--kv-cache-dtype out, and serve a folder of `fusedkv compress --codecs int8`"
            )
        if len(storing_windows(config)) > 1:
            # One block table for all layers: groups by window would have tables of their own, and a layer may
            # read sources of two groups.
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to change."""


def stores_whole_layers(plan: CachePlan, num_kv_heads: int, codecs: CodecPlan | None = None) -> bool:
    """Whether each layer stores all heads of both sides, coded alike, or nothing."""
    if codecs is not None and len({codecs.layers[i] for i in plan.storage_layers}) > 1:
        return False
    whole = ([0, 0], [num_kv_heads] * 2)
    return all(
        [SidePlan.resolve(plan, i, num_kv_heads, side).num_stored for side in ("key", "value")] in whole
        for i in range(plan.num_layers)
    )


def check_codecs(codecs: CodecPlan, plan: CachePlan, num_kv_heads: int, ranks: int) -> None:
    """Checks that blocks can hold the codes of a coded model.

    Raises:
        ValueError: Codes need raw rows or groups of tokens, a layer mixes before it stores, or ranks would
            share the heads.
    """
    check_codes(codecs, plan, static=True)
    if ranks > 1:
        raise ValueError(f"tensor_parallel_size must be 1 with cache_codecs, got {ranks}")
    for i in range(plan.num_layers):
        if mixes_any(plan, i, num_kv_heads):
            raise ValueError(
                f"cache_codecs must be None for plan {plan.name!r}, got codecs: its layer {i} mixes new keys "
                "or values with those that others have stored"
            )


def check_drafts(version: str) -> None:
    """Checks that this release can decode speculatively on CPUs: the sampler of 0.30 has Triton kernels only.

    Raises:
        ValueError: It cannot.
    """
    if () < minor_release(version) < (0, 31):
        raise ValueError(
            f"speculative_config must be None on CPUs with vLLM {version}, whose sampler for drafts needs "
            "Triton; install vLLM 0.31 or newer"
        )


def check_tensor_parallel(plan: CachePlan, num_kv_heads: int, ranks: int) -> None:
    """Checks that ``ranks`` processes can share the heads of each layer.

    Raises:
        ValueError: A rank would hold part of a KV head, or a plan treats KV heads of a layer differently.
    """
    if ranks == 1:
        return
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(
            f"tensor_parallel_size must divide the {num_kv_heads} KV heads or be a multiple of them, got "
            f"{ranks}"
        )
    for i, layer in enumerate(plan.layers):
        if any(part.heads != WHOLE for part in (*layer.keys, *layer.values)):
            raise ValueError(
                f"tensor_parallel_size must be 1 for plan {plan.name!r}, got {ranks}: its layer {i} does not "
                "treat all KV heads alike"
            )
    if num_kv_heads % ranks and not stores_whole_layers(plan, num_kv_heads):
        raise ValueError(
            f"tensor_parallel_size must divide the {num_kv_heads} KV heads for plan {plan.name!r}, got "
            f"{ranks}: its layers store keys or values only"
        )


def check_stages(plan: CachePlan, stages: list[tuple[int, int]]) -> None:
    """Checks that no layer reads the cache of another pipeline stage.

    Args:
        plan: The cache plan.
        stages: The layers [begin, end) of each stage.

    Raises:
        ValueError: A reader is cut from a source; the message says where a cut is possible.
    """
    for begin, end in stages:
        for i in range(begin, end):
            outside = [j for j in plan.source_layers(i) if not begin <= j < end]
            if outside:
                cuts = _possible_cuts(plan)
                where = f"cut before one of the layers {cuts}" if cuts else "use tensor parallelism"
                raise ValueError(
                    f"pipeline_parallel_size={len(stages)} puts layer {i} of plan {plan.name!r} and layer "
                    f"{outside[0]}, whose cache it reads, into two stages; {where} "
                    "(VLLM_PP_LAYER_PARTITION sets the layers of each stage)"
                )


def _possible_cuts(plan: CachePlan) -> list[int]:
    """The layers before which a stage can end: no later layer reads an earlier one."""
    lowest = [min((i, *plan.source_layers(i))) for i in range(plan.num_layers)]
    return [cut for cut in range(1, plan.num_layers) if all(low >= cut for low in lowest[cut:])]


def storing_windows(config: Any) -> set[str]:
    """The kinds of layers, full or sliding, among those that store."""
    types = getattr(config, "layer_types", None) or []
    return {types[i] for i in config.plan.storage_layers if i < len(types)}
