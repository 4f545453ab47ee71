"""Parts of a model, and the loss between layers: they equal the plain formulas, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from fusedkv_ext.conversion.distill import LanguageModelParts, layer_loss


def test_layer_loss_counts_each_layer_relative_to_its_size() -> None:
    theirs = [torch.ones(2, 3, 4), 100.0 * torch.ones(2, 3, 4)]
    ours = [1.1 * theirs[0], (0.7 * theirs[1]).requires_grad_()]
    loss = layer_loss(ours, theirs)
    torch.testing.assert_close(loss, torch.tensor((0.01 + 0.09) / 2))
    assert torch.autograd.grad(loss, ours[1])[0].abs().max() > 0
    assert layer_loss(theirs, theirs) == 0
    with pytest.raises(ValueError, match="both need the same layers"):
        layer_loss(ours, theirs[:1])


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("match", ["attention", "hidden"])
def test_layers_are_collected_once_per_pass(match: str) -> None:
    model = tiny()
    parts = LanguageModelParts(model, match)
    ids = torch.randint(50, (2, 9))
    for _ in range(2):
        outputs = parts(ids)
        assert [tuple(layer.shape) for layer in outputs.layers] == [(2, 9, 16)] * 3
    with torch.no_grad():
        outputs = parts(ids)
        logits = F.linear(outputs.hidden, parts.head.weight, parts.head.bias)
    torch.testing.assert_close(logits, model(input_ids=ids).logits)
    if match == "hidden":  # transformers puts the last layer's through the final norm
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(outputs.layers[:2], list(states[1:3]))


def test_models_that_scale_their_logits_are_refused() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 8.0
            return output

    with pytest.raises(ValueError, match="does more to its logits"):
        LanguageModelParts(Scaled(tiny().config).eval())


def test_an_unknown_place_to_match_is_named() -> None:
    with pytest.raises(ValueError, match="match must be one of attention, hidden"):
        LanguageModelParts(tiny(), "values")
