"""Checkpoint folders of a run, `step-00000200`, which appear atomically.

A checkpoint is written into a hidden folder, synced to disk and renamed. Old checkpoints are renamed before
they are deleted. So the newest folder with such a name always loads, even after a kill.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from fusedkv_ext.checkpoint import checked_files
from fusedkv_ext.checkpoint.pretrained import holds_model
from fusedkv_ext.training.config import TrainConfig

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_TRAINER = "trainer.json"


def sync(folder: Path) -> None:
    """Syncs the files of a folder and the folder itself to disk, so that a rename is ordered after them."""
    for path in (*(file for file in folder.iterdir() if file.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of all checkpoints in `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def latest(root: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = checkpoints(root)
    return found[-1][1] if found else None


def resolve(path: str | Path) -> Path:
    """The folder to load: `path` if it contains a model, otherwise the newest checkpoint of that run.

    Raises:
        FileNotFoundError: There is neither.
    """
    folder = Path(path)
    if holds_model(folder):
        return folder
    found = latest(folder) or latest(folder / "checkpoints")
    if found is None:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint; expected a folder with config.json and model.safetensors, "
            "or the --out folder of a training run"
        )
    return found


def folder_of(root: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return root / f"step-{step:08d}"


def publish(scratch: Path, target: Path) -> None:
    """Syncs a folder to disk and renames it to `target`."""
    for folder in (*(path for path in scratch.iterdir() if path.is_dir()), scratch):
        sync(folder)
    scratch.rename(target)
    sync(target.parent)


def prune(root: Path, keep: int) -> None:
    """Deletes all checkpoints except the newest `keep`."""
    for _, old in checkpoints(root)[:-keep]:
        trash = root / f".trash-{old.name}"
        shutil.rmtree(trash, ignore_errors=True)
        old.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def write_trainer(folder: Path, facts: dict[str, Any]) -> None:
    """Writes trainer.json: the state of a run that is not a tensor."""
    text = json.dumps({"format": _FORMAT, **facts}, indent=2)
    with checked_files.writing(folder / _TRAINER) as file:
        file.write(f"{text}\n".encode())
    checked_files.write_sums(folder, {_TRAINER: file.checksum})


def read_trainer(folder: Path) -> dict[str, Any]:
    """Reads the trainer.json of a checkpoint folder.

    Raises:
        ValueError: The folder is not a checkpoint of a run, is damaged, or has another format version.
    """
    path = folder / _TRAINER
    if not path.is_file():
        raise ValueError(
            f"{folder} must have a {_TRAINER} to resume training, got a model without it; start a new run"
        )
    checked_files.verify(folder, [_TRAINER], _advice(folder))
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged and cannot be read ({error}); {_advice(folder)}") from error
    if not isinstance(facts, dict) or facts.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} must have format {_FORMAT}, got another one; another version wrote it")
    return facts


def training_config(folder: Path) -> TrainConfig | None:
    """The training configuration of a checkpoint folder; None if it has no trainer.json."""
    known = (folder / _TRAINER).is_file()
    return TrainConfig.from_dict(read_trainer(folder)["config"]) if known else None


def _advice(folder: Path) -> str:
    return f"restore {folder} from a copy, or delete it to resume from the previous checkpoint"


def clean(root: Path) -> None:
    """Deletes the partial and half-deleted checkpoints of a killed run."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith((".partial-", ".trash-")):
                shutil.rmtree(path, ignore_errors=True)
