"""Configurations in the package: TOML files for `TrainConfig`, with the source of each value."""

from __future__ import annotations

from pathlib import Path

from fusedkv_ext.errors import ConfigError

_FOLDER = Path(__file__).with_name("recipes")


def names() -> list[str]:
    """Names of the packaged configurations, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def find(name_or_path: str | Path) -> Path:
    """Finds a TOML file by the name of a packaged configuration or by its path.

    Write `./name` for a local file with the name of a packaged configuration.

    Raises:
        ConfigError: There is neither.
    """
    if str(name_or_path) in names():
        return _FOLDER / f"{name_or_path}.toml"
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"--config: {name_or_path} does not exist; expected a TOML file or one of {', '.join(names())}"
        )
    return path
