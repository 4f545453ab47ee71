"""fusedkv grads and the trainer's observer: norms by hand, no bit of training changed, resuming, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from tiny import killed_after, options, tiny_run

from fusedkv_ext.checkpoint import dcp
from fusedkv_ext.cli.main import main
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab import run_figures
from fusedkv_ext.lab.entries import parse_all
from fusedkv_ext.lab.gradients import (
    PROJECTIONS,
    Gradients,
    every_steps,
    read_gradients,
    run_gradients,
    table,
)
from fusedkv_ext.lab.runs import Spread, dumps
from fusedkv_ext.training import loop, run_folder
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.data.tokenizer import ByteTokenizer
from fusedkv_ext.training.data.tokens import training_batch
from fusedkv_ext.training.metrics import read_metrics
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer, build_model


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_run(tmp_path)


def trainer_of(config: TrainConfig) -> DecoderTrainer:
    data = loop.load_data(config, ByteTokenizer())
    return DecoderTrainer(build_model(config, 256), data, config, torch.device("cpu"))


def gradients_of(config: TrainConfig, out: Path, every: int = 2, should_stop=lambda: False) -> Gradients:
    entries = parse_all(["vanilla", "fusedkv"])
    return run_gradients(config, entries, 2, every, out, SilentProgress(), should_stop)


# Two layers, the upper one of plan b without keys and values; two seeds; steps 2 and 4.
_A, _B = [[2.0, 1.0], [1.0, 1.0]], [[4.0, 3.0], [3.0, 1.0]]
_HOLES = [[4.0, None], [3.0, None]]
KNOWN = Gradients(
    plans=["a", "b"],
    seeds=[0, 1],
    steps=[2, 4],
    span=[2, 4],
    shallow_layers=[0],
    series=[dict.fromkeys(PROJECTIONS, _A), {"q_proj": _B, "k_proj": _HOLES, "v_proj": _HOLES}],
    means=[dict.fromkeys(PROJECTIONS, _A), {"q_proj": _B, "k_proj": _HOLES, "v_proj": _HOLES}],
    valid_bits_per_byte=[[2.0, 2.0], [1.9, 1.9]],
    conditions={},
    config={"model": {"num_hidden_layers": 2}},
)


# The observer


@pytest.mark.parametrize("change", [{}, {"run.accumulate": 2}, {"optim.grad_clip": 1e-3}])
def test_norms_are_those_of_autograd_before_clipping(config: TrainConfig, change: dict[str, object]) -> None:
    config = config.updated(change.items())
    trainer = trainer_of(config)
    model, run = build_model(config, 256), config.run
    ids = training_batch(trainer.data.train, run.seed, 0, run.batch_size, config.data.seq_len)
    loss = model(ids, labels=ids)[1]
    trainer.observe = every_steps(1)
    record = trainer.train_step().observed
    assert record.keys() == {"kind", *PROJECTIONS} and record["kind"] == "grads"
    storing = len(model.plan.storage_layers)
    assert 0 < storing < len(model.model.layers)
    for name in PROJECTIONS:
        own = [layer.self_attn for layer in model.model.layers[: None if name == "q_proj" else storing]]
        weights = [getattr(attention, name).weight for attention in own]
        by_hand = [
            float(g.square().sum().sqrt()) for g in torch.autograd.grad(loss, weights, retain_graph=True)
        ]
        assert record[name][: len(own)] == pytest.approx(by_hand, rel=1e-4)
        assert record[name][len(own) :] == [None] * (len(model.model.layers) - len(own))


def test_an_observer_changes_no_bit_of_training_and_no_checkpoint(
    config: TrainConfig, tmp_path: Path
) -> None:
    runs = [loop.start(config, tmp_path / name) for name in ("plain", "observed")]
    runs[1].trainer.observe = every_steps(1)
    results = [loop.run(run, SilentProgress()) for run in runs]
    states = []
    for result in results:
        folder = Path(result.checkpoint)
        facts = run_folder.read_trainer(folder)
        del facts["seconds"]
        entries = dcp.stored(folder / "state")
        tensors = {name: torch.empty(entry.size) for name, entry in entries.items()}
        dcp.read(folder / "state", tensors)
        states.append((tensors, facts))
    (tensors, facts), (observed_tensors, observed_facts) = states
    assert facts == observed_facts and tensors.keys() == observed_tensors.keys()
    assert "optimizer.model.norm.weight.exp_avg" in tensors
    assert all(torch.equal(tensors[name], observed_tensors[name]) for name in tensors)
    kinds = [{record["kind"] for record in read_metrics(run.folder / "metrics.jsonl")} for run in runs]
    assert kinds == [{"run", "train", "valid"}, {"run", "train", "valid", "grads"}]


def test_without_an_observer_nothing_is_observed(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    assert trainer.train_step().observed is None
    trainer.observe = every_steps(3)
    assert [trainer.train_step().observed is None for _ in range(3)] == [True, False, True]  # steps 2, 3, 4


# Running


def test_killed_and_run_again_gives_the_same_file(config: TrainConfig, tmp_path: Path) -> None:
    whole = gradients_of(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        gradients_of(config, tmp_path / "parts", should_stop=killed_after(20))  # in the second plan
    assert (tmp_path / "parts" / "fusedkv" / "seed-0").exists()
    assert dumps(gradients_of(config, tmp_path / "parts").to_dict()) == dumps(whole.to_dict())
    assert whole.steps == [2, 4, 6] and whole.span == [4, 6]  # the warm-up has two steps
    assert whole.shallow_layers == [0, 1]


def test_plans_see_the_same_windows_and_means_are_those_of_the_records(
    config: TrainConfig, tmp_path: Path
) -> None:
    found = gradients_of(config, tmp_path / "out", every=1)
    records = [
        r
        for r in read_metrics(tmp_path / "out" / "fusedkv" / "seed-1" / "metrics.jsonl")
        if r["kind"] == "grads"
    ]
    late = [r["k_proj"][1] for r in records if r["step"] > config.optim.warmup_steps]
    assert found.means[1]["k_proj"][1][1] == pytest.approx(sum(late) / len(late), rel=1e-5)
    assert found.means[1]["k_proj"][0][2:] == [None, None] and None not in found.means[0]["k_proj"][0]
    configs = [
        read_metrics(tmp_path / "out" / plan / "seed-1" / "metrics.jsonl")[0]["config"]
        for plan in ("vanilla", "fusedkv")
    ]
    assert configs[0]["model"].pop("plan") == "vanilla" and configs[1]["model"].pop("plan") == "fusedkv"
    assert configs[0] == configs[1]


def test_ratios_by_hand() -> None:
    assert KNOWN.ratios(1, "q_proj") == [Spread.of([2.0, 3.0]), Spread.of([3.0, 1.0])]
    assert KNOWN.ratios(1, "v_proj") == [Spread.of([2.0, 3.0]), None]
    assert KNOWN.shallow_ratio(1, "k_proj") == Spread.of([2.0, 3.0])
    both = replace(KNOWN, shallow_layers=[0, 1])
    assert both.shallow_ratio(1, "q_proj") == Spread.of([2.5, 2.0])
    assert both.shallow_ratio(1, "k_proj") == Spread.of([2.0, 3.0])  # of the layers that have one
    lines = table(KNOWN).splitlines()
    assert lines[0].split() == ["b", "/", "a", *PROJECTIONS]
    assert lines[3].split() == ["layer", "1", "2.00", "±", "1.41", "-", "-"]


def test_another_interval_in_the_same_folder_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    gradients_of(config, tmp_path / "out")
    wanted = r"must have gradients of steps \[3, 6\]\.\.\., got \[2, 4, 6\]\.\.\.; give the same --every"
    with pytest.raises(ConfigError, match=wanted):
        gradients_of(config, tmp_path / "out", every=3)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(4, r"gradients of steps \[2, 4, 6\]\.\.\., got \[6\]\.\.\.;"), (6, "gradients of 3 steps, got 0")],
)
def test_a_run_without_all_its_records_is_refused(
    config: TrainConfig, tmp_path: Path, steps: int, message: str
) -> None:
    folder = tmp_path / "out" / "vanilla" / "seed-0"
    plain = loop.start(config.updated([("model.plan", "vanilla")]), folder)
    loop.run(plain, SilentProgress(), stop_after=steps)
    with pytest.raises(ValueError, match=message):
        gradients_of(config, tmp_path / "out")


def test_recording_nothing_after_the_warm_up_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a step after the warm-up must be recorded, got run.steps 6, --every 7"
    ):
        gradients_of(config, tmp_path / "out", every=7)
    assert not (tmp_path / "out").exists()


# Pictures, files, commands


def test_the_picture_has_a_column_per_projection_and_lines_where_there_are_norms() -> None:
    axes = run_figures.gradient_norms(KNOWN).axes
    assert [panel.get_title(loc="left") for panel in axes[:3]] == list(PROJECTIONS)
    above = [container.lines[0] for container in axes[1].containers]  # of k_proj
    assert [line.get_xdata().tolist() for line in above] == [[0, 1], [0]]
    assert above[1].get_ydata().tolist() == [3.5]
    thick = axes[4].lines[-1]
    assert thick.get_xdata().tolist() == [2, 4] and thick.get_ydata().tolist() == [4.0, 3.0]


def test_the_command_writes_file_and_picture_and_plot_draws_it_again(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grads"
    command = ["grads", "--out", str(out), "--every", "2", *options(config)]
    assert main([*command, "--methods", "vanilla, fusedkv,yoco"]) == 0
    said = capsys.readouterr().out
    assert "fusedkv / vanilla" in said and "yoco / vanilla" in said and "mean of layers 0..1" in said
    result = json.loads((out / "grads.json").read_text())
    assert result["ratio_of_shallow_layers"].keys() == {"fusedkv", "yoco"} and result["seeds"] == [0]
    assert main(["plot", str(out), "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (out / "grads.png").read_bytes()
    assert (
        main(
            ["plot", str(out / "vanilla/seed-0"), str(out / "yoco/seed-0"), "--out", str(tmp_path / "l.png")]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--every", "0"], "--every must be at least 1, got 0"),
        (["--methods", "vanilla"], "--methods needs at least two, got vanilla"),
        (["--methods", "yoco,yoco"], "--methods needs at least two, got yoco"),
        (["--methods", "vanilla,fuzedkv"], "got 'fuzedkv'"),
    ],
)
def test_wrong_settings_are_one_sentence(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["grads", "--out", str(tmp_path / "x"), *options(config), *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_bad_files_are_named_with_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads(dumps(KNOWN.to_dict()))
    path = tmp_path / "result.json"
    assert read_gradients(path, good) == KNOWN
    for change, message in [
        (
            {"series": 3},
            "'series' must be a list, got int; expected the grads.json that `fusedkv grads` wrote",
        ),
        (
            {"series": good["series"][:1]},
            "'series' must have 2 rows of 2 norms for each projection of the 2 plans",
        ),
        ({"means": [{"q_proj": [[1.0]]}] * 2}, "'means' must have 2 rows of 2 norms"),
        ({"config": {}}, "'config' must have model.num_hidden_layers"),
        ({"shallow_layers": [2]}, "'shallow_layers' must be layers below 2, got [2]"),
        ({"kind": "probe"}, "expected the probe.json"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        assert main(["plot", str(path), "--out", str(tmp_path / "x.png")]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and message in error
