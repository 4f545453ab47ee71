"""``fusedkv compress``: folders that generate and eval load, what they report, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_folders import converted, save_folder, tiny_llama

from fusedkv_ext.cache.codec import CodecPlan
from fusedkv_ext.cli.main import main
from fusedkv_ext.hf.loading import load_causal_lm
from fusedkv_ext.plan import CachePlan

PROMPT = "the cache of a layer is "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"token {i} reads the cache of layer {i * i % 7}." for i in range(130)))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_folder(tiny_llama(), tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = save_folder(converted(tiny_llama(), "fusedkv"), tmp_path_factory.mktemp("fused") / "model")
    (folder / "conversion.json").write_text("{}")
    return folder


def arguments(model: Path, text: Path, out: Path, **options: Any) -> list[str]:
    settings = {"codecs": "int8", "window": 64, "tokens": 2048, "eval-tokens": 512, **options}
    pairs = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["compress", str(model), "--calibrate", str(text), "--out", str(out), *pairs]


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_a_folder_is_written_that_generate_and_eval_load(
    kind: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = request.getfixturevalue(kind), tmp_path / "coded"
    label = "turboquant:bits=4,sinks=2,tail=4"
    assert main([*arguments(model, text, out, codecs=label), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    record = json.loads((out / "compression.json").read_text())
    assert printed == {"folder": str(out), **record}
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (out / "conversion.json").exists()
    assert not [path for path in tmp_path.iterdir() if path != out]

    loaded = load_causal_lm(out)
    codecs, plan = loaded.config.codecs, loaded.config.plan
    assert plan.name == record["plan"] == {"plain": "vanilla", "fused": "fusedkv"}[kind]
    assert codecs == CodecPlan.named(label, plan) == CodecPlan.from_dict(record["codecs"])
    sizes = (plan, 2, 8, torch.float32)
    whole = plan.bytes_per_token(2, 8, torch.float32)
    assert record["bytes_per_token"] == {"before": whole, "after": codecs.bytes_per_token(*sizes)}
    assert record["raw_bytes"] == codecs.raw_bytes(*sizes) == 6 * whole
    scores = record["perplexity"]
    assert scores["before"] != scores["after"] and scores["stderr"] > 0 and scores["tokens"] > 500
    assert math.log(scores["after"] / scores["before"]) == pytest.approx(scores["difference"], abs=1e-9)
    assert scores["text"] == [str(text)]

    tasks = ["--text", str(text), "--tasks", "perplexity", "--context", "256", "--max-tokens", "512"]
    assert main(["eval", str(model), str(out), *tasks, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    before, after = found.values()
    assert before["perplexity"]["perplexity"] == pytest.approx(scores["before"], rel=1e-5)
    assert after["perplexity"]["perplexity"] == pytest.approx(scores["after"], rel=1e-5)
    assert after["difference"]["stderr"] == pytest.approx(scores["stderr"], rel=1e-3)
    assert after["cache_bytes_per_token"] == record["bytes_per_token"]["after"]

    asked = ["--prompt", PROMPT, "--max-new-tokens", "20", "--temperature", "0"]
    assert main(["generate", str(out), *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = found["prompt_tokens"] + found["new_tokens"] - 1
    coded = len(codecs.coded_tokens(tokens))
    expected = coded * record["bytes_per_token"]["after"] + (tokens - coded) * whole
    assert found["cache_bytes"] == expected < tokens * whole


def test_the_report_has_perplexity_its_paired_difference_and_bytes(
    plain: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(plain, text, tmp_path / "coded", codecs="int4:bits=2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("original: perplexity ")
    assert lines[1].startswith("int4:bits=2: perplexity ") and " +- " in lines[1] and "paired" in lines[1]
    assert lines[2].startswith("cache: 0.03 KiB per token, 6.2% of 0.50; the first 4 and last 0 tokens")


def test_codecs_come_from_a_file_and_replace_those_of_a_coded_folder(
    fused: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, path = tmp_path / "first", tmp_path / "second", tmp_path / "codecs.json"
    codecs = CodecPlan.named("fp8", CachePlan.named("fusedkv", 4))
    path.write_text(codecs.to_json())
    assert main(arguments(fused, text, first)) == 0
    assert main(arguments(first, text, second, codecs=path)) == 0
    assert load_causal_lm(second).config.codecs == codecs
    records = [json.loads((folder / "compression.json").read_text()) for folder in (first, second)]
    assert records[0]["perplexity"]["before"] == records[1]["perplexity"]["before"]
    assert "fp8: perplexity" in capsys.readouterr().out


def refused(
    argv: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str], code: int = 2
) -> None:
    assert main(argv) == code
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1, err
    assert not out.exists() and not list(out.parent.glob(f".{out.name}.*"))


def test_bad_input_is_one_clear_error_before_any_work_and_writes_nothing(
    plain: Path,
    fused: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, other, short = tmp_path / "coded", tmp_path / "other.json", tmp_path / "short.txt"
    other.write_text(CodecPlan.named("int8", CachePlan.named("vanilla", 4)).to_json())
    short.write_text("the cache")
    future = tmp_path / "future.json"
    future.write_text(json.dumps({**json.loads(other.read_text()), "format": 2}))
    monkeypatch.setattr("fusedkv_ext.hf.loading.load_causal_lm", None)  # no weight is read
    for model, options, message in (
        (plain, {"codecs": "int9"}, "codecs must be one of int8, fp8"),
        (plain, {"codecs": "int8:bits=3"}, "codecs 'int8' have no option 'bits'"),
        (plain, {"codecs": "pca:rank=9"}, "layer 0 keys: rank must be at most the head dim 8, got 9"),
        (
            plain,
            {"rank-budget": "ramp"},
            "--rank-budget must be uniform with codecs without a rank, got ramp",
        ),
        (fused, {"codecs": other}, "layer 2 keys: the codec must be raw"),
        (plain, {"codecs": future}, "format of the codecs must be at most 1, got 2"),
        (plain, {"codecs": tmp_path / "none.json"}, "none.json"),
        (plain, {"window": 1}, "--window must be from 2"),
        (plain, {"tokens": 100}, "--tokens must be at least 2048"),
        (plain, {"eval-tokens": 0}, "--eval-tokens must be at least 1"),
    ):
        code = 1 if "none.json" in message else 2
        refused(arguments(model, text, out, **options), message, out, capsys, code)
    refused(arguments(plain, short, out), "calibration must have at least 2048 tokens", out, capsys, 1)
    refused(arguments(tmp_path, text, out), "there is no config.json", out, capsys, 1)
    out.mkdir()
    assert main(arguments(plain, text, out)) == 2
    assert "--out must not exist" in capsys.readouterr().err


def test_a_damaged_model_writes_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_llama(), tmp_path / "coded"
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = float("nan")
    folder = save_folder(model, tmp_path / "damaged")
    capsys.readouterr()
    refused(arguments(folder, text, out), "the model's loss must be finite", out, capsys, 1)
