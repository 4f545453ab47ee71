"""Losses at the output head: they equal the plain formulas, in value and gradient, and hold few logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import randomise_fusion, tiny_config, tiny_decoder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedkv_ext import Decoder
from fusedkv_ext.ops import head_loss
from fusedkv_ext.ops.head_loss import Head, VocabShard, Workspace, chunk_rows, head_losses
from fusedkv_ext.ops.packing import IGNORED, next_tokens

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
        "labels": next_tokens(torch.randint(VOCAB, ROWS, generator=generator)),
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


def test_a_given_divisor_takes_the_place_of_the_number_of_labels() -> None:
    t = tensors()
    head = Head(t["weight"], t["bias"])
    mean = head_losses(t["hidden"], head, t["labels"]).loss
    number = int((t["labels"] != IGNORED).sum())
    for divisor in (2.5, torch.tensor(5)):
        got = head_losses(t["hidden"], head, t["labels"], num_target_tokens=divisor).loss
        torch.testing.assert_close(got * divisor, mean * number, rtol=1e-12, atol=0)
    nothing = torch.full_like(t["labels"], IGNORED)
    loss = head_losses(t["hidden"], head, nothing, num_target_tokens=1.0).loss
    assert loss.item() == 0 and not torch.autograd.grad(loss, t["weight"])[0].any()


def test_rows_that_do_not_count_may_hold_anything() -> None:
    t = tensors()
    expected = head_losses(t["hidden"], Head(t["weight"]), t["labels"]).loss
    broken = t["hidden"].detach().clone()
    broken[t["labels"] == IGNORED] = torch.nan
    broken.requires_grad_()
    loss = head_losses(broken, Head(t["weight"]), t["labels"]).loss
    assert torch.equal(loss, expected)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (broken, t["weight"])))


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_labels_that_are_no_tokens_are_an_error(label: int) -> None:
    t = tensors()
    t["labels"][1, 3] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        head_losses(t["hidden"], Head(t["weight"]), t["labels"])


@pytest.mark.parametrize("chunk", [None, 33])
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_share_the_vocabulary_add_up(ranks: int, chunk: int | None) -> None:
    """All ranks in one process: each message is the next of those that a first pass has written down."""
    t = tensors()
    expected = head_losses(t["hidden"], Head(t["weight"], t["bias"]), t["labels"])
    inputs = (t["hidden"], t["weight"], t["bias"])
    wanted = torch.autograd.grad(expected.loss, inputs)
    size = -(-VOCAB // ranks)
    found, results = None, _all_ranks(t, ranks, size, chunk)
    for loss, *grads in results:
        torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=0)
        found = grads if found is None else [a + b for a, b in zip(found, grads, strict=True)]
    torch.testing.assert_close(tuple(found), wanted, rtol=1e-11, atol=1e-13)


def _all_ranks(t: dict[str, Tensor], ranks: int, size: int, chunk: int | None) -> list[tuple[Tensor, ...]]:
    """Loss and gradients of every rank. Message i needs all ranks' i-th tensor, which depends on the messages
    before: so the ranks run again and again, each time with one more message known."""
    known: list[Tensor] = []
    while True:
        sent: list[list[tuple[str, Tensor]]] = []
        results = []
        for rank in range(ranks):
            messages: list[tuple[str, Tensor]] = []

            def exchange(x: Tensor, kind: str, messages: list[tuple[str, Tensor]] = messages) -> None:
                messages.append((kind, x.clone()))
                if len(messages) <= len(known):
                    x.copy_(known[len(messages) - 1])

            shard = VocabShard(
                rank,
                ranks,
                size,
                maximum=lambda x, exchange=exchange: exchange(x, "maximum"),
                total=lambda x, exchange=exchange: exchange(x, "total"),
            )
            rows = slice(rank * size, (rank + 1) * size)
            head = Head(t["weight"][rows], t["bias"][rows], shard)
            loss = head_losses(t["hidden"], head, t["labels"], chunk=chunk).loss
            grads = torch.autograd.grad(loss, (t["hidden"], t["weight"], t["bias"]))
            results.append((loss.detach(), *grads))
            sent.append(messages)
        if len(known) == len(sent[0]):
            return results
        kinds, parts = zip(*(messages[len(known)] for messages in sent), strict=True)
        whole = torch.stack(parts)
        known.append(whole.amax(0) if kinds[0] == "maximum" else whole.sum(0))


# The decoder's loss


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_chunks_go_by_the_vocabulary() -> None:
    assert chunk_rows(10**6, 128_000, "cpu") * 128_000 <= 2**24
    assert chunk_rows(100, 256, "cpu") == 100
    assert chunk_rows(100, 2**30, "cuda") == 1
    assert chunk_rows(10**6, 128_000, "cuda") == 1048


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "tied": ("fusedkv", {"tie_word_embeddings": True}),
    "own head": ("yoco", {"tie_word_embeddings": False}),
    "experts": ("fusedkv", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_alone_is_that_beside_logits_in_value_and_gradient(
    case: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_loss._CHUNK_LOGITS, "cpu", 61 * 7)
    monkeypatch.setattr(head_loss, "_BLOCK_LOGITS", 61 * 3)
    plan, changes = CASES[case]
    model = tiny_decoder(plan, **changes).double()
    ids = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:9] = IGNORED
    document_ids = (torch.arange(19) // 5).expand(2, 19) if packed else None
    options = {"document_ids": document_ids, "num_target_tokens": 11.0 if packed else None}
    expected = model(ids, labels, **options)[1]
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model.loss(ids, labels, **options)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().loss(ids, labels), model(ids, labels)[1])
    assert model.loss(ids, torch.full_like(ids, IGNORED)).item() == 0


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_loss._CHUNK_LOGITS, "cpu", 2000 * 8)
    model = Decoder(tiny_config("fusedkv", vocab_size=2000))
    ids = torch.randint(2000, (4, 32))
    with Largest() as whole:
        model(ids, ids)[1].backward()
    with Largest() as parts:
        model.loss(ids, ids).backward()
    assert whole.elements == 4 * 32 * 2000
    assert parts.elements == 2000 * 32  # the gradient of the head


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_loss_in_bf16_is_fp32_and_as_exact_as_that_beside_logits(how: str) -> None:
    torch.manual_seed(0)
    model, ids = tiny_decoder("fusedkv"), torch.randint(61, (4, 30))
    exact = model.double().loss(ids, ids)
    model = model.to(torch.bfloat16 if how == "bf16" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss, beside = model.loss(ids, ids), model(ids, ids)[1]
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= 2 * abs(beside - exact) + 1e-4
    loss.backward()
    assert model.lm_head.weight.grad.dtype == model.lm_head.weight.dtype


def test_a_head_of_another_kind_gives_its_logits() -> None:
    model, ids = tiny_decoder("fusedkv", tie_word_embeddings=False), torch.randint(61, (2, 9))

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 8

    head = Scaled(32, 61, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert torch.equal(model.loss(ids, ids), model(ids, ids)[1])


def test_a_compiled_model_has_the_same_loss() -> None:
    model, ids = tiny_decoder("fusedkv"), torch.randint(61, (2, 9))
    randomise_fusion(model)
    expected = model.loss(ids, ids)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(ids, ids, return_logits=False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, model.lm_head.weight), torch.autograd.grad(expected, model.lm_head.weight)
    )


def test_without_labels_there_is_no_loss() -> None:
    with pytest.raises(ValueError, match="must be True without labels, got False"):
        tiny_decoder("fusedkv")(torch.zeros(1, 4, dtype=torch.long), return_logits=False)
