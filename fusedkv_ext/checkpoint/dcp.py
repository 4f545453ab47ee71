"""Tensors in the format of torch.distributed.checkpoint, written and read by any number of ranks.

This module imports torch.distributed.checkpoint, so callers import it only when they read or write such a
folder.
"""

from __future__ import annotations

import pathlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fusedkv_ext.checkpoint import checked_files

__all__ = ["Writer", "first_cause", "read", "stored"]

_METADATA = ".metadata"


class _Unpickler(pickle.Unpickler):
    """Unpickles .metadata: constructs the classes of a checkpoint and runs no other code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib":  # paths of the machine that wrote it
            return pathlib.PurePosixPath
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {"torch.strided": torch.strided}.__getitem__
        found = getattr(torch, name, None) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        if module == Metadata.__module__ and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if (module, name) == (dcp.FileSystemReader.__module__, "_StorageInfo"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


class _Reader(dcp.FileSystemReader):
    """Reader that raises the error of `read` inside dcp.load, so that all ranks of a group raise."""

    def __init__(self, folder: Path, metadata: Metadata, problem: ValueError | None) -> None:
        super().__init__(folder)
        self._metadata, self._problem = metadata, problem

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        if self._problem is not None:
            raise self._problem
        super().set_up_storage_reader(*args, **kwargs)


class _SummedFiles(FileSystem):
    """Torch's file system, which records the checksum of each written file."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:  # yields any file-like object
        if mode != "wb":
            with super().create_stream(path, mode) as file:
                yield file
            return
        with checked_files.writing(Path(path)) as summed:
            yield summed
        self.sums[Path(path).name] = summed.checksum

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


@dataclass(frozen=True)
class _Written(WriteResult):
    """A rank's report of a written tensor to rank 0, with the checksum of its file."""

    checksum: int


class Writer(dcp.FileSystemWriter):
    """Writes a folder in torch's format, with the checksum of each file for `read`.

    Disk errors are raised as OSError with the name of the file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.fs: _SummedFiles = _SummedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        def with_sums(done: Future[list[WriteResult]]) -> list[WriteResult]:
            return [
                _Written(**vars(each), checksum=self.fs.sums[each.storage_data.relative_path])
                for each in done.value()
            ]

        return super().write_data(plan, planner).then(with_sums)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        sums = {each.storage_data.relative_path: each.checksum for part in results for each in part}
        checked_files.write_sums(Path(self.path), {**sums, _METADATA: self.fs.sums[_METADATA]})


def stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes (``size``) and dtypes (``properties.dtype``) of the tensors in a folder, by name.

    The tensors are not read, so their checksums are not verified.

    Raises:
        ValueError: A file is missing or truncated. The message names it and a remedy.
    """
    metadata = _metadata(folder)
    _check_files(folder, metadata)
    return cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)


def read(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Copies tensors of a folder into the given ones by name. A rank reads its shard of a DTensor.

    The checksum of every file is verified first. The ranks of a group verify some files each.

    Args:
        folder: The folder.
        tensors: The tensors to fill.
        group: The ranks that read together; an error on one rank is raised on all. None: this process alone.

    Raises:
        ValueError: The folder is damaged, or has no tensor with that name, shape and dtype.
    """
    metadata, problem = Metadata({}), None
    try:
        metadata = _metadata(folder)
        files = _check_files(folder, metadata)
        _check_tensors(folder, metadata, tensors)
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        checked_files.verify(folder, files[rank::size], _advice(folder))
    except ValueError as error:
        problem = error
    alone = group is None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(
                tensors,
                storage_reader=_Reader(folder, metadata, problem),
                process_group=group,
                no_dist=alone,
            )
        except CheckpointException as error:
            cause = first_cause(error)
            if isinstance(cause, ValueError):
                raise cause from error
            # Do not forward torch's message: it suggests weights_only=False, which would execute code from
            # the file.
            said = f": {cause}" if isinstance(cause, OSError) else ""
            raise ValueError(
                f"{folder} cannot be read ({type(cause).__name__}{said}); {_advice(folder)}"
            ) from error


def first_cause(error: BaseException) -> BaseException:
    """The error of the lowest rank among those that torch.distributed.checkpoint collected."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


def _metadata(folder: Path) -> Metadata:
    path = folder / _METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        sound = isinstance(metadata, Metadata) and all(
            isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()
        )
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {_advice(folder)}") from error
    except Exception as error:  # pickle raises several kinds
        raise ValueError(
            f"{path} is damaged and cannot be read ({type(error).__name__}: {error}); {_advice(folder)}"
        ) from error
    if not sound:  # reading would unpickle other objects
        raise ValueError(f"{path} must list tensors only, got other objects; it is of another program")
    checked_files.verify(folder, [_METADATA], _advice(folder))
    metadata.storage_meta = StorageMeta()
    return metadata


def _check_files(folder: Path, metadata: Metadata) -> list[str]:
    """Names of the files, after a check that each exists in full length."""
    sizes: dict[str, int] = {}
    for part in metadata.storage_data.values():
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; {_advice(folder)}")
        if (found := path.stat().st_size) < size:
            raise ValueError(f"{path} is damaged: it has {found} bytes, not {size}; {_advice(folder)}")
    return sorted(sizes)


def _check_tensors(folder: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        entry = cast("TensorStorageMetadata | None", metadata.state_dict_metadata.get(name))
        if entry is None:
            raise ValueError(f"{folder} must have {name}; it was written for another model or optimizer")
        found, wanted = (tuple(entry.size), entry.properties.dtype), (tuple(tensor.shape), tensor.dtype)
        if found != wanted:
            raise ValueError(
                f"{folder}: {name} must have shape {wanted[0]} and dtype {wanted[1]}, got {found[0]} and "
                f"{found[1]}; it was written for another model"
            )


def _advice(folder: Path) -> str:
    return f"restore {folder.parent} from a copy, or delete it to resume from the previous checkpoint"
