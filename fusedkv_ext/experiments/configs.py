"""The configurations that come with the package: names for TOML files of `fusedkv train` and `compare`."""

from __future__ import annotations

from pathlib import Path

from fusedkv_ext.train.config import ConfigError

_FOLDER = Path(__file__).parent / "configs"


def names() -> tuple[str, ...]:
    """Names of the configurations, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def find(name: str) -> Path:
    """The file of a configuration: one of ``names()``, or a path of the user's own. Raises ConfigError."""
    if name in names():
        return _FOLDER / f"{name}.toml"
    if not Path(name).is_file():
        raise ConfigError(f"--config: {name} is neither a file nor one of {', '.join(names())}")
    return Path(name)
