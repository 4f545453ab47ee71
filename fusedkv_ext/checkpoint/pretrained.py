"""Saving and loading a decoder: a folder with ``config.json`` and ``model.safetensors``.

Checkpoints of training runs, with ``config.json`` and ``state/``, are loaded too. The weights file contains
the config as well, so it is complete by itself. A new checkpoint takes effect when the weights file is
replaced: whenever the process is killed, the folder loads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedkv_ext.checkpoint import checked_files
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.layers.decoder_config import MODEL_TYPE, DecoderConfig

__all__ = ["is_huggingface", "load_pretrained", "save_pretrained"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# In a checkpoint of a training run: the folder in the format of dcp_files.py, and what stands before the
# names of weights in it.
STATE, PREFIX = "state", "model."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_pretrained(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Writes ``model`` into ``folder``, which is created if necessary; a checkpoint in it is replaced.

    The write is atomic: until the new checkpoint is complete on disk the old one loads. A tied head is not
        stored
    twice. The weights file has its checksum in it, which ``load_pretrained`` compares.

    Args:
        model: The decoder.
        folder: The folder.

    Raises:
        ImportError: The safetensors package is missing.
        OSError: The checkpoint cannot be written; the message names the file.
    """
    safetensors = _safetensors()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config.to_dict(), indent=2)
    tensors = {name: tensor.detach().contiguous() for name, tensor in stored_tensors(model).items()}

    new_config, new_weights = (folder / f".{name}.tmp" for name in (CONFIG, WEIGHTS))
    metadata = {"format": "pt", "config": config, checked_files.SUM: checked_files.NO_SUM}
    try:
        with checked_files.naming(folder / WEIGHTS):
            new_config.write_text(config + "\n", encoding="utf-8")
            safetensors.torch.save_file(tensors, new_weights, metadata=metadata)
            checked_files.stamp(new_weights)
            new_weights.chmod(new_config.stat().st_mode & 0o777)  # safetensors creates it for the owner only
            for path in (new_config, new_weights):
                _sync(path)
        # While the files change places there is no config.json, and loading takes the one inside the weights.
        # Each sync keeps a power cut from making the steps in another order.
        (folder / CONFIG).unlink(missing_ok=True)
        _sync(folder)
        os.replace(new_weights, folder / WEIGHTS)
        _sync(folder)
        os.replace(new_config, folder / CONFIG)
        _sync(folder)
    finally:
        for path in (new_config, new_weights):
            with suppress(FileNotFoundError):
                path.unlink()


def load_pretrained(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """The decoder of a folder: one of ``save_pretrained``, or a checkpoint of a training run.

    The number of processes that wrote the checkpoint does not matter.

    Args:
        folder: The folder.
        device: Default CPU.
        dtype: Of all but the fusion weights, which remain fp32; None keeps the stored dtypes.

    Raises:
        ImportError: The safetensors package is missing, or torch.distributed for a checkpoint of a run.
        FileNotFoundError: There is no checkpoint.
        ValueError: The config or a weights file is missing, truncated or of a newer version; tensors are
            missing, unexpected or of a wrong shape; or a file differs from its checksum.
    """
    folder = Path(folder)
    if (folder / STATE).is_dir():
        model = allocate(folder)
        tensors = {PREFIX + name: tensor for name, tensor in stored_tensors(model).items()}
        _dcp_files().read(folder / STATE, tensors)
        model = model.to(device or "cpu")
    else:
        model = _from_safetensors(folder, device or "cpu")
    return model if dtype is None else model.to(dtype)


def holds_model(folder: Path) -> bool:
    """Whether ``load_pretrained`` finds weights in this folder."""
    return (folder / WEIGHTS).is_file() or (folder / STATE).is_dir()


def allocate(folder: Path, device: torch.device | str = "cpu") -> Decoder:
    """The decoder of a folder in the stored dtypes, with its weights not read yet.

    Errors are those of ``load_pretrained``.
    """
    if (folder / STATE).is_dir():
        path, config = folder / STATE, _read_config(folder, {})
        found = {
            name.removeprefix(PREFIX): (tuple(each.size), each.properties.dtype)
            for name, each in _dcp_files().stored(path).items()
            if name.startswith(PREFIX)
        }
    else:
        path = folder / WEIGHTS
        with open_weights(folder) as file:
            config = _read_config(folder, file.metadata() or {})
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(each.get_shape()), each[:0].dtype) for name, each in slices.items()}
    model = _meta_model(config)
    _check_tensors({name: shape for name, (shape, _) in found.items()}, model, path)
    empty = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in found.items()}
    return filled(model, empty)


@contextmanager
def open_weights(folder: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """The open weights file of a folder; safetensors' get_slice and get_tensor read onto ``device``."""
    safetensors = _safetensors()
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: there is no {WEIGHTS} and no folder {STATE}")
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt", device=str(device)) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or no safetensors file: {error}") from error


def verify_weights(folder: Path) -> None:
    """Compares the weights file of a folder with the checksum that ``save_pretrained`` put into it.

    The file of another program has none.

    Raises:
        ValueError: They differ.
    """
    checked_files.verify_stamp(folder / WEIGHTS, f"restore {folder} from a copy")


def _from_safetensors(folder: Path, device: torch.device | str) -> Decoder:
    with open_weights(folder, device) as file:
        verify_weights(folder)
        model = _meta_model(_read_config(folder, file.metadata() or {}))
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        _check_tensors(shapes, model, folder / WEIGHTS)
        return filled(model, {name: file.get_tensor(name) for name in shapes})


def _meta_model(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def filled(model: Decoder, tensors: dict[str, Tensor]) -> Decoder:
    """The decoder with these tensors as its parameters, by the names of ``stored_tensors``."""
    if model.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model


def is_huggingface(folder: str | os.PathLike[str]) -> bool:
    """Whether the config.json of a folder has a model_type of transformers instead of ours."""
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("model_type", MODEL_TYPE) != MODEL_TYPE


def stored_tensors(model: Decoder) -> dict[str, Tensor]:
    """The tensors of a model that a folder stores, by name: a tied head once."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[HEAD]
    return tensors


def _read_config(folder: Path, metadata: dict[str, str]) -> DecoderConfig:
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8") if path.is_file() else metadata.get("config")
    if text is None:
        raise FileNotFoundError(f"no checkpoint in {folder}: there is no {CONFIG}")
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}, not an object")
        return DecoderConfig.from_dict(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_tensors(found: dict[str, tuple[int, ...]], model: Decoder, path: Path) -> None:
    expected = stored_tensors(model)
    for what, names in (
        ("misses", expected.keys() - found.keys()),
        ("has unexpected", found.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{path} {what} {_listed(sorted(names))}; it does not belong to its config")
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise ValueError(
                f"{path}: {name} has shape {found[name]}, the config wants {tuple(tensor.shape)}"
            )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders, and needs no such sync
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dcp_files() -> ModuleType:
    try:
        from fusedkv_ext.checkpoint import dcp
    except ImportError as error:
        raise ImportError(
            "checkpoints of training runs need a torch with torch.distributed; `fusedkv export`, run where "
            f"there is one, makes folders of them that any torch reads ({error})"
        ) from error
    return dcp


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading checkpoints needs the safetensors package: pip install fusedkv_ext[io]"
        ) from error
    return safetensors
