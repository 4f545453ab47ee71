"""Convert a pretrained Llama to another cache plan, without training.

    python examples/convert_llama.py

Needs transformers (pip install "fusedkv_ext[hf]"). The Llama is tiny and random, so nothing is downloaded.
With a real checkpoint use ``AutoModelForCausalLM.from_pretrained(folder)`` and the token ids of a real text,
or the command ``fusedkv convert``.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fusedkv_ext as fkv

torch.manual_seed(0)

# Stands in for a pretrained model.
llama = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=None,
    )
).eval()

# Layers 0 to 3 keep their keys and values. Layers 4 and 5 reconstruct theirs from layers 0 and 3.
plan = fkv.CachePlan.named("fusedkv", 6, storage_layers=4)

# 1. Copy weights only. Fusion weights start at the plan's initial values.
copied = fkv.conversion.convert_model(llama, plan)

# 2. Calibrate: fusion weights and output projections are solved for in closed form on a text, no gradients.
text = torch.randint(128, (8, 256))  # (windows, tokens per window)
calibrated = fkv.conversion.convert_model(llama, plan, calibration=text)

# How far the next-token distributions are from the original's, on tokens that were not calibrated on.
held_out = torch.randint(128, (4, 256))


@torch.no_grad()
def divergence(model: torch.nn.Module) -> float:
    """Mean KL divergence from the original model's next-token distribution, in nats."""
    original, other = (m(held_out).logits.log_softmax(-1) for m in (llama, model))
    return (original.exp() * (original - other)).sum(-1).mean().item()


before, after = divergence(copied.model), divergence(calibrated.model)
print(f"KL divergence from the original: {before:.3f} copied, {after:.3f} calibrated")
assert after < before

# The cache is smaller: 4 of 6 layers store.
sizes = [fkv.hf.cache_bytes_per_token(m.config, torch.bfloat16) for m in (calibrated.model, llama)]
print(f"cache per token: {sizes[0]} bytes, original {sizes[1]} bytes")
assert 6 * sizes[0] == 4 * sizes[1]

# The result is a model of transformers: it generates, and it is saved and loaded as such.
prompt = held_out[:1, :8]
expected = calibrated.model.generate(prompt, max_new_tokens=8, do_sample=False)
with tempfile.TemporaryDirectory() as folder:
    calibrated.model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # knows the type, as fkv.hf is imported
assert torch.equal(loaded.generate(prompt, max_new_tokens=8, do_sample=False), expected)
