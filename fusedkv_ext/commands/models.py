"""Loading of what the commands take for a model: checkpoints of this package, and Hugging Face folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedkv_ext.train.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model, `Decoder` or `hf.language_model.LanguageModel`, and what belongs to it.

    plan: name of its cache plan, or the type of a model of transformers without one. ends: tokens that end a
    text and are not shown. cache_bytes_per_token: None for a model that keeps no cache.
    """

    folder: Path
    model: Any
    tokenizer: Tokenizer
    plan: str
    ends: frozenset[int | None]
    cache_bytes_per_token: float | None


def load_model(path: str | Path, tokenizer: str | None, *, device: str, dtype: str) -> Loaded:
    """path: a Hugging Face folder, a checkpoint or a run. tokenizer: a file; None: the folder's own.

    Raises what `load_pretrained` and `hf.loading` raise, and ValueError for a tokenizer that has more tokens
    than the model.
    """
    import torch

    from fusedkv_ext.checkpoint import is_huggingface
    from fusedkv_ext.train.trainer import resolve_device

    load = _huggingface if is_huggingface(path) else _checkpoint
    loaded = load(Path(path), tokenizer, device=resolve_device(device), dtype=getattr(torch, dtype))
    if loaded.tokenizer.vocab_size > loaded.model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {loaded.folder.name} has {loaded.tokenizer.vocab_size} tokens and the model "
            f"{loaded.model.config.vocab_size}; name the one that it was trained with: --tokenizer FILE"
        )
    return loaded


def _checkpoint(path: Path, tokenizer_file: str | None, *, device: Any, dtype: Any) -> Loaded:
    from fusedkv_ext.checkpoint import load_pretrained
    from fusedkv_ext.train.checkpoints import resolve
    from fusedkv_ext.train.tokenizer import load_tokenizer, saved_tokenizer

    folder = resolve(path)
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else saved_tokenizer(folder)
    model = load_pretrained(folder, device=device, dtype=dtype)
    ends, cache_bytes = frozenset({tokenizer.separator}), model.config.cache_bytes_per_token(dtype)
    return Loaded(folder, model, tokenizer, model.plan.name, ends, cache_bytes)


def _huggingface(folder: Path, tokenizer_file: str | None, *, device: Any, dtype: Any) -> Loaded:
    from fusedkv_ext.train.extras import need

    need("transformers", "Reading a Hugging Face folder", "hf")
    from fusedkv_ext.hf.language_model import LanguageModel
    from fusedkv_ext.hf.loading import load_causal_lm, load_config, load_tokenizer

    vocab_size = load_config(folder).get_text_config().vocab_size
    tokenizer = load_tokenizer(folder, vocab_size, tokenizer_file or None)
    model = LanguageModel(load_causal_lm(folder, device=device, dtype=dtype))
    ends = frozenset(model.ends() | {tokenizer.separator})
    return Loaded(folder, model, tokenizer, model.name, ends, model.cache_bytes_per_token())
