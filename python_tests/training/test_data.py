"""Text to batches: which files are held out, what is cached, which windows a step sees."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from fusedkv_ext.training.data import tokens as data_module
from fusedkv_ext.training.data.corpus import default_corpus, split_files, split_text, user_corpus
from fusedkv_ext.training.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from fusedkv_ext.training.data.tokens import (
    TokenData,
    cache_root,
    prepare,
    training_batch,
    validation_batches,
)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """60 short files of different content in nested folders."""
    for i in range(60):
        path = tmp_path / "books" / f"shelf{i % 4}" / f"book{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Book {i}: größer, {'word ' * (i + 3)}\nend of {i}\n", encoding="utf-8")
    return tmp_path / "books"


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {
        token: i for i, token in enumerate(["<|endoftext|>", "[UNK]", "word", "Book", "end", "of", ":"])
    }
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def load(path: Path, tmp_path: Path, **options: object) -> TokenData:
    return prepare(ByteTokenizer(), [path], cache_dir=tmp_path / "cache", **options)


def documents(tokens: torch.Tensor) -> set[bytes]:
    return {part for part in bytes(tokens.tolist()).split(b"\0") if part}


def test_token_files_hold_every_document_once_and_nothing_else(books: Path, tmp_path: Path) -> None:
    data = load(books, tmp_path)
    expected = {path.read_bytes() for path in books.rglob("*.txt")}
    train, valid = documents(data.train), documents(data.valid)
    assert train | valid == expected
    assert not train & valid
    assert data.info.train_bytes + data.info.valid_bytes == sum(map(len, expected))
    assert data.train.numel() + data.valid.numel() == sum(map(len, expected)) + len(expected)  # separators


def test_split_depends_on_relative_paths_only(books: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other" / "place"
    shutil.copytree(books, elsewhere)
    sides = [split_files(user_corpus([root]).files, 0.2) for root in (books, elsewhere)]
    here, there = ([[file.name for file in side] for side in split] for split in sides)
    assert here == there
    assert 3 <= len(here[1]) <= 25


def test_adding_files_moves_no_file_to_the_other_side(books: Path) -> None:
    files = user_corpus([books]).files
    train, valid = split_files(files[::2], 0.2)
    all_train, all_valid = split_files(files, 0.2)
    assert {f.name for f in train} <= {f.name for f in all_train}
    assert {f.name for f in valid} <= {f.name for f in all_valid}


def test_copies_of_one_content_count_once(books: Path, tmp_path: Path) -> None:
    for i in range(20):
        (books / f"copy{i}.txt").write_text("the same license everywhere\n")
    data = load(books, tmp_path, valid_fraction=0.5)
    assert data.info.duplicate_files == 19
    assert not documents(data.train) & documents(data.valid)


def test_files_that_are_no_text_are_skipped_in_folders_and_refused_by_name(
    books: Path, tmp_path: Path
) -> None:
    (books / "latin1.txt").write_bytes("größer".encode("latin-1"))
    (books / "binary.bin").write_bytes(b"ab\0cd")
    (books / ".hidden").write_text("not to be found")
    data = load(books, tmp_path)
    assert data.info.skipped_files == 2
    assert b"not to be found" not in documents(data.train) | documents(data.valid)
    with pytest.raises(ValueError, match=r"text: .*latin1\.txt is empty or not UTF-8"):
        load(books / "latin1.txt", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load(books / "nowhere", tmp_path)


def test_one_file_is_split_into_two_parts_without_overlap(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    data = load(path, tmp_path, valid_fraction=0.1)
    train, valid = (bytes(side.tolist()).rstrip(b"\0") for side in (data.train, data.valid))
    assert train + valid == path.read_bytes()
    assert train.endswith(b"\n")
    assert 0.05 < len(valid) / len(train + valid) < 0.15
    assert split_text("ab", 0.5) == ("a", "b")


def test_named_validation_files_are_taken_out_of_training(books: Path, tmp_path: Path) -> None:
    held_out = sorted(books.rglob("*.txt"))[:5]
    data = load(books, tmp_path, valid_text=held_out)
    assert documents(data.valid) == {path.read_bytes() for path in held_out}
    assert not documents(data.train) & documents(data.valid)
    with pytest.raises(ValueError, match="text must have a file that is not a validation file"):
        load(held_out[0], tmp_path, valid_text=held_out)


def test_second_time_nothing_is_encoded(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(books, tmp_path)
    monkeypatch.setattr(data_module, "_build", lambda *_: pytest.fail("encoded again"))
    again = load(books, tmp_path)
    assert torch.equal(first.train, again.train) and first.info == again.info


@pytest.mark.parametrize("change", ["content", "name", "fraction", "tokenizer"])
def test_cache_key_changes_with(change: str, books: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    before = load(books, tmp_path).info.key
    book = books / "shelf1" / "book1.txt"
    if change == "content":
        book.write_text(book.read_text() + "!")
    if change == "name":
        book.rename(book.with_name("renamed.txt"))
    tokenizer = FileTokenizer(tokenizer_file) if change == "tokenizer" else ByteTokenizer()
    fraction = 0.3 if change == "fraction" else 0.02
    after = prepare(tokenizer, [books], valid_fraction=fraction, cache_dir=tmp_path / "cache").info.key
    # A fraction that holds out the same files may give the same key; 0.3 of 60 files cannot.
    assert after != before


def test_damaged_cache_is_made_again(books: Path, tmp_path: Path) -> None:
    data = load(books, tmp_path)
    expected = data.train.clone()
    folder = tmp_path / "cache" / "tokens" / data.info.key
    del data
    os.truncate(folder / "train.bin", 10)
    assert torch.equal(load(books, tmp_path).train, expected)
    (folder / "info.json").write_text("{")
    assert torch.equal(load(books, tmp_path).train, expected)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_cache_lies_under_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "fusedkv"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_root() == Path.home() / ".cache" / "fusedkv"


def test_batch_is_a_function_of_seed_and_step() -> None:
    tokens = torch.arange(5000, dtype=torch.int32)
    first = training_batch(tokens, 1, 7, 4, 32)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(first, training_batch(tokens, 1, 7, 4, 32))
    assert not torch.equal(first, training_batch(tokens, 1, 8, 4, 32))
    assert not torch.equal(first, training_batch(tokens, 2, 7, 4, 32))
    assert torch.equal(first - first[:, :1], torch.arange(32).expand(4, 32))  # windows are contiguous


def test_batches_reach_both_ends_of_the_text() -> None:
    tokens = torch.arange(40, dtype=torch.uint8)
    starts = {int(window[0]) for step in range(60) for window in training_batch(tokens, 0, step, 8, 32)}
    assert starts == set(range(9))


def test_validation_windows_do_not_overlap_and_span_the_text() -> None:
    tokens = torch.arange(10_000, dtype=torch.int32)
    batches = list(validation_batches(tokens, 4, 64, 5))
    windows = torch.cat(batches)
    assert windows.shape == (20, 64)
    assert len(windows.unique()) == windows.numel()
    assert windows[0, 0] == 0 and windows[-1, 0] > 9000
    everything = torch.cat(list(validation_batches(tokens, 7, 64, 10_000)))
    assert torch.equal(everything.flatten(), torch.arange(10_000 // 64 * 64))


def test_text_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len must be at most the 10 tokens .*, got 64"):
        training_batch(torch.zeros(10, dtype=torch.uint8), 0, 0, 1, 64)


def test_tokenizer_file_gives_its_ids_and_separators(
    books: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    tokenizer = FileTokenizer(tokenizer_file)
    assert tokenizer.separator == 0 and tokenizer.vocab_size == 7
    data = prepare(tokenizer, [books], cache_dir=tmp_path / "cache")
    assert int((data.train == 0).sum()) == data.info.train_files
    assert data.tokens_per_byte < 0.5


def test_large_vocabularies_are_stored_as_int32(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        vocab_size, identity, separator = 1000, "wide", 999

        def encode(self, text: str) -> list[int]:
            return [600 + byte for byte in text.encode()]

    path = tmp_path / "text.txt"
    path.write_text("abc" * 50)
    data = prepare(Wide(), [path], cache_dir=tmp_path / "cache", valid_fraction=0.2)
    assert data.train.dtype == torch.int32
    assert data.train[-1] == 999 and data.train[0] == 600 + ord("a")
    assert data.tokens_per_byte == 1


def test_stream_holds_back_unfinished_characters() -> None:
    text = "aß€😀b"
    tokenizer = load_tokenizer(None)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"tokenizer must be a tokenizer\.json of Hugging Face .*, got .*tokenizer\.json",
    ):
        FileTokenizer(path)


def test_default_corpus_is_python_of_stdlib_and_torch_without_tests() -> None:
    corpus = default_corpus()
    names = {file.name for file in corpus.files}
    assert {"stdlib/textwrap.py", "torch/nn/functional.py"} <= names
    assert not [name for name in names if "/test/" in name or "/site-packages/" in name]
    assert sum(file.size for file in corpus.files) > 20e6
    assert "PSF-2.0" in corpus.origin and "BSD-3-Clause" in corpus.origin
