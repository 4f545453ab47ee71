"""Reading of a Hugging Face folder, with errors for incomplete models.

transformers initializes missing tensors with random numbers and accepts an encoder as a language model, each
with a warning. Here both are errors, and so are partly downloaded files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.extras import need
from fusedkv_ext.training.data.tokenizer import FileTokenizer

INDEX = "model.safetensors.index.json"
CONVERSION = "conversion.json"
COMPRESSION = "compression.json"
GENERATION = "generation_config.json"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")
# A folder whose model has more rows of the embedding than this many times its tokenizer's tokens has the
# tokenizer of another model; vocabularies are padded by a few per cent.
MOST_PADDING = 4 / 3


def load_config(folder: str | os.PathLike[str]) -> Any:
    """The config of a causal language model (transformers' PreTrainedConfig).

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: transformers does not know the type, or the model is not a causal language model.
    """
    transformers = need("transformers", "Reading a Hugging Face folder", "hf")
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face folder: there is no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {_first_sentence(error)}") from error
    names = config.architectures or []
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    classes = mapping[type(config)] if type(config) in mapping else ()
    known = {model.__name__ for model in (classes if isinstance(classes, (list, tuple)) else (classes,))}
    if not known or (names and not known & set(names)) or getattr(config, "is_encoder_decoder", False):
        what = f"a {names[0]}" if names else f"of type {config.model_type!r}"
        raise ValueError(f"{folder} must be a causal language model, such as LlamaForCausalLM, got {what}")
    return config


def load_causal_lm(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Any:
    """The model of a folder, in evaluation mode (transformers' PreTrainedModel). Nothing is downloaded.

    Args:
        folder: a Hugging Face folder.
        dtype: of the weights; None keeps the stored ones.
        settings: further arguments of from_pretrained, such as attn_implementation.

    Raises:
        FileNotFoundError: the weights or a part of them are missing.
        ValueError: a file is truncated, or a tensor is missing or has another shape; otherwise as
            ``load_config``.
    """
    transformers = need("transformers", "Reading a Hugging Face folder", "hf")
    safetensors = need("safetensors", "Reading a Hugging Face folder", "hf")
    folder = Path(folder)
    load_config(folder)
    _check_parts(folder)
    with _quiet(transformers):
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error below, with their names
                **settings,
            )
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"the weights in {folder} are only part of what they should be ({error}); download them again"
            ) from error
    _check_tensors(folder, found)
    return model.to(device).eval()


def _check_parts(folder: Path) -> None:
    """Raises FileNotFoundError if a file of weights that the index names is missing."""
    path = folder / INDEX
    if not path.is_file():
        if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors")
        return
    try:
        parts = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not an index of weights: {_first_sentence(error)}") from error
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not complete: {_listed(missing)} of the {len(parts)} files of weights that "
            f"{INDEX} names missing; download it again"
        )


def _check_tensors(folder: Path, found: dict[str, Any]) -> None:
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"the weights in {folder} lack {_listed(missing)}; the folder is not complete")
    if wrong := sorted(found["mismatched_keys"]):
        name, stored, expected = wrong[0]
        raise ValueError(
            f"the weights in {folder} do not belong to its config.json: {name} has shape {tuple(stored)}, "
            f"the config wants {tuple(expected)}"
        )


def load_tokenizer(
    folder: str | os.PathLike[str], vocab_size: int, file: str | os.PathLike[str] | None = None
) -> FileTokenizer:
    """The tokenizer of a folder, without special tokens added automatically.

    Args:
        folder: a Hugging Face folder.
        vocab_size: of the model.
        file: a tokenizer.json that replaces the one of the folder.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: the tokenizer belongs to another model.
    """
    if file is not None:
        named = FileTokenizer(Path(file))
        if named.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer {file} must have at most the model's {vocab_size} tokens, got "
                f"{named.vocab_size}; it belongs to another model"
            )
        return named
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = FileTokenizer(folder / "tokenizer.json")
    else:
        tokenizer = _converted(folder)
    if tokenizer.vocab_size > vocab_size or vocab_size > MOST_PADDING * tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} must fit the model's vocabulary of {vocab_size}, got "
            f"{tokenizer.vocab_size} tokens; it belongs to another model: name another, --tokenizer FILE"
        )
    return tokenizer


def _converted(folder: Path) -> FileTokenizer:
    """Converts the older files, vocab.json and merges.txt or tokenizer.model, with transformers."""
    transformers = need("transformers", "Reading a tokenizer", "hf")
    known = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
    if not any((folder / name).is_file() for name in known):
        raise FileNotFoundError(
            f"{folder} has no tokenizer: there is no tokenizer.json; name one: --tokenizer FILE"
        )
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with tempfile.TemporaryDirectory() as scratch:
            loaded.save_pretrained(scratch)
            return FileTokenizer(Path(scratch) / "tokenizer.json")
    except Exception as error:  # of many kinds, from files of any content
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({_first_sentence(error)}); name a tokenizer.json: "
            "--tokenizer FILE"
        ) from error


def save_like(model: Any, source: Path, target: Path) -> None:
    """Writes a model that was derived from ``source``, with the small files of ``source``.

    Those are the tokenizer, templates and generation settings. They are copied unchanged, because
    transformers reads some that it refuses to write.
    """
    settings = model.generation_config
    if (source / GENERATION).is_file():
        model.generation_config = type(settings)()
    try:
        with _quiet(need("transformers", "Writing a Hugging Face folder", "hf")):
            model.save_pretrained(target)
    finally:
        model.generation_config = settings
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, target / GENERATION)
    copy_small_files(source, target)


def copy_small_files(source: Path, target: Path) -> None:
    """Copies all files of a folder but its weights: tokenizer, templates and the like.

    Files that ``target`` already has are kept. conversion.json and compression.json, which say how
    ``source`` was created, are left out.
    """
    for path in sorted(source.iterdir()):
        known = path.name in (CONVERSION, COMPRESSION) or path.name.endswith(_WEIGHTS)
        if path.is_file() and not known and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``out`` when the block ends: whole, or not at all.

    Raises:
        FileExistsError: ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and reports: their warnings about incomplete models are errors here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
