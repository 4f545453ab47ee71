"""Losses at the output head and between layers: they equal the plain formulas, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from fusedkv_ext.conversion.distill import LanguageModelParts, layer_loss
from fusedkv_ext.training.loss import IGNORED, Head, Workspace, head_losses, shifted_labels

ROWS, VOCAB, WIDTH, TEACHER_WIDTH = (2, 70), 37, 6, 4  # 140 rows: more than two blocks of 64


def tensors(bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    made = {
        "hidden": draw(*ROWS, WIDTH).requires_grad_(),
        "weight": draw(VOCAB, WIDTH).requires_grad_(),
        "bias": draw(VOCAB).requires_grad_() if bias else None,
        "teacher_hidden": draw(*ROWS, TEACHER_WIDTH),
        "teacher_weight": draw(VOCAB, TEACHER_WIDTH),
        "labels": shifted_labels(torch.randint(VOCAB, ROWS, generator=generator)),
    }
    made["labels"][0, :5] = IGNORED
    return made


def plain(t: dict[str, Tensor], ce_weight: float, kl_weight: float, temperature: float) -> tuple[Tensor, ...]:
    """(loss, ce, kl) with whole logits, by torch's own losses."""
    logits = F.linear(t["hidden"], t["weight"], t["bias"]).flatten(0, 1)
    theirs = (t["teacher_hidden"] @ t["teacher_weight"].T).flatten(0, 1)
    labels = t["labels"].flatten()
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    counted = labels != IGNORED
    kl = temperature**2 * F.kl_div(
        F.log_softmax(logits[counted] / temperature, -1),
        F.log_softmax(theirs[counted] / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    return ce_weight * ce + kl_weight * kl, ce, kl


@pytest.mark.parametrize(
    ("ce_weight", "kl_weight", "temperature", "chunk", "bias"),
    [
        (1.0, 1.0, 1.0, 2048, True),
        (0.7, 0.4, 2.0, 33, True),
        (0.0, 1.0, 1.0, 1, False),
        (0.0, 2.0, 0.5, 64, False),
    ],
    ids=["one-chunk", "ragged-chunks-temperature", "kl-only-row-by-row", "kl-only-low-temperature"],
)
def test_chunked_losses_equal_plain_ones_in_value_and_gradient(
    ce_weight: float, kl_weight: float, temperature: float, chunk: int, bias: bool
) -> None:
    t = tensors(bias)
    inputs = [t[name] for name in ("hidden", "weight", "bias") if t[name] is not None]
    expected = plain(t, ce_weight, kl_weight, temperature)
    expected_grads = torch.autograd.grad(3.0 * expected[0], inputs)
    workspace = Workspace()
    for _ in range(2):  # the second time in memory that the first one used
        got = head_losses(
            t["hidden"],
            Head(t["weight"], t["bias"]),
            t["labels"],
            teacher_hidden=t["teacher_hidden"],
            teacher_head=Head(t["teacher_weight"]),
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            temperature=temperature,
            chunk=chunk,
            workspace=workspace,
        )
        torch.testing.assert_close(tuple(got), expected, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(3.0 * got.loss, inputs)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-13)


def test_without_a_teacher_the_loss_is_cross_entropy() -> None:
    t = tensors()
    got = head_losses(t["hidden"], Head(t["weight"], t["bias"]), t["labels"], chunk=50)
    expected = plain(t, 1.0, 0.0, 1.0)[0]
    torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=0)
    assert got.kl is None and not got.ce.requires_grad
    wanted = torch.autograd.grad(expected, t["hidden"])[0]
    torch.testing.assert_close(torch.autograd.grad(got.loss, t["hidden"])[0], wanted)


def test_kl_of_a_model_with_itself_is_zero_and_pulls_nowhere() -> None:
    t = tensors()
    for temperature in (1.0, 3.0):
        got = head_losses(
            t["hidden"],
            Head(t["weight"], t["bias"]),
            t["labels"],
            teacher_hidden=t["hidden"],
            teacher_head=Head(t["weight"], t["bias"]),
            ce_weight=0.0,
            temperature=temperature,
        )
        assert abs(got.kl.item()) < 1e-14
        assert torch.autograd.grad(got.loss, t["weight"])[0].abs().max() < 1e-15


def test_a_frozen_head_gets_no_gradient_and_ignored_rows_give_none() -> None:
    t = tensors()
    got = head_losses(t["hidden"], Head(t["weight"].detach(), None), t["labels"])
    got.loss.backward()
    assert t["weight"].grad is None
    assert t["hidden"].grad[t["labels"] == IGNORED].abs().max() == 0
    assert (t["hidden"].grad[t["labels"] != IGNORED].abs().amax(-1) > 0).all()


def test_second_use_of_the_gradient_is_an_error_and_no_wrong_number() -> None:
    t = tensors()
    loss = head_losses(t["hidden"], Head(t["weight"]), t["labels"]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_autocast_is_as_exact_as_plain_logits_in_bf16() -> None:
    t = tensors()
    expected = plain(t, 1.0, 1.0, 1.0)
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in t.items()}

    def error(values: tuple[Tensor, ...]) -> float:
        return max(abs(a.double() - b).item() for a, b in zip(values, expected, strict=True))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head_losses(
            single["hidden"],
            Head(single["weight"], single["bias"]),
            t["labels"],
            teacher_hidden=single["teacher_hidden"],
            teacher_head=Head(single["teacher_weight"]),
        )
        dense = plain(single, 1.0, 1.0, 1.0)
    assert got.loss.dtype == torch.float32
    assert error(tuple(got)) <= 2 * error(dense) + 1e-4


def test_bad_arguments_of_the_head_losses_are_named() -> None:
    t = tensors()
    head, labels = Head(t["weight"], t["bias"]), t["labels"]
    with pytest.raises(ValueError, match="labels: expected one per row"):
        head_losses(t["hidden"], head, labels[:, 1:])
    with pytest.raises(ValueError, match="belong together"):
        head_losses(t["hidden"], head, labels, teacher_hidden=t["teacher_hidden"])
    with pytest.raises(ValueError, match="36 entries, the student's 37"):
        head_losses(
            t["hidden"],
            head,
            labels,
            teacher_hidden=t["teacher_hidden"],
            teacher_head=Head(t["teacher_weight"][1:]),
        )
    with pytest.raises(ValueError, match="temperature must be > 0"):
        head_losses(t["hidden"], head, labels, temperature=0.0)
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        head_losses(t["hidden"], head, labels, chunk=0)
    with pytest.raises(ValueError, match="all are ignored"):
        head_losses(t["hidden"], head, torch.full_like(labels, IGNORED))


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
        logits = F.linear(outputs.hidden, *parts.head)
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
