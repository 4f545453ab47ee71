"""Checkpoints of a run: folders `step-00000200` that are complete or not there at all.

A checkpoint is written into a hidden folder, synced to disk and renamed; old ones are renamed away before
they are deleted. So whenever the process dies, the newest folder with such a name loads.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.checkpoint import load_pretrained, save_pretrained
from fusedkv_ext.decoder import Decoder
from fusedkv_ext.train.config import TrainConfig
from fusedkv_ext.train.tokenizer import Tokenizer

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_STATE = "trainer.pt"


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
    if (folder / "model.safetensors").is_file():
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


def write(root: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Writes `root/step-N` and deletes all but the newest `keep` checkpoints. fill: puts the files into the
    folder that it is given.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = folder_of(root, step)
    if not target.exists():  # otherwise a run that was stopped right after saving saves the same state again
        scratch = root / f".partial-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        fill(scratch)
        sync(scratch)
        scratch.rename(target)
        sync(root)
    for _, old in checkpoints(root)[:-keep]:
        trash = root / f".trash-{old.name}"
        shutil.rmtree(trash, ignore_errors=True)
        old.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    return target


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes what `read_state` reads: plain types and tensors."""
    torch.save({"format": _FORMAT, **state}, folder / _STATE)


def save(
    root: Path, model: Decoder, state: dict[str, Any], *, tokenizer: Tokenizer | None = None, keep: int = 2
) -> Path:
    """Writes `root/step-N` for N = state["step"] and deletes all but the newest `keep` checkpoints."""

    def fill(scratch: Path) -> None:
        save_pretrained(model, scratch)
        write_state(scratch, state)
        if tokenizer is not None:
            tokenizer.save(scratch)

    return write(root, state["step"], fill, keep=keep)


def clean(root: Path) -> None:
    """Deletes what a killed run left half written or half deleted."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith((".partial-", ".trash-")):
                shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path, *, mmap: bool = False) -> dict[str, Any]:
    """What `write_state` left in a checkpoint folder. Raises ValueError when it is damaged or of another
    version.
    """
    path = folder / _STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # zip, pickle and EOF errors of several kinds
        raise ValueError(f"{path} is damaged and cannot be read ({type(error).__name__})") from error
    if state.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} has another format than {_FORMAT}; it was written by another version")
    return state


def training_config(folder: Path) -> TrainConfig | None:
    """How the model in a checkpoint folder was trained; None where the folder does not say."""
    path = folder / _STATE
    return TrainConfig.from_dict(read_state(folder, mmap=True)["config"]) if path.is_file() else None


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[Decoder, dict[str, Any]]:
    """(model, state) as given to `save`. Raises ValueError when the folder is no checkpoint of a run."""
    path = folder / _STATE
    if not path.is_file():
        raise ValueError(f"{folder} holds a model but no {_STATE}: it can generate text, not go on training")
    state = read_state(folder)
    model = load_pretrained(folder, device=device)
    for parameter in model.parameters():
        # Out of the file's memory into memory of its own: matrix products may round differently on addresses
        # of another alignment, and a resumed run is to repeat the uninterrupted one bit for bit.
        parameter.data = parameter.data.clone()
    return model, state
