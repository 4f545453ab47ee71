"""Quickstart: a small decoder with half of a cache, trained for one step, then used to generate.

    python examples/quickstart.py

Needs fusedkv_ext and torch, no GPU and no download. Takes a few seconds.
"""

import torch

import fusedkv_ext as fkv

torch.manual_seed(0)

# A cache plan is a table. For each layer it says where the keys and values come from.
# FusedKV on 8 layers: layers 0 to 3 store keys and values, layers 4 to 7 mix those of layers 0 and 3.
plan = fkv.CachePlan.named("fusedkv", num_layers=8)
print(plan)

# A decoder-only language model in the style of Qwen3: RMSNorm, RoPE, QK-norm, SwiGLU.
config = fkv.DecoderConfig(
    vocab_size=256,  # token ids are bytes here
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,  # two query heads share one KV head
    plan=plan,
)
model = fkv.Decoder(config)

# Training: labels are the token ids themselves. The model shifts them by one position.
ids = torch.randint(256, (2, 32))
logits, loss = model(ids, labels=ids)
loss.backward()
print(f"loss {loss.item():.3f} nats per token, logits {tuple(logits.shape)}")

# The learned weights of the mix are parameters like any other, so they have gradients.
fusion_weights = model.model.layers[4].self_attn.kv_fusion
assert all(weight.grad is not None for weight in fusion_weights.parameters())

# Generation: greedy unless you pass a temperature. The KV cache is made, filled and dropped inside.
with_cache = model.generate(ids, max_new_tokens=16)

# Without a cache every token recomputes the whole sequence. That is slow, and gives the same tokens.
without_cache = model.generate(ids, max_new_tokens=16, use_cache=False)
assert torch.equal(with_cache, without_cache)

# What the plan saves: cache bytes per token, beside the plan of an ordinary transformer.
vanilla = fkv.CachePlan.named("vanilla", num_layers=8)
sizes = [p.bytes_per_token(num_kv_heads=2, head_dim=16, dtype=torch.bfloat16) for p in (plan, vanilla)]
assert 2 * sizes[0] == sizes[1]
print(f"cache per token: {sizes[0]} bytes, vanilla {sizes[1]} bytes")
