"""Comparison of methods under one training budget: equal data order, tokens, width and seeds.

Every run has its own folder with metrics.jsonl and checkpoints. Finished runs are not repeated, so a killed
comparison resumes.

Learning rates follow one rule for all methods. All seeds run at the first rate, and the first seed runs at
every rate. The rate of a method is the one with the lowest loss of the first seed. The remaining seeds then
run at that rate.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.errors import ConfigError, TrainingDiverged
from fusedkv_ext.lab import runs
from fusedkv_ext.lab.entries import Entry
from fusedkv_ext.lab.reporting import write
from fusedkv_ext.lab.timing import in_turns
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.training import loop, session
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data.tokenizer import load_tokenizer
from fusedkv_ext.training.data.tokens import TokenData
from fusedkv_ext.training.metrics import read_metrics
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer, build_model, ffn_width, resolve_device, resolve_plan

RESULT = "result.json"


@dataclass(frozen=True)
class Budget:
    """The common budget of all methods.

    Attributes:
        config: The configuration that all runs share.
        seeds: Number of seeds, starting with `run.seed`.
        rates: Learning rates. The first seed runs with all of them.
        equal: "width" gives all methods the same sizes. "parameters" adapts the FFN width so that the number
            of parameters equals that of the first method.
    """

    config: TrainConfig
    seeds: int
    rates: tuple[float, ...]
    equal: str = "width"

    @property
    def first_seed(self) -> int:
        """The seed that runs with all rates."""
        return self.config.run.seed

    @property
    def all_seeds(self) -> list[int]:
        return runs.seeds_of(self.config, self.seeds)


@dataclass(frozen=True)
class RunKey:
    """One training run of a comparison."""

    entry: Entry
    rate: float
    seed: int

    def folder(self, root: Path) -> Path:
        return root / "runs" / self.entry.folder / f"lr{self.rate:g}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.entry.label} lr {self.rate:g} seed {self.seed}"


Results = dict[RunKey, dict[str, Any]]


def parameters(config: TrainConfig, vocab_size: int) -> int:
    """Number of parameters of a configuration's model, counted on the meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, vocab_size).parameters())


def configs(entries: Sequence[Entry], budget: Budget, vocab_size: int) -> dict[Entry, TrainConfig]:
    """The configuration of each method, without seed and rate.

    Raises:
        ConfigError: A method does not support these sizes. The message names it.
    """
    found, counts = {}, []
    for entry in entries:
        try:
            found[entry] = entry.config(budget.config)
            counts.append(parameters(found[entry], vocab_size))
        except ValueError as error:
            raise ConfigError(f"method {entry.label}: {error}") from error
    if budget.equal == "width":
        return found
    return {entry: _resized(config, counts[0], vocab_size) for entry, config in found.items()}


def _resized(config: TrainConfig, target: int, vocab_size: int) -> TrainConfig:
    """Adapts the width of the FFN, or of its experts, to get as close to `target` parameters as possible."""
    model = config.model
    width, key = ffn_width(model), "intermediate_size"
    if model.num_experts and model.moe_intermediate_size:
        width, key = model.moe_intermediate_size, "moe_intermediate_size"

    def widened(by: int) -> TrainConfig:
        return config.updated([(f"model.{key}", max(1, width + by))])

    # Measured on the model, over many channels, because the experts' width rounds intermediate_size.
    own, span = parameters(config, vocab_size), 1024
    per_channel = (parameters(widened(span), vocab_size) - own) / span
    return widened(round((target - own) / per_channel))


def plan_runs(entries: Sequence[Entry], budget: Budget, results: Results) -> list[RunKey]:
    """The runs without a result that can start now, in order; empty at the end of the comparison.

    The runs at a method's best rate are added when its runs with the first seed have results.
    """
    first, *others = budget.rates
    keys = [RunKey(entry, first, seed) for seed in budget.all_seeds for entry in entries]
    keys += [RunKey(entry, rate, budget.first_seed) for rate in others for entry in entries]
    for entry in entries:
        rate = best_rate(entry, budget, results)
        if rate is not None and rate != first:
            keys += [RunKey(entry, rate, seed) for seed in budget.all_seeds[1:]]
    return [key for key in keys if key not in results]


def best_rate(entry: Entry, budget: Budget, results: Results) -> float | None:
    """The rate with the lowest loss of the first seed; None if a run is missing or all diverged."""
    losses = {}
    for rate in budget.rates:
        result = results.get(RunKey(entry, rate, budget.first_seed))
        if result is None:
            return None
        if result["valid_loss"] is not None:
            losses[rate] = result["valid_loss"]
    return min(losses, key=losses.__getitem__) if losses else None


def read_result(folder: Path, config: TrainConfig, text: str) -> dict[str, Any] | None:
    """Reads the result of a run.

    Args:
        folder: Folder of the run.
        config: Expected configuration.
        text: Expected key of the training text.

    Returns:
        The result, or None if the run is not finished.

    Raises:
        ConfigError: The result has another configuration, plan or text.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    runs.check_same(config, TrainConfig.from_dict(result["config"]), folder)
    if "plan" in result:
        runs.check_same_plan(config, CachePlan.from_dict(result["plan"]), folder)
    if result.get("text", text) != text:  # old results have no text
        raise ConfigError(
            f"{folder} must have a run with the same text, got another one; restore the text, or choose "
            "another --out"
        )
    return result


def train_run(
    config: TrainConfig,
    folder: Path,
    threads: int,
    text: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains one model to the end, resuming from its newest checkpoint, and writes the result."""
    loop.deterministic(resolve_device(config.run.device))
    plan = resolve_plan(config.model).to_dict()
    result: dict[str, Any] = {"config": config.to_dict(), "plan": plan, "text": text}
    try:
        with _with_threads(threads):
            done = runs.finish(config, folder, SilentProgress(), should_stop)
        result |= {"valid_loss": done.valid_loss, "valid_bits_per_byte": done.valid_bits_per_byte}
    except TrainingDiverged as error:  # also a result: this rate is too high for this method
        result |= {"valid_loss": None, "valid_bits_per_byte": None, "diverged": str(error)}
    if session.rank() == 0:
        write(folder / RESULT, json.dumps(result))
    return result


def _config_of(key: RunKey, methods: dict[Entry, TrainConfig]) -> TrainConfig:
    config = methods[key.entry].updated([("optim.lr", key.rate), ("run.seed", key.seed)])
    return loop.absolute_paths(config)


def load(budget: Budget) -> TokenData:
    """Loads the tokens of a comparison's text."""
    return loop.load_data(budget.config, load_tokenizer(budget.config.data.tokenizer))


def run_all(
    entries: Sequence[Entry],
    budget: Budget,
    root: Path,
    *,
    jobs: int,
    threads: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[RunKey, dict[str, Any], int]]:
    """Trains all missing runs below `root`.

    With one job, runs execute in this process or, under torchrun, on all ranks together. With more, each run
    has its own process.

    Args:
        entries: The methods.
        budget: The budget of every method.
        root: Output folder.
        jobs: Number of concurrent runs.
        threads: CPU threads of each run.
        should_stop: Returns True to interrupt the runs.

    Yields:
        (run, result, number of known remaining runs).

    Raises:
        Stopped: `should_stop` returned True before the end.
        ConfigError: Settings are invalid, or differ from those of existing runs.
        RuntimeError: The process of a run was killed.
    """
    if jobs > 1 and session.world_size() > 1:
        raise ConfigError(f"--jobs must be 1 under torchrun, got {jobs}; all ranks work on one run at a time")
    data = load(budget).info  # encodes the text once for all processes
    methods = configs(entries, budget, data.vocab_size)
    results: Results = {}
    with ExitStack() as stack:
        at_once = partial(_at_once, should_stop=should_stop)
        train = at_once if jobs == 1 else stack.enter_context(_processes(jobs))
        running: dict[Future[dict[str, Any]], RunKey] = {}
        while True:
            missing = [key for key in plan_runs(entries, budget, results) if key not in running.values()]
            for key in missing:
                config, folder = _config_of(key, methods), key.folder(root)
                found = read_result(folder, config, data.key)
                if found is not None:
                    results[key] = found
                    yield key, found, len(plan_runs(entries, budget, results))
                elif len(running) < jobs:
                    running[train(train_run, config, folder, threads, data.key)] = key
            if not running and not missing:
                return
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                results[key] = future.result()
                yield key, results[key], len(plan_runs(entries, budget, results))
            if should_stop():
                raise runs.Stopped


def _at_once(
    train: Callable[..., dict[str, Any]], *arguments: Any, should_stop: Callable[[], bool]
) -> Future[dict[str, Any]]:
    """Runs a call in this process, which `should_stop` ends."""
    done: Future[dict[str, Any]] = Future()
    done.set_result(train(*arguments, should_stop=should_stop))
    return done


@contextmanager
def _with_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _processes(jobs: int) -> Iterator[Callable[..., Future[dict[str, Any]]]]:
    """Process pool that terminates its processes on an error. Their runs resume from checkpoints."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent)
    try:
        yield pool.submit
    except BaseException as error:
        processes = list((pool._processes or {}).values())  # `shutdown` clears the attribute
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(
                "the process of a run was killed, perhaps for lack of memory; repeat the command to resume "
                "from the checkpoints, with fewer --jobs to use less memory"
            ) from error
        raise
    pool.shutdown()


def _end_with_parent() -> None:
    """Initializer of a pool process: it exits when its parent exits, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    parent = multiprocessing.parent_process()

    def wait_for_end() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def curves(
    entries: Sequence[Entry], budget: Budget, results: Results, root: Path
) -> dict[str, list[tuple[float, float]]]:
    """Validation loss in bits per byte over tokens: mean over seeds, without diverged runs."""
    found = {}
    for entry in entries:
        rate = best_rate(entry, budget, results)
        if rate is None:
            continue
        points: dict[float, list[float]] = {}
        for key in (RunKey(entry, rate, seed) for seed in budget.all_seeds):
            if results[key]["valid_loss"] is None:
                continue  # a partial curve would distort the mean
            for record in read_metrics(key.folder(root) / "metrics.jsonl"):
                if record["kind"] == "valid":
                    points.setdefault(record["tokens"], []).append(record["bits_per_byte"])
        found[entry.label] = [(tokens, statistics.fmean(losses)) for tokens, losses in sorted(points.items())]
    return found


def tokens_per_second(
    methods: Mapping[Entry, TrainConfig], data: TokenData, threads: int, repeats: int = 7
) -> dict[Entry, float]:
    """Training speed of each method.

    It is the speed of the first method times a ratio of median step times. Each ratio is measured with
    alternating steps, so noise affects both methods alike. Two models at a time are in memory.

    Args:
        methods: The configuration of each method.
        data: The tokens to train on.
        threads: CPU threads.
        repeats: Timed steps per method.
    """

    def trainer(config: TrainConfig) -> DecoderTrainer:
        model = build_model(config, data.info.vocab_size)
        return DecoderTrainer(model, data, config, resolve_device(config.run.device))

    (first, config), *others = methods.items()
    baseline = trainer(config)
    bases, ratios = [], {first: 1.0}
    for entry, other in others or [(first, config)]:
        calls = {"baseline": baseline.train_step, "other": trainer(other).train_step}
        with _with_threads(threads):
            seconds = in_turns(calls, repeats, baseline.device)
        bases.append(seconds["baseline"])
        if entry is not first:
            ratios[entry] = seconds["baseline"] / seconds["other"]
    speed = baseline.tokens_per_step / statistics.median(bases)
    return {entry: speed * ratio for entry, ratio in ratios.items()}
