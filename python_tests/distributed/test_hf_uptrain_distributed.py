"""Uptraining under torchrun: N processes give the run of one, resume it, and write one whole folder.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from hf_uptraining import SMALL, weights, write_model, write_text
from ranks import HAS_GLOO, processes_of, torchrun, wait_for_step
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fusedkv_ext.conversion import uptraining
from fusedkv_ext.conversion.trainable import Trainable
from fusedkv_ext.conversion.uptrain_settings import UptrainSettings
from fusedkv_ext.conversion.uptraining import Uptrainer, partial_folder, uptrain
from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer
from fusedkv_ext.training import run_folder, session
from fusedkv_ext.training.data.tokens import prepare
from fusedkv_ext.training.metrics import read_metrics

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

STEPS = dict(SMALL, batch_size=8, precision="fp32")
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "two parts": {"accumulate": 2},
    "changed": {"train": "changed"},
    "lora": {"train": "lora", "rank": 2},
    "distilled": {"distill": ("logits", "layers"), "ce_weight": 0.5},
    "hidden states": {"distill": ("layers",), "match": "hidden", "train": "changed"},
}


def five_steps(folder: Path, changes: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """Losses, norms, validation and what is trained, in float64: what rounding leaves is far from a mistake.

    One process runs the rows of several ranks as parts of the batch: the loss of layers is a mean over parts.
    """
    changes = {**changes, "accumulate": changes.get("accumulate", 1) * ranks}
    settings, cpu = UptrainSettings(**{**STEPS, **changes}), torch.device("cpu")
    mesh = session.data_parallel_mesh(cpu)
    model, teacher = (load_causal_lm(folder / name).double() for name in ("converted", "original"))
    data = prepare(load_tokenizer(folder / "original", 32), [str(folder / "text.txt")], ())
    listed = json.loads((folder / "converted" / "conversion.json").read_text())["changed"]
    trainable = Trainable(model, settings.train, changed=listed, rank=settings.rank, seed=0)
    if mesh is not None:
        for shared in (model, teacher):
            uptraining._shard(shared, mesh, settings, cpu)
    trainer = Uptrainer(trainable, teacher, data, settings, cpu, mesh)
    assert isinstance(model, FSDPModule) is (mesh is not None)
    before = trainer.evaluate()
    steps = [trainer.train_step() for _ in range(5)]
    return {
        "losses": [step.loss for step in steps],
        "parts": [list(step.parts.values()) for step in steps],
        "norms": [step.grad_norm for step in steps],
        "validations": [before, trainer.evaluate()],
        "weights": trainable.state() if mesh is None else trainable.whole_state(),
        "shards": {name: part.numel() for name, part in _shards(trainable).items()},
    }


def _shards(trainable: Trainable) -> dict[str, Tensor]:
    return {
        name: part.to_local() if hasattr(part, "to_local") else part
        for name, part in trainable.state().items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uptrain")
    write_model(folder / "original")
    write_model(folder / "converted", folder / "original")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    """What each of the two processes found."""
    pytest.importorskip("peft")
    done = torchrun(__file__, folder, folder=folder)
    _, err = done.communicate(timeout=float(os.environ.get("FUSEDKV_TEST_TIMEOUT", "180")))
    assert done.returncode == 0, err[-4000:]
    return [torch.load(folder / f"rank{i}.pt") for i in range(2)]


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, ranks: list[dict], folder: Path) -> None:
    alone = five_steps(folder, CASES[case], ranks=2)
    for found in (rank[case] for rank in ranks):
        for name in ("losses", "norms", "validations"):
            assert found[name] == pytest.approx(alone[name], rel=1e-7, abs=0), name
        for ours, theirs in zip(found["parts"], alone["parts"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-7)
    first, second = (rank[case]["weights"] for rank in ranks)
    assert first.keys() == alone["weights"].keys() and not second
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first[name], weight, rtol=1e-5, atol=1e-7, msg=name)
    assert len(set(alone["losses"])) == 5  # the windows of different steps differ


def test_each_process_holds_its_shard_of_what_is_trained(ranks: list[dict], folder: Path) -> None:
    for case in CASES:
        sizes = {name: weight.numel() for name, weight in ranks[0][case]["weights"].items()}
        for name, size in sizes.items():
            held = [rank[case]["shards"][name] for rank in ranks]
            assert sum(held) == size and max(held) < size or size < 64, (case, name)


# The command


def uptrain_arguments(folder: Path, out: Path, **changes: object) -> list[object]:
    """`fusedkv uptrain` of the converted model, of small size."""
    options = {**STEPS, **changes}
    settings = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    texts = ["--text", folder / "text.txt"]
    return ["-m", "fusedkv_ext", "uptrain", folder / "converted", *texts, "--out", out, *settings]


def finished(*arguments: object, folder: Path) -> str:
    """What the first process printed, when torchrun has ended well."""
    done = torchrun(*arguments, folder=folder)
    out, err = done.communicate(timeout=float(os.environ.get("FUSEDKV_TEST_TIMEOUT", "180")))
    assert done.returncode == 0, err[-4000:]
    return out


def test_the_folder_that_two_processes_write_is_the_one_of_one(folder: Path) -> None:
    """With LoRA: the first process merges updates that both have held in parts."""
    pytest.importorskip("peft")
    changes = {"train": "lora", "rank": 2}
    printed = finished(*uptrain_arguments(folder, folder / "two", **changes), "--json", folder=folder)
    found = json.loads(printed)
    alone = uptrain(folder / "converted", [folder / "text.txt"], folder / "one", **{**STEPS, **changes})
    for name in ("loss_before", "loss_after", "original_loss"):
        assert found[name] == pytest.approx(alone.to_dict()[name], rel=1e-5), name
    assert found["trained_parameters"] == alone.trained_parameters and found["finished"]
    ours, theirs = weights(folder / "two"), weights(folder / "one")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    names = {path.name for path in (folder / "one").iterdir()}
    assert {path.name for path in (folder / "two").iterdir()} == names
    assert not partial_folder(folder / "two").exists()
    text = prepare(load_tokenizer(folder / "two", 32), [str(folder / "text.txt")], ()).valid
    options = dict(context=SMALL["valid_window"], max_tokens=SMALL["valid_tokens"])
    assert perplexity(load_causal_lm(folder / "two"), text, **options).loss == pytest.approx(
        found["loss_after"]
    )


def test_bf16_gathers_weights_in_bf16_and_learns(folder: Path) -> None:
    changes = {"precision": "bf16", "steps": 20}
    found = json.loads(
        finished(*uptrain_arguments(folder, folder / "bf16", **changes), "--json", folder=folder)
    )
    alone = uptrain(folder / "converted", [folder / "text.txt"], folder / "bf16 one", **{**STEPS, **changes})
    assert found["loss_after"] == pytest.approx(alone.loss_after, rel=0.02)
    assert found["perplexity_after"] < 0.8 * found["perplexity_before"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_run_resumes_bit_for_bit_and_on_another_number_of_processes(folder: Path) -> None:
    changes = {"steps": 24, "save_minutes": 1e-9}  # a checkpoint after every step
    whole, killed, other = (folder / name for name in ("whole", "killed", "other"))
    expected = json.loads(finished(*uptrain_arguments(folder, whole, **changes), "--json", folder=folder))
    first = torchrun(*uptrain_arguments(folder, killed, **changes), folder=folder)
    wait_for_step(partial_folder(killed), 3)
    os.kill(processes_of(first.pid)[1], signal.SIGKILL)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1, err
    assert not killed.exists()
    saved = run_folder.checkpoints(partial_folder(killed) / "checkpoints")[-1][0]
    assert 1 <= saved < 24
    shutil.copytree(partial_folder(killed), partial_folder(other))
    command = ["-m", "fusedkv_ext", "uptrain", folder / "converted", "--out", killed, "--resume"]
    assert f"resuming {partial_folder(killed)} at step {saved}" in finished(*command, folder=folder)
    ours, theirs = weights(killed), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    records = read_metrics(killed / "metrics.jsonl")
    assert records[-1]["loss_after"] == expected["loss_after"]
    resumed = uptrain(folder / "converted", (), other, resume=True)
    assert resumed.finished and resumed.steps == 24
    assert resumed.loss_after == pytest.approx(expected["loss_after"], rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_said_once(folder: Path) -> None:
    done = torchrun(*uptrain_arguments(folder, folder / "wrong", batch_size=9), folder=folder)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 1
    said = [line for line in (out + err).splitlines() if line.startswith("fusedkv: error")]
    assert said == [
        "fusedkv: error: batch_size (9) must be a multiple of data ranks x accumulate (2 x 1 = 2)"
    ]
    assert not (folder / "wrong").exists()


# What the processes of `ranks` do


def _work(folder: Path) -> None:
    torch.set_num_threads(1)
    with session.session():
        found = {case: five_steps(folder, changes) for case, changes in CASES.items()}
        torch.save(found, folder / f"rank{session.rank()}.pt")


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
