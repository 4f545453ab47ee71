"""Settings of the demo, in its two sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedkv_ext.training.config import TrainConfig

PLANS = ("vanilla", "fusedkv-lite", "fusedkv")  # the first is the baseline
PROMPT = "import torch\nfrom torch import Tensor, nn\n\n\nclass "


@dataclass(frozen=True)
class DemoSettings:
    """Sizes, repetitions and time limit of the demo."""

    config: TrainConfig
    minutes: float  # total time, from reading the text to the report
    reserve: float  # fraction of the time that is reserved for the work after training
    context: int = 4096
    prompt_repeats: int = 7
    decode_repeats: int = 100
    final_valid_batches: int = 128
    sample_tokens: int = 400


def standard(minutes: float | None = None) -> DemoSettings:
    """Settings of `fusedkv demo`: 8 layers, 7 minutes, about a million tokens per model on two cores."""
    values = {
        "model.hidden_size": 128,
        "model.head_dim": 32,
        "run.batch_size": 4,
        # Near the best rate of vanilla, for a fair baseline. Its validation loss after 961 steps was 2.258
        # bits per byte at 6e-4, 2.203 at 1e-3, 2.432 at 2e-3 and 2.472 at 4e-3.
        "optim.lr": 1e-3,
        "optim.warmup_steps": 60,
    }
    return DemoSettings(TrainConfig().updated(values.items()), minutes or 7.0, reserve=0.08)


def quick(minutes: float | None = None) -> DemoSettings:
    """Settings of `fusedkv demo --quick`, a smoke test of half a minute."""
    base = standard(minutes or 0.5)
    values = {
        "model.hidden_size": 64,
        "model.head_dim": 16,
        "data.seq_len": 128,
        "run.batch_size": 4,
        "optim.warmup_steps": 10,
    }
    return replace(
        base,
        config=base.config.updated(values.items()),
        reserve=0.4,
        prompt_repeats=2,
        decode_repeats=20,
        final_valid_batches=64,
        sample_tokens=120,
    )
