"""Every plan over every kind of cache: the tokens of decoding without a cache, or a refusal before the first.

Offloaded caches are not here: transformers makes them on a machine with an accelerator only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import IMPLEMENTATIONS, LAYERS, tiny_model, tokens
from tiny import PLANS
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import QuantizedLayer

from fusedkv_ext.plan import CachePlan

WINDOW, PROMPT, NEW = 4, 7, 4
# Not the plans whose caches hold what that of another plan holds; but readers of full layers between which a
# layer with a window stores.
ALIKE = {"fusedkv-lite-learnable", "fusedkv-lite-rev", "gqa", "mqa"}
CASES = {name: PLANS[name] for name in sorted(PLANS.keys() - ALIKE)}
CASES |= {
    f"{name} storing 3": CachePlan.named(name, LAYERS, storage_layers=3) for name in ("fusedkv", "yoco")
}
FULL, SLIDING = "full_attention", "sliding_attention"
TYPES = {
    "full": [FULL] * LAYERS,
    "windows": [SLIDING] * LAYERS,
    "windows first": [SLIDING, SLIDING, FULL, FULL],
    "windows last": [FULL, FULL, SLIDING, SLIDING],
    "windows between": [FULL, SLIDING, FULL, SLIDING],
}


class Lossless(QuantizedLayer):
    """A quantized layer that loses nothing: what is left is when it stores what."""

    def __init__(self) -> None:
        super().__init__(residual_length=WINDOW)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=PROMPT + NEW)


def early(model: PreTrainedModel) -> Cache:
    """As export for ExecuTorch and chunked prefill make it."""
    config, cache = model.config, static(model)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.float64, "cpu")
    return cache


CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "dynamic without a config": lambda model: DynamicCache(),
    "static": static,
    "static, allocated early": early,
    "quantized": lambda model: Cache(layers=[Lossless() for _ in range(LAYERS)]),
}


def may_refuse(plan: CachePlan, types: str, cache: str) -> bool:
    """Where an error that names the plan will do: what users rarely have, and cannot have by default."""
    heads = {
        (len(plan.stored_key_heads(i, 4)), len(plan.stored_value_heads(i, 4))) for i in range(plan.num_layers)
    }
    partial = not heads <= {(0, 0), (4, 4)}
    if cache == "quantized":
        return partial or types != "full"
    return cache.startswith("static") and (types != "full" or cache != "static" and partial)


def greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of each new token (NEW, VOCAB), where each step recomputes all tokens."""
    found = []
    for _ in range(NEW):
        logits = model(ids, use_cache=False).logits[:, -1]
        found.append(logits)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return torch.cat(found)


def outcome(model: PreTrainedModel, prompt: Tensor, cache: Cache, expected: Tensor) -> str:
    """ "right", "wrong", "refused" before anything was computed, or the error."""
    passes: list[Any] = []
    hook = model.register_forward_hook(lambda *_: passes.append(None))
    options = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
    try:
        found = model.generate(prompt, past_key_values=cache, **options)
    except ValueError as error:
        named = model.config.plan.name in str(error)
        return f"refused, {len(passes)} passes too late" if passes else "refused" if named else repr(error)
    except Exception as error:
        return repr(error)[:100]
    finally:
        hook.remove()
    # Norms round to float32 within a model of float64.
    tolerance = 1e-4 * expected.abs().max().item()
    return "right" if torch.allclose(torch.cat(found.logits).double(), expected, atol=tolerance) else "wrong"


@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_every_plan_over_every_cache_decodes_as_without_a_cache(types: str) -> None:
    bad, right = [], 0
    for name, plan in CASES.items():
        windows = dict(sliding_window=WINDOW, use_sliding_window=True, layer_types=TYPES[types])
        try:
            model = tiny_model("qwen3", plan, **windows).double()
        except ValueError as error:  # layers with full attention that read windows
            assert plan.name in str(error)
            assert types not in ("full", "windows last") or "needs transformers 5.23" in str(error)
            continue
        prompt = tokens(1, PROMPT)
        model.set_attn_implementation("eager")
        expected = greedy(model, prompt)
        for implementation in IMPLEMENTATIONS:
            model.set_attn_implementation(implementation)
            for kind, make in CACHES.items():
                found = outcome(model, prompt, make(model), expected)
                right += found == "right"
                if found != "right" and not (found == "refused" and may_refuse(plan, types, kind)):
                    bad.append(f"{name}, {implementation}, {kind}: {found}")
    assert not bad, "\n".join(bad)
    assert right >= 2 * len(IMPLEMENTATIONS)
