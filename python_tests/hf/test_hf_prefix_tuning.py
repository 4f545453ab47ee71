"""PEFT's prefix tuning: learned keys and values before the text, or a sentence that names the plan."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from hf_tiny import LAYERS, tiny_model, tokens
from tiny import PLANS

PREFIX, HEADS, DIM = 3, 4, 8


def tuned_or_refusal(plan: str) -> peft.PeftModel | str:
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    model = tiny_model("llama", plan)
    ids = tokens(2, 7)
    try:
        tuned = peft.get_peft_model(model, settings)
        torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight)
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    except ValueError as error:
        return str(error)
    return tuned


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_prefixes_of_all_that_a_layer_stores_are_learned_or_the_plan_is_refused(plan: str) -> None:
    found, of = tuned_or_refusal(plan), PLANS[plan]
    heads = [
        (len(of.stored_key_heads(i, HEADS)), len(of.stored_value_heads(i, HEADS))) for i in range(LAYERS)
    ]
    if isinstance(found, str):
        assert plan in found and not {*heads} <= {(0, 0), (HEADS, HEADS)}
        return
    # tokens, layers, keys and values
    grad = found.prompt_encoder["default"].embedding.weight.grad.view(PREFIX, LAYERS, 2, HEADS * DIM)
    learned = [(bool(grad[:, i, 0].any()), bool(grad[:, i, 1].any())) for i in range(LAYERS)]
    assert learned == [(k > 0, v > 0) for k, v in heads]


def test_a_prefix_stands_before_the_text_as_in_a_cache() -> None:
    tuned, ids = tuned_or_refusal("fusedkv"), tokens(2, 7)
    tuned.eval()
    ones = torch.ones(2, PREFIX + 7, dtype=torch.long)
    with torch.no_grad():
        found = tuned(input_ids=ids, attention_mask=ones[:, PREFIX:]).logits
        prefix = tuned.get_prompt(2)
        expected = tuned.base_model(ids, attention_mask=ones, past_key_values=prefix).logits
        without = tuned.base_model(ids).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(without, expected, atol=1e-2)
