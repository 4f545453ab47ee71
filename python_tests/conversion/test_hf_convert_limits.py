"""fusedkv convert at its limits: what else a folder holds, options out of range, models that are converted
already."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

pytest.importorskip("tokenizers")

import tokenizers
from hf_folders import save_folder, tiny_llama
from transformers import AutoModelForCausalLM, GenerationConfig

from fusedkv_ext.cli import main as cli
from fusedkv_ext.conversion import calibration_windows, convert_model
from fusedkv_ext.conversion.uptraining import uptrain


@pytest.fixture
def original(tmp_path):
    torch.manual_seed(0)
    return save_folder(tiny_llama(), tmp_path / "original")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: one cache for several layers, {i * i}\n" for i in range(200)))
    return path


def run(original: Path, *args: object) -> int:
    """`fusedkv convert`, with few tokens."""
    return cli.main([str(arg) for arg in ("convert", original, "--eval-tokens", 256, *args)])


def test_settings_of_generation_are_carried_over(original, text, tmp_path):
    """Chat models end a turn at tokens that only generation_config.json names. transformers reads a
    temperature without do_sample, but refuses to write it."""
    settings = {"eos_token_id": [256, 10], "temperature": 0.3, "do_sample": False}
    (original / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(original)
    assert convert_model(model, "fusedkv").model.generation_config.eos_token_id == [256, 10]
    assert run(original, "--plan", "fusedkv", "--out", tmp_path / "out") == 0
    small = dict(steps=2, batch_size=1, seq_len=32, valid_tokens=64, valid_window=32, validations=1)
    uptrain(tmp_path / "out", [text], tmp_path / "trained", **small)
    for folder in (tmp_path / "out", tmp_path / "trained"):
        assert json.loads((folder / "generation_config.json").read_text()) == settings
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [256, 10]


def test_biases_of_pooled_heads_are_pooled_too():
    """The mean of two value heads is the mean of their biases, too."""
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            projection = layer.self_attn.v_proj
            projection.bias.normal_()
    done = convert_model(model, "skipv1", pooling="mean-v")
    for layer, before in zip(done.model.model.layers[1:], model.model.layers[1:], strict=True):
        bias = before.self_attn.v_proj.bias.unflatten(0, (2, 8)).mean(0)
        torch.testing.assert_close(layer.self_attn.v_proj.bias, bias)


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1", "yoco++"])
def test_converted_models_are_refused(plan, tmp_path, capsys):
    """What their layers lost cannot be brought back, and what they read is not what they had."""
    done = convert_model(tiny_llama(), plan)
    with pytest.raises(ValueError, match=re.escape(f"got one converted already, to plan {plan!r}")):
        convert_model(done.model, "fusedkv-lite")
    folder = save_folder(done.model, tmp_path / "converted")
    assert run(folder, "--plan", "cla", "--out", tmp_path / "out") == 2
    assert "convert the original" in capsys.readouterr().err
    whole = convert_model(tiny_llama(), "vanilla").model
    assert convert_model(whole, plan).model.config.plan.name == plan


def test_windows_of_long_texts_end_inside_them():
    """float32 cannot count beyond 2^24 tokens."""
    ids = torch.arange(2**24 + 1 + 4096, dtype=torch.int32)
    windows = calibration_windows(ids, 4096, 1024)
    assert windows.shape == (4, 1024) and windows[-1, -1] == len(ids) - 1


@pytest.mark.parametrize(
    "args, words",
    [
        (["--window", 0], "--window"),
        (["--window", -5], "--window"),
        (["--window", 1], "--window"),
        (["--window", 257], "256 positions"),
        (["--window", 128, "--tokens", 100], "--tokens must be at least 2048"),
        (["--window", 128, "--pooling", "middle"], "--pooling"),
        (["--window", 128, "--search", "prefix", "--budget", 0.1], "from 1 to 4, got 0"),
        (["--window", 128, "--search", "kvsharer", "--storage-layers", 0], "from 1 to 4, got 0"),
        (["--window", 128, "--search", "layers", "--storage-layers", 9], "from 1 to 4, got 9"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(args, words, original, text, tmp_path, capsys, monkeypatch):
    """Found out before the model is read."""
    monkeypatch.setattr("fusedkv_ext.hf.loading.load_causal_lm", None)
    plan = [] if "--search" in args else ["--plan", "fusedkv"]
    assert run(original, *plan, *args, "--calibrate", text, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["--repair"], ["--metric", "plain"], ["--refit", "o_proj"]])
def test_options_of_calibration_need_its_text(args, original, tmp_path, capsys):
    assert run(original, "--plan", "fusedkv", *args, "--out", tmp_path / "out") == 2
    assert f"{args[0]} needs --calibrate" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_found_out_at_once(original, text, tmp_path, capsys):
    assert run(original, "--plan", "fusedkv", "--calibrate", text, "--out", text / "out") == 2
    assert f"--out must be in a folder, got a path in {text}" in capsys.readouterr().err


def test_copying_needs_no_tokenizer_and_a_named_one_is_kept(original, text, tmp_path, capsys):
    named = tmp_path / "named.json"
    (original / "tokenizer.json").rename(named)
    assert run(original, "--plan", "fusedkv", "--out", tmp_path / "copied") == 0
    rest = ["--window", 128, "--tokens", 2048, "--refit", "--calibrate", text, "--tokenizer", named]
    assert run(original, "--plan", "fusedkv", *rest, "--out", tmp_path / "out") == 0
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert kept.to_str() == tokenizers.Tokenizer.from_file(str(named)).to_str()
    data = json.loads(named.read_text())
    data["model"]["vocab"] |= {f"word{i}": 300 + i for i in range(50)}
    named.write_text(json.dumps(data))
    assert run(original, "--plan", "fusedkv", *rest, "--out", tmp_path / "other") == 1
    assert "it belongs to another model" in capsys.readouterr().err
