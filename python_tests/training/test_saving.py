"""Checkpoints of one process: written beside the training, one at a time; damaged ones and failing disks are
errors that say what to do; exported.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import tiny_run
from torch.distributed.checkpoint.api import CheckpointException

from fusedkv_ext.checkpoint import dcp as dcp_files
from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.cli.main import main
from fusedkv_ext.errors import CheckpointError, TrainingDiverged
from fusedkv_ext.training import loop, run_folder, saver
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_run(tmp_path, **{"run.keep": 10})


def run_in(folder: Path, config: TrainConfig, **options: int) -> Path:
    return Path(loop.run(loop.start(config, folder), SilentProgress(), **options).checkpoint)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    entries = dcp_files.stored(checkpoint / "state")
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp_files.read(checkpoint / "state", tensors)
    return tensors


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class Disk:
    """Stands between the writer and the disk: full at some steps, forgetful at others, slow until `ready` is
    set.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full: set[int] = set()
        self.full_at: str | None = None  # the file, whenever it is written
        self.forgets: set[int] = set()
        self.ready = threading.Event()
        self.ready.set()
        self.writing, self.most = 0, 0
        write = saver._Writer.write_data

        def watched(writer: saver._Writer, *args: object) -> object:
            self.writing += 1
            self.most = max(self.most, self.writing)
            try:
                assert self.ready.wait(60)
                if any(f"step-{step:08d}" in str(writer.path) for step in self.full):
                    raise OSError(28, "No space left on device")
                if self.full_at is not None:  # a device that is always full, in place of the file
                    (writer.path / self.full_at).symlink_to("/dev/full")
                written = write(writer, *args)
                if any(f"step-{step:08d}" in str(writer.path) for step in self.forgets):
                    (writer.path / "__0_0.distcp").unlink()
                return written
            finally:
                self.writing -= 1

        monkeypatch.setattr(saver._Writer, "write_data", watched)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# Writing


def test_what_a_checkpoint_holds(config: TrainConfig, tmp_path: Path) -> None:
    newest = run_in(tmp_path / "run", config, stop_after=1)
    files = ["checksums.json", "config.json", "state", "trainer.json"]
    assert sorted(path.name for path in newest.iterdir()) == files
    state = [".metadata", "__0_0.distcp", "checksums.json"]
    assert sorted(path.name for path in (newest / "state").iterdir()) == state
    names = set(dcp_files.stored(newest / "state"))
    weights = {name for name, _ in load_pretrained(newest).named_parameters()}  # a tied head is one parameter
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert names == {f"model.{name}" for name in weights} | {
        f"optimizer.{name}.{kind}" for name in weights for kind in kinds
    }


def test_steps_go_on_while_one_checkpoint_at_a_time_is_written(
    config: TrainConfig, tmp_path: Path, disk: Disk
) -> None:
    this, seen = loop.start(config.updated([("run.save_every", 2)]), tmp_path / "run"), {}
    disk.ready.clear()

    def observe(step: int, model: object) -> None:
        seen[step] = names_in(tmp_path / "run") if step > 3 else []
        if step == 4:
            disk.ready.set()

    this.trainer.observe = observe
    loop.run(this, SilentProgress())
    assert len(seen[4]) == 1 and seen[4][0].startswith(".partial-step-00000002-")
    assert seen[5][0] == "step-00000002" or seen[5][1] == "step-00000002"  # the save at step 4 has waited
    assert names_in(tmp_path / "run") == [f"step-{step:08d}" for step in (2, 4, 6)]
    assert disk.most == 1
    plain = run_in(tmp_path / "plain", config)
    for step in (2, 4, 6):
        mine, theirs = (
            tensors_of(run / "checkpoints" / f"step-{step:08d}")
            for run in (tmp_path / "run", plain.parents[1])
        )
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), step


def test_a_checkpoint_before_the_first_step_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """Torch makes AdamW's state, which is not there yet, by a step of its own."""
    this = loop.start(config, tmp_path / "run")
    loop.run(this, SilentProgress(), should_stop=lambda: True)
    assert names_in(tmp_path / "run") == ["step-00000000"]
    resumed, warnings = loop.resume(tmp_path / "run")
    assert warnings == []
    losses = [
        [trainer.train_step().loss for _ in range(3)]
        for trainer in (this.trainer, resumed.trainer, loop.start(config, tmp_path / "plain").trainer)
    ]
    assert losses[0] == losses[1] == losses[2] and len(set(losses[0])) == 3


def test_settings_of_the_optimizer_come_from_the_configuration(config: TrainConfig, tmp_path: Path) -> None:
    run_in(tmp_path / "run", config, stop_after=1)
    resumed, warnings = loop.resume(tmp_path / "run", lambda old: old.updated([("optim.weight_decay", 0.5)]))
    assert {group["weight_decay"] for group in resumed.trainer.optimizer.param_groups} == {0.5, 0.0}
    assert warnings == ["not bit for bit what an uninterrupted run gives: the configuration changed"]


# Failing


@pytest.mark.parametrize("step", [2, 6])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(
    step: int, config: TrainConfig, tmp_path: Path, disk: Disk
) -> None:
    disk.full = {step}
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=rf"step-0000000{step} could not be written \(OSError:.*space"):
        run_in(run, config)
    whole = [name for name in names_in(run) if not name.startswith(".partial-")]
    assert whole == [f"step-{before:08d}" for before in range(2, step, 2)]
    disk.full = set()
    if whole:
        resumed, warnings = loop.resume(run)
        assert resumed.trainer.step == step - 2 and warnings == [] and names_in(run) == whole
    else:
        resumed = loop.start(config, run)
    loop.run(resumed, SilentProgress())
    assert names_in(run) == ["step-00000002", "step-00000004", "step-00000006"]


# A device that is always full.
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")


@needs_dev_full
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata.tmp", "checksums.json"])
def test_a_full_disk_is_named_whatever_torch_makes_of_it(
    file: str, config: TrainConfig, tmp_path: Path, disk: Disk
) -> None:
    disk.full_at = file
    message = rf"could not be written \(OSError: \[Errno 28\] No space left on device: '.*/{file}'"
    with pytest.raises(CheckpointError, match=f"step-00000002 {message}"):
        run_in(tmp_path / "run", config)


@needs_dev_full
def test_a_disk_that_is_full_amid_a_large_tensor_is_named(tmp_path: Path) -> None:
    """Of what no buffer holds, torch's writer of archives says "unexpected pos"."""
    large = {"large": torch.randn(300_000)}
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointException) as caught:
            dcp.save(large, storage_writer=saver._Writer(tmp_path, lambda: None), no_dist=True)
    cause = dcp_files.first_cause(caught.value)
    assert isinstance(cause, OSError) and "No space left on device" in str(cause) and "distcp" in str(cause)


def test_a_part_that_is_not_in_the_folder_keeps_it_from_getting_its_name(
    config: TrainConfig, tmp_path: Path, disk: Disk
) -> None:
    """As when each machine has an --out folder of its own."""
    disk.forgets = {4}
    message = (
        r"step-00000004 could not be written \(OSError: .*__0_0\.distcp is missing; all processes have to"
    )
    with pytest.raises(CheckpointError, match=message):
        run_in(tmp_path / "run", config)
    assert [name for name in names_in(tmp_path / "run") if name.startswith("step")] == ["step-00000002"]


def diverge_after(step: int, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    train_step = DecoderTrainer.train_step

    def diverging(self: DecoderTrainer) -> object:
        if self.step == step:
            threading.Timer(0.2, disk.ready.set).start()
            raise TrainingDiverged("training diverged")
        return train_step(self)

    monkeypatch.setattr(DecoderTrainer, "train_step", diverging)
    disk.ready.clear()


def test_a_diverging_run_waits_for_its_checkpoint_and_names_it(
    config: TrainConfig, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge_after(3, monkeypatch, disk)
    with pytest.raises(TrainingDiverged, match="the last checkpoint is .*step-00000002$"):
        run_in(tmp_path / "run", config)
    assert names_in(tmp_path / "run") == ["step-00000002"]


def test_no_error_of_the_writer_is_lost_behind_another(
    config: TrainConfig, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge_after(3, monkeypatch, disk)
    disk.full = {2}
    with pytest.warns(UserWarning, match="step-00000002 could not be written .*No space left"):
        with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
            run_in(tmp_path / "run", config)


# Damaged


def garbage_inside(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:] = b"\xff" * len(data)
    path.write_bytes(data)


def garbage_without_checksums(path: Path) -> None:
    garbage_inside(path)
    (path.parent / "checksums.json").unlink()


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "part missing": ("__0_0.distcp", Path.unlink, r"__0_0\.distcp is missing; "),
    "part cut off": ("__0_0.distcp", half, r"__0_0\.distcp is damaged: it has \d+ bytes, not \d+; "),
    "part garbled": ("__0_0.distcp", garbage_inside, r"__0_0\.distcp is damaged: its checksum is .*; "),
    "part of an old one": ("__0_0.distcp", garbage_without_checksums, r"state cannot be read \(.*\); "),
    "list missing": (".metadata", Path.unlink, r"\.metadata is missing; "),
    "list cut off": (".metadata", half, r"\.metadata is damaged and cannot be read \(.*\); "),
    "list garbled": (".metadata", garbage_inside, r"\.metadata is damaged and cannot be read \(.*\); "),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named_with_what_to_do(case: str, config: TrainConfig, tmp_path: Path) -> None:
    file, damage, message = DAMAGE[case]
    newest = run_in(tmp_path / "run", config, stop_after=3)
    damage(newest / "state" / file)
    advice = r"restore .*step-00000003 from a copy, or delete it to resume from the previous checkpoint$"
    for read in (load_pretrained, lambda folder: loop.resume(folder.parents[1])):
        with pytest.raises(ValueError, match=message + advice):
            read(newest)
    assert run_folder.resolve(tmp_path / "run") == newest


def flip(path: Path, at: float) -> None:
    """One bit, so far into the file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def as_torch_reads(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint without this package."""
    metadata = dcp.FileSystemReader(checkpoint / "state").read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=checkpoint / "state", no_dist=True)
    return tensors


@pytest.mark.parametrize("at", [0.01, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("file", ["state/__0_0.distcp", "state/.metadata", "trainer.json"])
def test_a_flipped_bit_is_found(file: str, at: float, checkpoint: Path) -> None:
    flip(checkpoint / file, at)
    message = rf"{Path(file).name} is damaged.*; restore .*step-00000003 from a copy, or delete it to resume"
    with pytest.raises(ValueError, match=message):
        loop.resume(checkpoint.parents[1])
    if file.startswith("state"):
        with pytest.raises(ValueError, match=message):
            load_pretrained(checkpoint)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return run_in(folder / "run", tiny_run(folder, **{"run.keep": 10}), stop_after=3).parents[1]


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy")) / "checkpoints" / "step-00000003"


def test_every_file_has_a_checksum_or_none(checkpoint: Path) -> None:
    whole = tensors_of(checkpoint)
    path = checkpoint / "state" / "checksums.json"
    sums = json.loads(path.read_text())
    for name in ("__0_0.distcp", ".metadata"):
        path.write_text(json.dumps({"crc32": {k: v for k, v in sums["crc32"].items() if k != name}}))
        with pytest.raises(ValueError, match=rf"must have a checksum of {name}, got none; restore"):
            load_pretrained(checkpoint)
    for text in ("{}", "[]", "", '{"crc32": {"__0_0.distcp": 1}}', '{"crc32": {"__0_0.distcp": "x"}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="checksums.json is damaged and cannot be read"):
            load_pretrained(checkpoint)
    # Checkpoints of earlier versions have none.
    path.unlink()
    (checkpoint / "checksums.json").unlink()
    read = tensors_of(checkpoint)
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    assert loop.resume(checkpoint.parents[1])[0].trainer.step == 3


def test_the_format_is_torchs(checkpoint: Path) -> None:
    theirs, ours = as_torch_reads(checkpoint), tensors_of(checkpoint)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


class Hostile:
    def __reduce__(self) -> object:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("what", ["object", "bytes"])
def test_a_list_of_tensors_runs_no_code(
    what: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = run_in(tmp_path / "run", config, stop_after=1)
    monkeypatch.chdir(tmp_path)
    path = newest / "state" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    if what == "object":
        metadata.planner_data = Hostile()
    else:  # would be unpickled when it is read
        metadata.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"refers to \w+\.mkdir, which no|must list tensors only"):
        load_pretrained(newest)
    assert not (tmp_path / "owned").exists()


def test_another_model_is_an_error_that_names_the_weight(config: TrainConfig, tmp_path: Path) -> None:
    newest = run_in(tmp_path / "run", config, stop_after=1)
    data = json.loads((newest / "config.json").read_text())
    for changes, message in [
        ({"hidden_size": 64}, r"state: model\.embed_tokens\.weight must have shape .*, got \(256, 32\)"),
        ({"qk_norm": False}, r"state has unexpected model\.layers\.0\.self_attn\.k_norm\.weight"),
        ({"attention_bias": True}, r"state misses model\.layers\.0\.self_attn\.k_proj\.bias"),
    ]:
        (newest / "config.json").write_text(json.dumps(data | changes))
        with pytest.raises(ValueError, match=message):
            load_pretrained(newest)


# Exported


def test_an_exported_run_is_its_newest_model(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run_in(tmp_path / "run", config, stop_after=3)
    older = newest.with_name("step-00000002")
    for source, out, arguments in (
        (newest, "newest", []),
        (older, "older", []),
        (newest, "half", ["--dtype", "bfloat16"]),
    ):
        given = tmp_path / "run" if out == "newest" else source
        assert main(["export", str(given), str(tmp_path / out), "--json", *arguments]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["checkpoint"] == str(source) and said["folder"] == str(tmp_path / out)
        model = load_pretrained(source, dtype=torch.bfloat16 if arguments else None)
        exported = load_pretrained(tmp_path / out).state_dict()
        assert said["parameters"] == sum(weight.numel() for weight in model.parameters())
        for name, weight in model.state_dict().items():
            assert exported[name].dtype == weight.dtype and torch.equal(exported[name], weight), name
    assert main(["generate", str(tmp_path / "half"), "--prompt", "the", "--max-new-tokens", "2"]) == 0


def test_export_writes_a_whole_folder_or_none(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = run_in(tmp_path / "run", config, stop_after=1)
    out = tmp_path / "out"
    (tmp_path / "there").mkdir()
    huggingface = tmp_path / "llama"
    huggingface.mkdir()
    (huggingface / "config.json").write_text('{"model_type": "llama"}')
    for source, target, code, message in (
        (newest, tmp_path / "there", 2, "FOLDER must not exist, got "),
        (tmp_path / "nothing", out, 1, "holds no checkpoint"),
        (huggingface, out, 2, "RUN must be the folder of a training run, got the Hugging Face folder"),
    ):
        assert main(["export", str(source), str(target)]) == code
        assert message in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "publish", lambda *_: (_ for _ in ()).throw(OSError("disk on fire")))
    assert main(["export", str(newest), str(out)]) == 1
    assert "disk on fire" in capsys.readouterr().err
    half(newest / "state" / "__0_0.distcp")
    assert main(["export", str(newest), str(out)]) == 1
    assert "__0_0.distcp is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "llama", "run", "text", "there"]
