"""Writes the models, makes the engines in this process, and has them take turns: A B C A B C."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.vllm.versions import vllm_version
from suite.machine import busy_seconds, machine
from suite.serving import goals
from suite.serving.engines import Engine
from suite.serving.settings import EngineSpec, Settings

FORMAT = 1
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS counts
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def write_model(folder: Path, spec: EngineSpec, settings: Settings) -> None:
    """A Llama with random weights: the same for all engines as far as they have the same parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import fusedkv_ext.hf as fkv_hf

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=11 * settings.hidden // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=max(settings.max_len("pressure"), settings.max_len("room")),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    plan = spec.plan(settings.layers)
    config = config if plan is None else fkv_hf.config_for(config, plan)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "kv_fusion" in name:
                weight.copy_(0.5 + 0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """What vLLM finds in its environment. Without OMP_NUM_THREADS it takes one thread."""
    before = dict(os.environ)
    os.environ |= ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would replace the memory that engines are given
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def row(scenario: str, spec: EngineSpec, settings: Settings) -> dict[str, Any]:
    plan = spec.plan(settings.layers)
    return {
        "scenario": scenario,
        "engine": spec.label,
        "plan": plan and plan.name,
        "cache_ratio": float(plan.cache_ratio) if plan else 1.0,
        "early_exit": spec.early_exit,
        "cache_bytes": settings.cache_bytes(scenario),
        "cache_tokens": None,
        "rounds": [],
        "error": None,
    }


def summarized(found: dict[str, Any]) -> dict[str, Any]:
    """A row with its figures: of the best round, and the best step of all."""
    if not found["rounds"]:
        return found
    best = min(found["rounds"], key=lambda turn: turn["seconds"])
    steps = [step for turn in found["rounds"] for step in turn["step"]]
    return found | {
        "running": max(turn["running"] for turn in found["rounds"]),
        "tokens_per_s": best["output_tokens"] / best["seconds"],
        "ttft_s": statistics.median(best["ttft"]),
        "tpot_ms": 1e3 * statistics.median(best["tpot"]),
        "preemptions": best["preemptions"],
        "prefill_s": min(max(turn["ttft"]) for turn in found["rounds"]),
        "step_ms": 1e3 * min(steps) if steps else None,
        "step_median_ms": 1e3 * statistics.median(steps) if steps else None,
    }


def measure(
    scenario: str, folders: dict[EngineSpec, Path], settings: Settings, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of one scenario. An engine that fails takes no further turns; its row has the error."""
    rows = {spec: row(scenario, spec, settings) for spec in folders}
    engines: dict[EngineSpec, Engine] = {}

    def attempt(spec: EngineSpec, what: Callable[[], str]) -> None:
        if rows[spec]["error"]:
            return
        try:
            show(f"{scenario}, {spec.label}: {what()}")
        except Exception as error:
            rows[spec]["error"] = f"{type(error).__name__}: {error}"
            show(f"{scenario}, {spec.label}: {rows[spec]['error']}")

    def start(spec: EngineSpec, folder: Path) -> str:
        engine = engines[spec] = Engine(folder, spec, settings, scenario)
        rows[spec]["cache_tokens"] = engine.cache_tokens
        engine.turn(1, min(settings.prompt, 64), 4, seed=0)  # libraries are loaded then
        return f"{engine.cache_tokens:,} tokens of cache"

    def turn(spec: EngineSpec, seed: int) -> str:
        sizes = (settings.sent(scenario), settings.prompt, settings.answer(scenario))
        found = engines[spec].turn(*sizes, seed)
        rows[spec]["rounds"].append(asdict(found))
        return f"round {seed}, {found.seconds:.1f} s"

    try:
        for spec, folder in folders.items():
            attempt(spec, partial(start, spec, folder))
        for seed in range(1, settings.rounds + 1):
            for spec in folders:
                attempt(spec, partial(turn, spec, seed))
    finally:
        for engine in engines.values():
            engine.shutdown()
    return [summarized(found) for found in rows.values()]


def run(
    scenarios: Sequence[str],
    chosen: Sequence[EngineSpec],
    settings: Settings,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures all engines in all scenarios.

    Returns:
        What benchmarks/serving.py writes as JSON.
    """
    began, others_began = time.monotonic(), busy_seconds()
    threads = settings.threads or torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, environment(threads):
        folders: dict[EngineSpec, Path] = {}
        for spec in chosen:
            folders[spec] = Path(scratch) / spec.name.replace(":", "_").replace("/", "_")
            if not folders[spec].exists():
                write_model(folders[spec], spec, settings)
        for scenario in scenarios:
            rows += measure(scenario, folders, settings, show)
    seconds = time.monotonic() - began
    others = (busy_seconds() - others_began) / seconds / (os.cpu_count() or 1)
    found = machine() | {"vllm": vllm_version(), "threads": threads}
    return {
        "format": FORMAT,
        "settings": settings.name,
        "sizes": asdict(settings),
        "scenarios": list(scenarios),
        "machine": found | {"other_processes_percent": round(max(100 * others, 0.0), 1)},
        "seconds": round(seconds, 1),
        "rows": rows,
        "goals": goals.judge(rows, scenarios),
    }
