"""Choice of layouts for the tables of docs/scale.md: the least traffic among those that fit."""

from __future__ import annotations

from fusedkv_ext.distributed import Layout
from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.memory import memory
from fusedkv_ext.lab.planner.serving import Server
from fusedkv_ext.lab.planner.traffic import traffic
from fusedkv_ext.layers.decoder_config import DecoderConfig

__all__ = ["server", "training"]

HEADS = (1, 2, 4, 8)  # tp: within a machine
BATCHES = (1, 2, 4, 8)


def _fitting(
    config: DecoderConfig, gpus: int, context: int, gpu_memory: float, checkpointing: str
) -> tuple[list[Job], tuple[int, Job]]:
    """Jobs that fit: for each tp the smallest cp, with the largest micro-batch; and the smallest peak.

    More cp would only add traffic. The peak is that of micro-batch 1, with its job. All remaining GPUs shard
    the weights.
    """
    fitting, tried = [], []
    for tp in HEADS:
        for cp in (2**i for i in range((gpus // tp).bit_length())):
            layout = Layout(1, gpus // (tp * cp), cp, tp)
            jobs = [Job(config, layout, batch, context, checkpointing=checkpointing) for batch in BATCHES]
            tried.append((memory(jobs[0]).peak, jobs[0]))
            if tried[-1][0] <= gpu_memory:
                larger = (job for job in reversed(jobs[1:]) if memory(job).peak <= gpu_memory)
                fitting.append(next(larger, jobs[0]))
                break
    return fitting, min(tried, key=lambda found: found[0])


def training(config: DecoderConfig, gpus: int, context: int, gpu_memory: float) -> tuple[Job, bool]:
    """Chooses the job with the least traffic per token among those that fit.

    Activation checkpointing is used only if no job fits without it.

    Args:
        config: The decoder.
        gpus: Number of GPUs.
        context: Tokens per sequence.
        gpu_memory: Bytes of memory per GPU.

    Returns:
        The job and True, or the job with the smallest peak and False if none fits.
    """
    for checkpointing in ("none", "non_reentrant"):
        fitting, smallest = _fitting(config, gpus, context, gpu_memory, checkpointing)
        if fitting:
            return min(fitting, key=lambda job: traffic(job).total / job.tokens_per_step), True
    return smallest[1], False


def server(config: DecoderConfig, context: int, gpu_memory: float, chunk: int) -> Server:
    """The server with the fewest GPUs of a machine that fits one sequence; otherwise a whole machine."""
    servers = [Server(config, tp, context, chunk=chunk) for tp in HEADS]
    return next((found for found in servers if found.sequences(gpu_memory)), servers[-1])
