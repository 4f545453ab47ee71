"""What the vLLM plugin refuses before an engine starts. Runs without vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedkv_ext.cache.codec import CodecPlan
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.plan.methods import METHODS
from fusedkv_ext.vllm import config, versions


def plan(name: str, layers: int = 8) -> CachePlan:
    return CachePlan.named(name, layers)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_layers_are_whole_if_they_store_both_sides_or_nothing(name: str) -> None:
    stored = {
        (len(plan(name).stored_key_heads(i, 4)), len(plan(name).stored_value_heads(i, 4))) for i in range(8)
    }
    assert config.stores_whole_layers(plan(name), 4) == (stored <= {(0, 0), (4, 4)})


@pytest.mark.parametrize(
    ("heads", "ranks", "fits"),
    [(4, 1, True), (4, 2, True), (4, 4, True), (2, 4, True), (4, 3, False), (3, 2, False)],
)
def test_ranks_have_whole_heads_or_copies_of_one(heads: int, ranks: int, fits: bool) -> None:
    if fits:
        config.check_tensor_parallel(plan("fusedkv"), heads, ranks)
        return
    with pytest.raises(
        ValueError, match=f"tensor_parallel_size must divide the {heads} KV heads .* got {ranks}"
    ):
        config.check_tensor_parallel(plan("fusedkv"), heads, ranks)


def test_a_plan_of_some_heads_is_not_split_over_ranks() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size must be 1 for plan 'skipv1'"):
        config.check_tensor_parallel(plan("skipv1"), 4, 2)


def test_ranks_hold_no_copies_of_a_head_if_layers_store_one_side() -> None:
    config.check_tensor_parallel(plan("svformer"), 4, 2)
    with pytest.raises(ValueError, match="must divide the 2 KV heads for plan 'svformer', got 4"):
        config.check_tensor_parallel(plan("svformer"), 2, 4)


def test_a_stage_may_end_where_no_later_layer_reads_an_earlier_one() -> None:
    config.check_stages(plan("vanilla"), [(0, 3), (3, 8)])
    config.check_stages(plan("cla"), [(0, 4), (4, 8)])
    with pytest.raises(
        ValueError, match=r"layer 3 .* and layer 2, .*cut before one of the layers \[2, 4, 6\]"
    ):
        config.check_stages(plan("cla"), [(0, 3), (3, 8)])
    with pytest.raises(ValueError, match="layer 4 .*'fusedkv' and layer 0.*use tensor parallelism"):
        config.check_stages(plan("fusedkv"), [(0, 4), (4, 8)])


def engine(layer_types: list[str] | None = None, **changes: Any) -> Any:
    """What EngineChecks reads of vLLM's configuration."""
    found = changes.get("plan", plan("fusedkv"))
    codecs = None if "codecs" not in changes else CodecPlan.named(changes["codecs"], found)
    hf_config = SimpleNamespace(plan=found, codecs=codecs, num_key_value_heads=2, layer_types=layer_types)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=changes.get("ranks", 1), pipeline_parallel_size=1
        ),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        lora_config=changes.get("lora_config"),
        speculative_config=changes.get("speculative_config"),
        device_config=SimpleNamespace(device_type=changes.get("device", "cpu")),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    )


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2", "nvfp4", "float16"])
def test_caches_of_another_dtype_than_the_model_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"kv_cache_dtype must be auto or bfloat16, .* got '{dtype}'"):
        config.EngineChecks.verify_and_update_config(engine(cache_dtype=dtype))


@pytest.mark.filterwarnings("error")
def test_adapters_on_cpus_are_warned_of() -> None:
    config.EngineChecks.verify_and_update_config(engine(lora_config=object(), device="cuda"))
    with pytest.warns(UserWarning, match="max_loras to one more"):
        config.EngineChecks.verify_and_update_config(engine(lora_config=object()))


def test_drafts_on_cpus_need_a_sampler_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "vllm_version", lambda: "0.30.0")
    config.EngineChecks.verify_and_update_config(engine())
    config.EngineChecks.verify_and_update_config(engine(speculative_config=object(), device="cuda"))
    with pytest.raises(ValueError, match="must be None on CPUs with vLLM 0.30.0, .* vLLM 0.31 or newer"):
        config.EngineChecks.verify_and_update_config(engine(speculative_config=object()))
    for version in ("0.31.0", "0.32.1", "1.0", "unknown"):
        config.check_drafts(version)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codecs": "kivi"}, "must keep no raw rows"),
        ({"codecs": "turboquant:sinks=0,tail=0"}, "static scales per channel"),
        ({"codecs": "int8", "ranks": 2}, "tensor_parallel_size must be 1 with cache_codecs"),
        ({"codecs": "int8", "plan": plan("yoco++")}, "mixes new keys or values"),
    ],
)
def test_codes_that_blocks_cannot_hold_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.EngineChecks.verify_and_update_config(engine(**changes))
    config.EngineChecks.verify_and_update_config(engine(codecs="int8"))


def test_storing_layers_with_different_windows_share_one_cache_group() -> None:
    full, sliding = "full_attention", "sliding_attention"
    for types, groups in (
        (None, False),
        ([full] * 8, False),
        ([full] * 4 + [sliding] * 4, False),  # only readers have a window
        ([full, sliding] * 4, True),
    ):
        found = engine(types)
        config.EngineChecks.verify_and_update_config(found)
        assert found.scheduler_config.disable_hybrid_kv_cache_manager == groups


def test_an_untested_release_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, warns in (
        ("0.32.0", False),
        ("0.32.1+cpu", False),
        ("0.29.3", True),
        ("1.0", True),
        ("unknown", True),
    ):
        monkeypatch.setattr(versions, "vllm_version", lambda version=version: version)
        if warns:
            with pytest.warns(UserWarning, match=f"tested with vLLM .*this is {re.escape(version)}"):
                versions.warn_if_untested()
        else:
            versions.warn_if_untested()


def test_a_missing_internal_of_vllm_is_one_sentence() -> None:
    with pytest.raises(
        ImportError, match="cannot serve with vLLM .*lacks what its plugin needs .*nowhere.*install"
    ):
        with versions.needed():
            import fusedkv_ext.nowhere  # noqa: F401


def test_the_plugin_imports_nothing_of_vllm_before_it_is_called() -> None:
    code = (
        "import sys, fusedkv_ext, fusedkv_ext.vllm; assert 'vllm' not in sys.modules\n"
        "import fusedkv_ext.vllm.config; assert not any(x.split('.')[0] == 'vllm' for x in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_entry_point_is_the_plugin() -> None:
    from importlib.metadata import entry_points

    found = [x for x in entry_points(group="vllm.general_plugins") if x.name == "fusedkv"]
    assert [x.value for x in found] == ["fusedkv_ext.vllm:register"]
