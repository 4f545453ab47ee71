"""What an engine can be started with, against transformers.

Variants of the model, adapters, drafts, quantized weights, bfloat16, compiled layers, several processes.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm_models import (
    TOKENS,
    LoRARequest,
    SamplingParams,
    answers,
    engine,
    generate,
    greedy,
    load,
    log_probs,
    make_model,
    metric,
    prompts,
)

from fusedkv_ext.vllm.config import check_drafts
from fusedkv_ext.vllm.versions import vllm_version

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "change",
    [{"tie_word_embeddings": True}, {"attention_bias": True}, {"rope_parameters": LLAMA3}],
    ids=lambda x: next(iter(x)),
)
def test_variants_of_llama(change: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama", "fusedkv", **change)
    expected = greedy(tmp_path / "model", prompts())
    make_model(tmp_path / "usual", "llama", "fusedkv")
    assert expected != greedy(tmp_path / "usual", prompts())
    with engine(tmp_path / "model") as llm:
        assert answers(llm, prompts()) == expected


def test_tokens_with_and_without_an_adapter_are_those_of_peft(tmp_path: Path) -> None:
    """An adapter on every projection, in one batch with requests that do without.

    On CPUs vLLM gives the latter the weights of the last slot for adapters, so one slot is left empty.
    """
    from peft import LoraConfig, get_peft_model

    make_model(tmp_path / "model", "llama", "fusedkv")
    expected = [greedy(tmp_path / "model", prompts())]
    torch.manual_seed(3)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(tmp_path / "model"), lora).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.08)
    adapted.save_pretrained(tmp_path / "adapter")
    expected.append(generate(adapted, prompts()))
    assert all(x != y for x, y in zip(*expected, strict=True))
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": x} for x in prompts()]
    adapters = [None] * len(inputs) + [LoRARequest("adapter", 1, str(tmp_path / "adapter"))] * len(inputs)
    with engine(tmp_path / "model", enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        said = llm.generate(inputs * 2, sampling, use_tqdm=False, lora_request=adapters)
    assert [list(x.outputs[0].token_ids) for x in said] == expected[0] + expected[1]


def test_drafts_from_the_prompt_change_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model repeats itself, so that some drafts are accepted and others are not.

    The engine has its own process: numba, which looks for drafts, keeps vLLM from starting an engine where it
    has been imported.
    """
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    make_model(tmp_path, "llama", "fusedkv")
    try:
        check_drafts(vllm_version())
    except ValueError as error:
        pytest.skip(str(error))
    tokens = 40
    inputs = prompts((5, 60, 17, 130))
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(tmp_path, speculative_config=drafts) as llm:
        found = answers(llm, inputs, max_tokens=tokens, min_tokens=tokens)
        drafted, accepted = (metric(llm, f"spec_decode_num_{x}_tokens") for x in ("draft", "accepted"))
    assert found == generate(load(tmp_path), inputs, tokens)
    assert 20 < accepted < drafted - 20


def to_int8(source: Path, folder: Path) -> None:
    """Projections as int8 with a scale for each output, in the format of compressed-tensors.

    Seven bits are used: products of eight saturate in vLLM's kernel on CPUs without VNNI instructions.
    """
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 63
            weights[f"{name}_scale"] = scale
            weight = (weight / scale).round().to(torch.int8)
        weights[name] = weight
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class Int8Linear(nn.Linear):
    """The arithmetic of such a projection in float32, of which ``weight`` is in whole steps already."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear((x / scale).round() * scale, self.weight)


def prompt_log_probs(folder: Path, inputs: list[list[int]], **options: Any) -> list[Tensor]:
    """What vLLM says of the tokens of each prompt, the first without."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    with engine(folder, **options) as llm:
        said = llm.generate([{"prompt_token_ids": x} for x in inputs], sampling, use_tqdm=False)
    return [
        torch.tensor(
            [entry[token].logprob for token, entry in zip(prompt[1:], x.prompt_logprobs[1:], strict=True)]
        )
        for prompt, x in zip(inputs, said, strict=True)
    ]


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def of_tokens(model: Any, prompt: list[int]) -> Tensor:
    """The same in transformers."""
    return log_probs(model, prompt)[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]


def test_int8_weights_have_the_log_probabilities_of_their_arithmetic(tmp_path: Path) -> None:
    """Equal until an input is rounded to the other side, which later tokens of the prompt feel."""
    make_model(tmp_path / "model", "llama", "fusedkv")
    to_int8(tmp_path / "model", tmp_path / "int8")
    inputs = prompts((6,) * 16 + (64, 300))
    found = torch.cat(prompt_log_probs(tmp_path / "int8", inputs))
    weights, model = load_file(tmp_path / "int8" / "model.safetensors"), load(tmp_path / "model")
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.endswith("_proj"):
                layer.weight.copy_(weights[f"{name}.weight"] * weights[f"{name}.weight_scale"])
    exact = torch.cat([of_tokens(model, x) for x in inputs])
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            layer.__class__ = Int8Linear
    expected = torch.cat([of_tokens(model, x) for x in inputs])
    equal = (found - expected).abs() < 1e-5
    assert equal[:80].float().mean() > 0.8  # of the short prompts
    assert rms(found - exact) <= 1.5 * rms(expected - exact)


def test_bfloat16_is_as_exact_as_in_transformers(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", "fusedkv")
    inputs = prompts((5, 64, 300))
    found = torch.cat(prompt_log_probs(tmp_path, inputs, dtype="bfloat16"))
    exact, rounded = (
        torch.cat([of_tokens(load(tmp_path, dtype), x) for x in inputs])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (found - exact).abs().max() <= 2 * (rounded - exact).abs().max()
    assert rms(found - exact) <= 1.5 * rms(rounded - exact)


@pytest.mark.parametrize("heads", [2, 1])
def test_two_ranks_share_the_heads(heads: int, tmp_path: Path) -> None:
    """With one KV head both ranks hold a copy of it."""
    make_model(tmp_path, "llama", "fusedkv", num_key_value_heads=heads)
    with engine(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert answers(llm, prompts()) == greedy(tmp_path, prompts())
    assert not multiprocessing.active_children()


def test_two_stages_of_a_plan_that_can_be_cut(tmp_path: Path) -> None:
    """On CPUs vLLM makes the buffers between stages only for layers that are traced."""
    make_model(tmp_path, "llama", "cla", layers=4)
    traced = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(tmp_path, max_num_batched_tokens=64, **stages, **traced) as llm:
        assert answers(llm, prompts()) == greedy(tmp_path, prompts())
    assert not multiprocessing.active_children()
