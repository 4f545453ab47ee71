"""Models on vLLM against the same models in transformers, token for token in float32.

One engine for each model, in this process. `make test-vllm` runs it in an environment with vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_models import (
    LENGTHS,
    LLM,
    SIZES,
    TOKENS,
    answers,
    engine,
    greedy,
    make_model,
    metric,
    plan_of,
    prompts,
)

from fusedkv_ext.hf import from_decoder
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.layers.decoder_config import DecoderConfig

MODELS = [
    ("llama", "vanilla"),
    ("llama", "fusedkv"),
    ("llama", "fusedkv-lite"),
    ("llama", "fusedkv-lite-learnable"),
    ("llama", "yoco"),
    ("llama", "cla"),
    ("llama", "dense-fusion"),
    ("llama", "yoco++"),
    ("llama", "resformer"),
    ("llama", "skipv1"),
    ("llama", "skipv1-yoco"),
    ("llama", "svformer"),
    ("llama", "skipkv1"),
    ("llama", "patchwork"),
    ("qwen3", "yoco-v"),
    ("qwen3", "fusedkv"),
]


@pytest.mark.parametrize(("family", "plan"), MODELS, ids=lambda x: x)
def test_greedy_tokens_are_those_of_transformers(family: str, plan: str, tmp_path: Path) -> None:
    """Prompts of unequal lengths that join and leave: no more than three at once, in chunks of 64 tokens."""
    make_model(tmp_path, family, plan)
    with engine(tmp_path, max_num_seqs=3, max_num_batched_tokens=64) as llm:
        assert answers(llm, prompts()) == greedy(tmp_path, prompts())


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
def test_a_trained_decoder_is_served_from_its_exported_folder(qk_norm: bool, tmp_path: Path) -> None:
    """`fusedkv export --hf` writes it; the tokens are those of the Decoder itself."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: SIZES[name] for name in names} | {"head_dim": SIZES["head_dim"], "num_hidden_layers": 6}
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**sizes, plan="fusedkv", qk_norm=qk_norm)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.05 * torch.randn_like(parameter))
    from_decoder(decoder).save_pretrained(tmp_path)
    inputs = prompts((5, 40, 90))
    with engine(tmp_path) as llm:
        found = answers(llm, inputs)
    for prompt, answer in zip(inputs, found, strict=True):
        with torch.no_grad():
            logits = decoder(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        assert answer == logits.argmax(-1).tolist()


def test_prefix_caching_changes_no_token(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", "fusedkv")
    inputs = prompts((5, 17, 40, 90), shared=120)
    with engine(tmp_path) as llm:
        for _ in range(2):
            assert answers(llm, inputs) == greedy(tmp_path, inputs)
        assert metric(llm, "prefix_cache_hits") >= 4 * 96  # whole blocks of 32


def test_preemption_changes_no_token(tmp_path: Path) -> None:
    """Two requests that each begin with two blocks of four and come to need a third."""
    make_model(tmp_path, "llama", "fusedkv")
    inputs = prompts((60, 61))
    with engine(tmp_path, num_gpu_blocks_override=5, block_size=32, max_model_len=96) as llm:
        assert answers(llm, inputs) == greedy(tmp_path, inputs)
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1", "svformer", "skipv1-yoco", "patchwork"])
def test_the_engine_has_blocks_for_what_layers_store(plan: str, tmp_path: Path) -> None:
    """1 / cache_ratio as many as for plain Llama in the same memory, within one block.

    A layer that stores nothing has one element per token if other layers' pages differ.
    """
    make_model(tmp_path, "llama", plan)
    stored = plan_of(plan)
    with engine(tmp_path) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        elements = stored.num_layers * 2 * 2 * 16 * stored.cache_ratio + (plan == "patchwork")  # per token
        assert abs(2**30 / (elements * 4 * cache.block_size) - cache.num_gpu_blocks) <= 1


def rows_of_readers(llm: LLM, inputs: list[list[int]]) -> tuple[list[list[int]], int]:
    """The answers, and how many rows the last layer has seen."""
    seen = []
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    hook = model.model.layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = answers(llm, inputs)
    hook.remove()
    return found, sum(seen)


@pytest.mark.parametrize(
    ("plan", "exits"), [("fusedkv", True), ("fusedkv-lite", True), ("yoco++", True), ("skipv1", False)]
)
def test_readers_see_only_rows_with_logits_after_an_early_exit(
    plan: str, exits: bool, tmp_path: Path
) -> None:
    make_model(tmp_path, "llama", plan)
    rows = sum(LENGTHS) + len(LENGTHS) * (TOKENS - 1)
    options = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    with engine(tmp_path, kv_sharing_fast_prefill=True, **options) as llm:
        found, seen = rows_of_readers(llm, prompts())
        assert found == greedy(tmp_path, prompts())
    chunks = sum(-(-n // 64) + 3 for n in LENGTHS)
    assert seen <= len(LENGTHS) * TOKENS + chunks if exits else seen >= rows


@pytest.mark.parametrize("early_exit", [False, True])
def test_compiled_models_give_the_same_tokens(early_exit: bool, tmp_path: Path) -> None:
    make_model(tmp_path, "llama", "fusedkv", layers=4)
    with engine(tmp_path, enforce_eager=False, kv_sharing_fast_prefill=early_exit) as llm:
        assert answers(llm, prompts()) == greedy(tmp_path, prompts())


@pytest.mark.parametrize("storing", ["alike", "mixed"])
def test_sliding_windows_of_qwen3(storing: str, tmp_path: Path) -> None:
    full, sliding = "full_attention", "sliding_attention"
    kinds = [full, full if storing == "alike" else sliding, full, full, full, sliding, full, sliding]
    windows = {"layer_types": kinds, "sliding_window": 24, "use_sliding_window": True}
    make_model(tmp_path, "qwen3", "fusedkv", **windows)
    with engine(tmp_path) as llm:
        assert answers(llm, prompts()) == greedy(tmp_path, prompts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be auto or float32"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "use tensor parallelism"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_model(tmp_path, "llama", "fusedkv")
    with pytest.raises(ValueError, match=message):
        with engine(tmp_path, **options):
            pass
