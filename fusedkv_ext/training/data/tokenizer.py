"""Tokenizers: raw UTF-8 bytes, or a Hugging Face `tokenizers` file.

The byte tokenizer needs no vocabulary file. Every byte has its own id, so bits per token are bits per byte.
Byte 0 ends a document: it cannot occur in text, because files with a zero byte are not read as text.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fusedkv_ext.extras import need

# End-of-document tokens of published vocabularies, in order of preference.
_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "[EOS]")


class StreamDecoder(Protocol):
    """Incremental decoder from ids to text. It holds back the bytes of an incomplete character."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """Interface of a tokenizer for training and generation."""

    vocab_size: int
    separator: int | None  # end-of-document id; None if the vocabulary has no such token
    identity: str  # equal for tokenizers that encode equally

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream(self) -> StreamDecoder: ...

    def save(self, folder: Path) -> None: ...


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes((token,)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; byte 0 separates documents."""

    vocab_size = 256
    separator: int | None = 0
    identity = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        return _ByteStream()

    def save(self, folder: Path) -> None:
        """Does nothing; the byte tokenizer has no file."""


class _WholeTextStream:
    """Decodes all ids again at each token and returns the new text, which is correct for any vocabulary.

    A replacement character at the end belongs to an incomplete character and is held back.
    """

    def __init__(self, tokenizer: FileTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face package `tokenizers`.

    Args:
        path: Path of the file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        tokenizers = need("tokenizers", "Reading a tokenizer file")
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: {path} is not a file; expected a tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"tokenizer must be a tokenizer.json of Hugging Face tokenizers, got {path} ({error})"
            ) from error
        self._json = self._tokenizer.to_str()
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.identity: str = hashlib.sha256(self._json.encode()).hexdigest()
        found = (self._tokenizer.token_to_id(token) for token in _END_OF_DOCUMENT)
        self.separator: int | None = next((token for token in found if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> StreamDecoder:
        return _WholeTextStream(self)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """Loads the tokenizer of a file, or the byte tokenizer if `path` is None or empty."""
    return FileTokenizer(path) if path else ByteTokenizer()


def saved_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint folder."""
    path = folder / "tokenizer.json"
    return FileTokenizer(path) if path.is_file() else ByteTokenizer()


def pack(ids: Sequence[int], vocab_size: int) -> bytes:
    """Encodes ids for a token file: uint8 for vocabularies of up to 256 tokens, otherwise int32."""
    return bytes(ids) if vocab_size <= 256 else array("i", ids).tobytes()
