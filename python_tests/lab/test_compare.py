"""Comparisons: equal budgets, runs that are not done twice, the rule for the rate, honest tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from fusedkv_ext.cli import main as cli
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab import compare, comparison, comparison_plots, recipes
from fusedkv_ext.lab.compare import Budget, RunKey
from fusedkv_ext.lab.entries import Entry, every, parse, parse_all
from fusedkv_ext.lab.figures import save
from fusedkv_ext.lab.pages import experiments as page
from fusedkv_ext.plan import METHODS, CachePlan
from fusedkv_ext.training.config import TrainConfig, load_toml
from fusedkv_ext.training.metrics import MetricsLog, read_metrics

ROOT = Path(__file__).parents[2]
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
    return {key: {"valid_loss": loss, "valid_bits_per_byte": loss} for key, loss in losses.items()}


# --- Entries ---


@pytest.mark.parametrize("entry", every(), ids=lambda entry: entry.label)
def test_labels_are_read_back_and_make_models(entry: Entry) -> None:
    assert parse(entry.label) == entry
    config = entry.config(TrainConfig.from_dict(load_toml(recipes.find("tiny"))))
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
        ("nope", "plan name must be one of vanilla, .*, got 'nope'"),
        ("cla:factors=3", "plan 'cla' has no option 'factors'; its options: factor"),
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
    with pytest.raises(ConfigError, match="labels must be unique, got mine for"):
        parse_all([mine, other])


def test_options_out_of_range_are_found_before_anything_is_trained(small: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="skip must be between 0 and 1"):
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


@pytest.mark.parametrize("experts", [{}, {"model.moe_intermediate_size": 24}], ids=["shared", "own width"])
def test_equal_parameters_with_experts(small: TrainConfig, experts: dict[str, int]) -> None:
    config = small.updated([("model.num_experts", 4), *experts.items()])
    found = compare.configs(parse_all(["vanilla", "fusedkv"]), Budget(config, 1, (1e-3,), "parameters"), 256)
    target, count = (compare.parameters(config, 256) for config in found.values())
    assert 2 * abs(count - target) <= 4 * 3 * config.model.hidden_size * config.model.num_hidden_layers


def test_methods_that_these_sizes_cannot_have_are_found_before_anything_is_trained(
    small: TrainConfig,
) -> None:
    """A tenth of 2 KV heads; a full layer that reads a sliding one."""
    sliding = [
        ("model.layer_types", ["sliding_attention"] * 3 + ["full_attention"]),
        ("model.sliding_window", 4),
    ]
    for label, config in (("skipv1:skip=0.1", small), ("yoco", small.updated(sliding))):
        with pytest.raises(ConfigError, match=f"method {label}: "):
            compare.configs(parse_all(["vanilla", label]), Budget(config, 1, (1e-3,)), 256)


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


def run_all(
    config: TrainConfig,
    root: Path,
    labels: Sequence[str] = ("vanilla", "fusedkv"),
    seeds: int = 2,
    jobs: int = 2,
) -> compare.Results:
    budget, entries = Budget(config, seeds, (1e-3,)), parse_all(labels)
    return {key: result for key, result, _ in compare.run_all(entries, budget, root, jobs=jobs, threads=1)}


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
    with pytest.raises(
        ConfigError, match=r"run.steps must be 4, as in the run of .*, got 5; .* choose another --out"
    ):
        run_all(small.updated([("run.steps", 5)]), tmp_path)


def test_runs_of_other_text_are_not_taken_for_those_of_this(
    small: TrainConfig, text: Path, tmp_path: Path
) -> None:
    """The folder's name is the same, its content has changed."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    config = small.updated([("data.text", [str(folder)])])
    one_run = {"seeds": 1, "labels": ["vanilla"], "jobs": 1}
    assert len(run_all(config, tmp_path / "out", **one_run)) == 1
    (folder / "b.txt").write_text("more\n" * 100, encoding="utf-8")
    with pytest.raises(ConfigError, match="must have a run with the same text, got another one; restore"):
        run_all(config, tmp_path / "out", **one_run)


def test_a_run_that_another_process_trains_is_left_alone(small: TrainConfig, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = RunKey(Entry("vanilla"), 1e-3, 0).folder(tmp_path)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is training this run"):
            run_all(small, tmp_path, seeds=1, labels=["vanilla"], jobs=1)
    assert len(run_all(small, tmp_path, seeds=1, labels=["vanilla"], jobs=1)) == 1


def test_a_file_with_another_plan_than_its_run_is_refused(small: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    budget = Budget(small, 1, (1e-3,))
    for name in ("cla", "cla", "yoco"):
        file.write_text(CachePlan.named(name, 4).to_json())
        runs = compare.run_all([parse(str(file))], budget, tmp_path / "out", jobs=1, threads=1)
        if name == "cla":
            assert [str(key) for key, _, _ in runs] == ["mine lr 0.001 seed 0"]
        else:
            with pytest.raises(
                ConfigError, match=r"mine.json must have the plan of the run in .*, got another plan"
            ):
                list(runs)


def test_seeds_begin_at_run_seed(small: TrainConfig) -> None:
    entry, budget = Entry("vanilla"), Budget(small.updated([("run.seed", 7)]), 2, (1e-3, 2e-3))
    first = [RunKey(entry, 1e-3, 7), RunKey(entry, 1e-3, 8), RunKey(entry, 2e-3, 7)]
    assert compare.plan_runs([entry], budget, {}) == first
    results = finished(budget, dict.fromkeys(first, 2.0) | {first[2]: 1.0})
    assert compare.plan_runs([entry], budget, results) == [RunKey(entry, 2e-3, 8)]


# --- Results ---


def made_up(losses: dict[str, list[float | None]]) -> comparison.Result:
    budget = Budget(TrainConfig.from_dict(load_toml(recipes.find("tiny"))), 3, (1e-3,))
    entries = [parse(label) for label in losses]
    results = finished(
        budget,
        {RunKey(e, 1e-3, seed): loss for e in entries for seed, loss in enumerate(losses[e.label])},
    )
    methods = compare.configs(entries, budget, 256)
    return comparison.summarize(budget, methods, results, dict.fromkeys(entries, 1000.0), {"vocab_size": 256})


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


def test_seeds_that_diverged_leave_the_pairing_of_the_others_alone() -> None:
    result = made_up({"vanilla": [2.0, None, 4.0], "yoco": [2.1, 3.1, 4.1], "cla": [2.2, 3.2, None]})
    vanilla, yoco, cla = result["rows"]
    assert vanilla["losses"] == [2.0, None, 4.0] and vanilla["loss_mean"] == 3.0
    assert yoco["gap_mean"] == pytest.approx(0.1) and yoco["gap_sd"] == pytest.approx(0.0, abs=1e-12)
    assert cla["gap_mean"] == pytest.approx(0.2) and cla["gap_sd"] is None
    (claim,) = comparison.verdicts(result)  # with CLA one pair is left, which decides nothing
    assert claim["claim"] == "vanilla < YOCO" and claim["gap"] == pytest.approx(-0.1)
    assert "3.000 ± 1.414 (1 of 3 diverged)" in comparison.text_table(result)


def test_a_baseline_that_diverged_makes_no_other_method_diverge() -> None:
    result = made_up({"vanilla": [None] * 3, "yoco": [2.0, 3.0, 4.0]})
    lines = comparison.text_table(result).splitlines()
    assert "diverged" not in lines[1] and "diverged" in lines[2]


def test_a_comparison_in_which_all_diverged_has_its_table_and_pictures(tmp_path: Path) -> None:
    result = made_up({"vanilla": [None] * 3, "yoco": [None] * 3})
    assert comparison.text_table(result).count("diverged") == 4  # as the loss and as the rate
    for figure in (comparison_plots.loss_over_cache(result), comparison_plots.loss_over_tokens({})):
        assert save(figure, tmp_path / "picture.png").stat().st_size > 1000


def test_curves_are_means_of_the_runs_that_ended(tmp_path: Path) -> None:
    entry, budget = Entry("vanilla"), Budget(TrainConfig(), 2, (1e-3,))
    results = finished(budget, {RunKey(entry, 1e-3, 0): 2.0, RunKey(entry, 1e-3, 1): None})
    for key, losses in zip(results, ([4.0, 2.0], [8.0]), strict=True):
        log = MetricsLog(key.folder(tmp_path) / "metrics.jsonl")
        for step, loss in enumerate(losses):
            log.write({"kind": "valid", "step": step, "tokens": 10 * step, "bits_per_byte": loss})
        log.close()
    assert compare.curves([entry], budget, results, tmp_path) == {"vanilla": [(0, 4.0), (10, 2.0)]}


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
        (["--methods", "nope"], "got 'nope'"),
        (["--methods", ","], "--methods must name a method, got none"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be >= 1 and --threads >= 0, got 0 and 0"),
        (["--config", "huge"], "--config: huge does not exist; expected a TOML file or one of"),
        (["--rates", "fast"], "--rates must be numbers such as 1e-3,2e-3, got 'fast'"),
        (["--rates", "-1"], "optim.lr must be > 0"),
        (["--rates", "1e-3,1.0000001e-3"], "--rates must differ within six digits"),
        (["--set", "run.steps"], "--set must be KEY=VALUE"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
