"""Progress display for one or more tasks: bars in a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """Interface of a progress display."""

    def task(self, name: str, total: int, done: int = 0) -> None:
        """Starts a task of `total` steps, of which `done` are complete."""

    def advance(self, name: str, done: int, text: str = "") -> None:
        """Reports that `done` steps of a task are complete; `text` has the latest numbers."""

    def line(self, text: str) -> None:
        """Prints a line that stays on the screen."""

    def close(self) -> None: ...


class SilentProgress:
    def task(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, name: str, done: int, text: str = "") -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainProgress:
    """Plain lines: at most one per task every `interval` seconds, and one at the end of a task."""

    def __init__(self, stream: TextIO, interval: float = 5.0) -> None:
        self._stream, self._interval = stream, interval
        self._totals: dict[str, int] = {}
        self._shown: dict[str, float] = {}

    def task(self, name: str, total: int, done: int = 0) -> None:
        self._totals[name] = total
        self._shown[name] = -self._interval

    def advance(self, name: str, done: int, text: str = "") -> None:
        now, total = time.monotonic(), self._totals[name]
        if text and (done >= total or now - self._shown[name] >= self._interval):
            self._shown[name] = now
            self.line(f"{name} {done}/{total}  {text}")

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None: ...


class RichProgress:
    """One bar per task with elapsed and remaining time. The numbers use the remaining width."""

    def __init__(self, rich: Any, stream: TextIO) -> None:
        self._console = rich.console.Console(file=stream)
        columns = rich.progress
        numbers = rich.table.Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._bars = columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(bar_width=16),
            columns.MofNCompleteColumn(),
            columns.TimeElapsedColumn(),
            columns.TimeRemainingColumn(compact=True),
            columns.TextColumn("{task.fields[text]}", markup=False, table_column=numbers),
            console=self._console,
            expand=True,
        )
        self._tasks: dict[str, Any] = {}
        self._bars.start()

    def task(self, name: str, total: int, done: int = 0) -> None:
        self._tasks[name] = self._bars.add_task(name, total=total, completed=done, text="")

    def advance(self, name: str, done: int, text: str = "") -> None:
        fields = {"text": text} if text else {}
        self._bars.update(self._tasks[name], completed=done, **fields)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bars.stop()


def make_progress(stream: TextIO | None = None, interval: float = 5.0) -> Progress:
    """Creates the progress display for a stream.

    Args:
        stream: Output stream. If None, stdout.
        interval: Seconds between two plain lines of a task.

    Returns:
        Bars if the stream is a terminal and the package rich is installed, otherwise plain lines. Under
        torchrun all ranks except rank 0 are silent.
    """
    from fusedkv_ext.training import session

    if session.rank():
        return SilentProgress()
    stream = stream or sys.stdout
    if stream.isatty():
        try:
            import rich
            import rich.console
            import rich.progress
            import rich.table
        except ImportError:
            print('(for progress bars: pip install "fusedkv_ext[demo]")', file=stream)
        else:
            return RichProgress(rich, stream)
    return PlainProgress(stream, interval)
