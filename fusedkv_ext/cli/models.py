"""Loading of the models of the commands: checkpoints of this package, and Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.training.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and folder.

    Attributes:
        folder: The folder of the model.
        model: A `Decoder` or an `evaluation.language_model.LanguageModel`.
        tokenizer: The tokenizer.
        plan: Name of the cache plan, or the model type of a model without a plan.
        ends: Tokens that end a text and are not shown.
        cache_bytes_per_token: None for a model without a KV cache.
    """

    folder: Path
    model: Any
    tokenizer: Tokenizer
    plan: str
    ends: frozenset[int | None]
    cache_bytes_per_token: float | None


@contextmanager
def coded_passes(model: Any) -> Iterator[None]:
    """Passes without a cache compute what decoding over coded caches would, if the model has codecs."""
    inner: Any = getattr(model, "model", None)
    if getattr(getattr(inner, "config", None), "cache_codecs", None) is None:
        yield
        return
    from fusedkv_ext.conversion.coding import simulated

    with simulated(inner):
        yield


def load_model(path: str | Path, tokenizer: str | None, *, device: str, dtype: str) -> Loaded:
    """Loads a model for evaluation or generation, with tensor parallelism under torchrun.

    Args:
        path: A Hugging Face folder or Hub id, a checkpoint, or the folder of a run.
        tokenizer: A tokenizer file; None for the tokenizer of the folder.
        device: Name of the device, or "auto".
        dtype: Name of the dtype.

    Raises:
        ValueError: The tokenizer has more tokens than the model, or the model cannot be loaded. See
            `load_pretrained` and `hf.loading` for further errors.
        ConfigError: The number of heads is not a multiple of the number of processes.
    """
    import torch

    from fusedkv_ext.checkpoint.pretrained import is_huggingface
    from fusedkv_ext.cli.hub import local_folder
    from fusedkv_ext.training.trainer import resolve_device

    folder = local_folder(path)
    load = _huggingface if is_huggingface(folder) else _checkpoint
    loaded = load(folder, tokenizer, device=resolve_device(device), dtype=getattr(torch, dtype))
    if loaded.tokenizer.vocab_size > loaded.model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {loaded.folder.name} must have at most the model's "
            f"{loaded.model.config.vocab_size} tokens, got {loaded.tokenizer.vocab_size}; name the tokenizer "
            "of its training with --tokenizer FILE"
        )
    return loaded


def _checkpoint(path: Path, tokenizer_file: str | None, *, device: Any, dtype: Any) -> Loaded:
    from fusedkv_ext.training.data.tokenizer import load_tokenizer, saved_tokenizer
    from fusedkv_ext.training.run_folder import resolve

    folder = resolve(path)
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else saved_tokenizer(folder)
    model = _decoder(folder, device, dtype)
    ends, cache_bytes = frozenset({tokenizer.separator}), model.config.cache_bytes_per_token(dtype)
    return Loaded(folder, model, tokenizer, model.plan.name, ends, cache_bytes)


def _decoder(folder: Path, device: Any, dtype: Any) -> Any:
    """The whole model, or under torchrun this rank's shard of it."""
    from fusedkv_ext.training import session

    if session.world_size() == 1:
        from fusedkv_ext.checkpoint.pretrained import load_pretrained

        return load_pretrained(folder, device=device, dtype=dtype)
    from torch.distributed.device_mesh import init_device_mesh

    from fusedkv_ext.distributed.loading import load_sharded
    from fusedkv_ext.errors import CannotShare

    tp = init_device_mesh(device.type, (session.world_size(),), mesh_dim_names=("tp",))
    try:
        return load_sharded(folder, tp, dtype, device)
    except CannotShare as error:
        raise ConfigError(str(error)) from error


def _huggingface(folder: Path, tokenizer_file: str | None, *, device: Any, dtype: Any) -> Loaded:
    from fusedkv_ext.extras import need

    need("transformers", "Reading a Hugging Face folder", "hf")
    from fusedkv_ext.evaluation.language_model import LanguageModel
    from fusedkv_ext.hf.loading import load_causal_lm, load_config, load_tokenizer
    from fusedkv_ext.training import session

    config = load_config(folder).get_text_config()
    tokenizer = load_tokenizer(folder, config.vocab_size, tokenizer_file or None)
    ranks, settings = session.world_size(), {}
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, name, None) or 0
            if heads % ranks:  # transformers does not check this
                raise ConfigError(
                    f"{name} of the model in {folder} must be a multiple of the {ranks} processes, got "
                    f"{heads}; start fewer"
                )
        settings["distributed_config"] = DistributedConfig(tp_size=ranks, tp_plan="auto")
    model = LanguageModel(load_causal_lm(folder, device=device, dtype=dtype, **settings))
    ends = frozenset(model.ends() | {tokenizer.separator})
    cache_bytes = model.cache_bytes_per_token()  # of this process's heads
    return Loaded(folder, model, tokenizer, model.name, ends, cache_bytes and cache_bytes * ranks)
