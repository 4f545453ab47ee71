"""Packed documents: a model gives what it gives for each alone, and training keeps documents apart.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from ranks import HAS_GLOO, run_ranks, whole
from tiny import hybrid, options, tiny_decoder, tiny_run
from torch import Tensor

from fusedkv_ext import Decoder, load_pretrained
from fusedkv_ext.cli.main import main
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.layers import decoder
from fusedkv_ext.ops import checks, sdpa
from fusedkv_ext.ops.packing import (
    IGNORED,
    Documents,
    document_ids_of,
    document_positions,
    next_tokens,
    read_documents,
)
from fusedkv_ext.training import loop, session
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data.tokenizer import ByteTokenizer
from fusedkv_ext.training.data.tokens import TokenData, num_target_tokens, rows_of, training_batch
from fusedkv_ext.training.metrics import read_metrics, series
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer, build_model

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: what rounding leaves
LATENT = {"head_dim": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        plan: (plan, {}) for plan in ("vanilla", "fusedkv", "fusedkv-lite", "skipv1", "cla", "yoco", "yoco++")
    },
    "windows": ("fusedkv", {"sliding_window": 3}),
    "windows between": ("fusedkv", hybrid("fusedkv")),
    "latents": ("fusedkv", LATENT),
    "latents of two layers": ("fusedkv-lite", LATENT),
    "recomputed fusion": ("fusedkv", {"recompute_fusion": True}),
    "experts": ("fusedkv", {"num_experts": 4, "moe_intermediate_size": 16}),
}
DOCUMENTS = ((5, 1, 9, 3), (1, 12, 4, 1))  # lengths, sequence by sequence


def model_of(case: str) -> Decoder:
    torch.manual_seed(3)
    plan, changes = MODELS[case]
    return tiny_decoder(plan, **changes).double().eval()  # in training experts add what depends on sequences


def packed() -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """ids, document_ids, and the documents of each sequence."""
    ids = torch.randint(61, (2, 18), generator=torch.Generator().manual_seed(4))
    names = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]
    return (
        ids,
        torch.stack(names),
        [list(row.split(list(ls))) for row, ls in zip(ids, DOCUMENTS, strict=True)],
    )


def alone(model: Decoder, documents: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits (B, S, vocab) and the mean loss over target tokens, each document a sequence of its own."""
    logits = [[model(document[None])[0] for document in row] for row in documents]
    pairs = [pair for rows in zip(logits, documents, strict=True) for pair in zip(*rows, strict=True)]
    losses = [F.cross_entropy(x[:-1], document[1:], reduction="sum") for x, document in pairs]
    targets = sum(len(document) - 1 for _, document in pairs)
    return torch.stack([torch.cat(row) for row in logits]), torch.stack(losses).sum() / targets


def gradients_of(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


# The model


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
def test_packed_documents_give_what_separate_ones_give(case: str, checkpointing: str | None) -> None:
    model = model_of(case)
    ids, document_ids, documents = packed()
    expected, expected_loss = alone(model, documents)
    expected_gradients = gradients_of(model, expected_loss)
    for layer in model.model.layers:
        layer.activation_checkpointing = checkpointing
    logits, loss = model(ids, ids, document_ids=document_ids)
    torch.testing.assert_close(logits, expected, **EXACT)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    for name, gradient in gradients_of(model, loss).items():
        assert expected_gradients[name].abs().max() > 1e-9, f"{name} has no gradient to compare"
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-8, atol=1e-10, msg=name)
    ignored = model(ids)
    first = torch.tensor([5, 1])  # a sequence's first document sees the same either way
    for b in range(2):
        torch.testing.assert_close(ignored[b, : first[b]], expected[b, : first[b]], **EXACT)
    begins = [5, 6, 15]  # where a token that ignores the masks sees others
    assert (ignored - expected)[0, begins].abs().amax(-1).min() > 1e-3, "this model would not notice a mask"


@pytest.mark.parametrize("case", ["fusedkv", "latents"])
def test_a_model_reads_its_documents_once_and_makes_no_mask(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, document_ids, _), reads = model_of(case), packed(), []

    def recorded(document_ids: Tensor) -> Documents:
        reads.append(document_ids)
        return read_documents(document_ids)

    def refused(*args: object) -> NoReturn:
        raise AssertionError("a layer reads ids, or makes a mask of them")

    monkeypatch.setattr(decoder, "read_documents", recorded)
    monkeypatch.setattr(checks, "read_documents", refused)
    monkeypatch.setattr(sdpa, "_document_mask", refused)
    model(ids, ids, document_ids=document_ids)[1].backward()
    assert len(reads) == 1


def test_ids_that_return_join_their_tokens() -> None:
    """Attention compares ids for equality: two runs of one id are one document, of which none is a run."""
    model = model_of("vanilla")
    attention = model.model.layers[0].self_attn
    x, ids = torch.randn(1, 9, 32, dtype=torch.float64), torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]])
    cos_sin = model.model.rope.cos_sin(torch.arange(9))
    out = attention(x, position_embeddings=cos_sin, document_ids=ids)[0]
    for places in ([0, 1, 2, 6, 7, 8], [3, 4, 5]):
        own = attention(x[:, places], position_embeddings=tuple(part[places] for part in cos_sin))[0]
        torch.testing.assert_close(out[:, places], own, **EXACT)


@pytest.mark.parametrize("case", ["fusedkv", "yoco", "latents"])
def test_the_last_logits_alone_are_the_same(case: str) -> None:
    model = model_of(case)
    ids, document_ids, _ = packed()
    with torch.no_grad():
        expected = model(ids, document_ids=document_ids)
        for keep in (1, 4):
            kept = model(ids, document_ids=document_ids, logits_to_keep=keep)
            torch.testing.assert_close(kept, expected[:, -keep:], **EXACT)


@pytest.mark.parametrize("case", ["vanilla", "latents"])
def test_an_attention_module_makes_the_positions_itself(case: str) -> None:
    attention = model_of(case).model.layers[0].self_attn
    x = torch.randn(2, 18, 32, dtype=torch.float64)
    _, document_ids, _ = packed()
    out, _ = attention(x, document_ids=document_ids)
    for b, lengths in enumerate(DOCUMENTS):
        parts = [attention(part[None])[0][0] for part in x[b].split(list(lengths))]
        torch.testing.assert_close(out[b], torch.cat(parts), **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_packed_model_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    model = model_of("fusedkv")
    ids, document_ids, _ = packed()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [f(ids, ids, document_ids=document_ids) for f in (compiled, model)]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
    gradients = [gradients_of(model, loss) for _, loss in results]
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-8, atol=1e-10, msg=name)


def test_positions_and_labels_follow_the_changes_of_the_ids() -> None:
    ids = torch.tensor([[4, 4, 4, 9, 9, -1, 4, 4], [0, 1, 2, 3, 3, 3, 3, 0]])
    positions = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 2, 3, 0]]
    assert document_positions(ids).tolist() == document_positions(ids.int()).tolist() == positions
    labels = torch.arange(10, 18).expand(2, 8)
    no = IGNORED
    expected = [[11, 12, no, 14, no, no, 17, no], [no, no, no, 14, 15, 16, no, no]]
    assert next_tokens(labels, ids).tolist() == expected
    assert next_tokens(labels).tolist() == [[*range(11, 18), no]] * 2


def test_a_separator_ends_its_document() -> None:
    ids = torch.tensor([[7, 0, 5, 5, 0, 0, 3], [0, 1, 1, 1, 1, 1, 0]])
    assert document_ids_of(ids, 0).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert num_target_tokens(ids, 0) == 1 + 2 + 0 + 0 + 0 + 5 and num_target_tokens(ids, None) == 12


def test_labels_left_out_stay_left_out() -> None:
    model = model_of("fusedkv")
    ids, document_ids, _ = packed()
    labels = ids.clone()
    labels[0] = IGNORED
    loss = model(ids, labels, document_ids=document_ids)[1]
    row = model(ids[1:], ids[1:], document_ids=document_ids[1:])[1]
    torch.testing.assert_close(loss, row, **EXACT)


def test_without_target_tokens_loss_and_gradients_are_zero() -> None:
    model = model_of("fusedkv")
    ids = torch.arange(18).expand(2, 18)
    loss = model(ids, ids, document_ids=ids)[1]
    assert loss.item() == 0 and all(not g.any() for g in gradients_of(model, loss).values())
    assert model(ids, torch.full_like(ids, IGNORED))[1].item() == 0


def test_num_target_tokens_is_what_the_sum_is_divided_by() -> None:
    model = model_of("fusedkv")
    ids, document_ids, documents = packed()
    targets = sum(len(document) - 1 for row in documents for document in row)
    mean, given = (
        model(ids, ids, document_ids=document_ids, num_target_tokens=number)[1] for number in (None, 2.5)
    )
    torch.testing.assert_close(given * 2.5, mean * targets, **EXACT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"document_ids": torch.zeros(2, 17, dtype=torch.long)},
            r"int32 or int64 of .* ids, \(2, 18\)",
        ),
        ({"document_ids": torch.zeros(2, 18)}, "must be int32 or int64 .* got torch.float32"),
        (
            {"document_ids": torch.zeros(2, 18, dtype=torch.long, device="meta")},
            "document_ids must be on .* got a tensor on meta",
        ),
        ({"num_target_tokens": 3.0}, "num_target_tokens must be above 0, with labels, got 3.0"),
        (
            {"num_target_tokens": 0.0, "labels": torch.zeros(2, 18, dtype=torch.long)},
            "num_target_tokens must be above 0",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    ids, _, _ = packed()
    with pytest.raises(ValueError, match=message):
        model_of("fusedkv")(ids, **arguments)


@pytest.mark.parametrize("case", ["fusedkv", "latents"])
@torch.no_grad()
def test_a_cache_takes_no_packed_prompts(case: str) -> None:
    model = model_of(case)
    ids, document_ids, _ = packed()
    cache = model.make_cache(2, 32)
    with pytest.raises(ValueError, match="document_ids must be None with a cache"):
        model(ids, document_ids=document_ids, cache=cache)
    assert list(cache.lengths) == [0, 0]  # nothing has been done


# Training


def config_in(folder: Path, **changes: Any) -> TrainConfig:
    """Windows of 32 tokens out of documents of 5 to 44 bytes and their separators."""
    text = folder / "documents"
    if not text.exists():
        text.mkdir(parents=True)
        for i in range(80):
            words = "the quick brown fox jumps over the lazy dog"[: 3 + 37 * i % 40]
            (text / f"{i}.txt").write_text(f"{i} {words}")
    values = {
        "data.text": [str(text)],
        "data.document_masks": True,
        "data.valid_fraction": 0.3,
        "run.batch_size": 8,
    }
    return tiny_run(folder, **values | changes)


def trainer_of(config: TrainConfig) -> DecoderTrainer:
    data = loop.load_data(config, ByteTokenizer())
    return DecoderTrainer(build_model(config, 256).double(), data, config, torch.device("cpu"))


def three_steps(trainer: DecoderTrainer) -> tuple[Tensor, list[float]]:
    """The windows of three steps, (3, rows, tokens); their losses and norms and the validation after them."""
    windows, steps = [], []
    for _ in range(3):
        windows.append(trainer._windows())
        steps.append(trainer.train_step())
    numbers = [number for step in steps for number in (step.loss, step.grad_norm)]
    return torch.stack(windows), [*numbers, trainer.evaluate()]


EXPERTS = {"model.num_experts": 4, "model.router_aux_loss_coef": 0.5}


def test_a_step_is_one_of_separate_documents(tmp_path: Path) -> None:
    trainer = trainer_of(config_in(tmp_path, **{"run.accumulate": 2}))
    windows = trainer._windows()
    documents = []
    for window in windows:
        ends = [i + 1 for i in range(31) if window[i] == 0]
        documents.append([part for part in window.tensor_split(ends) if len(part)])
    assert max(map(len, documents)) > 2
    _, expected = alone(trainer.model, documents)
    gradients = gradients_of(trainer.model, expected)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    step = trainer.train_step()
    assert step.loss == pytest.approx(expected.item(), rel=1e-10)
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-8)
    other = trainer_of(config_in(tmp_path, **{"data.document_masks": False})).train_step()
    assert abs(other.loss - step.loss) > 1e-4, "this text would not notice a mask"


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_the_number_of_parts_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = []
    for parts in (1, 2, 8):
        trainer = trainer_of(config_in(tmp_path, **changes, **{"run.accumulate": parts}))
        if parts == 8:
            counts = [num_target_tokens(window[None], 0) for window in trainer._windows()]
            assert len(set(counts)) > 2, "parts have to differ in their numbers of target tokens"
        found.append(three_steps(trainer)[1])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)


def test_windows_without_target_tokens_give_no_nan(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    info = loop.load_data(config, ByteTokenizer()).info
    nothing = torch.zeros(400, dtype=torch.uint8)  # separators, each a document
    some = torch.where(torch.arange(400) < 330, nothing, torch.arange(400).remainder(50).to(torch.uint8))
    for tokens in (nothing, some):
        trainer = DecoderTrainer(
            build_model(config, 256), TokenData(tokens, tokens, info, 0), config, torch.device("cpu")
        )
        steps = [trainer.train_step() for _ in range(4)]
        losses = [step.loss for step in steps] + [trainer.evaluate()]
        assert all(map(math.isfinite, losses)), losses
        assert (max(losses) == 0) == (tokens is nothing)


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    config = config_in(tmp_path, **{"run.accumulate": 2})
    result = loop.run(loop.start(config, tmp_path / "whole"), SilentProgress())
    loop.run(loop.start(config, tmp_path / "parts"), SilentProgress(), stop_after=3)
    resumed, warnings = loop.resume(tmp_path / "parts")
    again = loop.run(resumed, SilentProgress())
    assert warnings == [] and again.valid_loss == result.valid_loss
    folders = [tmp_path / "whole", tmp_path / "parts"]
    weights = [load_pretrained(end.checkpoint).state_dict() for end in (result, again)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    losses = [series(read_metrics(folder / "metrics.jsonl"), "train", "loss") for folder in folders]
    assert losses[0] == losses[1] and len(losses[0]) > 0


def test_the_command_line_trains_on_packed_documents(tmp_path: Path) -> None:
    changes = {"run.steps": 60, "optim.lr": 5e-3, "run.save_every": 60}
    config = config_in(tmp_path, **changes)
    flags, out = options(config), tmp_path / "run"
    seeds = flags.index("--seeds")  # of other commands
    del flags[seeds : seeds + 2]
    assert main(["train", "--out", str(out), *flags]) == 0
    records = read_metrics(out / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert records[0]["config"]["data"]["document_masks"] is True
    assert losses[0] > 5 and losses[-1] < 3


def test_a_tokenizer_without_a_separator_is_refused(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.separator = None
    config = config_in(tmp_path, **{"data.tokenizer": "words.json"})
    with pytest.raises(ConfigError, match="data.document_masks needs a tokenizer with.* got words.json"):
        loop.load_data(config, tokenizer)


# The order of the data


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_data_ranks_share_the_rows_of_a_batch(ranks: int) -> None:
    tokens = torch.arange(5000, dtype=torch.int32)
    batch = training_batch(tokens, 3, 11, 8, 16)
    parts = [training_batch(tokens, 3, 11, 8, 16, rows_of(rank, ranks, 8)) for rank in range(ranks)]
    assert all(len(part) == 8 // ranks for part in parts)
    assert torch.equal(torch.cat(parts), batch)


LAYOUTS: dict[str, dict[str, Any]] = {
    "four shards": {},
    "two copies, two shards": {"parallel.dp_replicate": 2},
    "tensor parallel": {"parallel.tp": 2},
    "context parallel": {"parallel.cp": 2},
    "context parallel, checkpointing": {
        "parallel.cp": 2,
        "parallel.activation_checkpointing": "reentrant",
        "model.plan": "yoco++",
    },
    "experts": EXPERTS,
}


def run_of(folder: Path, layout: str) -> dict[str, Any]:
    """Three steps of a layout, in two parts each, and the windows that they ran on."""
    trainer = trainer_of(config_in(folder, **LAYOUTS[layout], **{"run.accumulate": 2}))
    windows, numbers = three_steps(trainer)
    return {
        "place": (trainer.data_rank, trainer.data_ranks),
        "windows": windows,
        "numbers": numbers,
        "weights": {name: whole(weight).detach() for name, weight in trainer.model.named_parameters()},
    }


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    with session.session():
        found = {layout: run_of(folder, layout) for layout in LAYOUTS}
        torch.save(found, folder / f"rank{session.rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    loop.load_data(config_in(folder), ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    if not HAS_GLOO:
        pytest.skip("needs a torch with gloo")
    return run_ranks(__file__, folder, processes=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_processes_train_as_one(layout: str, four: list[dict[str, Any]], folder: Path) -> None:
    alone = [key for key in LAYOUTS[layout] if not key.startswith("parallel.")]
    changes = {key: LAYOUTS[layout][key] for key in alone}
    trainer = trainer_of(config_in(folder, **changes, **{"run.accumulate": 1}))
    windows, expected = three_steps(trainer)
    ranks = [rank[layout] for rank in four]
    for rank in ranks:
        assert rank["numbers"] == pytest.approx(expected, rel=1e-9)
        for name, weight in trainer.model.named_parameters():
            torch.testing.assert_close(rank["weights"][name], weight.detach(), rtol=1e-7, atol=1e-9, msg=name)
    data_ranks = ranks[0]["place"][1]
    assert data_ranks == (2 if {"parallel.tp", "parallel.cp"} & set(LAYOUTS[layout]) else 4)
    for data_rank in range(data_ranks):
        own = [rank["windows"] for rank in ranks if rank["place"] == (data_rank, data_ranks)]
        assert len(own) == 4 // data_ranks  # these share sequences
        for windows_of_rank in own:
            assert torch.equal(windows_of_rank, own[0])
    together = [next(r["windows"] for r in ranks if r["place"][0] == i) for i in range(data_ranks)]
    assert torch.equal(torch.cat(together, dim=1), windows)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
