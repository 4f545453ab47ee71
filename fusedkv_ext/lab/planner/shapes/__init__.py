"""Shapes to plan with: the configurations of the package, and larger models of which only the sizes are
here."""

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
    """Names that `find` knows."""
    return sorted([*recipes.names(), *(path.stem for path in _FOLDER.glob("*.toml"))])


def find(name_or_path: str | Path) -> Path:
    """The TOML file of a name that `names` lists, else the file of that path. Raises ConfigError if there is
    none."""
    own = _FOLDER / f"{name_or_path}.toml"
    return own if str(name_or_path) in names() and own.is_file() else recipes.find(name_or_path)


def load(name_or_path: str | Path) -> TrainConfig:
    """The configuration of that file."""
    return TrainConfig.from_dict(load_toml(find(name_or_path)))


def shape(config: TrainConfig, method: Entry | str, *, recompute_fusion: bool = False) -> DecoderConfig:
    """The decoder of a configuration with another method, which gets its number of KV heads: `gqa` half of
    them. Raises ConfigError for what cannot be.
    """
    entry = parse(method) if isinstance(method, str) else method
    config = entry.config(config).updated([("model.recompute_fusion", recompute_fusion)])
    return decoder_config(config, config.data.vocab_size or _BYTES)
