"""Checkpoints of a run: folders `step-00000200` that are complete or not there at all.

A checkpoint is written into a hidden folder, synced to disk and renamed; old ones are renamed away before
they are deleted. So whenever the process dies, the newest folder with such a name loads.
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
    """Brings files and names of a folder to disk, so that a rename cannot overtake their content."""
    for path in (*(file for file in folder.iterdir() if file.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def latest(root: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = checkpoints(root)
    return found[-1][1] if found else None


def resolve(path: str | Path) -> Path:
    """The folder to load: `path` itself when it holds a model, else the run's newest checkpoint."""
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
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def publish(scratch: Path, target: Path) -> None:
    """Gives a folder its name when all that is in it is on the disk."""
    for folder in (*(path for path in scratch.iterdir() if path.is_dir()), scratch):
        sync(folder)
    scratch.rename(target)
    sync(target.parent)


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for _, old in checkpoints(root)[:-keep]:
        trash = root / f".trash-{old.name}"
        shutil.rmtree(trash, ignore_errors=True)
        old.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def write_trainer(folder: Path, facts: dict[str, Any]) -> None:
    """Writes what `read_trainer` reads: what a run needs to go on that is no tensor."""
    text = json.dumps({"format": _FORMAT, **facts}, indent=2)
    with checked_files.writing(folder / _TRAINER) as file:
        file.write(f"{text}\n".encode())
    checked_files.write_sums(folder, {_TRAINER: file.checksum})


def read_trainer(folder: Path) -> dict[str, Any]:
    """What `write_trainer` left in a checkpoint folder. Raises ValueError when that is no checkpoint of a
    run, or damaged, or of another version.
    """
    path = folder / _TRAINER
    if not path.is_file():
        raise ValueError(
            f"{folder} holds a model but no {_TRAINER}: it can generate text, not go on training"
        )
    checked_files.verify(folder, [_TRAINER], _advice(folder))
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged and cannot be read ({error}); {_advice(folder)}") from error
    if not isinstance(facts, dict) or facts.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} has another format than {_FORMAT}; it was written by another version")
    return facts


def training_config(folder: Path) -> TrainConfig | None:
    """How the model in a checkpoint folder was trained; None where the folder does not say."""
    known = (folder / _TRAINER).is_file()
    return TrainConfig.from_dict(read_trainer(folder)["config"]) if known else None


def _advice(folder: Path) -> str:
    return f"restore {folder} from a copy, or delete it to go on from the checkpoint before it"


def clean(root: Path) -> None:
    """Deletes what a killed run left half written or half deleted."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith((".partial-", ".trash-")):
                shutil.rmtree(path, ignore_errors=True)
