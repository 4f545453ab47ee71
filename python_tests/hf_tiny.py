"""Tiny transformers models that the tests of fusedkv_ext.hf share. Import it after importorskip."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from tiny import PLANS, randomise_fusion
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import fusedkv_ext.hf as hf
from fusedkv_ext.plan import CachePlan

VOCAB, LAYERS = 61, 4
IMPLEMENTATIONS = ("sdpa", "eager", "fusedkv")
CONFIGS = {"llama": hf.FusedKVLlamaConfig, "qwen3": hf.FusedKVQwen3Config}
MODELS = {"llama": hf.FusedKVLlamaForCausalLM, "qwen3": hf.FusedKVQwen3ForCausalLM}


class Ops(TorchDispatchMode):
    """Counts the calls of our operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedkv":
            self.calls[func._schema.name.removeprefix("fusedkv::")] += 1
        return func(*args, **(kwargs or {}))


def sizes(**options: Any) -> dict[str, Any]:
    """Arguments of the configs of both families, ours and the plain ones."""
    common = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return {**common, **options}


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which every layer and every head matters to the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "kv_fusion" not in name and weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5 * (3 if "q_proj" in name else 1))
    randomise_fusion(model)
    return model.eval()


def tiny_model(
    family: str, plan: CachePlan | str, implementation: str | None = None, **options: Any
) -> PreTrainedModel:
    """A model with random weights; ``plan`` by name is one of ``tiny.PLANS``."""
    plan = PLANS[plan] if isinstance(plan, str) else plan
    config = CONFIGS[family](**sizes(cache_plan=plan.to_dict(), **options))
    if implementation is not None:
        config._attn_implementation = implementation
    return lively(MODELS[family](config))


def tokens(*shape: int) -> Tensor:
    """Random ids without the padding's."""
    return torch.randint(2, VOCAB, shape)


def left_padded(ids: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
    """Each row shortened to its last tokens, the rest padding: ids and attention mask."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return ids * mask, mask


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of fp32 sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
