"""Train a decoder with a loop of your own: plain PyTorch, no trainer.

    python examples/train_your_own_loop.py

The text is this file and its tokens are bytes: enough to see the loss fall in a few seconds on a CPU.
Saving needs safetensors (pip install "fusedkv_ext[io]").
``fusedkv train`` does the same for real, with data, checkpoints, several GPUs and resuming.
"""

import math
import tempfile
from pathlib import Path

import torch

import fusedkv_ext as fkv

torch.manual_seed(0)
STEPS, WARMUP, BATCH, WINDOW, PEAK_RATE = 70, 10, 8, 64, 1e-2

text = torch.tensor(list(Path(__file__).read_bytes()))
model = fkv.Decoder(
    fkv.DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        plan="fusedkv",
    )
)

# param_groups leaves fusion weights, norms, biases and embeddings out of weight decay. Fusion weights are
# matrices by shape, but decay would pull every mixed key and value towards zero.
optimizer = torch.optim.AdamW(fkv.param_groups(model, weight_decay=0.1), lr=PEAK_RATE, betas=(0.9, 0.95))


def rate(step: int) -> float:
    """Linear warmup, then cosine decay to zero: the share of the peak learning rate."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
start_weights = [p.detach().clone() for p in model.model.layers[2].self_attn.kv_fusion.parameters()]

losses = []
for step in range(STEPS):
    starts = torch.randint(len(text) - WINDOW, (BATCH,))
    ids = torch.stack([text[i : i + WINDOW] for i in starts.tolist()])
    _, loss = model(ids, labels=ids)  # mean cross-entropy of the next token, in nats
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    losses.append(loss.item())
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:3d}  loss {losses[-1]:.3f}")

# A guess from the frequencies of the bytes alone costs their entropy. The model has learned more than that.
frequencies = text.bincount(minlength=256) / len(text)
entropy = -frequencies.xlogy(frequencies).sum().item()
print(f"entropy of the byte frequencies {entropy:.3f}")
assert losses[0] > 5 and losses[-1] < entropy - 0.3

# The fusion weights learn like every other parameter.
end_weights = list(model.model.layers[2].self_attn.kv_fusion.parameters())
assert any(not torch.equal(a, b) for a, b in zip(start_weights, end_weights, strict=True))

# Save, load, generate. load_pretrained restores the plan with the weights.
prompt = torch.tensor([list(b"import ")])
with tempfile.TemporaryDirectory() as folder:
    fkv.save_pretrained(model, folder)  # config.json and model.safetensors
    loaded = fkv.load_pretrained(folder)
tokens = loaded.generate(prompt, max_new_tokens=20)
assert torch.equal(tokens, model.generate(prompt, max_new_tokens=20))
print(repr(bytes(tokens[0].tolist()).decode(errors="replace")))
