"""Memory and time of a training step on packed documents: a decoder's forward and backward over one sequence.

Each row runs in a process of its own, on one thread. Memory is the resident memory at the peak, less that
before the step. Time is the CPU time of the process, the median of several steps.

    python benchmarks/packed_step.py [tokens]
"""

from __future__ import annotations

import statistics
import sys
import time

from suite.machine import resident_bytes, run_with_exact_memory

WAYS = ("none", "contiguous", "returning")
STEPS = 3


def step(tokens: int, documents: str) -> None:
    """Prints a row. documents: "none"; "contiguous"; "returning", where the last token has the first's id."""
    import torch

    import fusedkv_ext as fkv

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = fkv.DecoderConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        plan="fusedkv",
    )
    model = fkv.Decoder(config)
    ids = torch.randint(0, 512, (1, tokens))
    begins = torch.zeros(1, tokens, dtype=torch.long)
    end = 0
    while documents != "none" and (end := end + int(torch.randint(256, 513, ()))) < tokens:
        begins[0, end] = 1
    document_ids = None if documents == "none" else begins.cumsum(1)
    if document_ids is not None and documents == "returning":
        document_ids[0, -1] = 0

    def run() -> None:
        model(ids, labels=ids, document_ids=document_ids)[1].backward()

    model(ids[:, :64], labels=ids[:, :64])[1].backward()  # gradients and libraries are there before the step
    before = resident_bytes("VmRSS")
    run()
    peak = resident_bytes("VmHWM") - before
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    print(f"| {documents} | {peak / 1e6:.0f} | {statistics.median(seconds):.2f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        step(int(sys.argv[1]), sys.argv[2])
    else:
        print("| documents | MB at the peak | s of CPU time |\n|---|---|---|", flush=True)
        for way in WAYS:
            command = [sys.executable, __file__, *(sys.argv[1:] or ["4096"]), way]
            print(run_with_exact_memory(command), end="", flush=True)
