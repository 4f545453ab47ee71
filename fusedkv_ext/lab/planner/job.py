"""What a training job is, as far as memory and messages depend on it."""

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
        config: the decoder.
        layout: processes along each dimension; its dp_shard must be given.
        batch: the micro-batch, sequences that a data rank runs at once.
        context: tokens of a sequence.
        accumulate: micro-batches per optimizer step.
        precision: "bf16" gathers fp32 weights, and computes, in bf16; or "fp32".
        checkpointing: activation checkpointing of each layer.

    Raises:
        ValueError: a field is invalid; the message names it.
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
            raise ValueError("the layout must say dp_shard, the GPUs that share the weights, got 0")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f'precision must be "bf16" or "fp32", got {self.precision!r}')
        if self.checkpointing not in CHECKPOINTING:
            known = ", ".join(CHECKPOINTING)
            raise ValueError(f"checkpointing must be one of {known}, got {self.checkpointing!r}")
        if self.layout.cp > 1 and self.context % (2 * self.layout.cp):
            raise ValueError(
                f"cp={self.layout.cp} cuts a context into {2 * self.layout.cp} chunks; context must be a "
                f"multiple of that, got {self.context}"
            )
        check_shares(self.config, self.layout.tp)

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def whole(self) -> int:
        """Tokens of the sequences of a micro-batch."""
        return self.batch * self.context

    @property
    def tokens(self) -> int:
        """Those of them that one GPU runs."""
        return self.whole // self.layout.cp

    @property
    def fsdp(self) -> int:
        """GPUs that share the weights: dp_shard x cp."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.layout.dp_replicate * self.fsdp * self.layout.tp

    @property
    def tokens_per_step(self) -> int:
        """Of all GPUs together, over the micro-batches of a step."""
        layout = self.layout
        return layout.dp_replicate * layout.dp_shard * self.whole * self.accumulate
