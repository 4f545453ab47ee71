"""Shapes for the planner: the packaged configurations, and the sizes of larger models."""

from __future__ import annotations

from pathlib import Path

from fusedkv_ext.lab import recipes
from fusedkv_ext.lab.entries import Entry, parse
from fusedkv_ext.layers.decoder import DecoderConfig
from fusedkv_ext.training.config import TrainConfig, load_toml
from fusedkv_ext.training.trainer import decoder_config

__all__ = ["find", "load", "names", "shape"]

_FOLDER = Path(__file__).parent
_BYTES = 256  # vocabulary without a tokenizer


def names() -> list[str]:
    """Names of the shapes."""
    return sorted([*recipes.names(), *(path.stem for path in _FOLDER.glob("*.toml"))])


def find(name_or_path: str | Path) -> Path:
    """Finds a TOML file by the name of a shape or by its path.

    Raises:
        ConfigError: There is neither.
    """
    own = _FOLDER / f"{name_or_path}.toml"
    return own if str(name_or_path) in names() and own.is_file() else recipes.find(name_or_path)


def load(name_or_path: str | Path) -> TrainConfig:
    """Loads the configuration of a file that `find` finds."""
    return TrainConfig.from_dict(load_toml(find(name_or_path)))


def shape(config: TrainConfig, method: Entry | str, *, recompute_fusion: bool = False) -> DecoderConfig:
    """The decoder configuration for another method, with the method's number of KV heads.

    Args:
        config: The configuration.
        method: A method or its label. `gqa` halves the number of KV heads.
        recompute_fusion: Recomputes fused keys and values in the backward.

    Raises:
        ConfigError: The method does not support these sizes.
    """
    entry = parse(method) if isinstance(method, str) else method
    config = entry.config(config).updated([("model.recompute_fusion", recompute_fusion)])
    return decoder_config(config, config.data.vocab_size or _BYTES)
