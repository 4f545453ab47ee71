"""Time of the log-sum-exp: attention alone, with the lse of its flash kernel, with the scores again.

CPU time of the process on one thread, the median of several calls in turns.

    python benchmarks/lse_time.py [tokens]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.scores import log_sum_exp
from fusedkv_ext.ops.sdpa import sdpa_attention, sdpa_attention_lse

ROUNDS = 7


def main(tokens: int) -> None:
    torch.set_num_threads(1)
    q, (k, v) = torch.randn(1, tokens, 8, 64), torch.randn(2, 1, tokens, 2, 64)
    call = AttentionCall(q, [k], [v], None, None, None, None, 64**-0.5, -1, 0, return_lse=True)
    ways: dict[str, Callable[[], object]] = {
        "attention alone": lambda: sdpa_attention(call),
        "with the flash kernel's lse": lambda: sdpa_attention_lse(call),
        "with the scores again": lambda: (sdpa_attention(call), log_sum_exp(call)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    print("| causal attention, float32, 8 heads of 64, 2 KV heads | ms of CPU time |\n|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {1e3 * statistics.median(times):.0f} |")


if __name__ == "__main__":
    with torch.no_grad():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048)
