"""`fusedkv eval`: what perplexity and loss by position count, and the command on trained checkpoints."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor, nn

from fusedkv_ext.checkpoint.pretrained import save_pretrained
from fusedkv_ext.cli import eval as command
from fusedkv_ext.cli.main import main
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.evaluation import perplexity as evaluate
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data import tokens as data
from fusedkv_ext.training.data.corpus import user_corpus
from fusedkv_ext.training.data.tokenizer import ByteTokenizer


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


class Uniform(nn.Module):
    """Takes all tokens for equally likely, and remembers what it was asked: (inputs, predictions wanted)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=64)
        self.nothing = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, int]] = []

    def forward(self, ids: Tensor, *, logits_to_keep: int = 0) -> Tensor:
        wanted = logits_to_keep or ids.shape[1]
        self.asked.append((ids, wanted))
        return torch.zeros(len(ids), wanted, self.config.vocab_size)


def text_of(length: int, vocab_size: int = 61) -> Tensor:
    return torch.randint(vocab_size, (length,), dtype=torch.int32)


def scored_alone(model: Decoder, ids: Tensor, first: int, target: int) -> float:
    """Loss of one token from those between `first` and it, by one plain forward pass."""
    with torch.no_grad():
        logits = model(ids[None, first:target].long())[0, -1]
    return -logits.double().log_softmax(-1)[ids[target].long()].item()


# Target tokens


@pytest.mark.parametrize(
    ("tokens", "context", "stride"),
    [(50, 16, 16), (49, 16, 16), (50, 16, 5), (50, 16, 1), (17, 16, 3), (33, 16, 16), (9, 1, 1)],
)
def test_every_token_is_a_target_exactly_once_with_the_context_promised(
    tokens: int, context: int, stride: int
) -> None:
    model = Uniform(tokens)
    ids = torch.arange(tokens)  # a token is its own position, so what is fed tells which tokens are targets
    losses = evaluate.window_losses(model, ids, context=context, stride=stride)
    before: dict[int, int] = {}
    for rows, wanted in model.asked:
        for row in rows.tolist():
            assert row == list(range(row[0], row[0] + len(row)))
            for place in range(len(row) - wanted, len(row)):
                assert row[place] + 1 not in before
                before[row[place] + 1] = place + 1
    assert sorted(before) == list(range(1, tokens))
    assert all(seen >= context - stride + 1 for token, seen in before.items() if token > context)
    assert losses.counts.sum() == tokens - 1
    positions = losses.positions()
    for first, last, number in zip(positions.first, positions.last, positions.tokens, strict=True):
        assert number == sum(first <= seen <= last for seen in before.values())


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary() -> None:
    result = evaluate.perplexity(Uniform(256), text_of(100, 256), context=8, tokens_per_byte=1.0)
    assert result.loss == pytest.approx(math.log(256)) and result.perplexity == pytest.approx(256)
    assert result.bits_per_byte == pytest.approx(8) and result.stderr == pytest.approx(0, abs=1e-6)
    assert (result.tokens, result.windows, result.context, result.stride) == (99, 13, 8, 8)


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "yoco"])
def test_strided_losses_are_those_of_each_token_alone(plan: str) -> None:
    model, ids = tiny.tiny_decoder(plan), text_of(31)
    losses = evaluate.window_losses(model, ids, context=12, stride=5)
    starts = [0] * 12 + [5] * 5 + [10] * 5 + [15] * 5 + [20] * 3
    expected = [scored_alone(model, ids, start, target) for target, start in enumerate(starts, start=1)]
    assert losses.perplexity().loss == pytest.approx(statistics.fmean(expected), rel=1e-5)
    assert losses.counts.sum(1).tolist() == [12, 5, 5, 5, 3]


def test_positions_average_to_the_loss_of_perplexity_and_errors_are_those_of_window_means() -> None:
    model, ids = tiny.tiny_decoder("fusedkv"), text_of(161)
    perplexity = evaluate.perplexity(model, ids, context=32)
    positions = evaluate.per_position(model, ids, context=32)
    total = sum(loss * number for loss, number in zip(positions.loss, positions.tokens, strict=True))
    assert total / sum(positions.tokens) == pytest.approx(perplexity.loss)
    assert sum(positions.tokens) == perplexity.tokens == 160

    means, first = [], []
    for start in range(0, 160, 32):
        losses = [scored_alone(model, ids, start, start + i) for i in range(1, 33)]
        means.append(statistics.fmean(losses))
        first.append(losses[0])
    assert perplexity.loss == pytest.approx(statistics.fmean(means), rel=1e-5)
    assert perplexity.stderr == pytest.approx(statistics.stdev(means) / math.sqrt(5), rel=1e-4)
    assert positions.loss[0] == pytest.approx(statistics.fmean(first), rel=1e-5)
    assert positions.stderr[0] == pytest.approx(statistics.stdev(first) / math.sqrt(5), rel=1e-4)


def test_buckets_of_positions_are_half_octaves_without_gaps() -> None:
    assert evaluate.position_buckets(16) == (1, 2, 3, 4, 6, 8, 12, 16)
    assert evaluate.position_buckets(20) == (1, 2, 3, 4, 6, 8, 12, 16, 20)
    assert evaluate.position_buckets(1) == (1,)
    positions = evaluate.per_position(Uniform(5), text_of(41, 5), context=20)
    assert positions.first[0] == 1 and positions.last[-1] == 20
    assert all(last + 1 == first for last, first in zip(positions.last, positions.first[1:], strict=False))


def test_max_tokens_spreads_windows_over_the_whole_text() -> None:
    model = Uniform(400)
    result = evaluate.perplexity(model, torch.arange(400), context=10, max_tokens=50)
    starts = [row[0] for rows, _ in model.asked for row in rows.tolist()]
    assert starts == [0, 80, 160, 240, 320] and result.tokens == 50


def test_paired_differences_have_the_sign_and_the_error_of_windows() -> None:
    ids = text_of(161)
    good, bad = tiny.tiny_decoder("vanilla"), tiny.tiny_decoder("fusedkv")
    one, other = (evaluate.window_losses(model, ids, context=32) for model in (good, bad))
    difference = evaluate.paired_difference(one, other)
    by_window = ((one.sums - other.sums).sum(1) / 32).tolist()
    assert difference.loss == pytest.approx(one.perplexity().loss - other.perplexity().loss)
    assert difference.stderr == pytest.approx(statistics.stdev(by_window) / math.sqrt(5))
    assert evaluate.paired_difference(one, one) == evaluate.Difference(0.0, 0.0)
    with pytest.raises(ValueError, match="same windows"):
        evaluate.paired_difference(one, evaluate.window_losses(good, ids, context=16))


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = tiny.tiny_decoder("vanilla").train()
    model.lm_head.eval()
    result = evaluate.perplexity(model, text_of(20), context=8)
    assert model.training and model.model.training and not model.lm_head.training
    assert result.stderr is not None and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"context": 65},
            r"context must be at most max_position_embeddings of the model \(64\), got 65",
        ),
        ({"context": 8, "stride": 9}, "stride must be from 1 to the context of 8 tokens, got 9"),
        ({"context": 8, "stride": 0}, "stride must be from 1 to the context of 8 tokens, got 0"),
        ({"context": 0}, "context must be at least 1 token, got 0"),
        ({"context": 8, "max_tokens": 0}, "max_tokens must be at least 1, or None for all, got 0"),
        ({"context": 30}, "the text must have at least 31 tokens for a context of 30, got 30"),
    ],
)
def test_arguments_that_cannot_be_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.window_losses(tiny.tiny_decoder("vanilla"), text_of(30), **settings)


def test_a_damaged_model_is_an_error_and_no_number() -> None:
    model = tiny.tiny_decoder("vanilla")
    nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(RuntimeError, match="loss must be finite"):
        evaluate.perplexity(model, text_of(20), context=8)


# Text


def test_the_default_text_is_what_training_validates_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(30):
        (tmp_path / f"{i}.py").write_text(f"x = {i}  # größer\n" * 9)
    for module in (evaluate, data):
        monkeypatch.setattr(module, "default_corpus", lambda: user_corpus([tmp_path]))
    tokenizer = ByteTokenizer()
    for fraction in (0.1, 0.4):
        text = evaluate.read_text(valid_fraction=fraction)
        known = data.prepare(tokenizer, valid_fraction=fraction, cache_dir=tmp_path / f"cache{fraction}")
        assert torch.equal(text.ids(tokenizer), known.valid.int())
        assert text.bytes == known.info.valid_bytes
        assert text.tokens_per_byte(known.info.valid_tokens) == known.tokens_per_byte == 1.0


def test_the_default_text_is_held_out_of_all_runs_that_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(60):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n")
    monkeypatch.setattr(evaluate, "default_corpus", lambda: user_corpus([tmp_path]))

    def chosen(*sections: dict[str, object] | None) -> set[str]:
        runs = [s if s is None else TrainConfig.from_dict({"data": s}) for s in sections]
        text = command._text(
            SimpleNamespace(text=[]), [SimpleNamespace(training=run, name="run") for run in runs]
        )
        return set(text.documents)

    large, small = chosen({"valid_fraction": 0.4}), chosen({"valid_fraction": 0.1})
    assert small < large and small == chosen({"valid_fraction": 0.4}, None, {"valid_fraction": 0.1})
    other_text = {"text": ["notes.txt"], "valid_fraction": 0.1}
    assert chosen({"valid_fraction": 0.4}, other_text) == large
    assert chosen(None) == set(evaluate.read_text().documents)
    with pytest.raises(ConfigError, match="must be given for run, which was trained on all of"):
        chosen(None, {"valid_text": ["notes.txt"]})


# The command

SMALL = [
    "model.num_hidden_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
    "data.seq_len=32",
    "run.batch_size=8",
    "run.device=cpu",
    "run.valid_batches=2",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Text, a run trained on it, and a folder of save_pretrained."""
    root = tmp_path_factory.mktemp("eval")
    text, run, saved = root / "text", root / "run", root / "saved"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text("".join(f"line {i}.{j} of all work and no play\n" for j in range(40)))
    settings = [part for setting in SMALL for part in ("--set", setting)]
    settings += ["--set", f"data.cache_dir={root / 'cache'}"]
    assert main(["train", "--text", str(text), "--out", str(run), "--steps", "3", *settings]) == 0
    save_pretrained(Decoder(tiny.tiny_config("yoco", vocab_size=256, max_position_embeddings=256)), saved)
    return text, run, saved


def test_command_compares_checkpoints_of_both_kinds(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    text, run, saved = folders
    arguments = ["eval", str(run), str(saved), "--text", str(text), "--lengths", "160", "200", "--depths"]
    arguments += ["0", "100", "--examples", "2", "--max-tokens", "640", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (
        list(result["checkpoints"]) == ["run", "saved"] and result["settings"]["context"] == 32
    )  # as trained
    for name, plan in (("run", "fusedkv"), ("saved", "yoco")):
        entry = result["checkpoints"][name]
        assert entry["plan"] == plan and entry["perplexity"]["tokens"] == 640
        assert entry["perplexity"]["bits_per_byte"] == pytest.approx(
            entry["perplexity"]["loss"] / math.log(2)
        )
        assert sum(entry["positions"]["tokens"]) == 640
        assert len(entry["retrieval"]["cells"]) == 2 * 2 * 2 and len(entry["retrieval"]["totals"]) == 4
    first, second = (result["checkpoints"][name] for name in ("run", "saved"))
    gap = second["perplexity"]["loss"] - first["perplexity"]["loss"]
    assert second["difference"]["loss"] == pytest.approx(gap) and "difference" not in first
    for name in ("positions.png", "retrieval.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_command_prints_the_numbers_of_its_json(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, run, _ = folders
    arguments = ["eval", str(run), "--text", str(text), "--context", "160", "--stride", "80"]
    arguments += ["--max-tokens", "320", "--depths", "50", "--examples", "2"]
    capsys.readouterr()
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["checkpoints"]["run"]
    assert "windows of 160 tokens, stride 80" in shown and f"{entry['perplexity']['loss']:.4f} ±" in shown
    assert entry["perplexity"]["tokens"] == 160 + 3 * 80  # all tokens of the first window are targets
    assert all(f"{loss:.3f} ±" in shown for loss in entry["positions"]["loss"])
    assert entry["positions"]["windows"] == 2
    assert "chance 25%" in shown and all(f"{t['nll']:.2f} ±" in shown for t in entry["retrieval"]["totals"])


def test_command_takes_a_checkpoint_folder_and_single_tasks(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, run, _ = folders
    folder = run / "checkpoints" / "step-00000003"
    for task in ("perplexity", "positions", "retrieval"):
        arguments = ["eval", str(folder), "--text", str(text), "--tasks", task, "--lengths", "160"]
        capsys.readouterr()
        assert main([*arguments, "--examples", "1", "--depths", "50", "--max-tokens", "64", "--json"]) == 0
        entry = json.loads(capsys.readouterr().out)["checkpoints"][str(folder)]
        assert set(entry) == {"checkpoint", "plan", "parameters", "cache_bytes_per_token", task}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere"], 1, "/nowhere holds no checkpoint; expected a folder with"),
        (["RUN", "RUN"], 2, "paths must be unique, got "),
        (["RUN", "--tasks", "perplexity,haystack"], 2, "expected some of perplexity,positions,retrieval"),
        (["RUN", "SAVED", "--context", "300"], 2, "max_position_embeddings of saved (256), got 300"),
        (["RUN", "SAVED", "--lengths", "257"], 2, "max_position_embeddings of saved (256), got 257"),
        (
            ["RUN", "--context", "8150", "--tasks", "perplexity"],
            1,
            "at least 8151 tokens for a context of 8150",
        ),
        (["RUN", "--stride", "33"], 2, "stride must be from 1 to the context of 32"),
        (["RUN", "--stride", "0"], 2, "stride must be from 1 to the context of 32 tokens, got 0"),
        (["RUN", "--max-tokens", "-1"], 2, "max_tokens must be at least 1"),
        (["RUN", "--lengths", "100"], 2, "for task multikey, got 100: needles, question and answer take"),
        (["RUN", "--depths", "101"], 2, "depths must be from 0 to 1"),
        (["RUN", "--text", "/nowhere"], 1, "/nowhere does not exist"),
    ],
)
def test_command_says_what_came_and_what_to_do(
    arguments: list[str],
    code: int,
    message: str,
    folders: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, run, saved = folders
    arguments = [{"RUN": str(run), "SAVED": str(saved)}.get(word, word) for word in arguments]
    if "--text" not in arguments:
        arguments += ["--text", str(text)]
    if "--lengths" not in arguments:
        arguments += ["--lengths", "160", "--examples", "1"]
    assert main(["eval", *arguments]) == code
    out, err = capsys.readouterr()
    assert message in " ".join(err.split()) and "Traceback" not in out + err


def test_checkpoints_of_different_tokenizers_are_compared_by_bits_per_byte_only(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text, run, _ = folders
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.train([str(text / "0.txt")], tokenizers.trainers.BpeTrainer(vocab_size=60, show_progress=False))
    config = tiny.tiny_config("vanilla", vocab_size=words.get_vocab_size(), max_position_embeddings=256)
    save_pretrained(Decoder(config), tmp_path / "words")
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    arguments = ["eval", str(run), str(tmp_path / "words"), "--text", str(text)]
    assert main(arguments) == 2
    assert (
        "must have one tokenizer for positions and retrieval, got different ones" in capsys.readouterr().err
    )
    assert main([*arguments, "--tasks", "perplexity", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    tokens = len(evaluate.read_text([text]).ids(ByteTokenizer()))
    entry = entries["words"]["perplexity"]
    assert entries["run"]["perplexity"]["tokens"] == tokens - 1 > entry["tokens"]
    assert entry["bits_per_byte"] == pytest.approx(
        entry["loss"] / math.log(2) * (entry["tokens"] + 1) / tokens
    )
    assert "difference" not in entries["words"]


def test_wrong_numbers_are_wrong_questions() -> None:
    """Exit code 2, not 1: the command tells them apart by the type."""
    with pytest.raises(ConfigError):
        evaluate.check_context(tiny.tiny_decoder("vanilla"), 65)
