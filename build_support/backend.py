"""The build backend that pyproject.toml names: setuptools', after one sentence about whatever is wrong.

It requires no package, so pip and uv call it before they download anything. An isolated build, which sees no
torch, ends there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from importlib import metadata
from typing import Any

from native_config import ConfigError, NativeConfig, configure, find_tool, wanted_cuda

MIN_SETUPTOOLS = 77  # pyproject.toml has the license as an SPDX expression

Settings = dict[str, Any] | None


def check_environment() -> None:
    """Whether this Python has what a build needs; in an isolated build it has nothing."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "fusedkv_ext is compiled with the torch that will load it, and this build sees none; run "
            "`pip install 'torch>=2.11' 'setuptools>=77' pybind11 cmake ninja`, then your command again with "
            "--no-build-isolation: `pip install --no-build-isolation .` (or `uv pip install "
            "--no-build-isolation .`)."
        )
    missing = [name for name in ("pybind11",) if importlib.util.find_spec(name) is None]
    missing += [name for name in ("cmake", "ninja") if find_tool(name) is None]
    found = metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    if int(re.match(r"\d+", found)[0]) < MIN_SETUPTOOLS:
        missing.insert(0, f"'setuptools>={MIN_SETUPTOOLS}'")
    if missing:
        raise ConfigError(
            f"fusedkv_ext needs {', '.join(missing)} to build, and {sys.prefix} lacks that; "
            f"run `pip install {' '.join(missing)}` there, then your command again."
        )


def check_build() -> NativeConfig:
    """The configuration, or the end of the process with one sentence."""
    try:
        check_environment()
        wanted = wanted_cuda(os.environ)
        config = configure(wanted, os.environ)
        if wanted == "ON" and not config.torch_cuda:
            raise ConfigError(
                f"CUDA ops were asked for (FUSEDKV_CUDA=1), and torch {config.torch_version} has no CUDA; "
                "install a torch with CUDA, or unset FUSEDKV_CUDA."
            )
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if config.build_warning:
        print(f"warning: {config.build_warning}", file=sys.stderr)
    return config


def _labelled(settings: Settings) -> dict[str, Any]:
    """Settings that put ``+cpu`` or ``+cu130`` behind the version."""
    settings = dict(settings or {})
    given = settings.get("--global-option", [])
    label = ["egg_info", f"--tag-build=+{check_build().label}"]
    return {**settings, "--global-option": [*([given] if isinstance(given, str) else given), *label]}


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return [f"setuptools>={MIN_SETUPTOOLS}"]


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    from setuptools import build_meta

    return build_meta.build_sdist(sdist_directory, config_settings)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    check_build()
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    settings = _labelled(config_settings)
    from setuptools import build_meta

    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, settings)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    settings = _labelled(config_settings)
    from setuptools import build_meta

    return build_meta.build_wheel(wheel_directory, settings, metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    settings = _labelled(config_settings)
    from setuptools import build_meta

    return build_meta.build_editable(wheel_directory, settings, metadata_directory)
