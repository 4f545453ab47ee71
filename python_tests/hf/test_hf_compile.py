"""Models of transformers on a plan under torch.compile: one graph, the same result."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import close, left_padded, tiny_model, tokens
from transformers import CompileConfig, StaticCache


def test_the_whole_model_compiles_into_one_graph() -> None:
    model, ids = tiny_model("llama", "patchwork"), tokens(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_compiled_step_over_a_static_cache_is_one_graph() -> None:
    model, ids = tiny_model("llama", "fusedkv"), tokens(2, 9)
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :7], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for now in (slice(7, 8), slice(8, 9)):
        close(step(ids[:, now], past_key_values=cache).logits, expected[:, now])


def test_training_compiles_into_one_graph() -> None:
    model, ids = tiny_model("qwen3", "fusedkv", use_cache=False).train(), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        close(weight.grad, expected[name])


@pytest.mark.parametrize("plan", ["fusedkv-lite", "skipv1"])
@torch.no_grad()
def test_all_steps_over_a_static_cache_are_one_graph(plan: str) -> None:
    torch.compiler.reset()
    model, ids = tiny_model("llama", plan), tokens(2, 12)
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :8], past_key_values=cache)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(8, 12):
        close(compiled(ids[:, step : step + 1], past_key_values=cache).logits[:, 0], expected[:, step])
    assert counter.frame_count == 1


slow = pytest.mark.skipif(
    not os.environ.get("FUSEDKV_INDUCTOR"), reason="set FUSEDKV_INDUCTOR=1: half a minute of compiling C++"
)


@pytest.mark.parametrize(
    ("plan", "backend"),
    [("fusedkv", "aot_eager"), ("skipv1", "aot_eager"), pytest.param("fusedkv", "inductor", marks=slow)],
)
def test_generate_with_compiled_steps_gives_the_same_tokens(plan: str, backend: str) -> None:
    """transformers compiles the steps over a static cache by itself on GPUs; on the CPU when asked to."""
    torch.compiler.reset()
    model = tiny_model("llama", plan)
    ids, mask = left_padded(tokens(2, 8), [2, 0])
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
    compile_config._compile_all_devices = True
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model.generate(ids, cache_implementation="static", compile_config=compile_config, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    assert torch.equal(found, expected)
