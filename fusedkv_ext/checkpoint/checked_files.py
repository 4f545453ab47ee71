"""Files with checksums, which detect changed bytes, and disk errors with the name of the file.

The checksum is CRC-32. It detects every change within 32 neighboring bits, and misses one in 4 billion other
changes. It does not protect against forgery.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = [
    "CHECKSUMS",
    "NO_SUM",
    "SUM",
    "SummedFile",
    "naming",
    "stamp",
    "verify",
    "verify_stamp",
    "write_sums",
    "writing",
]

CHECKSUMS = "checksums.json"
# A safetensors file has its checksum in its metadata under this name, so that both are replaced together.
# `stamp` fills it in. It is the checksum of the file with NO_SUM in its place.
SUM, NO_SUM = "crc32", "0" * 8
_STAMP = re.compile(rf'"{SUM}":"(.{{8}})"'.encode(), re.DOTALL)  # any bytes, also a damaged checksum
_BLOCK = 1 << 22


class SummedFile:
    """A file that is written sequentially, with the checksum of the bytes so far.

    Attributes:
        checksum: CRC-32 of the bytes so far.
        error: The OSError of a failed write, which libraries may replace by their own errors.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.checksum = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.checksum = zlib.crc32(data, self.checksum)
        return written

    def __getattr__(self, name: str) -> Any:  # tell, flush, fileno, close
        return getattr(self._file, name)


@contextmanager
def writing(path: Path) -> Iterator[SummedFile]:
    """Opens the file for writing.

    Raises:
        OSError: A write failed, even if the caller raised another error for it. It has the name of the file.
    """
    file = None
    with naming(path):
        try:
            with path.open("wb") as opened:
                file = SummedFile(opened)
                yield file
        except Exception as error:
            if file is None or file.error is None or error is file.error:
                raise
            raise file.error from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to disk errors without one, and converts those of safetensors to OSError."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if type(error).__name__ != "SafetensorError" or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def write_sums(folder: Path, sums: Mapping[str, int]) -> None:
    """Writes the checksums of a folder's files, by name, for `verify`."""
    text = json.dumps({"crc32": {name: f"{sums[name]:08x}" for name in sorted(sums)}}, indent=1)
    with naming(folder / CHECKSUMS):
        (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def verify(folder: Path, names: Iterable[str], advice: str) -> None:
    """Compares files of a folder with their checksums.

    A folder without checksums, from an earlier version, is not checked.

    Args:
        folder: The folder.
        names: The files.
        advice: Remedy for damage, for the error message.

    Raises:
        ValueError: A file has changed, or has no checksum although others do. The message names it.
    """
    path = folder / CHECKSUMS
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))["crc32"]
        known = {name: int(text, 16) for name, text in sums.items()}
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged and cannot be read ({error!r}); {advice}") from error
    for name in names:
        if name not in known:
            raise ValueError(f"{path} must have a checksum of {name}, got none; {advice}")
        with (folder / name).open("rb") as file:
            _compare(folder / name, f"{_sum_of(file):08x}", f"{known[name]:08x}", advice)


def stamp(path: Path) -> None:
    """Fills in the checksum of a safetensors file that was saved with ``metadata={SUM: NO_SUM, ...}``."""
    with path.open("r+b") as file:
        found = _find_stamp(file)
        if found is None or found[2] != NO_SUM:
            raise ValueError(f"{path} must have {SUM}={NO_SUM!r} in its metadata, got none; save it so")
        header, place, _ = found
        checksum = _sum_of(file, zlib.crc32(header))
        file.seek(place)
        file.write(f"{checksum:08x}".encode())


def verify_stamp(path: Path, advice: str) -> None:
    """Compares a safetensors file with the checksum in it. Files of other writers have none.

    Raises:
        ValueError: The checksum differs. The message names the file.
    """
    with path.open("rb") as file:
        if found := _find_stamp(file):
            header, _, checksum = found
            _compare(path, f"{_sum_of(file, zlib.crc32(header)):08x}", checksum, advice)


def _find_stamp(file: IO[bytes]) -> tuple[bytes, int, str] | None:
    """Header of a safetensors file with zeros as checksum, position of the checksum, and its value."""
    start = file.read(8)
    size = int.from_bytes(start, "little")
    if size > os.fstat(file.fileno()).st_size - 8:  # not a safetensors file or truncated; the reader raises
        return None
    header = start + file.read(size)
    match = _STAMP.search(header)
    if match is None:
        return None
    blank = header[: match.start(1)] + NO_SUM.encode() + header[match.end(1) :]
    return blank, match.start(1), match[1].decode("ascii", "replace")


def _sum_of(file: IO[bytes], checksum: int = 0) -> int:
    """Checksum of the rest of a file."""
    while block := file.read(_BLOCK):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _compare(path: Path, found: str, known: str, advice: str) -> None:
    if found != known:
        raise ValueError(f"{path} is damaged: its checksum is {found}, expected {known}; {advice}")
