"""Comparisons: equal budgets, runs that are not done twice, the rule for the rate, honest tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from fusedkv_ext import cli
from fusedkv_ext.experiments import compare, comparison, comparison_plots, configs, page
from fusedkv_ext.experiments.compare import Budget, RunKey
from fusedkv_ext.experiments.entries import Entry, every, parse, parse_all
from fusedkv_ext.plan import METHODS, CachePlan
from fusedkv_ext.train.config import ConfigError, TrainConfig, load_toml
from fusedkv_ext.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent
SIZES = {
    "model.num_hidden_layers": 4,
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
    "model.head_dim": 8,
    "data.seq_len": 16,
    "run.steps": 4,
    "run.batch_size": 2,
    "run.valid_every": 2,
    "run.valid_batches": 2,
    "run.save_every": 2,
    "optim.warmup_steps": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} of some text, {i * i % 97}\n" for i in range(400)), encoding="utf-8")
    return path


@pytest.fixture
def small(text: Path, tmp_path: Path) -> TrainConfig:
    more = {"data.text": [str(text)], "data.cache_dir": str(tmp_path / "tokens")}
    return TrainConfig().updated((SIZES | more).items())


def finished(budget: Budget, losses: dict[RunKey, float | None]) -> compare.Results:
    """Results with those losses, of runs that nobody ran."""
    return {
        key: {"valid_loss": loss, "valid_bits_per_byte": loss}
        for key, loss in losses.items()
    }


# --- Entries ---


@pytest.mark.parametrize("entry", every(), ids=lambda entry: entry.label)
def test_labels_are_read_back_and_make_models(entry: Entry) -> None:
    assert parse(entry.label) == entry
    config = entry.config(TrainConfig.from_dict(load_toml(configs.find("tiny"))))
    assert config.model.plan == entry.method and config.model.plan_options == dict(entry.options)
    assert comparison.cache_bytes_per_token(config) > 0


def test_all_is_every_method_with_its_variants_once() -> None:
    entries = parse_all(["vanilla", "all", "cla:factor=3"])
    assert entries[0] == Entry("vanilla") and len(entries) == len(set(entries))
    assert {entry.method for entry in entries} == set(METHODS)
    assert len(entries) == sum(1 + len(method.variants) for method in METHODS.values())
    assert len({entry.folder for entry in entries}) == len(entries)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("nope", "unknown method 'nope'; known: vanilla"),
        ("cla:factors=3", "method 'cla' has no option 'factors'; its options: factor"),
        ("cla:factor", r"expected option=value after ':', as in cla:factor=3, got 'factor'"),
        ("vanilla:n=1", "its options: none"),
    ],
)
def test_labels_that_mean_nothing(label: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(label)


def test_files_are_methods_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mine, other = str(tmp_path / "mine.json"), str(tmp_path / "a" / "mine.json")
    (entry,) = parse_all([mine, "", mine])
    assert (entry.label, entry.folder, entry.paper, entry.options) == ("mine", "mine", mine, ())
    with pytest.raises(ConfigError, match="are both called mine"):
        parse_all([mine, other])


def test_options_out_of_range_are_found_before_anything_is_trained(small: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="skip must be a share between 0 and 1"):
        parse("skipv1:skip=2").config(small)


def test_options_without_a_method_are_refused(small: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="give options with the method, as in cla:factor=3"):
        Entry("cla").config(small.updated([("model.plan_options.factor", 3)]))


# --- Budgets ---


def test_equal_parameters_are_equal_to_a_channel_of_the_ffn(small: TrainConfig) -> None:
    entries = parse_all(["all"])
    for equal in ("width", "parameters"):
        found = compare.configs(entries, Budget(small, 1, (1e-3,), equal), 256)
        counts = [compare.parameters(config, 256) for config in found.values()]
        per_channel = 3 * small.model.hidden_size * small.model.num_hidden_layers
        spread = max(abs(count - counts[0]) for count in counts)
        assert spread > per_channel if equal == "width" else 2 * spread <= per_channel


def test_the_rate_is_the_first_seeds_best_and_the_other_seeds_follow_it() -> None:
    a, b = Entry("vanilla"), Entry("yoco")
    budget = Budget(TrainConfig(), 3, (1e-3, 2e-3))
    first = compare.plan_runs([a, b], budget, {})
    assert first == [RunKey(e, 1e-3, s) for s in range(3) for e in (a, b)] + [
        RunKey(a, 2e-3, 0),
        RunKey(b, 2e-3, 0),
    ]
    losses = dict.fromkeys(first, 2.0) | {RunKey(a, 2e-3, 0): 1.5, RunKey(b, 2e-3, 0): None}
    results = finished(budget, losses)
    assert compare.best_rate(a, budget, results) == 2e-3
    assert compare.best_rate(b, budget, results) == 1e-3  # the other one diverged
    assert compare.plan_runs([a, b], budget, results) == [RunKey(a, 2e-3, 1), RunKey(a, 2e-3, 2)]
    del results[RunKey(b, 2e-3, 0)]
    assert compare.best_rate(b, budget, results) is None  # not known yet


# --- Runs ---


def run_all(config: TrainConfig, root: Path, **changes: object) -> compare.Results:
    budget = Budget(config, **({"seeds": 2, "rates": (1e-3,)} | changes))
    entries = parse_all(["vanilla", "fusedkv"])
    return {key: result for key, result, _ in compare.run_all(entries, budget, root, jobs=2, threads=1)}


def test_runs_are_equal_in_all_but_the_method_and_are_not_done_twice(
    small: TrainConfig, tmp_path: Path
) -> None:
    results = run_all(small, tmp_path)
    assert len(results) == 4
    files = [key.folder(tmp_path) / "metrics.jsonl" for key in results]
    kinds = [[record["kind"] for record in read_metrics(file)] for file in files]
    assert all(kind == kinds[0] and {"run", "train", "valid"} <= set(kind) for kind in kinds)
    settings = []
    for key, result in results.items():
        config = TrainConfig.from_dict(result["config"])
        settings.append(config.updated([("model.plan", "x"), ("run.seed", 0)]))
        assert config.run.seed == key.seed and config.model.plan == key.entry.method
    assert all(config == settings[0] for config in settings)

    before = [file.stat().st_mtime_ns for file in files]
    assert run_all(small, tmp_path) == results
    assert [file.stat().st_mtime_ns for file in files] == before
    with pytest.raises(ConfigError, match=r"run.steps = 4, now it is 5; .* choose another --out"):
        run_all(small.updated([("run.steps", 5)]), tmp_path)


def test_a_comparison_that_was_killed_ends_as_if_it_had_not_been(text: Path, tmp_path: Path) -> None:
    """SIGKILL while runs with checkpoints are going on: the losses are those of an undisturbed comparison."""
    sizes = SIZES | {"run.steps": 60, "run.save_every": 10, "run.valid_every": 60}
    values = [f"{key}={value}" for key, value in sizes.items()] + [f"data.cache_dir={tmp_path / 'tokens'}"]
    command = [sys.executable, "-m", "fusedkv_ext.cli", "compare", "--methods", "vanilla,yoco", "--json"]
    command += ["--seeds", "1", "--text", str(text), "--threads", "1"]
    command += [part for value in values for part in ("--set", value)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        [*command, "--out", str(tmp_path / "a")], env=env, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not list((tmp_path / "a").glob("runs/*/*/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "a" / "comparison.json").exists()
    ended = {}
    for out in ("a", "b"):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / out)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ended[out] = {row["label"]: row["losses"] for row in json.loads(done.stdout)["rows"]}
    assert ended["a"] == ended["b"] and all(ended["a"].values())
    assert (tmp_path / "a" / "loss_over_cache.png").stat().st_size > 10_000


def test_a_file_with_another_plan_than_its_run_is_refused(small: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    budget = Budget(small, 1, (1e-3,))
    for name in ("cla", "cla", "yoco"):
        file.write_text(CachePlan.named(name, 4).to_json())
        runs = compare.run_all([parse(str(file))], budget, tmp_path / "out", jobs=1, threads=1)
        if name == "cla":
            assert [str(key) for key, _, _ in runs] == ["mine lr 0.001 seed 0"]
        else:
            with pytest.raises(ConfigError, match=r"another plan than .*mine.json has now"):
                list(runs)


def test_seeds_begin_at_run_seed(small: TrainConfig) -> None:
    entry, budget = Entry("vanilla"), Budget(small.updated([("run.seed", 7)]), 2, (1e-3, 2e-3))
    first = [RunKey(entry, 1e-3, 7), RunKey(entry, 1e-3, 8), RunKey(entry, 2e-3, 7)]
    assert compare.plan_runs([entry], budget, {}) == first
    results = finished(budget, dict.fromkeys(first, 2.0) | {first[2]: 1.0})
    assert compare.plan_runs([entry], budget, results) == [RunKey(entry, 2e-3, 8)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_process(number: int, text: Path, tmp_path: Path) -> None:
    values = [f"{key}={value}" for key, value in (SIZES | {"run.steps": 10**5}).items()]
    command = [sys.executable, "-m", "fusedkv_ext.cli", "compare", "--methods", "vanilla", "--seeds", "1"]
    command += ["--text", str(text), "--threads", "1", "--out", str(tmp_path / "out")]
    command += ["--set", f"data.cache_dir={tmp_path}"] + [part for v in values for part in ("--set", v)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    going = subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "out").glob("runs/*/*/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.01)
    try:
        going.send_signal(number)
        assert "goes on" in going.communicate(timeout=30)[1]  # ends when every process has closed the pipe
        assert going.returncode == 130
    finally:
        if going.poll() is None:
            os.killpg(going.pid, signal.SIGKILL)


# --- Results ---


def made_up(losses: dict[str, list[float | None]]) -> comparison.Result:
    budget = Budget(TrainConfig.from_dict(load_toml(configs.find("tiny"))), 3, (1e-3,))
    entries = [parse(label) for label in losses]
    results = finished(
        budget,
        {RunKey(e, 1e-3, seed): loss for e in entries for seed, loss in enumerate(losses[e.label])},
    )  # fmt: skip
    methods = compare.configs(entries, budget, 256)
    return comparison.summarise(budget, methods, results, dict.fromkeys(entries, 1000.0), {"vocab_size": 256})


def test_gaps_are_paired_by_seed_and_spread_is_the_sample_deviation() -> None:
    result = made_up({"vanilla": [2.0, 3.0, 4.0], "yoco": [2.1, 3.1, 4.1], "gqa": [None, None, None]})
    vanilla, yoco, gqa = result["rows"]
    assert (vanilla["loss_mean"], vanilla["loss_sd"]) == (3.0, 1.0)
    assert yoco["gap_mean"] == pytest.approx(0.1) and yoco["gap_sd"] == pytest.approx(0.0, abs=1e-12)
    assert gqa["loss_mean"] is None and gqa["kv_heads"] == 2
    assert (vanilla["cache_bytes_per_token"], yoco["cache_bytes_per_token"]) == (2048, 1024)
    assert [row["label"] for row in comparison.ordered(result)] == ["vanilla", "yoco", "gqa"]
    text = comparison.text_table(result)
    assert "3.100 ± 1.000" in text and "+0.100 ± 0.000" in text and "diverged" in text


def test_verdicts_say_not_decided_when_seeds_disagree() -> None:
    sure = {
        "vanilla": [2.0, 2.1, 2.2],
        "yoco": [2.1, 2.2, 2.31],
        "cla": [1.9, 2.0, 2.09],
        "gqa": [2.5, 1.9, 2.1],
    }
    found = {row["claim"]: row["holds"] for row in comparison.verdicts(made_up(sure))}
    assert found == {
        "vanilla < YOCO": "yes",
        "vanilla < CLA": "no",
        "vanilla < GQA at half the cache": "not decided",
    }


def test_claims_name_methods_of_the_registry() -> None:
    assert {name for _, *names in comparison.CLAIMS for name in names} <= set(METHODS)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    rows = [
        {"label": name, "cache_bytes_per_token": size, "loss_mean": loss}
        for name, size, loss in [("a", 4, 1.0), ("b", 2, 2.0), ("c", 2, 1.5), ("d", 4, 1.2), ("e", 1, None)]
    ]
    assert comparison_plots.pareto(rows) == ["c", "a"]


def test_names_in_pictures_keep_their_distance_and_stay_near() -> None:
    heights = [0.0, 5.0, 5.1, 5.2, 5.3, 9.0]
    found = comparison_plots._apart(heights, 1.0)
    assert all(high - low >= 1.0 - 1e-9 for low, high in pairwise(found))
    assert found[0] == 0.0 and found[-1] == 9.0  # these have room
    assert sum(found[1:5]) == pytest.approx(sum(heights[1:5]))  # moved up as much as down


@pytest.mark.parametrize("name", page.DOCUMENTS)
def test_documents_are_what_the_results_give(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert page.made(text, ROOT / page.RESULTS) == text, "make docs"


# --- The command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nope"], "unknown method 'nope'"),
        (["--methods", ","], "--methods names no method"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be >= 1 and --threads >= 0, got 0 and 0"),
        (["--config", "huge"], "--config: huge does not exist; expected a TOML file or one of"),
        (["--rates", "fast"], "--rates must be numbers such as 1e-3,2e-3, got 'fast'"),
        (["--rates", "-1"], "optim.lr must be > 0"),
        (["--set", "run.steps"], "--set takes KEY=VALUE"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
