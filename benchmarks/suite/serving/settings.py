"""Sizes of the model and of the two scenarios, and the engines that are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusedkv_ext.plan import CachePlan

PLAIN = "plain"  # LlamaForCausalLM on vLLM's own attention; every other engine is a cache plan
ENGINES = (PLAIN, "vanilla", "fusedkv", "fusedkv-lite")
SCENARIOS = ("pressure", "room")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        name: "full" or "quick".
        layers, hidden, heads, kv_heads, head_dim, vocab: The model.
        dtype: Of weights and caches.
        requests: As many plain requests as the memory of either scenario holds.
        queue: Requests that are sent at once under pressure.
        prompt: Tokens of each prompt.
        output: Tokens of each answer under pressure.
        steps: Decode steps with room for all.
        rounds: Turns of each engine.
        block: Tokens of a block.
        chunk: The most tokens of a step.
        eager: Without torch.compile.
        threads: Of each engine; None: those of torch.
    """

    name: str = "full"
    layers: int = 16
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 4096
    dtype: str = "bfloat16"
    requests: int = 4
    queue: int = 16
    prompt: int = 4096
    output: int = 128
    steps: int = 60
    rounds: int = 2
    block: int = 128
    chunk: int = 4096
    eager: bool = True
    threads: int | None = None

    @property
    def token_bytes(self) -> int:
        """Of the plain model's cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    def answer(self, scenario: str) -> int:
        """Tokens of each answer."""
        return self.output if scenario == "pressure" else self.steps + 1

    def sent(self, scenario: str) -> int:
        """Requests of a turn."""
        return self.queue if scenario == "pressure" else self.requests

    def max_len(self, scenario: str) -> int:
        return self.prompt + self.answer(scenario)

    def cache_bytes(self, scenario: str) -> int:
        """KV memory of every engine: ``requests`` plain ones to their ends, and the block that vLLM keeps."""
        blocks = 1 + self.requests * math.ceil(self.max_len(scenario) / self.block)
        return blocks * self.block * self.token_bytes


# Prompts of almost two blocks, answers that end in a third: requests are preempted.
QUICK = Settings(
    *("quick", 4, 64, 2, 1, 32, 320), requests=2, queue=8, prompt=250, output=16, steps=8, rounds=1, chunk=512
)


@dataclass(frozen=True)
class EngineSpec:
    """One engine of the comparison.

    Attributes:
        name: PLAIN or a cache plan, as the command line names one.
        early_exit: Whether it gets ``kv_sharing_fast_prefill``.
    """

    name: str
    early_exit: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, early exit" if self.early_exit else self.name

    def plan(self, layers: int) -> CachePlan | None:
        return None if self.name == PLAIN else CachePlan.named(self.name, layers)


def specs(names: list[str], layers: int, early_exit: bool) -> list[EngineSpec]:
    """Engines in the order of their turns.

    Args:
        names: PLAIN or cache plans.
        layers: Of the model.
        early_exit: Adds a second engine for each plan whose last layers store nothing.
    """
    found = []
    for name in names:
        spec = EngineSpec(name)
        plan = spec.plan(layers)
        found.append(spec)
        if early_exit and plan is not None and max(plan.storage_layers) < layers - 1:
            found.append(EngineSpec(name, early_exit=True))
    return found
