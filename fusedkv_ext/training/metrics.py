"""Metrics of a run: one JSON object per line, readable during the run and after a kill.

Each record has a `kind`: "run" (once per start: names, sizes, configuration), "train" (means since the
previous such record) or "valid". `Trainer.observe` adds others, such as "grads" (gradient norms,
lab/gradients.py). `loss` is the cross entropy in nats per target token, and `bits_per_byte` is the same loss
per byte of text. `seconds` is the training time over all starts, without validation and saving.
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
    """Converts a cross entropy in nats per token to bits per byte of text."""
    return loss / math.log(2.0) * tokens_per_byte


class MetricsLog:
    """Appends records to a file, one line each. A line torn by a kill is dropped by the next start."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop(lambda record: False)  # a torn last line would swallow the first new record
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def forget_after(self, step: int) -> None:
        """Drops the records of later steps, which a resumed run repeats."""
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
    """Discards all records; the log of all ranks except rank 0."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


Log = MetricsLog | NoMetricsLog


def read_metrics(path: str | Path) -> list[Record]:
    """Reads all records of a file. A torn last line of a killed process is skipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not a metrics record. The message names it.
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
            raise ValueError(
                f"{path}, line {number} must be a metrics record: a JSON object with a kind"
            ) from error
        records.append(record)
    return records


def series(records: list[Record], kind: str, field: str) -> tuple[list[float], list[float]]:
    """Steps and values of one field of all records of one kind."""
    chosen = [record for record in records if record["kind"] == kind and record.get(field) is not None]
    return [record["step"] for record in chosen], [record[field] for record in chosen]
