"""Checkpoints of several processes: written beside the training, read by any number of processes, whole or
not there whatever is killed.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import HAS_GLOO, run_ranks, torchrun
from tiny import FIRST, SECOND, tiny_run

from fusedkv_ext.checkpoint import dcp
from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.cli.main import main
from fusedkv_ext.errors import CheckpointError
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment
from fusedkv_ext.training import loop, run_folder, saver, session
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.metrics import read_metrics
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer, build_model

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

SIZES = {
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 4,
    "model.head_dim": 8,
    "run.batch_size": 8,
    "run.valid_batches": 1,
    "run.save_every": 3,
    "run.keep": 10,
}
# Tensor parallelism puts the heads of skipv1 into another order, and those of a plan whose weights are not
# trained, so that the optimizer keeps nothing of them.
PLANS = ("fusedkv", "skipv1", "constants")
# Plan, and how two processes share it when they save.
SAVED = {
    "shards": ("fusedkv", {"parallel.dp_shard": 2}),
    "shards of skipv1": ("skipv1", {"parallel.dp_shard": 2}),
    "heads of skipv1": ("skipv1", {"parallel.tp": 2, "parallel.dp_shard": 1}),
    "heads of constants": ("constants", {"parallel.tp": 2, "parallel.dp_shard": 1}),
}
# What has been saved, and how four processes share it when they go on.
CHANGES = {
    "4 shards": ("shards", {"parallel.dp_shard": 4}),
    "2 copies of 2 shards": ("shards", {"parallel.dp_replicate": 2, "parallel.dp_shard": 2}),
    "2 shards of heads": ("one", {"parallel.tp": 2, "parallel.dp_shard": 2}),
    "2 shards of heads of skipv1": ("shards of skipv1", {"parallel.tp": 2, "parallel.dp_shard": 2}),
    "4 shards of skipv1": ("heads of skipv1", {"parallel.tp": 1, "parallel.dp_shard": 4}),
}
HALF, WHOLE = 3, 6  # steps: of what is saved, and of the whole run
LONG = {
    "model.plan": "fusedkv",
    "run.steps": 12,
}  # a run in fp32 of two processes, for what is equal bit for bit


def config_of(folder: Path, changes: dict[str, object]) -> TrainConfig:
    """As the test has left it in `folder`, changed."""
    return TrainConfig.from_dict(json.loads((folder / "config.json").read_text())).updated(changes.items())


def plan_of(folder: Path, name: str) -> str:
    """A name that the configuration knows, or the file of a plan, which this writes."""
    if name != "constants":
        return name
    own = [LayerPlan(Segment((i,)), Segment((i,))) for i in range(4)]
    mixed = Segment((0, 2), FIRST, Fusion("head", "normal", learnable=False))
    own[2] = LayerPlan(Segment((2,)), (mixed, Segment((2,), SECOND)))
    file = folder / "constants.json"
    if not file.exists():
        file.write_text(CachePlan(name, tuple(own)).to_json())
    return str(file)


def losses(run: Path) -> list[tuple[str, int, float]]:
    """All that a run has recorded, in order."""
    records = read_metrics(run / "metrics.jsonl")
    return [(r["kind"], r["step"], r["loss"]) for r in records if r["kind"] in ("train", "valid")]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    entries = dcp.stored(checkpoint / "state")
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.read(checkpoint / "state", tensors)
    return tensors


def same_bits(one: Path, other: Path) -> bool:
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def step_of(run: Path, step: int) -> Path:
    return run_folder.folder_of(run / "checkpoints", step)


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "config.json").write_text(json.dumps(tiny_run(folder, **SIZES).to_dict()))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:  # float64: rounding alone is far from any mistake
        patch.setattr(loop, "build_model", in_float64)
        for plan in PLANS:
            config = config_of(folder, {"model.plan": plan_of(folder, plan)})
            loop.run(loop.start(config, folder / plan), SilentProgress())
        config = config_of(folder, {"model.plan": "fusedkv"})
        loop.run(loop.start(config, folder / "one"), SilentProgress(), stop_after=HALF)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict]:
    """What two processes found; they have saved half of each run."""
    return run_ranks(__file__, folder, processes=2)


@pytest.fixture(scope="module")
def four(two: list[dict], folder: Path) -> list[dict]:
    """What four processes found, that went on with it."""
    for case, (saved, _) in CHANGES.items():
        shutil.copytree(folder / saved, folder / case)
    return run_ranks(__file__, folder, processes=4)


def in_float64(config: TrainConfig, vocab_size: int) -> torch.nn.Module:
    return build_model(config, vocab_size).double()


# Other numbers of processes


def check_goes_on_as_alone(run: Path, alone: Path) -> None:
    assert [step for kind, step, _ in losses(run) if kind == "train"] == list(range(1, WHOLE + 1))
    got = [record for record in losses(run) if record[:2] != ("valid", HALF)]  # of the stop
    for (*of, loss), (*wanted_of, wanted) in zip(got, losses(alone), strict=True):
        assert of == wanted_of and loss == pytest.approx(wanted, rel=1e-9), of
    assert len({loss for kind, _, loss in losses(alone) if kind == "train"}) == WHOLE  # the order shows
    tensors, expected = tensors_of(step_of(run, WHOLE)), tensors_of(step_of(alone, WHOLE))
    assert tensors.keys() == expected.keys() and "optimizer.model.norm.weight.exp_avg_sq" in tensors
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("case", CHANGES)
def test_four_processes_go_on_with_what_fewer_have_saved(case: str, four: list[dict], folder: Path) -> None:
    check_goes_on_as_alone(folder / case, folder / ("skipv1" if "skipv1" in case else "fusedkv"))
    before = 1 if CHANGES[case][0] == "one" else 2
    for rank in four:
        assert rank[case][0].endswith(f"an uninterrupted run gives: 4 processes, {before} before")


@pytest.mark.parametrize("case", ["shards", "heads of skipv1"])
def test_one_process_goes_on_with_what_two_have_saved(
    case: str, two: list[dict], folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / case, run)
    alone = [("parallel.dp_shard", 0), ("parallel.tp", 1)]
    resumed, warnings = loop.resume(run, lambda config: config.updated(alone))
    assert warnings[0] == "not bit for bit what an uninterrupted run gives: 1 processes, 2 before"
    loop.run(resumed, SilentProgress())
    check_goes_on_as_alone(run, folder / SAVED[case][0])


@pytest.mark.parametrize("case", SAVED)
def test_a_checkpoint_of_several_processes_is_a_model_and_is_exported(
    case: str, two: list[dict], folder: Path, tmp_path: Path
) -> None:
    model = load_pretrained(step_of(folder / case, HALF))
    alone = load_pretrained(step_of(folder / SAVED[case][0], HALF))
    assert main(["export", str(folder / case), str(tmp_path / "out")]) == 0
    exported = load_pretrained(tmp_path / "out")
    assert model.config == exported.config == alone.config
    for name, wanted in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], exported.state_dict()[name]), name
        torch.testing.assert_close(exported.state_dict()[name], wanted, rtol=1e-7, atol=1e-10, msg=name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing hidden is left


# Beside the training


def test_training_goes_on_beside_a_checkpoint_and_does_not_change_it(two: list[dict], folder: Path) -> None:
    for rank in two:
        assert rank["gated"] == {"absent at step 6": True, "waited": [True]}
    assert same_bits(step_of(folder / "gated", 3), step_of(folder / "whole", 3))
    assert losses(folder / "gated")[:6] == losses(folder / "whole")[:6]


def test_a_process_that_cannot_write_ends_the_run_on_all(two: list[dict], folder: Path) -> None:
    for rank in two:
        assert "step-00000006 could not be written (OSError: no space left" in rank["full"], rank["full"]
    names = sorted(path.name for path in (folder / "full" / "checkpoints").iterdir())
    assert names[-1] == "step-00000003" and names[0].startswith(".partial-step-00000006-")
    steps = [step for kind, step, _ in losses(folder / "full") if kind == "train"]
    assert 6 <= steps[-1] < 12  # it ended before the end, and not before the checkpoint was due


def test_processes_that_write_to_different_disks_end_the_run(two: list[dict], folder: Path) -> None:
    for rank in two:
        assert "__1_0.distcp is missing" in rank["apart"], rank["apart"]
        assert "the same --out folder" in rank["apart"]
    for rank in (0, 1):
        assert run_folder.latest(folder / f"apart{rank}" / "checkpoints") is None


def test_a_damaged_part_is_an_error_of_all(two: list[dict]) -> None:
    for rank in two:
        assert "__1_0.distcp is damaged: it has 100 bytes" in rank["damaged"]
        assert "delete it to resume from the previous checkpoint" in rank["damaged"]


def test_each_part_is_compared_with_its_checksum(two: list[dict]) -> None:
    """By one of the processes; all hear of it."""
    for rank in two:
        for name, said in rank["flipped"].items():
            assert f"{name} is damaged: its checksum is" in said
        assert rank["flipped"].keys() == {"__0_0.distcp", "__1_0.distcp"}


# Killed


def test_killed_twice_the_run_ends_bit_for_bit_as_uninterrupted(two: list[dict], folder: Path) -> None:
    """kill -9 of a process in a step, and with its part of a checkpoint half written."""
    run = folder / "killed"
    values = {
        f"{section}.{name}": value
        for section, keys in config_of(folder, LONG).to_dict().items()
        for name, value in keys.items()
        if f"{section}.{name}" not in ("model.plan_options", "data.text")
    }
    texts = {key: ",".join(value) if isinstance(value, list) else value for key, value in values.items()}
    settings = [
        part for key, text in texts.items() if text is not None for part in ("--set", f"{key}={text}")
    ]
    started = torchrun(
        "--max-restarts",
        2,
        __file__,
        folder,
        "train",
        "--out",
        run,
        "--resume",
        "--text",
        folder / "text",
        *settings,
        folder=folder,
    )
    out, err = started.communicate(timeout=170)
    assert started.returncode == 0, out + err[-3000:]
    began = (folder / "began.txt").read_text().split()
    assert began[0] == "None" and began[1] in ("step-00000003", "step-00000006"), began
    assert began[2:] == ["step-00000006"]
    assert losses(run) == losses(folder / "whole")  # and so each step is there once
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (3, 6, 9, 12)
    ]
    for step in (3, 6, 9, 12):
        assert same_bits(step_of(run, step), step_of(folder / "whole", step)), step


# What the processes do


def _saved(folder: Path) -> None:
    loop.build_model = in_float64
    for case, (plan, shared) in SAVED.items():
        config = config_of(folder, {"model.plan": plan_of(folder, plan), **shared})
        loop.run(loop.start(config, folder / case), SilentProgress(), stop_after=HALF)
    loop.build_model = build_model


def _gated(folder: Path) -> dict:
    """Files of step 3 are written after step 6 has begun; the save at step 6 waits for that."""
    this, gate, seen = loop.start(config_of(folder, LONG), folder / "gated"), threading.Event(), []
    target, write, found = step_of(folder / "gated", 3), saver._Writer.write_data, {}

    def late(self, *args: object) -> object:
        seen.append(gate.wait(60))
        return write(self, *args)

    def observe(step: int, model: object) -> None:
        if step == 6:
            found["absent at step 6"] = not target.exists()
            gate.set()

    this.trainer.observe, saver._Writer.write_data = observe, late
    try:
        loop.run(this, SilentProgress(), stop_after=6)
    finally:
        saver._Writer.write_data = write
    return {**found, "waited": seen[:1]}


def _full(folder: Path) -> str:
    """The disk of rank 1 is full at step 6."""
    write = saver._Writer.write_data

    def failing(self, *args: object) -> object:
        if dist.get_rank() == 1 and "step-00000006" in str(self.path):
            raise OSError("no space left on device")
        return write(self, *args)

    saver._Writer.write_data = failing
    try:
        loop.run(loop.start(config_of(folder, LONG), folder / "full"), SilentProgress())
    except CheckpointError as error:
        return str(error)
    finally:
        saver._Writer.write_data = write
    return "no error"


def _apart(folder: Path) -> str:
    """Machines without a common disk: --out is another folder for each process."""
    try:
        loop.run(loop.start(config_of(folder, LONG), folder / f"apart{dist.get_rank()}"), SilentProgress())
    except CheckpointError as error:
        return str(error)
    return "no error"


def _damaged(folder: Path) -> str:
    run = folder / "damaged"
    if dist.get_rank() == 0:
        shutil.copytree(step_of(folder / "whole", 3), step_of(run, 3))
        os.truncate(step_of(run, 3) / "state" / "__1_0.distcp", 100)
    dist.barrier()
    try:
        loop.resume(run)
    except ValueError as error:
        return str(error)
    return "no error"


def _flipped(folder: Path) -> dict[str, str]:
    found = {}
    for name in ("__0_0.distcp", "__1_0.distcp"):
        run = folder / f"flipped{name}"
        if dist.get_rank() == 0:
            shutil.copytree(step_of(folder / "whole", 3), step_of(run, 3))
            path = step_of(run, 3) / "state" / name
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        dist.barrier()
        try:
            loop.resume(run)
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    return found


def _two(folder: Path) -> dict:
    _saved(folder)
    loop.run(loop.start(config_of(folder, LONG), folder / "whole"), SilentProgress())
    return {
        "gated": _gated(folder),
        "full": _full(folder),
        "apart": _apart(folder),
        "damaged": _damaged(folder),
        "flipped": _flipped(folder),
    }


def _four(folder: Path) -> dict:
    found = {}
    for case, (_, shared) in CHANGES.items():
        this, found[case] = loop.resume(folder / case, lambda config, new=shared: config.updated(new.items()))
        loop.run(this, SilentProgress())
    return found


def _dying(folder: Path, arguments: list[str]) -> int:
    """`fusedkv train`, where a process kills itself at another place in each of the first two starts."""
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    train_step, write = DecoderTrainer.train_step, saver._Writer.write_data

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def in_a_step(self: DecoderTrainer) -> object:
        if self.step == 7:
            die()
        return train_step(self)

    def in_a_part(self, *args: object) -> object:
        result = write(self, *args)
        if "step-00000009" in str(self.path):
            os.truncate(self.path / "__1_0.distcp", 100)
            die()
        return result

    if rank == 0:
        newest = run_folder.latest(folder / "killed" / "checkpoints")
        with (folder / "began.txt").open("a") as file:
            file.write(f"{newest and newest.name}\n")
    if (start, rank) == (0, 1):
        DecoderTrainer.train_step = in_a_step
    elif (start, rank) == (1, 1):
        saver._Writer.write_data = in_a_part
    return main(arguments)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(_dying(Path(sys.argv[1]), sys.argv[2:]))
    torch.set_num_threads(1)
    with session.session():
        results = (_two if session.world_size() == 2 else _four)(Path(sys.argv[1]))
        torch.save(results, Path(sys.argv[1]) / f"rank{session.rank()}.pt")
