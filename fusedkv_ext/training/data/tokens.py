"""Token files and batches.

A corpus is encoded once into two flat files of ids, `train.bin` and `valid.bin`, in the user's cache folder
under a key made of the content of the files, the tokenizer and the split, and memory-mapped from then on.
The order of the data is a pure function of (seed, step): the windows of a step are drawn for the whole
batch, and each data parallel rank takes its rows (`rows_of`). So a resumed run needs no state of a loader,
any number of ranks trains on the same windows, and ranks that share sequences get equal ones.
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

_FORMAT = 1  # of the token files; part of the key, so that a new format never reads an old file


@dataclass(frozen=True)
class DataInfo:
    """What is in a pair of token files. Bytes are those of the text; each document adds one separator."""

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
    """Memory-mapped ids, 1-D, uint8 (vocabularies up to 256) or int32."""

    train: Tensor
    valid: Tensor
    info: DataInfo
    separator: int | None = None  # the id that ends a document

    @property
    def tokens_per_byte(self) -> float:
        """Of the validation text, where the end of a document counts as one byte. Exactly 1 for bytes."""
        return self.info.valid_tokens / (self.info.valid_bytes + self.info.valid_files)


def cache_root(folder: str | Path | None = None) -> Path:
    """Where token files go: `folder`, else $XDG_CACHE_HOME/fusedkv, else ~/.cache/fusedkv."""
    if folder:
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fusedkv"


@dataclass(frozen=True)
class _Documents:
    """One side of the split: whole files, or one part of a lone document."""

    files: tuple[TextFile, ...]
    part: int | None = None  # 0 or 1: the part of `split_text` to take
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
            raise ValueError("text: every training file is also a validation file; name different files")
        return _Documents(train), _Documents(held_out.files)
    if len(corpus.files) == 1:
        return _Documents(corpus.files, 0, fraction), _Documents(corpus.files, 1, fraction)
    train_files, valid_files = split_files(corpus.files, fraction)
    return _Documents(tuple(train_files)), _Documents(tuple(valid_files))


def _write_tokens(path: Path, documents: _Documents, tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns (tokens, bytes of text)."""
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
    """None unless the folder holds both files at their full length."""
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
    """Writes the files next to `target` and renames the folder: nobody ever sees half of it."""
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
            if _read_info(target) is None:  # otherwise another process was faster with the same content
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
    """Encodes a corpus, or finds it encoded already, and maps it into memory.

    `text` empty: the Python sources of this machine. `valid_text`: files held out by name; otherwise files
    are held out by a hash of their relative path, and of a single file its last part. Raises ValueError or
    FileNotFoundError naming the file in question.
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
    """Raises ValueError when not even one window of `seq_len` fits."""
    if tokens.numel() < seq_len:
        raise ValueError(
            f"data.seq_len is {seq_len}, but the {side} text has only {tokens.numel()} tokens; "
            "give more text or a smaller data.seq_len"
        )


def rows_of(rank: int, ranks: int, batch_size: int) -> slice:
    """The rows of a batch that data parallel rank `rank` of `ranks` has: equal shares, side by side."""
    share = batch_size // ranks
    return slice(rank * share, (rank + 1) * share)


def training_batch(
    tokens: Tensor, seed: int, step: int, batch_size: int, seq_len: int, rows: slice = slice(None)
) -> Tensor:
    """Ids (batch_size, seq_len) int64 of windows drawn uniformly; a pure function of the arguments.

    rows: those wanted of the batch; the others are drawn but not read.
    """
    check_length(tokens, seq_len, "training")
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    starts = torch.randint(tokens.numel() - seq_len + 1, (batch_size,), generator=generator)
    return _windows(tokens, starts[rows].tolist(), seq_len)


def num_target_tokens(ids: Tensor, separator: int | None) -> int:
    """Tokens of windows (B, T) that a model's loss predicts: all but the first of each window or, with a
    separator, of each document in it.
    """
    document_ids = None if separator is None else document_ids_of(ids, separator)
    return int((next_tokens(ids, document_ids) != IGNORED).sum())


def validation_batches(tokens: Tensor, batch_size: int, seq_len: int, max_batches: int) -> Iterator[Tensor]:
    """Windows (<= batch_size, seq_len) int64 that do not overlap, spread evenly over the text; the same
    every time.
    """
    check_length(tokens, seq_len, "validation")
    available = tokens.numel() // seq_len
    count = min(available, batch_size * max_batches)
    starts = [index * available // count * seq_len for index in range(count)]
    for first in range(0, count, batch_size):
        yield _windows(tokens, starts[first : first + batch_size], seq_len)
