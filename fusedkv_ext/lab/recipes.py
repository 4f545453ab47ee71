"""The configurations that come with the package: TOML files of `TrainConfig`, each value with its source."""

from __future__ import annotations

from pathlib import Path

from fusedkv_ext.errors import ConfigError

_FOLDER = Path(__file__).with_name("recipes")


def names() -> list[str]:
    """Names that `find` knows, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def find(name_or_path: str | Path) -> Path:
    """The TOML file of a name that `names` lists, else the file of that path.

    A file of your own with the name of a packaged configuration is `./name`.

    Raises:
        ConfigError: there is neither.
    """
    if str(name_or_path) in names():
        return _FOLDER / f"{name_or_path}.toml"
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"--config: {name_or_path} does not exist; expected a TOML file or one of {', '.join(names())}"
        )
    return path
