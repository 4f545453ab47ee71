"""Memory of a training step with and without recompute_fusion: a decoder's forward and backward over one
sequence, each way in a process of its own. Resident memory, less that before the step.

    python benchmarks/recompute_memory.py [tokens]
"""

from __future__ import annotations

import sys

from suite.machine import resident_bytes, run_with_exact_memory


def step(tokens: int, recompute_fusion: bool) -> None:
    import torch

    import fusedkv_ext as fkv

    torch.manual_seed(0)
    config = fkv.DecoderConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        plan="fusedkv",
        recompute_fusion=recompute_fusion,
    )
    model = fkv.Decoder(config)
    ids = torch.randint(0, 512, (1, tokens))
    model(ids[:, :64], labels=ids[:, :64])[1].backward()  # gradients and libraries are there before the step
    before = resident_bytes("VmRSS")
    _, loss = model(ids, labels=ids)
    held = resident_bytes("VmRSS") - before
    loss.backward()
    peak = resident_bytes("VmHWM") - before
    print(f"| {str(recompute_fusion).lower()} | {held / 1e6:.0f} | {peak / 1e6:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        step(int(sys.argv[1]), sys.argv[2] == "True")
    else:
        print("| recompute_fusion | MB after the forward | MB at the peak |\n|---|---|---|", flush=True)
        for way in ("False", "True"):
            command = [sys.executable, __file__, *(sys.argv[1:] or ["4096"]), way]
            print(run_with_exact_memory(command), end="", flush=True)
