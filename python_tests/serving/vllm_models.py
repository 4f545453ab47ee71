"""Tiny models on vLLM, and the same models in transformers, that the tests of the plugin share.

Importing it skips the test file in an environment without vLLM; `make test-vllm` has one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
if os.environ.get("FUSEDKV_REQUIRE_VLLM") is None:
    pytest.importorskip("vllm", reason="needs vllm; run `make test-vllm`")

from tiny import PLANS
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest  # noqa: F401  (for the test files)
from vllm.sampling_params import StructuredOutputsParams  # noqa: F401

import fusedkv_ext.hf as fkv_hf
from fusedkv_ext.plan import CachePlan

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config}
TOKENS = 12  # of each answer
LENGTHS = (5, 17, 64, 129, 1, 300)  # of the prompts


def prompts(lengths: tuple[int, ...] = LENGTHS, shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    common = torch.randint(3, 320, (shared,), generator=generator).tolist()
    return [common + torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def plan_of(name: str, layers: int = 8) -> CachePlan:
    return PLANS[name] if name == "patchwork" else CachePlan.named(name, layers)


def make_model(folder: Path, family: str, plan: str, layers: int = 8, **changes: Any) -> None:
    """A model whose fusion weights are random: a wrong source or weight changes its tokens."""
    torch.manual_seed(0)
    found = plan_of(plan, layers)
    plain = FAMILIES[family](**{**SIZES, "num_hidden_layers": found.num_layers, **changes})
    config = fkv_hf.config_for(plain, found)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kv_fusion" in name:
                parameter.copy_(0.5 + 0.3 * torch.randn_like(parameter))
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def generate(model: Any, inputs: list[list[int]], tokens: int = TOKENS, **options: Any) -> list[list[int]]:
    """What a model of transformers answers to each prompt alone."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **options}
    answers = []
    for prompt in inputs:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def greedy(folder: Path, inputs: list[list[int]]) -> list[list[int]]:
    """What the model in a folder answers in transformers."""
    return generate(load(folder), inputs)


@torch.no_grad()
def log_probs(model: Any, tokens: list[int]) -> Tensor:
    """(tokens, vocabulary) log-probabilities of the token after each one."""
    return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    found = LLM(
        model=str(folder),
        **{
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 512,
            "seed": 0,
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "disable_log_stats": False,
            **options,
        },
    )
    try:
        yield found
    finally:
        found.llm_engine.engine_core.shutdown()
        del found
        gc.collect()


def answers(llm: LLM, inputs: list[list[int]], **options: Any) -> list[list[int]]:
    options = {"max_tokens": TOKENS, "min_tokens": TOKENS, **options}
    sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **options)
    outs = llm.generate([{"prompt_token_ids": x} for x in inputs], sampling, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs]


def metric(llm: LLM, name: str) -> float:
    return sum(x.value for x in llm.get_metrics() if x.name == f"vllm:{name}")
