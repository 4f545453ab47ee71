"""`fusedkv uptrain`: what learns, the schedule, resuming, what is written, and errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from hf_uptraining import (
    SMALL,
    WORDS,
    one_thread_and_cache,
    weights,
    write_model,
    write_text,
    write_tokenizer,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusedkv_ext.checkpoint.pretrained import STATE
from fusedkv_ext.cli.main import build_parser, main
from fusedkv_ext.cli.uptrain import _OPTIONS
from fusedkv_ext.conversion.trainable import Trainable
from fusedkv_ext.conversion.uptrain_settings import UptrainSettings
from fusedkv_ext.conversion.uptraining import Uptrainer, partial_folder, uptrain
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.hf import FusedKVLlamaForCausalLM
from fusedkv_ext.training.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_thread_and_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("converted") / "model", original)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_loss_falls_and_the_folder_is_whole(converted: Path, text: Path, tmp_path: Path) -> None:
    result = uptrain(converted, [text], tmp_path / "out", **{**SMALL, "steps": 40})
    assert result.finished and result.steps == 40 and result.tokens == 40 * 2 * 32
    assert result.perplexity_after < 0.6 * result.perplexity_before
    assert result.original_loss is not None
    assert not partial_folder(tmp_path / "out").exists()
    # It loads like any folder, and has the perplexity that was reported.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is FusedKVLlamaForCausalLM and model.dtype == torch.float32
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["kind"] for record in records if record["kind"] != "train"] == [
        "run",
        "valid",
        "valid",
        "valid",
        "result",
    ]
    assert records[-1]["loss_after"] == records[-2]["loss"] == result.loss_after
    conversion = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert conversion["note"] == 1 and conversion["uptraining"]["tokens"] == result.tokens
    assert conversion["uptraining"]["loss_after"] == result.loss_after
    assert set(conversion["changed"]) == set(weights(tmp_path / "out"))  # everything has been trained


def test_reported_loss_is_that_of_the_written_model(original: Path, text: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(" ".join(reversed(WORDS)) * 30)
    settings = {**SMALL, "valid_text": (str(held_out),), "precision": "fp32", "valid_tokens": 10**6}
    result = uptrain(original, [text], tmp_path / "out", **settings)
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    ids = torch.tensor([*tokenizer.encode(held_out.read_text()).ids, 1])
    for folder, loss in ((original, result.loss_before), (tmp_path / "out", result.loss_after)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert perplexity(model, ids, context=64).loss == pytest.approx(loss, abs=1e-6)


def test_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    settings = dict(SMALL, distill=("logits", "layers"), accumulate=2)
    whole = uptrain(converted, [text], tmp_path / "whole", **settings)
    first = uptrain(converted, [text], tmp_path / "parts", stop_after=2, **settings)
    assert not first.finished and first.steps == 2 and not (tmp_path / "parts").exists()
    second = uptrain(converted, (), tmp_path / "parts", resume=True, should_stop=lambda: True)
    assert second.steps == 2
    done = uptrain(converted, [text], tmp_path / "parts", resume=True, **settings)
    assert (done.loss_after, done.loss_before) == (whole.loss_after, whole.loss_before)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    last = [
        [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"][-1]
        for name in ("whole", "parts")
    ]
    assert last[0]["step"] == last[1]["step"] == 6 and last[0]["grad_norm"] == last[1]["grad_norm"]


def test_killed_run_goes_on_from_its_last_checkpoint(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(SMALL, save_minutes=1e-9)  # a checkpoint after every step
    whole = uptrain(converted, [text], tmp_path / "whole", **settings)
    train_step = Uptrainer.train_step

    def killed(self: Uptrainer) -> object:
        if self.step == 4:
            raise MemoryError
        return train_step(self)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Uptrainer, "train_step", killed)
        uptrain(converted, [text], tmp_path / "parts", **settings)
    checkpoints = partial_folder(tmp_path / "parts") / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    assert not (tmp_path / "parts").exists()
    assert uptrain(converted, (), tmp_path / "parts", resume=True).loss_after == whole.loss_after
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_changed_trains_what_the_conversion_touched_and_nothing_else(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    uptrain(converted, [text], tmp_path / "out", train="changed", **SMALL)
    listed = set(json.loads((converted / "conversion.json").read_text())["changed"])
    before, after = weights(converted), weights(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == listed
    assert set(json.loads((tmp_path / "out" / "conversion.json").read_text())["changed"]) == listed


def test_lora_trains_adapters_and_fusion_weights_and_merges_them(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    result = uptrain(converted, [text], tmp_path / "out", train="lora", rank=2, **SMALL)
    before, after = weights(converted), weights(tmp_path / "out")
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different == {name for name in before if "_proj" in name or "kv_fusion" in name}
    assert result.trained_parameters < 0.5 * sum(p.numel() for p in before.values())
    for name in different:
        if "_proj" in name:
            assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2


def test_merged_lora_gives_the_same_logits(converted: Path) -> None:
    pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(converted)
    ids = torch.randint(32, (2, 20))
    plain = model(input_ids=ids).logits
    trainable = Trainable(model, "lora", rank=4, seed=1)
    torch.testing.assert_close(model(input_ids=ids).logits, plain)  # the second factor starts at zero
    with torch.no_grad():
        for tensor in trainable.state().values():
            tensor.add_(0.1)
    expected = model(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.01
    merged = trainable.merge()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_resumes_bit_for_bit(converted: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = dict(SMALL, train="lora", rank=2, steps=4)
    uptrain(converted, [text], tmp_path / "whole", **settings)
    uptrain(converted, [text], tmp_path / "parts", stop_after=3, **settings)
    uptrain(converted, (), tmp_path / "parts", resume=True)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_distillation_alone_moves_a_model_towards_its_teacher(
    original: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    """The text is never a target: the student comes nearer to a teacher that was never trained."""
    settings = {**SMALL, "steps": 60, "ce_weight": 0.0, "distill": ("logits",), "lr": 1e-2}
    uptrain(converted, [text], tmp_path / "out", train="changed", **settings)
    ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    teacher = AutoModelForCausalLM.from_pretrained(original)(input_ids=ids).logits.log_softmax(-1)

    def distance(folder: Path) -> float:
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        return torch.nn.functional.kl_div(
            logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True
        ).item()

    assert distance(tmp_path / "out") < 0.8 * distance(converted)


def test_a_model_in_bf16_stays_in_bf16_but_for_the_fusion_weights(text: Path, tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", dtype=torch.bfloat16)
    uptrain(write_model(tmp_path / "model", plain), [text], tmp_path / "out", **SMALL)
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}
    assert {dtype for name, dtype in kinds.items() if "kv_fusion" in name} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if "kv_fusion" not in name} == {torch.bfloat16}


def test_tokens_to_the_original_are_counted_when_its_loss_is_reached(
    converted: Path, original: Path, text: Path, tmp_path: Path
) -> None:
    result = uptrain(converted, [text], tmp_path / "out", **{**SMALL, "steps": 20, "validations": 19})
    assert result.original_loss is not None and result.loss_after < result.original_loss
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    reached = [r["tokens"] for r in records if r["kind"] == "valid" and r["loss"] <= result.original_loss]
    assert result.tokens_to_original == reached[0]


def test_budget_in_minutes_ends_by_the_clock(original: Path, text: Path, tmp_path: Path) -> None:
    result = uptrain(
        original, [text], tmp_path / "out", **{**SMALL, "steps": None, "minutes": 1 / 60, "validations": 2}
    )
    assert 1.0 <= result.seconds < 10.0
    rates = [r["lr"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if r["kind"] == "train"]
    assert rates[-1] < 0.5 * SMALL["lr"]  # the schedule has come to its end with the time


def test_learning_rate_warms_up_and_falls() -> None:
    cosine = UptrainSettings(steps=1, lr=1.0, warmup=0.1, final_lr=0.2)
    assert [cosine.rate(x) for x in (0.05, 0.1, 1.0, 2.0)] == pytest.approx([0.5, 1.0, 0.2, 0.2])
    assert cosine.rate(0.55) == pytest.approx(0.6)
    linear = UptrainSettings(steps=1, lr=1.0, warmup=0.1, final_lr=0.0, schedule="linear", decay=0.4)
    assert [linear.rate(x) for x in (0.3, 0.6, 0.8, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert UptrainSettings(steps=1, original_lr=2e-4).peak_lr == pytest.approx(3e-4)  # SkipV1Former's rule
    assert UptrainSettings(tokens=1000, batch_size=2, seq_len=100).total_steps == 5


def test_fusion_weights_learn_without_decay_at_a_rate_of_their_own(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    groups = Trainable(model, "all").groups(0.1, 5.0)
    assert {g["name"]: (g["weight_decay"], g["scale"]) for g in groups} == {
        "decay": (0.1, 1.0),
        "no_decay": (0.0, 1.0),
        "fusion": (0.0, 5.0),
    }
    fusion = next(g for g in groups if g["name"] == "fusion")
    assert len(fusion["params"]) == 2 * 4  # two reading layers, two key and two value weights each
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_help_of_the_command_names_the_settings_defaults() -> None:
    defaults = UptrainSettings(steps=1)
    for option, how in _OPTIONS:
        name = option.removeprefix("--").replace("-", "_")
        value = getattr(defaults, name)
        stated = how["help"].partition("(default: ")[2].rstrip(")")
        if isinstance(value, (int, float)) and name not in ("steps", "seed"):
            assert float(stated) == value, option
        elif stated and isinstance(value, str) and name != "device":
            assert stated == value, option


def test_command_runs_and_prints_one_json_object(
    original: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"uptrain {original} --text {text} --out {tmp_path / 'out'} --steps 2 --batch-size 2 --seq-len 16 "
    line += f"--distill logits --teacher {original} --valid-tokens 64 --validations 0 --json"
    assert main(line.split()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 2 and math.isfinite(printed["loss_after"])
    assert build_parser().parse_args(["uptrain", "x", "--out", "y", "--resume"]).text is None


def refused(
    kind: type[Exception], message: str, folder: Path, text: list[Path], out: Path, **settings: object
) -> None:
    with pytest.raises(kind, match=message):
        uptrain(folder, text, out, **{**SMALL, **settings})
    assert not out.exists()


def test_bad_input_is_one_clear_error_and_writes_nothing(
    original: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    short.write_text("the cache of a layer")
    refused(ValueError, "tokens are left for training, which is less than", original, [short], out)
    refused(ConfigError, "name at least one text file", original, [], out)
    refused(FileNotFoundError, "does not exist", original, [tmp_path / "none.txt"], out)
    refused(FileNotFoundError, "no config.json", tmp_path, [text], out)
    refused(ConfigError, "names no original", original, [text], out, distill=("logits",))
    refused(FileNotFoundError, "teacher: /nowhere is no", converted, [text], out, teacher="/nowhere")
    refused(ValueError, "needs conversion.json", original, [text], out, train="changed")
    refused(ConfigError, "exactly one budget", original, [text], out, minutes=1.0)
    refused(ConfigError, "no setting 'learning_rate'", original, [text], out, learning_rate=1.0)
    refused(ConfigError, "no loss to train with", original, [text], out, ce_weight=0.0)
    refused(ConfigError, "train must be one of", original, [text], out, train="some")
    other = tmp_path / "tokenizer.json"
    write_tokenizer(other, 50)
    refused(ValueError, "at most the model's 32 tokens, got 50", original, [text], out, tokenizer=str(other))
    assert not partial_folder(out).exists()


def test_a_model_with_codecs_is_refused(converted: Path, text: Path, tmp_path: Path) -> None:
    """They were fitted to the weights before training."""
    coded, out = tmp_path / "coded", tmp_path / "out"
    shutil.copytree(converted, coded)
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "cache_codecs": "kivi:group=8"}))
    refused(ConfigError, "must have no codecs, got .*kivi", coded, [text], out)


def test_a_conversion_of_another_model_is_refused(converted: Path, text: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "model", tmp_path / "model" / "conversion.json"
    shutil.copytree(converted, folder)
    path.write_text(json.dumps({"changed": ["model.layers.9.self_attn.o_proj.weight"]}))
    refused(ValueError, "belongs to another model", folder, [text], tmp_path / "out", train="changed")
    path.write_text('{"changed"')
    refused(ValueError, "is damaged", folder, [text], tmp_path / "out")


def test_a_teacher_with_another_vocabulary_is_refused(original: Path, text: Path, tmp_path: Path) -> None:
    other = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(other).save_pretrained(tmp_path / "teacher")
    refused(
        ConfigError,
        "40 entries, this model's 32",
        original,
        [text],
        tmp_path / "out",
        distill=("logits",),
        teacher=str(tmp_path / "teacher"),
    )


def test_a_run_resumes_only_with_what_it_began_with(original: Path, text: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.txt"
    uptrain(original, [text], out, stop_after=1, **SMALL)
    refused(ConfigError, "holds a run that was not finished", original, [text], out)
    changed = r"keeps its settings, got lr 0.5 \(was 0.003\)"
    refused(ConfigError, changed, original, [text], out, resume=True, lr=0.5)
    other.write_text(text.read_text() + "the end")
    refused(ConfigError, "content of its text", original, [other], out, resume=True)
    checkpoint = next((partial_folder(out) / "checkpoints").iterdir())
    for path in (checkpoint / "trainer.json", *(checkpoint / STATE).glob("*.distcp")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        refused(ValueError, "damaged", original, [text], out, resume=True)
        path.write_bytes(content)
    assert uptrain(original, (), out, resume=True, validations=0).finished
    with pytest.raises(ConfigError, match="exists already"):
        uptrain(original, [text], out, resume=True, **SMALL)
