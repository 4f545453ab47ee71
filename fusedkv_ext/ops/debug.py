"""The switch of the checks that read CUDA tensors."""

from __future__ import annotations

from types import TracebackType

__all__ = ["debug_checks"]

active = False


class _Restore:
    """Restores an earlier state of the switch when its block ends."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        debug_checks(self._before)


def debug_checks(enabled: bool = True) -> _Restore:
    """Checks the contents of CUDA tensors too: lengths, block tables, ``schedule`` and ``host_seqlens``.

    Each call then waits for the device. CPU tensors are always checked. Without these checks a CUDA sequence
    with a length or a page out of range gives NaN.

    The switch changes at once and for the whole process. Used as a context manager, the call restores the
    earlier state at the end of the block::

        with fkv.debug_checks():
            decoder.generate(ids, 16)

    Args:
        enabled: Whether to check from now on.
    """
    global active
    before, active = active, bool(enabled)
    return _Restore(before)
