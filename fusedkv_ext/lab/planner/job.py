"""Parameters of a training job that determine memory and traffic."""

from __future__ import annotations

from dataclasses import dataclass

from fusedkv_ext.distributed import Layout
from fusedkv_ext.distributed.tensor import check_shares
from fusedkv_ext.lab.planner.weights import check
from fusedkv_ext.layers.decoder_config import DecoderConfig

__all__ = ["Job"]

CHECKPOINTING = ("none", "non_reentrant", "reentrant")


@dataclass(frozen=True)
class Job:
    """One training step of a decoder on a cluster.

    Attributes:
        config: The decoder.
        layout: Ranks along each dimension. Its dp_shard must be given.
        batch: Micro-batch: sequences per data rank and forward pass.
        context: Tokens per sequence.
        accumulate: Micro-batches per optimizer step.
        precision: "bf16" all-gathers fp32 weights as bf16 and computes in bf16; or "fp32".
        checkpointing: Activation checkpointing of each layer.

    Raises:
        ValueError: A field is invalid. The message names it.
    """

    config: DecoderConfig
    layout: Layout
    batch: int = 1
    context: int = 8192
    accumulate: int = 1
    precision: str = "bf16"
    checkpointing: str = "none"

    def __post_init__(self) -> None:
        check(self.config)
        for name in ("batch", "context", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.layout.dp_shard < 1:
            raise ValueError("dp_shard of the layout must be at least 1, got 0; give the number of GPUs")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f'precision must be "bf16" or "fp32", got {self.precision!r}')
        if self.checkpointing not in CHECKPOINTING:
            known = ", ".join(CHECKPOINTING)
            raise ValueError(f"checkpointing must be one of {known}, got {self.checkpointing!r}")
        if self.layout.cp > 1 and self.context % (2 * self.layout.cp):
            raise ValueError(
                f"context must be a multiple of 2 x cp = {2 * self.layout.cp} chunks, got {self.context}; "
                "choose another context or cp"
            )
        check_shares(self.config, self.layout.tp)

    @property
    def element(self) -> int:
        """Bytes per activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def whole(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one GPU."""
        return self.whole // self.layout.cp

    @property
    def fsdp(self) -> int:
        """GPUs that shard the weights: dp_shard x cp."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def gpus(self) -> int:
        """Number of all GPUs."""
        return self.layout.dp_replicate * self.fsdp * self.layout.tp

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step on all GPUs, over all micro-batches."""
        layout = self.layout
        return layout.dp_replicate * layout.dp_shard * self.whole * self.accumulate
