"""The command `fusedkv`: what each subcommand prints, its exit code, one clear sentence for every error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fusedkv_ext as fkv
from fusedkv_ext import extras
from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.cli import verify
from fusedkv_ext.cli.main import COMMANDS, build_parser, main
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.extras import MissingExtra
from fusedkv_ext.lab.figures import distinct_names
from fusedkv_ext.ops import functional
from fusedkv_ext.plan import METHODS
from fusedkv_ext.training.config import known_keys

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
    "run.log_every=2",
]


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"{i}: all work and no play makes Jack a dull boy\n" * 40)
    return folder


def train_arguments(text: Path, out: Path, *more: str) -> list[str]:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return ["train", "--text", str(text), "--out", str(out), "--steps", "6", *settings, *more]


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


# Errors


@pytest.mark.parametrize("command", ["grads", "plan"])
def test_torchrun_does_not_run_a_command_of_one_process_several_times(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, message in (("0", f"fusedkv: error: {command} runs in one process;"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main([command]) == 2
        out, err = said(capsys)
        assert out == "" and err.startswith(message) and bool(err) is bool(message)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["plan"]) == 0


@pytest.mark.parametrize("name", METHODS)
def test_plan_draws_every_method_with_its_paper_and_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", name]) == 0
    said = capsys.readouterr().out
    assert f"{name}: 8 layers" in said and METHODS[name].paper in said
    assert all(option in said for option in METHODS[name].options)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["train", "--set", "run.stepz=3"],
            2,
            "unknown configuration key 'run.stepz'; did you mean run.steps",
        ),
        (["train", "--set", "run.steps"], 2, "--set must be KEY=VALUE, got 'run.steps'"),
        (["train", "--steps", "many"], 2, "run.steps must be an integer, got 'many'"),
        (["train", "--config", "nowhere.toml"], 2, "nowhere.toml does not exist"),
        (["train", "--plan", "fuzedkv"], 2, "plan name must be one of vanilla, gqa"),
        (["train", "--set", "model.plan_options.color=red"], 2, "has no option 'color'; its options:"),
        (["train", "--text", "/nowhere"], 1, "text: /nowhere does not exist"),
        (["train", "--stop-after", "0"], 2, "--stop-after must be >= 1"),
        (["train", "--plan", "cla:factor"], 2, "expected option=value after ':', as in cla:factor=3"),
        (["train", "--frobnicate"], 2, "fusedkv train: error: unrecognized arguments: --frobnicate"),
        (["plan", "nonsense", "--layers", "4"], 2, "got 'nonsense'"),
        (["plan", "fusedkv", "--layers", "0"], 2, "num_layers"),
        (["plan", "fusedkv:color=red"], 2, "plan 'fusedkv' has no option 'color'; its options:"),
        (["plan", "/nowhere.json"], 2, "/nowhere.json does not exist"),
        (["generate", "/nowhere"], 1, "/nowhere holds no checkpoint"),
        (["generate", "/nowhere", "--temperature", "-1"], 2, "temperature must be finite"),
        (["plot", "/nowhere/metrics.jsonl"], 1, "is not a file; expected the metrics.jsonl"),
        (["plot", "x.jsonl", "--out", "x.bmp"], 2, "--out must end in .png, .svg or .pdf"),
        (["demo", "--minutes", "0"], 2, "--minutes must be from 0.1"),
        (["train", "--set", "run.device=tpu9"], 2, "device must be auto, cpu or cuda, got 'tpu9'"),
        (["generate"], 2, "the following arguments are required: checkpoint"),
        (["trane"], 2, "invalid choice"),
    ],
)
def test_errors_are_one_sentence_with_the_right_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    text: Path,
    tmp_path: Path,
) -> None:
    if arguments[0] == "train" and "--text" not in arguments:
        arguments = [*arguments, "--text", str(text), "--out", str(tmp_path / "run")]
    assert main(arguments) == code
    out, err = said(capsys)
    assert message in err and "Traceback" not in out + err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(FileNotFoundError):
        main(["generate", "/nowhere", "--debug"])


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--quick"]) == 1
    assert 'pip install "fusedkv_ext[demo]"' in said(capsys)[1]
    with pytest.raises(MissingExtra, match=r'Reading maps needs the package "atlas_of_nothing"'):
        extras.need("atlas_of_nothing", "Reading maps")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, _ = said(capsys)
    assert "--json" in out and "--debug" in out and len(out.splitlines()) > 5


def test_names_of_curves_are_as_short_as_they_can_be_and_differ() -> None:
    assert distinct_names([Path("x/a"), Path("y/b")]) == ["a", "b"]
    assert distinct_names([Path("x/a/s"), Path("x/b/s"), Path("t")])[:2] == ["a/s", "b/s"]
    with pytest.raises(ConfigError, match="paths must be unique, got "):
        distinct_names([Path("x"), Path("./x")])


def test_the_help_of_a_command_has_all_that_its_module_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    assert "with options as in cla:factor=3" in said(capsys)[0]


def test_summaries_are_sentences_of_the_commands() -> None:
    text = build_parser().format_help()
    assert all(command in text for command in COMMANDS)
    assert "None" not in text and "fusedkv train:" not in text


# plan and info


def test_plan_prints_the_table_and_the_bytes_of_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    plan = fkv.CachePlan.named("fusedkv", 8, storage_layers=2)
    arguments = [
        "plan",
        "fusedkv:storage_layers=2",
        "--layers",
        "8",
        "--kv-heads",
        "4",
        "--head-dim",
        "64",
        "--dtype",
        "float16",
    ]
    assert main(arguments) == 0
    out, _ = said(capsys)
    assert METHODS["fusedkv"].keys in out and "storage_layers=null" in out
    assert str(plan) in out and f"{plan.bytes_per_token(4, 64, torch.float16):,} bytes per token" in out
    assert main([*arguments, "--json"]) == 0
    result = json.loads(said(capsys)[0])
    assert fkv.CachePlan.from_dict(result["plan"]) == plan
    assert result["bytes_per_token"] / result["vanilla_bytes_per_token"] == result["cache_ratio"] == 0.25


def test_plan_and_train_take_a_file_and_a_label(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = fkv.CachePlan("mine", fkv.CachePlan.named("cla", 4, factor=4).layers)
    file = tmp_path / "mine.json"
    file.write_text(plan.to_json())
    assert main(["plan", str(file)]) == 0
    assert said(capsys)[0] == f"{plan}\n"
    for number, given in enumerate([str(file), "cla:factor=4"]):
        out = tmp_path / str(number)
        assert main(train_arguments(text, out, "--plan", given, "--stop-after", "1")) == 0
        (checkpoint,) = (out / "checkpoints").glob("step-*")
        assert load_pretrained(checkpoint).plan.layers == plan.layers


def test_plan_without_a_name_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json"]) == 0
    names = json.loads(said(capsys)[0])
    assert set(names) == set(fkv.CachePlan.names())
    assert main(["plan"]) == 0
    out, _ = said(capsys)
    assert all(name in out for name in names)


def test_info_reports_the_level_in_use_and_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--verify", "--json"]) == 0
    info = json.loads(said(capsys)[0])
    assert info["native"]["cpu_level"] in info["native"]["cpu_levels"]
    assert info["torch"] == str(torch.__version__)
    assert len(info["verify"]) == len(verify.DTYPES) * 5
    assert all(check["passed"] and check["max_error"] <= check["allowed"] for check in info["verify"])


@pytest.mark.parametrize("wrong", ["slightly", "nan", "one element"])
def test_info_verify_fails_when_an_operation_is_wrong(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functional.fuse_kv

    def broken(sources: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        out = right(sources, weights)
        if wrong == "slightly":
            return out * 1.05
        out[-1, -1, -1, -1] += float("nan") if wrong == "nan" else 1.0
        return out

    monkeypatch.setattr(functional, "fuse_kv", broken)
    assert main(["info", "--verify"]) == 1
    out, _ = said(capsys)
    failed = [line.split()[1].rstrip(",") for line in out.splitlines() if line.startswith("FAIL")]
    assert failed.count("fuse_kv") == len(verify.DTYPES)
    assert "append_kvcache" not in failed and f"{len(failed)} failed" in out


def test_info_verify_sees_nan_in_any_output() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for got in ([bad, good], [good, bad]):
        results = [got, [good.double()] * 2, [good] * 2]
        check = verify.judged("op", torch.float32, torch.device("cpu"), results)
        assert not check.passed and check.to_dict()["max_error"] is None


# train, generate, plot


def test_trained_model_generates_and_its_curve_is_drawn(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train_arguments(text, out, "--json")) == 0
    stdout, stderr = said(capsys)
    result = json.loads(stdout)
    assert result["steps"] == 6 and result["finished"] and "validation at step 6" in stderr

    arguments = ["generate", str(out), "--prompt", "all work", "--max-new-tokens", "20", "--seed", "3"]
    assert main(arguments) == 0
    shown, _ = said(capsys)
    assert main([*arguments, "--json"]) == 0
    generated = json.loads(said(capsys)[0])
    assert shown == generated["prompt"] + generated["text"] + "\n"  # what was streamed is what was generated
    assert generated["new_tokens"] <= 20 and generated["plan"] == "fusedkv"

    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    assert main(["plot", str(out), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_generate_reads_the_prompt_from_standard_input(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(train_arguments(text, tmp_path / "run", "--stop-after", "1")) == 0
    said(capsys)
    pipe = tmp_path / "prompt"
    pipe.write_text("größer")
    with pipe.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert (
            main(["generate", str(tmp_path / "run"), "--prompt", "-", "--max-new-tokens", "3", "--json"]) == 0
        )
    assert json.loads(said(capsys)[0])["prompt"] == "größer"


def test_train_stops_resumes_and_refuses_to_overwrite(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train_arguments(text, out, "--stop-after", "2")) == 0
    assert "stopped at step 2" in said(capsys)[0]
    assert main(train_arguments(text, out)) == 2
    assert "add --resume" in said(capsys)[1]
    assert main(["train", "--out", str(out), "--resume"]) == 0
    stdout, _ = said(capsys)
    assert f"resuming {out} at step 2" in stdout and "done at step 6" in stdout and "warning" not in stdout


def test_a_run_on_relative_paths_is_resumed_from_another_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(train_arguments(Path("text"), Path("run"), "--stop-after", "1")) == 0
    monkeypatch.chdir(text)
    assert main(["train", "--out", "../run", "--resume", "--text", "."]) == 0
    assert "warning" not in said(capsys)[0]


def test_training_text_states_size_and_licence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_arguments(text, tmp_path / "run", "--stop-after", "1")) == 0
    assert f"text: {text}: train " in said(capsys)[0]
    arguments = train_arguments(text, tmp_path / "other", "--stop-after", "1")
    index = arguments.index("--text")
    assert main(arguments[:index] + arguments[index + 2 :]) == 0
    stdout, _ = said(capsys)
    assert "PSF-2.0" in stdout and "BSD-3-Clause" in stdout and " bytes in " in stdout


def test_divergence_exits_with_1_and_says_what_to_do(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "optim.lr=1e30", "--set", "optim.grad_clip=0", "--set", "optim.warmup_steps=0"]
    settings += ["--set", "run.save_every=1"]
    assert main(train_arguments(text, tmp_path / "run", "--steps", "50", *settings)) == 1
    _, err = said(capsys)
    assert "diverged at step" in err and f"the last checkpoint is {tmp_path}/run/checkpoints/step-0" in err


def test_keys_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--keys"]) == 0
    out, _ = said(capsys)
    assert "optim.lr = " in out and 'model.plan = "fusedkv"' in out


def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = train_arguments(text, out, "--steps", "1000000", "--set", "run.save_every=1000000")
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedkv_ext", *arguments], stdout=subprocess.PIPE, text=True
    )
    metrics, waited = out / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < waited and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: validating and saving" in stdout and "checkpoint" in stdout
    assert main(["generate", str(out), "--max-new-tokens", "2"]) == 0


def test_documentation_names_every_key() -> None:
    text = (Path(fkv.__file__).parent.parent / "docs" / "training.md").read_text()
    assert [key for key in known_keys() if f"{key.split('.')[1]}`" not in text] == []
