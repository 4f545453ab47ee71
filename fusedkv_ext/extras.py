"""Optional packages: imported when they are used, and one clear sentence when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """An optional package is needed and not installed; the message says what to install."""


def need(module: str, purpose: str, extra: str = "demo") -> ModuleType:
    """Imports `module`, or raises `MissingExtra` naming what it is for and the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingExtra(
            f'{purpose} needs the package "{package}", which is not installed: '
            f'pip install "fusedkv_ext[{extra}]"'
        ) from error
