"""Training runs of an experiment, which are resumed after a kill and not repeated."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.training import loop, run_folder, session
from fusedkv_ext.training.config import TrainConfig, known_keys
from fusedkv_ext.training.data.tokens import TokenData
from fusedkv_ext.training.metrics import Record, read_metrics
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.trainer import resolve_plan

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # of result files
Observer = Callable[[int, nn.Module], Record | None]

# Default model of the probe and of the gradients: deep rather than wide, minutes of training on two cores.
SMALL = {
    "model.num_hidden_layers": 12,
    "model.hidden_size": 96,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 4,
    "model.head_dim": 24,
    "data.seq_len": 128,
    "run.batch_size": 8,
    "run.log_every": 20,
    "run.valid_every": 200,
    "run.save_every": 100,
    "run.keep": 1,
}


class Stopped(Exception):
    """The user interrupted an experiment. Its runs have checkpoints; the same command resumes them."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has finished all its steps. The losses are those of the last validation."""

    model: Decoder
    valid_loss: float  # nats per token
    valid_bits_per_byte: float
    data: TokenData
    conditions: dict[str, Any]  # text, device, threads, versions


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; `sd` is None for one seed."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, form: str) -> str:
        return format(self.mean, form) + ("" if self.sd is None else f" ± {format(self.sd, form)}")


def significant(value: Any) -> Any:
    """Rounds floats to six significant digits, also in lists and dictionaries."""
    if isinstance(value, Mapping):
        return {key: significant(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [significant(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dumps(result: Mapping[str, Any]) -> str:
    """Formats JSON with one line per top-level entry."""
    entries = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def seeds_of(config: TrainConfig, count: int) -> list[int]:
    """`count` consecutive seeds, starting with `run.seed`."""
    return list(range(config.run.seed, config.run.seed + count))


def finish(
    config: TrainConfig,
    folder: Path,
    progress: Progress,
    should_stop: Callable[[], bool],
    observe: Observer | None = None,
) -> FinishedRun:
    """Trains the run in `folder` to its end, resuming from its newest checkpoint.

    Args:
        config: The configuration of the run.
        folder: Output folder of the run.
        progress: Progress display.
        should_stop: Returns True to interrupt the run.
        observe: See `Trainer.observe`.

    Raises:
        Stopped: `should_stop` returned True before the end.
        ConfigError: The folder has a run with another configuration, or another process is training it.
    """
    if should_stop():
        raise Stopped
    with _alone(folder):
        if run_folder.latest(folder / "checkpoints") is None:
            this = loop.start(config, folder)
        else:
            this, warnings = loop.resume(folder)
            check_same(config, this.trainer.config, folder)
            check_same_plan(config, this.trainer.model.plan, folder)
            for warning in warnings if this.trainer.step < config.run.steps else ():
                progress.line(f"warning: {folder}: {warning}")
        trainer = this.trainer
        trainer.observe = observe
        # Only rank 0 reads the metrics, because it may have just dropped records in `loop.resume`.
        ended = [] if session.rank() else _validated(folder / "metrics.jsonl", config.run.steps)
        if session.any_rank(bool(ended)):
            own = (ended[-1]["loss"], ended[-1]["bits_per_byte"]) if ended else (0.0, 0.0)
            losses = session.total(*own)
        else:
            progress.line(f"{folder}: {trainer.num_parameters:,} parameters, from step {trainer.step}")
            result = loop.run(this, progress, should_stop=should_stop)
            if not result.finished:
                raise Stopped
            losses = [result.valid_loss, result.valid_bits_per_byte]
        conditions = {
            "text": str(trainer.data.info),
            "device": str(trainer.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        loss, bits_per_byte = losses
        return FinishedRun(trainer.model, loss, bits_per_byte, trainer.data, conditions)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks a run's folder. A second process that trains the run raises ConfigError."""
    if fcntl is None or session.rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another process is training this run; wait until it ends, or choose another --out"
            ) from error
        except OSError:  # the file system has no locks
            pass
        yield


def _validated(metrics: Path, step: int) -> list[Record]:
    """Validation records of a step. A run with a validation of its last step is complete."""
    records = read_metrics(metrics) if metrics.exists() else []
    return [record for record in records if record["kind"] == "valid" and record["step"] == step]


def check_same(wanted: TrainConfig, found: TrainConfig, folder: Path) -> None:
    """Raises ConfigError with the first difference if the run of a folder has another configuration."""
    wanted = loop.absolute_paths(wanted)
    for key in known_keys():
        section, name = key.split(".")
        old, new = (getattr(getattr(config, section), name) for config in (found, wanted))
        if old != new:
            raise ConfigError(
                f"{key} must be {old!r}, as in the run of {folder}, got {new!r}; give the same settings to "
                "continue the run, or choose another --out"
            )


def check_same_plan(wanted: TrainConfig, found: CachePlan, folder: Path) -> None:
    """Raises ConfigError if the file of a plan has changed since the run started."""
    if resolve_plan(wanted.model) != found:
        raise ConfigError(
            f"{wanted.model.plan} must have the plan of the run in {folder}, got another plan; restore the "
            "file, or choose another --out"
        )


def without_seed(config: TrainConfig) -> dict[str, Any]:
    """The configuration for a result file, without the seed, which differs between runs."""
    values = asdict(config)
    del values["run"]["seed"]
    return values


def check_result(result: Any, path: Path, kind: str, required: Mapping[str, type]) -> dict[str, Any]:
    """Checks the content of a result file and returns it.

    Args:
        result: The parsed content.
        path: Path of the file, for error messages.
        kind: Expected kind of result.
        required: Types of the required entries.

    Raises:
        ValueError: The kind or format is another one, or an entry is missing. The message names the file.
    """
    expected = f"expected the {kind}.json that `fusedkv {kind}` wrote"
    if not isinstance(result, dict) or result.get("kind") != kind:
        found = result.get("kind") if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"{path} must have a result of kind {kind!r}, got {found!r}; {expected}")
    if result.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, got {result.get('format')!r}; another version wrote it"
        )
    for name, type_ in required.items():
        if not isinstance(result.get(name), type_):
            got = type(result[name]).__name__ if name in result else "nothing"
            raise ValueError(f"{path}: {name!r} must be a {type_.__name__}, got {got}; {expected}")
    return result


def finite_rows(rows: Any, width: int, holes: bool = False) -> bool:
    """True if `rows` is a list of lists of `width` finite numbers, or None entries if `holes`."""

    def good(x: Any) -> bool:
        return (holes and x is None) or (isinstance(x, (int, float)) and math.isfinite(x))

    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == width and all(map(good, row)) for row in rows
    )
