"""Data parallel training: N processes give the run of one, resume it, and end together.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import processes_of, torchrun, wait_for_step, whole
from tiny import PLANS

from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.errors import ConfigError, TrainingDiverged
from fusedkv_ext.lab import runs
from fusedkv_ext.training import loop, run_folder, session
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data.tokenizer import ByteTokenizer
from fusedkv_ext.training.metrics import read_metrics
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer, build_model

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs a torch with gloo"
)

SMALL = {
    "model.num_hidden_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 2,
    "model.head_dim": 16,
    "data.seq_len": 32,
    "run.batch_size": 8,
    "run.steps": 6,
    "run.log_every": 1,
    "run.valid_batches": 2,
    "run.save_every": 3,
    "run.device": "cpu",
    "optim.warmup_steps": 2,
}
CASES = {
    "fusedkv": {"model.plan": "fusedkv"},
    "fusedkv, two parts": {"model.plan": "fusedkv", "run.accumulate": 2},
    "skipv1": {"model.plan": "skipv1.json"},
    "skipv1, four parts": {"model.plan": "skipv1.json", "run.accumulate": 4},
    "copies": {"model.plan": "fusedkv", "parallel.dp_replicate": 2},
    "tokens": {"model.plan": "fusedkv", "parallel.cp": 2},
    "tokens of documents, two parts": {
        "model.plan": "skipv1.json",
        "parallel.cp": 2,
        "data.document_masks": True,
        "run.accumulate": 2,
    },
    "layers run again": {"model.plan": "fusedkv", "parallel.activation_checkpointing": "non_reentrant"},
}


def config_in(folder: Path, changes: dict[str, object] | None = None) -> TrainConfig:
    """A configuration whose text and plan lie in `folder`, which has to be the working directory too."""
    paths = {"data.text": [str(folder / "text")], "data.cache_dir": str(folder / "cache")}
    return TrainConfig().updated({**SMALL, **paths, **(changes or {})}.items())


def five_steps(config: TrainConfig) -> dict[str, object]:
    """Losses, norms, validation and weights, all in float64: what rounding leaves is far from any mistake."""
    data = loop.load_data(config, ByteTokenizer())
    trainer = DecoderTrainer(build_model(config, 256).double(), data, config, torch.device("cpu"))
    steps = [trainer.train_step() for _ in range(5)]
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
        "validation": trainer.evaluate(),
        "weights": {name: whole(weight) for name, weight in trainer.model.state_dict().items()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog\n" * 60)
    (folder / "skipv1.json").write_text(PLANS["skipv1"].to_json())
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    """What each of the two processes found."""
    done = torchrun(__file__, folder, folder=folder)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err[-3000:]
    return [torch.load(folder / f"rank{i}.pt") for i in range(2)]


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(
    case: str, ranks: list[dict], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    changes = {
        key: value
        for key, value in CASES[case].items()
        if key not in ("parallel.dp_replicate", "parallel.cp")
    }
    alone = five_steps(config_in(folder, changes))
    for found in (rank[case] for rank in ranks):
        for name in ("losses", "norms", "validation"):
            assert found[name] == pytest.approx(alone[name], rel=1e-9, abs=0), name
        assert found["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-8, atol=1e-10, msg=name)
    assert len(set(alone["losses"])) == 5  # the windows of different steps differ
    for name, weight in ranks[0][case]["weights"].items():
        assert torch.equal(weight, ranks[1][case]["weights"][name]), name


def test_resumed_on_two_processes_equals_uninterrupted_bit_for_bit(ranks: list[dict], folder: Path) -> None:
    weights = [load_pretrained(run_folder.resolve(folder / run)) for run in ("whole", "parts")]
    for (name, expected), got in zip(
        weights[0].state_dict().items(), weights[1].state_dict().values(), strict=True
    ):
        assert torch.equal(expected, got), name
    assert ranks[0]["whole"] == ranks[0]["parts"] == ranks[1]["whole"] == ranks[1]["parts"]
    assert ranks[0]["warnings"] == []
    records = read_metrics(folder / "parts" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [record["processes"] for record in records if record["kind"] == "run"] == [2, 2]


def test_rank_zero_says_whether_a_run_has_ended(ranks: list[dict]) -> None:
    """The other one finds a last validation in the metrics that rank 0 has dropped to repeat it."""
    for rank in ranks:
        assert rank["stale"] == rank["finished"] == ranks[0]["whole"]


def test_resuming_with_another_number_of_processes_warns(ranks: list[dict], folder: Path) -> None:
    _, warnings = loop.resume(folder / "whole")
    assert warnings == ["not bit for bit what an uninterrupted run gives: 1 processes, 2 before"]


def test_what_happens_on_one_process_ends_all(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["stopped"] == (2, False)
        assert "diverged at step 1: loss nan" in rank["diverged"] and rank["unchanged"]
        assert rank["not alike"].startswith("the processes differ in their text, step;")
        assert rank["other layouts"].startswith("the processes differ in their configuration;")


def test_one_process_makes_no_group() -> None:
    with session.session():
        assert not dist.is_initialized() and session.rank() == 0 and session.world_size() == 1


def test_half_an_environment_of_torchrun_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4, but RANK.* not set; start with torchrun"):
        with session.session():
            pass


# The command


def train_arguments(folder: Path, *more: object) -> list[object]:
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    settings += ["--set", f"data.cache_dir={folder / 'cache'}", "--text", folder / "text"]
    return ["-m", "fusedkv_ext", "train", *settings, *more]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_run_which_resumes_and_stops_on_a_signal(folder: Path) -> None:
    run = folder / "killed"
    endless = train_arguments(folder, "--out", run, "--set", "run.steps=1000000", "--set", "run.keep=1")
    first = torchrun(*endless, folder=folder)
    wait_for_step(run, 7)  # the save at step 6 has waited for that at step 3
    os.kill(processes_of(first.pid)[1], signal.SIGKILL)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1
    said = [line for line in err.splitlines() if line.startswith("fusedkv: error")]
    assert len(said) <= 1 and all("lost contact with the other processes" in line for line in said), err
    saved = run_folder.checkpoints(run / "checkpoints")[-1][0]
    assert saved >= 3
    second = torchrun(*endless, "--resume", folder=folder)
    wait_for_step(run, saved + 5)
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=60)
    assert f"resuming {run} at step {saved}" in out and "interrupted: validating and saving" in out
    assert out.count("stopped at step") == 1, out + err
    stopped = read_metrics(run / "metrics.jsonl")[-1]
    assert stopped["kind"] == "valid"
    assert run_folder.checkpoints(run / "checkpoints")[-1][0] == stopped["step"] > saved + 5


def test_a_process_that_dies_while_another_has_finished_is_lost_contact(folder: Path) -> None:
    """The last of all collectives, in which the processes leave together."""
    script = folder / "leave.py"
    script.write_text(
        "import os, signal, torch\n"
        "from fusedkv_ext.errors import LostContact\n"
        "from fusedkv_ext.training import session\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which ends the others\n"
        "try:\n"
        "    with session.session():\n"
        "        session.total(0.0)\n"
        "        if session.rank() == 1:\n"
        "            os._exit(9)\n"
        "except LostContact as error:\n"
        "    print('lost:', error, flush=True)\n"
        "os._exit(1)\n"
    )
    done = torchrun(script, folder=folder)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 1
    assert out.startswith("lost: lost contact with the other processes"), out + err


def test_a_batch_that_cannot_be_shared_is_said_once(folder: Path) -> None:
    wrong = train_arguments(folder, "--out", folder / "wrong", "--set", "run.batch_size=9")
    done = torchrun(*wrong, folder=folder)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 1
    said = [line for line in (out + err).splitlines() if line.startswith("fusedkv: error")]
    expected = "run.batch_size (9) must be a multiple of data ranks x run.accumulate (2 x 1 = 2)"
    assert said == [f"fusedkv: error: {expected}"]
    assert not (folder / "wrong").exists()


def test_a_comparison_is_trained_by_all_processes_together(folder: Path) -> None:
    values = SMALL | {"data.cache_dir": folder / "cache"}
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    command = ["-m", "fusedkv_ext", "compare", "--methods", "vanilla,yoco", "--seeds", "1", "--json"]
    command += settings
    done = torchrun(*command, "--text", folder / "text", "--out", folder / "compare", folder=folder)
    out, err = done.communicate(timeout=90)
    assert done.returncode == 0, err
    rows = json.loads(out)["rows"]
    assert [row["label"] for row in rows] == ["vanilla", "yoco"] and all(row["loss_mean"] for row in rows)
    for metrics in (folder / "compare").glob("runs/*/*/metrics.jsonl"):
        records = read_metrics(metrics)
        assert [record["processes"] for record in records if record["kind"] == "run"] == [2]
        assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


# What the processes of `ranks` do


def _resume(folder: Path, found: dict) -> None:
    config = config_in(folder)
    found["whole"] = loop.run(loop.start(config, folder / "whole"), SilentProgress()).valid_loss
    loop.run(loop.start(config, folder / "parts"), SilentProgress(), stop_after=3)
    resumed, found["warnings"] = loop.resume(folder / "parts")
    found["parts"] = loop.run(resumed, SilentProgress()).valid_loss


def _stale(folder: Path, found: dict) -> None:
    config = config_in(folder)
    loop.run(loop.start(config, folder / "stale"), SilentProgress(), stop_after=3)
    if session.rank() == 1:
        runs._validated = lambda *_: [{"loss": 0.0, "bits_per_byte": 0.0}]
    found["stale"] = runs.finish(config, folder / "stale", SilentProgress(), lambda: False).valid_loss
    found["finished"] = runs.finish(config, folder / "stale", SilentProgress(), lambda: False).valid_loss


def _end_together(folder: Path, found: dict) -> None:
    this = loop.start(config_in(folder), folder / "stopped")
    asked = loop.run(
        this, SilentProgress(), should_stop=lambda: session.rank() == 1 and this.trainer.step == 2
    )
    found["stopped"] = (asked.steps, asked.finished)

    this = loop.start(config_in(folder), folder / "diverged")
    model, forward = this.trainer.model, this.trainer.model.forward
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    if session.rank() == 1:
        model.forward = lambda *args, **more: forward(*args, **more) * float("nan")
    try:
        loop.run(this, SilentProgress())
    except TrainingDiverged as error:
        found["diverged"] = str(error)
    found["unchanged"] = all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    try:
        session.check_alike({"text": session.rank(), "seed": 3, "step": -session.rank()})
    except ConfigError as error:
        found["not alike"] = str(error)
    dimension = "parallel.tp" if session.rank() else "parallel.cp"  # each would wait for the other
    try:
        loop.start(config_in(folder, {dimension: 2}), folder / "not alike")
    except ConfigError as error:
        found["other layouts"] = str(error)


def _work(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict = {}
    with session.session():
        for case, changes in CASES.items():
            found[case] = five_steps(config_in(folder, changes))
        _resume(folder, found)
        _stale(folder, found)
        _end_together(folder, found)
        torch.save(found, folder / f"rank{session.rank()}.pt")


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
