"""Files of the corpus, and their split into training and validation.

The split is by file: a hash of the path *relative* to its root decides, so every machine has the same split.
Files with equal content count once, so no text is on both sides.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Excluded parts of an installation: tables of code points, and tests with intentionally broken files.
_NOT_SOURCE = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class TextFile:
    """One document.

    Attributes:
        name: Path relative to its root, with forward slashes.
        path: Path of the file.
        digest: SHA-256 of the content.
        size: Bytes.
    """

    name: str
    path: Path
    digest: str
    size: int


@dataclass(frozen=True)
class Corpus:
    """Files of a corpus.

    Attributes:
        files: The files, sorted by name.
        origin: Description of their source.
        skipped: Number of excluded files that are empty or not UTF-8 text.
        duplicates: Number of excluded files whose content occurs before.
    """

    files: tuple[TextFile, ...]
    origin: str
    skipped: int = 0
    duplicates: int = 0


def _read(path: Path, name: str) -> TextFile | None:
    """Reads a file; None if it is empty, is not UTF-8 or has a zero byte."""
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
    """Collects UTF-8 text from files and folders.

    Folders are searched recursively without hidden files. Files in them that are not text are skipped.

    Args:
        paths: Files and folders.
        key: Name of the setting for error messages.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A named file is not UTF-8 text, or no text was found.
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
            f"{key} must contain UTF-8 text, got {corpus.origin} with none in {corpus.skipped} files; give "
            "text files"
        )
    return corpus


def default_corpus() -> Corpus:
    """Python sources of the standard library and of the installed torch, without tests."""
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
        raise ValueError("this installation has no Python sources; give your own text with --text")
    return corpus


def _position(file: TextFile) -> float:
    """Hash of the relative path as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(file.name.encode("utf-8")).digest()[:8], "big") / 2.0**64


def split_files(files: Sequence[TextFile], fraction: float) -> tuple[list[TextFile], list[TextFile]]:
    """Splits files by the hash of their names. Both sides get at least one file.

    Args:
        files: Two or more files.
        fraction: Files whose hash is below this number are held out for validation.

    Returns:
        (training, validation).

    Raises:
        ValueError: There are fewer than two files.
    """
    if len(files) < 2:
        raise ValueError(f"a split by file needs at least 2 files, got {len(files)}")
    order = sorted(files, key=lambda file: (_position(file), file.name, file.digest))
    held_out = sum(_position(file) < fraction for file in order)
    held_out = min(max(held_out, 1), len(order) - 1)
    by_name = sorted(order[held_out:], key=lambda file: (file.name, file.digest))
    return by_name, sorted(order[:held_out], key=lambda file: (file.name, file.digest))


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """Splits one document into training and validation.

    The validation side is the last `fraction` of the text. The cut is after a line end, if one is near.

    Returns:
        (training, validation).
    """
    cut = min(max(round(len(text) * (1.0 - fraction)), 1), len(text) - 1)
    line_end = text.rfind("\n", 0, cut)
    if line_end >= cut // 2:
        cut = line_end + 1
    return text[:cut], text[cut:]
