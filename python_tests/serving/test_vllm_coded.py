"""Coded models in vLLM: blocks of codes, and the tokens of the same codes in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm_models import (  # skips without vllm
    TOKENS,
    answers,
    engine,
    load,
    make_model,
    metric,
    plan_of,
    prompts,
)

from fusedkv_ext.conversion.coding import code_model, collect_stored, simulated


def make_coded(folder: Path, family: str, plan: str, label: str) -> None:
    """A coded model with random weights."""
    make_model(folder, family, plan)
    model = load(folder)
    samples = collect_stored(model, torch.randint(3, 320, (8, 256)))
    code_model(model, label, samples)
    model.save_pretrained(folder)


@torch.no_grad()
def coded_greedy(folder: Path, inputs: list[list[int]]) -> list[list[int]]:
    """The answers where every row of prompt and answer attends to codes, as in an engine."""
    model, found = load(folder), []
    with simulated(model):
        for prompt in inputs:
            tokens = list(prompt)
            for _ in range(TOKENS):
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
                tokens.append(int(logits.argmax()))
            found.append(tokens[len(prompt) :])
    return found


@pytest.mark.parametrize(
    ("family", "plan", "label"),
    [
        ("llama", "vanilla", "int8"),
        ("qwen3", "fusedkv", "int4:sinks=0"),
        ("llama", "skipv1", "fp8"),
        ("llama", "yoco", "int8"),
    ],
)
def test_tokens_and_blocks_are_those_of_the_codes(family: str, plan: str, label: str, tmp_path: Path) -> None:
    make_coded(tmp_path, family, plan, label)
    inputs = prompts((5, 17, 129))
    codecs = load(tmp_path).config.codecs
    size = codecs.bytes_per_token(plan_of(plan), 2, 16, torch.float32)
    if plan == "fusedkv":  # where pages differ, a layer that stores nothing has one byte per token
        size += len(codecs.layers) - len(plan_of(plan).storage_layers)
    with engine(tmp_path) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        assert abs(2**30 / (size * cache.block_size) - cache.num_gpu_blocks) <= 1
        assert answers(llm, inputs) == coded_greedy(tmp_path, inputs)


def test_prefix_caching_and_preemption_change_no_token(tmp_path: Path) -> None:
    make_coded(tmp_path, "llama", "fusedkv", "int8")
    inputs = prompts((60, 61))
    with engine(tmp_path, num_gpu_blocks_override=5, block_size=32, max_model_len=96) as llm:
        assert answers(llm, inputs) == coded_greedy(tmp_path, inputs)
        assert metric(llm, "num_preemptions") > 0
    shared = prompts((9, 17), shared=96)
    with engine(tmp_path, enable_prefix_caching=True, block_size=32) as llm:
        for _ in range(2):
            assert answers(llm, shared) == coded_greedy(tmp_path, shared)
        assert metric(llm, "prefix_cache_hits") >= 96


@pytest.mark.parametrize(
    ("plan", "label", "message"),
    [
        ("fusedkv", "kivi:group=16", "no raw rows"),
        ("fusedkv", "int4", "no raw rows"),
        ("fusedkv", "turboquant:sinks=0,tail=0", "static scales per channel"),
        ("yoco++", "int8", "mixes new keys or values"),
    ],
)
def test_codes_that_blocks_cannot_hold_are_refused(
    plan: str, label: str, message: str, tmp_path: Path
) -> None:
    make_coded(tmp_path, "llama", plan, label)
    with pytest.raises(Exception, match=message), engine(tmp_path):
        pass
