"""Metrics of a run: one JSON object per line, readable while the run goes on and after it was killed.

Records have a `kind`: "run" (once per start: names, sizes, configuration), "train" (means since the last such
record) and "valid"; `Trainer.observe` adds others: "grads" (norms of gradients, experiments/gradients.py).
Losses are natural-log cross entropy per predicted token; `bits_per_byte` is the same loss per byte of text.
`seconds` counts training time over all starts, validation and saving left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Cross entropy in nats per token -> bits per byte of text."""
    return loss / math.log(2.0) * tokens_per_byte


class MetricsLog:
    """Appends records to a file; each is on disk as a whole line, or not at all, when a process dies."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop(lambda record: False)  # a torn last line would swallow the first new record
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def forget_after(self, step: int) -> None:
        """Drops records of later steps: those that a resumed run is going to repeat."""
        self._file.close()
        self._drop(lambda record: record.get("step", 0) > step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def _drop(self, unwanted: Callable[[Record], bool]) -> None:
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if not unwanted(record)]
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(scratch, self.path)


class NoMetricsLog:
    """Keeps nothing: what all processes but the first write to."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


Log = MetricsLog | NoMetricsLog


def read_metrics(path: str | Path) -> list[Record]:
    """All records of a file. A torn last line, left by a killed process, is passed over.

    Raises FileNotFoundError, or ValueError naming the line when the file is no metrics file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected the metrics.jsonl of a training run")
    records: list[Record] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError("no kind")
        except ValueError as error:
            if number == len(lines):  # not ended by a newline
                break
            raise ValueError(f"{path}, line {number}: not a metrics record") from error
        records.append(record)
    return records


def series(records: list[Record], kind: str, field: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one field of the records of one kind."""
    chosen = [record for record in records if record["kind"] == kind and record.get(field) is not None]
    return [record["step"] for record in chosen], [record[field] for record in chosen]
