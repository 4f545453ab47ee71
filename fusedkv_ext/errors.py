"""The exceptions of the package that are not plain ValueError or TypeError."""

from __future__ import annotations

__all__ = [
    "CacheFullError",
    "CannotShare",
    "CheckpointError",
    "ConfigError",
    "LostContact",
    "TrainingDiverged",
    "WrongResult",
]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


class CacheFullError(ValueError):
    """The new tokens do not fit. The cache is as it was before the call."""


class CannotShare(ValueError):
    """So many processes cannot share the heads of this model; another number of them may."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


class LostContact(RuntimeError):
    """Another process is gone; what it said, if it could say anything, is the reason."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is NaN or infinite; the weights are those before the failing step."""


class WrongResult(AssertionError):
    """A result misses the error criterion of ``fusedkv_ext.testing``; the message says where."""
