"""FusedKVAttention in a transformer block of your own.

    python examples/custom_block.py

The block below is a plain pre-norm block with LayerNorm and GELU. Only its attention knows about cache plans.
Keys and values travel as arguments and return values. There is no hidden state, so the block also works under
activation checkpointing, FSDP and torch.compile.
"""

import torch
from torch import nn

import fusedkv_ext as fkv

torch.manual_seed(0)
WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 6


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, plan: fkv.CachePlan, layer: int, rope: fkv.RotaryEmbedding) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # The module reads its row of the plan. It has no k_proj and v_proj where the layer stores nothing.
        self.attention = fkv.FusedKVAttention(plan, layer, WIDTH, HEADS, KV_HEADS, HEAD_DIM, rope=rope)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, sources, cache=None):
        # sources: keys and values of the layers that this one reads.
        # kv: keys and values that this layer stores; later layers get them as their sources.
        out, kv = self.attention(self.norm1(x), sources, cache=cache)
        x = x + out
        return x + self.mlp(self.norm2(x)), kv


class Transformer(nn.Module):
    """A stack of blocks. The loop below is all that a cache plan asks of a model."""

    def __init__(self, plan: fkv.CachePlan) -> None:
        super().__init__()
        self.plan = plan
        rope = fkv.RotaryEmbedding(HEAD_DIM)
        self.blocks = nn.ModuleList(Block(plan, i, rope) for i in range(plan.num_layers))

    def forward(self, x, cache=None):
        stored = []
        for i, block in enumerate(self.blocks):
            sources = [stored[j] for j in self.plan.source_layers(i)]
            x, kv = block(x, sources, cache)
            stored.append(kv)
        return x


plan = fkv.CachePlan.named("fusedkv", LAYERS)
model = Transformer(plan)
assert [block.attention.k_proj is None for block in model.blocks] == [False] * 3 + [True] * 3

# Training: all tokens at once, no cache.
x = torch.randn(2, 10, WIDTH)
expected = model(x)
expected.square().mean().backward()
assert all(parameter.grad is not None for parameter in model.parameters())

# Decoding: a prompt of seven tokens, then three single tokens. One cache serves all layers.
cache = fkv.KVCache(
    plan, batch_size=2, max_len=16, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.float32
)
with torch.no_grad():  # attention over a cache is not differentiable
    parts = []
    for chunk in x.split([7, 1, 1, 1], dim=1):
        cache.advance(chunk.shape[1])  # once per step, before the layers: make room for the new tokens
        parts.append(model(chunk, cache))
torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)

print(cache)
print("decoding with the cache gives what training computes at once")
