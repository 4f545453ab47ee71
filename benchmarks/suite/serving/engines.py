"""Engines of vLLM in this process, and what vLLM measures of a turn."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from suite.serving.settings import EngineSpec, Settings


@dataclass
class Turn:
    """What one turn of an engine gave. Times are vLLM's own, in seconds.

    Attributes:
        requests: Sent at once.
        seconds: From the first request to the last token.
        output_tokens: Of all requests.
        running: The most requests at once.
        preemptions: Requests that lost their cache and were computed again.
        ttft: Of each request from its arrival, queue included.
        tpot: Of each finished request: the mean time between its tokens.
        step: Times between tokens in steps that decode all requests of the turn and nothing else.
    """

    requests: int
    seconds: float = 0.0
    output_tokens: int = 0
    running: int = 0
    preemptions: int = 0
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Adds one step of the engine.

        Args:
            scheduler: vLLM's SchedulerStats.
            iteration: vLLM's IterationStats; None where the step gave no token.
        """
        self.running = max(self.running, scheduler.num_running_reqs)
        if iteration is None:
            return
        if len(self.ttft) == len(iteration.inter_token_latencies_iter) == self.requests:
            self.step.append(max(iteration.inter_token_latencies_iter))
        self.ttft += iteration.time_to_first_tokens_iter
        self.preemptions += iteration.num_preempted_reqs
        self.output_tokens += iteration.num_generation_tokens
        self.tpot += [done.mean_time_per_output_token for done in iteration.finished_requests]


class Engine:
    """One engine, and what its steps tell."""

    def __init__(self, folder: Path, spec: EngineSpec, settings: Settings, scenario: str) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.metrics.loggers import StatLoggerBase

        class Recorder(StatLoggerBase):
            """Hands what vLLM tells of each step to the turn."""

            def __init__(self, engine: Engine) -> None:
                self.engine = engine

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                self.engine.current.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        self.current = Turn(0)
        arguments = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=settings.dtype,
            seed=0,
            enforce_eager=settings.eager,
            distributed_executor_backend="uni",
            max_model_len=settings.max_len(scenario),
            max_num_seqs=settings.sent(scenario),
            max_num_batched_tokens=settings.chunk,
            block_size=settings.block,
            kv_cache_memory_bytes=settings.cache_bytes(scenario),
            **({"kv_sharing_fast_prefill": True} if spec.early_exit else {}),
        )
        self._engine = LLMEngine.from_engine_args(arguments, stat_loggers=[lambda *_: Recorder(self)])

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache has room for; vLLM keeps one block of them."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def turn(self, requests: int, prompt: int, answer: int, seed: int) -> Turn:
        """Sends all requests at once and steps to the last token.

        Args:
            requests: Their number.
            prompt: Tokens of each prompt, which are others for each seed.
            answer: Tokens of each answer.
            seed: Of the prompts.

        Raises:
            RuntimeError: vLLM reports another number of tokens.
        """
        from vllm import SamplingParams

        vocab = self._engine.model_config.get_vocab_size()
        inputs = torch.randint(3, vocab, (requests, prompt), generator=torch.Generator().manual_seed(seed))
        sampling = SamplingParams(
            temperature=0, max_tokens=answer, min_tokens=answer, ignore_eos=True, detokenize=False
        )
        found = self.current = Turn(requests)
        gc.collect()
        began = time.perf_counter()
        for number, tokens in enumerate(inputs.tolist()):
            self._engine.add_request(f"{seed}-{number}", {"prompt_token_ids": tokens}, sampling)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        found.seconds = time.perf_counter() - began
        if found.output_tokens != requests * answer:
            raise RuntimeError(f"{requests * answer} tokens were asked for, got {found.output_tokens}")
        return found

    def shutdown(self) -> None:
        self._engine.engine_core.shutdown()
