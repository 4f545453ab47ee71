"""Tensor and pipeline parallelism of transformers: checks that the ranks can shard a plan.

transformers gives each rank consecutive KV heads and the query heads that read them. Fusion weights per head
are sharded alike (``base_model_tp_plan`` of our configs). Weights that all heads share are replicated; each
rank has the gradient of its own heads only (``shards.for_all_ranks``).
"""

from __future__ import annotations

from fusedkv_ext.plan import CachePlan
from fusedkv_ext.plan.latent import WHOLE

__all__ = ["check_parallel"]


def check_parallel(plan: CachePlan, num_kv_heads: int, tp_size: int = 1, pp_size: int = 1) -> None:
    """Checks that ``tp_size`` ranks can shard the heads of each layer, and ``pp_size`` stages the layers.

    Raises:
        ValueError: a rank would hold part of a KV head, the plan treats KV heads of a layer differently, or a
            stage would read caches of another.
    """
    if tp_size > 1:
        if num_kv_heads % tp_size:
            raise ValueError(
                f"num_key_value_heads ({num_kv_heads}) must be a multiple of tp_size ({tp_size}): a rank "
                "holds whole KV heads; use fewer ranks, or FSDP"
            )
        for i, layer in enumerate(plan.layers):
            if any(part.heads != WHOLE for part in (*layer.keys, *layer.values)):
                raise ValueError(
                    f"layer {i} of plan {plan.name!r} does not treat all KV heads alike, and tensor "
                    "parallelism gives each rank some of them; use FSDP, or a plan without shares of heads"
                )
    if pp_size > 1 and any(set(plan.source_layers(i)) - {i} for i in range(plan.num_layers)):
        raise ValueError(
            f"plan {plan.name!r} reads keys and values of earlier layers, and the stages of pipeline "
            "parallelism hand on hidden states only; use FSDP or tensor parallelism"
        )
