"""Token files and batches.

A corpus is encoded once into two flat files of ids, `train.bin` and `valid.bin`, which are memory-mapped.
They are in the user's cache folder, under a key that hashes the text files, the tokenizer and the split.

The windows of a step are a pure function of (seed, step). They are drawn for the whole batch, and each data
parallel rank takes its rows (`rows_of`). So a resumed run needs no loader state, and any number of ranks
trains on the same windows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusedkv_ext.checkpoint import checked_files
from fusedkv_ext.ops.packing import IGNORED, document_ids_of, next_tokens
from fusedkv_ext.training.data.corpus import (
    Corpus,
    TextFile,
    default_corpus,
    split_files,
    split_text,
    user_corpus,
)
from fusedkv_ext.training.data.tokenizer import Tokenizer, pack

_FORMAT = 1  # format version of the token files, part of their key


@dataclass(frozen=True)
class DataInfo:
    """Sizes and origin of a pair of token files. Bytes are those of the text, without separators."""

    key: str
    origin: str
    vocab_size: int
    train_files: int
    valid_files: int
    train_tokens: int
    valid_tokens: int
    train_bytes: int
    valid_bytes: int
    skipped_files: int
    duplicate_files: int

    def __str__(self) -> str:
        left_out = f"; left out: {self.skipped_files} empty or not UTF-8, {self.duplicate_files} duplicates"
        return (
            f"{self.origin}: train {self.train_bytes:,} bytes in {self.train_files} files, "
            f"{self.train_tokens:,} tokens; validation {self.valid_bytes:,} bytes in {self.valid_files} "
            f"files, {self.valid_tokens:,} tokens"
            + (left_out if self.skipped_files or self.duplicate_files else "")
        )


@dataclass(frozen=True)
class TokenData:
    """Memory-mapped token ids.

    Attributes:
        train: Training ids, 1-D, uint8 for vocabularies of up to 256 tokens, otherwise int32.
        valid: Validation ids, likewise.
        info: Sizes and origin.
        separator: The id that ends a document; None if there is none.
    """

    train: Tensor
    valid: Tensor
    info: DataInfo
    separator: int | None = None

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of the validation text. The end of a document counts as one byte."""
        return self.info.valid_tokens / (self.info.valid_bytes + self.info.valid_files)


def cache_root(folder: str | Path | None = None) -> Path:
    """Folder of the token files: `folder`, else $XDG_CACHE_HOME/fusedkv, else ~/.cache/fusedkv."""
    if folder:
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fusedkv"


@dataclass(frozen=True)
class _Documents:
    """One side of the split: whole files, or one part of a single document."""

    files: tuple[TextFile, ...]
    part: int | None = None  # index into the result of `split_text`; None: the whole text
    fraction: float = 0.0

    def texts(self) -> Iterator[str]:
        for file in self.files:
            text = file.path.read_bytes().decode("utf-8")
            yield text if self.part is None else split_text(text, self.fraction)[self.part]

    def identity(self) -> list[object]:
        return [self.part, self.fraction, [(file.name, file.digest) for file in self.files]]


def _split(corpus: Corpus, held_out: Corpus | None, fraction: float) -> tuple[_Documents, _Documents]:
    if held_out is not None:
        known = {file.digest for file in held_out.files}
        train = tuple(file for file in corpus.files if file.digest not in known)
        if not train:
            raise ValueError(
                "text must have a file that is not a validation file, got validation files only; name "
                "different files"
            )
        return _Documents(train), _Documents(held_out.files)
    if len(corpus.files) == 1:
        return _Documents(corpus.files, 0, fraction), _Documents(corpus.files, 1, fraction)
    train_files, valid_files = split_files(corpus.files, fraction)
    return _Documents(tuple(train_files)), _Documents(tuple(valid_files))


def _write_tokens(path: Path, documents: _Documents, tokenizer: Tokenizer) -> tuple[int, int]:
    """Writes a token file; returns its number of tokens and of bytes of text."""
    tokens = text_bytes = 0
    with checked_files.naming(path), path.open("wb") as file:
        for text in documents.texts():
            ids = tokenizer.encode(text)
            if tokenizer.separator is not None:
                ids.append(tokenizer.separator)
            file.write(pack(ids, tokenizer.vocab_size))
            tokens += len(ids)
            text_bytes += len(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    return tokens, text_bytes


def _read_info(folder: Path) -> DataInfo | None:
    """Reads info.json; None unless both token files are complete."""
    try:
        info = DataInfo(**json.loads((folder / "info.json").read_text(encoding="utf-8")))
        width = 1 if info.vocab_size <= 256 else 4
        sizes = ((folder / "train.bin").stat().st_size, (folder / "valid.bin").stat().st_size)
        return info if sizes == (info.train_tokens * width, info.valid_tokens * width) else None
    except (OSError, ValueError, TypeError):
        return None


def _build(
    target: Path, key: str, corpus: Corpus, sides: tuple[_Documents, _Documents], tokenizer: Tokenizer
) -> None:
    """Writes the token files into a scratch folder and renames it to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        train, valid = sides
        train_tokens, train_bytes = _write_tokens(scratch / "train.bin", train, tokenizer)
        valid_tokens, valid_bytes = _write_tokens(scratch / "valid.bin", valid, tokenizer)
        info = DataInfo(
            key=key,
            origin=corpus.origin,
            vocab_size=tokenizer.vocab_size,
            train_files=len(train.files),
            valid_files=len(valid.files),
            train_tokens=train_tokens,
            valid_tokens=valid_tokens,
            train_bytes=train_bytes,
            valid_bytes=valid_bytes,
            skipped_files=corpus.skipped,
            duplicate_files=corpus.duplicates,
        )
        (scratch / "info.json").write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
        if target.exists() and _read_info(target) is None:
            shutil.rmtree(target, ignore_errors=True)  # damaged
        try:
            scratch.rename(target)
        except OSError:
            if _read_info(target) is None:  # otherwise another process has written the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prepare(
    tokenizer: Tokenizer,
    text: Sequence[str | Path] = (),
    valid_text: Sequence[str | Path] = (),
    *,
    valid_fraction: float = 0.02,
    cache_dir: str | Path | None = None,
) -> TokenData:
    """Encodes a corpus, or finds its token files in the cache, and maps them into memory.

    Args:
        tokenizer: The tokenizer.
        text: Files and folders of the corpus. If empty, the Python sources of this machine.
        valid_text: Files and folders to hold out. If empty, files are held out by a hash of their relative
            path, or the last part of a single file.
        valid_fraction: Fraction of the corpus to hold out if `valid_text` is empty.
        cache_dir: Cache folder. If None, see `cache_root`.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file is not UTF-8 text, or one side of the split is empty.
        OSError: The token files cannot be written.
    """
    corpus = user_corpus(text) if text else default_corpus()
    held_out = user_corpus(valid_text, "valid_text") if valid_text else None
    sides = _split(corpus, held_out, valid_fraction)
    identity = [_FORMAT, tokenizer.identity, *(side.identity() for side in sides)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    target = cache_root(cache_dir) / "tokens" / key
    info = _read_info(target)
    if info is None:
        _build(target, key, corpus, sides, tokenizer)
        info = _read_info(target)
        if info is None:
            raise OSError(f"the token files in {target} could not be read back; is the disk full?")
    return TokenData(
        _map(target / "train.bin", info.train_tokens, info.vocab_size),
        _map(target / "valid.bin", info.valid_tokens, info.vocab_size),
        info,
        tokenizer.separator,
    )


def _map(path: Path, count: int, vocab_size: int) -> Tensor:
    dtype = torch.uint8 if vocab_size <= 256 else torch.int32
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype)


def _windows(tokens: Tensor, starts: Sequence[int], seq_len: int) -> Tensor:
    return torch.stack([tokens[start : start + seq_len] for start in starts]).to(torch.int64)


def check_length(tokens: Tensor, seq_len: int, side: str) -> None:
    """Raises ValueError if the tokens are fewer than one window of `seq_len`."""
    if tokens.numel() < seq_len:
        raise ValueError(
            f"data.seq_len must be at most the {tokens.numel()} tokens of the {side} text, got {seq_len}; "
            "give more text or a smaller data.seq_len"
        )


def rows_of(rank: int, ranks: int, batch_size: int) -> slice:
    """The rows of a batch that belong to data parallel rank `rank` of `ranks`: equal, contiguous parts."""
    share = batch_size // ranks
    return slice(rank * share, (rank + 1) * share)


def generator_of(name: str) -> torch.Generator:
    """A random generator that is a pure function of ``name``."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def training_batch(
    tokens: Tensor, seed: int, step: int, batch_size: int, seq_len: int, rows: slice = slice(None)
) -> Tensor:
    """Draws the windows of a training step uniformly. The result is a pure function of the arguments.

    Args:
        tokens: Ids of the text, 1-D.
        seed: Seed of the run.
        step: Optimizer step.
        batch_size: Windows of the whole batch.
        seq_len: Tokens per window.
        rows: Rows of the batch to return. The others are drawn but not read.

    Returns:
        Ids (rows, seq_len) int64.

    Raises:
        ValueError: The text is shorter than one window.
    """
    check_length(tokens, seq_len, "training")
    generator = generator_of(f"{seed}:{step}")
    starts = torch.randint(tokens.numel() - seq_len + 1, (batch_size,), generator=generator)
    return _windows(tokens, starts[rows].tolist(), seq_len)


def num_target_tokens(ids: Tensor, separator: int | None) -> int:
    """Number of target tokens of windows (B, T).

    The first token of each window is not a target. With a separator, neither is the first of each document.
    """
    document_ids = None if separator is None else document_ids_of(ids, separator)
    return int((next_tokens(ids, document_ids) != IGNORED).sum())


def validation_batches(tokens: Tensor, batch_size: int, seq_len: int, max_batches: int) -> Iterator[Tensor]:
    """Yields batches of non-overlapping windows that are spread evenly over the text, always the same.

    Args:
        tokens: Ids of the text, 1-D.
        batch_size: Largest number of windows in a batch.
        seq_len: Tokens per window.
        max_batches: Largest number of batches.

    Yields:
        Ids (<= batch_size, seq_len) int64.

    Raises:
        ValueError: The text is shorter than one window.
    """
    check_length(tokens, seq_len, "validation")
    available = tokens.numel() // seq_len
    count = min(available, batch_size * max_batches)
    starts = [index * available // count * seq_len for index in range(count)]
    for first in range(0, count, batch_size):
        yield _windows(tokens, starts[first : first + batch_size], seq_len)
