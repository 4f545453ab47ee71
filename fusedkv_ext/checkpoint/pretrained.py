"""Saving and loading a decoder: a folder with ``config.json`` and ``model.safetensors``.

Checkpoints of training runs, with ``config.json`` and ``state/``, are loaded too. The weights file also
contains the config, so it is self-contained. A new checkpoint takes effect when the weights file is replaced,
so the folder loads even if the process is killed.
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
# In a checkpoint of a training run: the folder in the format of dcp.py, and the prefix of weights in it.
STATE, PREFIX = "state", "model."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_pretrained(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Writes ``model`` into ``folder`` and replaces a checkpoint in it. The folder is created if necessary.

    The write is atomic: the old checkpoint loads until the new one is complete on disk. A tied head is stored
    once. The weights file contains its checksum, which ``load_pretrained`` verifies.

    Args:
        model: The decoder.
        folder: The folder.

    Raises:
        ImportError: The safetensors package is missing.
        OSError: The checkpoint cannot be written. The message names the file.
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
            new_weights.chmod(new_config.stat().st_mode & 0o777)  # safetensors creates it with mode 0600
            for path in (new_config, new_weights):
                _sync(path)
        # Without config.json, loading uses the config in the weights file. The syncs keep the order of the
        # steps in a power failure.
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
    """Loads the decoder of a folder from ``save_pretrained``, or from a checkpoint of a training run.

    The checkpoint may be from any number of ranks.

    Args:
        folder: The folder.
        dtype: Dtype of all parameters except fusion weights, which stay fp32. None keeps the stored dtypes.
        device: Device; default CPU.

    Raises:
        ImportError: The safetensors package is missing, or torch.distributed for a checkpoint of a run.
        FileNotFoundError: There is no checkpoint.
        ValueError: A file is missing, truncated, of a newer version or differs from its checksum, or tensors
            do not match the config.
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
    """Whether a folder has weights for ``load_pretrained``."""
    return (folder / WEIGHTS).is_file() or (folder / STATE).is_dir()


def allocate(folder: Path, device: torch.device | str = "cpu") -> Decoder:
    """Creates the decoder of a folder in the stored dtypes, with uninitialized weights.

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
    """Opens the weights file of a folder; safetensors' get_slice and get_tensor read onto ``device``."""
    safetensors = _safetensors()
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint; expected {WEIGHTS} or a folder {STATE}")
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt", device=str(device)) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or not a safetensors file: {error}") from error


def verify_weights(folder: Path) -> None:
    """Compares the weights file of a folder with the checksum in it. Files of other programs have none.

    Raises:
        ValueError: The checksum differs.
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
    """Assigns tensors to the parameters of a decoder, by the names of ``stored_tensors``, and returns it."""
    if model.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model


def is_huggingface(folder: str | os.PathLike[str]) -> bool:
    """Whether the config.json of a folder has a model_type of transformers."""
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("model_type", MODEL_TYPE) != MODEL_TYPE


def stored_tensors(model: Decoder) -> dict[str, Tensor]:
    """The tensors to store of a model, by name, without a tied head."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[HEAD]
    return tensors


def _read_config(folder: Path, metadata: dict[str, str]) -> DecoderConfig:
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8") if path.is_file() else metadata.get("config")
    if text is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint; expected a {CONFIG}")
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"it must contain a JSON object, got {type(data).__name__}")
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
                f"{path}: {name} must have shape {tuple(tensor.shape)} of its config, got {found[name]}"
            )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _sync(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders and needs no sync
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
            "checkpoints of training runs need a torch with torch.distributed; `fusedkv export` with such a "
            f"torch converts them to folders that any torch reads ({error})"
        ) from error
    return dcp


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading checkpoints needs the safetensors package: pip install 'fusedkv_ext[io]'"
        ) from error
    return safetensors
