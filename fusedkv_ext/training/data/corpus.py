"""Which files make the corpus, and which of them are held out for validation.

A file belongs to training or to validation as a whole, by a hash of its path *relative* to the root it was
found under, so the split is the same on every machine. Files with equal content count once: a license header
that is copied around cannot be on both sides.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Parts of an installation that are not worth learning from: tables of code points, and test data that is
# broken on purpose.
_NOT_SOURCE = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class TextFile:
    """One document. `name` is the path below its root, with forward slashes; `digest` is the content's."""

    name: str
    path: Path
    digest: str
    size: int


@dataclass(frozen=True)
class Corpus:
    """Files of a corpus, where they come from, and how many were left out for not being UTF-8 text."""

    files: tuple[TextFile, ...]
    origin: str
    skipped: int = 0
    duplicates: int = 0


def _read(path: Path, name: str) -> TextFile | None:
    """None when the file is empty or no text: not UTF-8, or with a zero byte."""
    content = path.read_bytes()
    if not content or b"\0" in content:
        return None
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return TextFile(name, path, hashlib.sha256(content).hexdigest(), len(content))


def _walk(root: Path, pattern: str, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    for path in sorted(root.rglob(pattern)):
        parts = path.relative_to(root).parts
        if not any(part.startswith(".") or part == "__pycache__" or part in excluded for part in parts):
            if path.is_file():
                yield path


def _collect(found: Iterable[tuple[Path, str]], origin: str) -> Corpus:
    unique: dict[str, TextFile] = {}
    skipped = duplicates = 0
    for path, name in found:
        file = _read(path, name)
        if file is None:
            skipped += 1
        elif file.digest in unique:
            duplicates += 1
        else:
            unique[file.digest] = file
    files = tuple(sorted(unique.values(), key=lambda file: (file.name, file.digest)))
    return Corpus(files, origin, skipped, duplicates)


def user_corpus(paths: Sequence[str | Path], key: str = "text") -> Corpus:
    """UTF-8 text from files and folders (all files below a folder, hidden ones left out).

    Raises FileNotFoundError for a path that is not there and ValueError for a named file that is no UTF-8
    text, or when no text is found at all. Inside folders, files that are no text are skipped and counted.
    """
    found: list[tuple[Path, str]] = []
    for entry in paths:
        path = Path(entry).expanduser()
        if path.is_dir():
            found += [(file, file.relative_to(path).as_posix()) for file in _walk(path, "*")]
        elif path.is_file():
            if _read(path, path.name) is None:
                raise ValueError(f"{key}: {path} is empty or not UTF-8 text; convert it to UTF-8 first")
            found.append((path, path.name))
        else:
            raise FileNotFoundError(f"{key}: {path} does not exist; expected a text file or a folder of them")
    corpus = _collect(found, ", ".join(str(path) for path in paths))
    if not corpus.files:
        raise ValueError(
            f"{key}: no UTF-8 text found in {corpus.origin} ({corpus.skipped} other files there)"
        )
    return corpus


def default_corpus() -> Corpus:
    """The Python sources that are on every machine: standard library and installed torch, tests left out."""
    import torch

    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"]), "torch": Path(torch.__file__).parent}
    found = [
        (path, f"{prefix}/{path.relative_to(root).as_posix()}")
        for prefix, root in roots.items()
        for path in _walk(root, "*.py", _NOT_SOURCE)
    ]
    corpus = _collect(
        found,
        "Python sources of the standard library (PSF-2.0) and of the installed torch (BSD-3-Clause)",
    )
    if not corpus.files:
        raise ValueError("no Python sources found in this installation; name a text of your own with --text")
    return corpus


def _position(file: TextFile) -> float:
    """A number in [0, 1) that depends on the file's relative path alone."""
    return int.from_bytes(hashlib.sha256(file.name.encode("utf-8")).digest()[:8], "big") / 2.0**64


def split_files(files: Sequence[TextFile], fraction: float) -> tuple[list[TextFile], list[TextFile]]:
    """(training, validation): a file is held out when the hash of its name falls below `fraction`.

    Both sides get at least one file; needs two files or more.
    """
    if len(files) < 2:
        raise ValueError(f"a split by file needs at least 2 files, got {len(files)}")
    order = sorted(files, key=lambda file: (_position(file), file.name, file.digest))
    held_out = sum(_position(file) < fraction for file in order)
    held_out = min(max(held_out, 1), len(order) - 1)
    by_name = sorted(order[held_out:], key=lambda file: (file.name, file.digest))
    return by_name, sorted(order[:held_out], key=lambda file: (file.name, file.digest))


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """(training, validation) of one lone document: its last `fraction`, cut after a line end where there
    is one.
    """
    cut = min(max(round(len(text) * (1.0 - fraction)), 1), len(text) - 1)
    line_end = text.rfind("\n", 0, cut)
    if line_end >= cut // 2:
        cut = line_end + 1
    return text[:cut], text[cut:]
