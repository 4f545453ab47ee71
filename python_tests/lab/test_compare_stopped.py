"""A comparison that is interrupted or killed: nothing of it goes on, and nothing of it is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_compare import ROOT, SIZES, text  # noqa: F401  (a fixture)

from fusedkv_ext.cli import main as cli
from fusedkv_ext.training.trainer import DecoderTrainer, StepResult


def _workers(parent: int) -> list[int]:
    """The processes of a pool, not its resource tracker."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, stat = (path / "cmdline").read_text(), (path / "stat").read_text()
        except OSError:  # it has just ended
            continue
        if int(stat.rsplit(")", 1)[1].split()[1]) == parent and "spawn_main" in line:
            found.append(int(path.name))
    return found


def _runs(process: int) -> bool:
    """Whether it is more than an entry of the process table that nobody has asked for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in /proc")
def test_no_run_outlives_a_comparison_that_was_killed(
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Alone, by a signal that it cannot handle; its runs would go on for hours."""
    values = SIZES | {"run.steps": 10**7, "run.save_every": 5, "data.cache_dir": str(tmp_path / "tokens")}
    command = [sys.executable, "-m", "fusedkv_ext", "compare", "--methods", "vanilla,yoco", "--jobs", "2"]
    command += ["--seeds", "1", "--text", str(text), "--threads", "1", "--out", str(tmp_path / "out")]
    command += [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    comparison_ = subprocess.Popen(command, env=env, start_new_session=True, **quiet)
    try:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("out/runs/*/*/metrics.jsonl"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        workers = _workers(comparison_.pid)
        assert len(workers) == 2
        comparison_.kill()
        assert comparison_.wait(timeout=30) == -signal.SIGKILL
        until = time.monotonic() + 10
        while any(map(_runs, workers)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(_runs, workers))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(comparison_.pid, signal.SIGKILL)
        comparison_.wait()


def test_a_comparison_that_was_killed_ends_as_if_it_had_not_been(
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """SIGKILL while runs with checkpoints are going on: the losses are those of an undisturbed comparison."""
    sizes = SIZES | {"run.steps": 60, "run.save_every": 10, "run.valid_every": 60}
    values = [f"{key}={value}" for key, value in sizes.items()] + [f"data.cache_dir={tmp_path / 'tokens'}"]
    command = [sys.executable, "-m", "fusedkv_ext", "compare", "--methods", "vanilla,yoco", "--json"]
    command += ["--seeds", "1", "--text", str(text), "--threads", "1"]
    command += [part for value in values for part in ("--set", value)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        [*command, "--out", str(tmp_path / "a")],
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "a").glob("runs/*/*/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "a" / "comparison.json").exists()
    ended = {}
    for out in ("a", "b"):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / out)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ended[out] = {row["label"]: row["losses"] for row in json.loads(done.stdout)["rows"]}
    assert ended["a"] == ended["b"] and all(ended["a"].values())
    assert (tmp_path / "a" / "loss_over_cache.png").stat().st_size > 10_000


def _hear_interrupts() -> None:
    """Shells start background jobs with SIGINT ignored, and what ignores it hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_process(
    number: int,
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    values = [f"{key}={value}" for key, value in (SIZES | {"run.steps": 10**5}).items()]
    command = [sys.executable, "-m", "fusedkv_ext", "compare", "--methods", "vanilla", "--seeds", "1"]
    command += ["--text", str(text), "--threads", "1", "--out", str(tmp_path / "out")]
    command += ["--set", f"data.cache_dir={tmp_path}"] + [part for v in values for part in ("--set", v)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    going = subprocess.Popen(
        command,
        env=env,
        start_new_session=True,
        preexec_fn=_hear_interrupts,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "out").glob("runs/*/*/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.01)
    try:
        going.send_signal(number)
        assert "resumes" in going.communicate(timeout=30)[1]  # ends when every process has closed the pipe
        assert going.returncode == 130
    finally:
        if going.poll() is None:
            os.killpg(going.pid, signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_comparison(
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An exception of a signal handler inside a finalizer is ignored by Python."""
    steps = []

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def step(trainer: DecoderTrainer) -> StepResult:
        steps.append(trainer.step)
        if len(steps) == 3:
            Finalized()
        return train_step(trainer)

    train_step = DecoderTrainer.train_step
    monkeypatch.setattr(DecoderTrainer, "train_step", step)
    values = SIZES | {"run.steps": 100, "data.cache_dir": str(tmp_path / "tokens")}
    command = ["compare", "--methods", "vanilla", "--seeds", "1", "--text", str(text)]
    command += ["--out", str(tmp_path / "out")]
    command += [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    assert cli.main(command) == 130
    assert steps == [0, 1, 2] and "resumes" in capsys.readouterr().err
