"""fusedkv probe: centers of mass, heat maps, resuming, result files; and fusedkv plot on what it wrote."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from tiny import killed_after, options, tiny_run

from fusedkv_ext.cli.main import main
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab import run_figures
from fusedkv_ext.lab.probe import (
    Probe,
    center_of_mass,
    check_plan,
    learned_weights,
    read_probe,
    run_probe,
    stored_rms,
    table,
)
from fusedkv_ext.lab.runs import Spread, Stopped, dumps
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment
from fusedkv_ext.training import run_folder
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.progress import SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer, build_model


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_run(tmp_path, **{"model.plan": "dense-fusion"})


def probe_of(config: TrainConfig, out: Path, seeds: int = 2, should_stop=lambda: False) -> Probe:
    return run_probe(config, seeds, out, SilentProgress(), should_stop)


# Two seeds, two reconstruction layers, three sources.
KNOWN = Probe(
    plan="dense-fusion",
    source_layers=[0, 1, 2],
    reconstruction_layers=[3, 4],
    seeds=[0, 1],
    keys=[[[0.0, 0.0, 1.0], [0.0, -1.0, 1.0]], [[0.0, 0.0, 3.0], [0.0, 0.0, 0.5]]],
    values=[[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]],
    rms={"keys": [[1.0, 1.0, 1.0]] * 2, "values": [[1.0, 3.0, 1.0], [1.0, 1.0, 1.0]]},
    valid_loss=[1.0, 1.0],
    valid_bits_per_byte=[1.5, 1.7],
    conditions={},
    config={},
)


@pytest.mark.parametrize(
    ("weights", "center"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.5),
        ([0.0, 0.0, 0.0, 0.2], 3.0),
        ([3.0, 0.0, 0.0, 1.0], 0.75),
        ([-3.0, 0.0, 0.0, 1.0], 0.75),  # a negative weight counts as much as a positive one
    ],
)
def test_the_center_of_mass_weighs_positions_by_absolute_weight(weights: list[float], center: float) -> None:
    assert center_of_mass(weights, range(4)) == pytest.approx(center)


def test_weights_that_are_all_zero_have_no_center() -> None:
    with pytest.raises(ValueError, match="no center of mass"):
        center_of_mass([0.0, 0.0], [0, 1])


def test_asymmetry_and_shares_of_known_weights() -> None:
    assert KNOWN.centers("keys") == [[2.0, 1.5], [2.0, 2.0]]
    assert KNOWN.center("values") == pytest.approx(Spread(0.125, 0.125 * 2**0.5))
    assert KNOWN.asymmetry() == pytest.approx(Spread(1.75, 0.25 * 2**0.5))
    assert KNOWN.centers("values", scaled=True) == [[0.0, 0.75], [0.0, 0.0]]
    assert KNOWN.asymmetry(scaled=True) == pytest.approx(Spread(1.6875, 0.3125 * 2**0.5))
    assert KNOWN.share("keys", [2]).mean == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    lines = table(KNOWN).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["3", "4", "all", "all,"]
    assert "1.75 ± 0.35" in lines[4] and "Equal weights: 1.00" in table(KNOWN)
    sizes = {side: rows[:1] for side, rows in KNOWN.rms.items()}
    alone = replace(KNOWN, seeds=[0], keys=KNOWN.keys[:1], values=KNOWN.values[:1], rms=sizes)
    assert "±" not in table(replace(alone, valid_bits_per_byte=[1.5]))


def test_only_plans_with_scalars_on_common_sources_can_be_probed() -> None:
    assert check_plan(CachePlan.named("dense-fusion", 7, storage_layers=4)) == ([0, 1, 2, 3], [4, 5, 6])
    assert check_plan(CachePlan.named("fusedkv", 6, granularity="scalar")) == ([0, 2], [3, 4, 5])
    other = Segment((0,), fusion=Fusion("scalar", (1.0,)))
    mixed = CachePlan("mixed", [*CachePlan.named("dense-fusion", 4).layers, LayerPlan(other, other)])
    for plan in (
        CachePlan.named("fusedkv", 6),
        CachePlan.named("vanilla", 4),
        CachePlan.named("yoco", 4),
        mixed,
    ):
        with pytest.raises(ConfigError, match=f"weigh one set of source layers.*'{plan.name}'"):
            check_plan(plan)


def test_latent_attention_is_refused_before_it_is_trained(config: TrainConfig, tmp_path: Path) -> None:
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    latent = config.updated((f"model.{name}", size) for name, size in sizes.items())
    with pytest.raises(
        ConfigError, match="model.kv_lora_rank must be none for the probe, got 16: latent attention"
    ):
        probe_of(latent, tmp_path / "probe")
    assert not (tmp_path / "probe").exists()


def test_weights_are_those_of_the_model_and_start_at_one_over_n(config: TrainConfig) -> None:
    model = build_model(config, 256)
    assert learned_weights(model, [2, 3]) == {side: [[0.5, 0.5]] * 2 for side in ("keys", "values")}
    with torch.no_grad():
        model.model.layers[3].self_attn.kv_fusion.value_1.fill_(-0.25)
    assert learned_weights(model, [2, 3])["values"] == [[0.5, 0.5], [0.5, -0.25]]


def test_sizes_are_those_of_what_the_sources_store(config: TrainConfig) -> None:
    model = build_model(config, 256)
    ids = torch.randint(256, (2, 9))
    sizes = stored_rms(model, ids, [0, 1])
    cache = model.make_cache(2, 9)
    with torch.no_grad():
        model(ids, cache=cache)
    assert sizes["keys"] == pytest.approx([float(cache.keys(j).square().mean().sqrt()) for j in (0, 1)])
    assert sizes["values"] == pytest.approx([float(cache.values(j).square().mean().sqrt()) for j in (0, 1)])
    assert not any(layer._forward_hooks for layer in model.model.layers)


# Pictures


def test_the_heat_map_has_a_row_per_reconstruction_layer_and_a_column_per_source() -> None:
    figure = run_figures.probe_maps(KNOWN)
    for axes, side in zip(figure.axes, ("keys", "values"), strict=False):
        (image,) = axes.images
        mean = torch.tensor(getattr(KNOWN, side)).mean(0)
        assert torch.allclose(torch.tensor(image.get_array().tolist()), mean)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "4"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
        (diamonds,) = axes.lines
        expected = torch.tensor(KNOWN.centers(side)).mean(0).tolist()
        assert list(diamonds.get_xdata()) == pytest.approx(expected)
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim() == (-2.0, 2.0)
    positive = run_figures.probe_maps(
        replace(KNOWN, keys=[[[1.0] * 3] * 2] * 2, values=[[[2.0] * 3] * 2] * 2)
    )
    assert positive.axes[0].images[0].get_clim() == (0.0, 2.0)


def test_diamonds_lie_between_the_columns_of_sources_that_are_no_neighbors() -> None:
    keys, sizes = [[[1.0, 1.0]]], {"keys": [[1.0, 1.0]], "values": [[1.0, 1.0]]}
    layers = {"source_layers": [0, 4], "reconstruction_layers": [5]}
    probe = replace(KNOWN, **layers, seeds=[0], keys=keys, values=keys, rms=sizes)
    assert run_figures.probe_maps(probe).axes[0].lines[0].get_xdata()[0] == pytest.approx(0.5)


# Running


def test_killed_and_run_again_gives_the_same_file(config: TrainConfig, tmp_path: Path) -> None:
    whole = probe_of(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        probe_of(config, tmp_path / "parts", should_stop=killed_after(12))  # within seed 1
    assert run_folder.latest(tmp_path / "parts" / "seed-1" / "checkpoints").name == "step-00000004"
    assert dumps(probe_of(config, tmp_path / "parts").to_dict()) == dumps(whole.to_dict())
    assert whole.keys[0] != whole.keys[1] and whole.keys[0] != [[0.5, 0.5]] * 2


def test_a_finished_probe_is_not_trained_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probe_of(config, tmp_path / "out", seeds=1)
    before = (tmp_path / "out" / "seed-0" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(DecoderTrainer, "train_step", None)
    assert probe_of(config, tmp_path / "out", seeds=1) == first
    assert (tmp_path / "out" / "seed-0" / "metrics.jsonl").read_bytes() == before


def test_killed_before_the_last_validation_it_is_made_up_for(config: TrainConfig, tmp_path: Path) -> None:
    whole = probe_of(config, tmp_path / "out", seeds=1)
    metrics = tmp_path / "out" / "seed-0" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "valid"
    metrics.write_text("".join(lines[:-1]))
    assert probe_of(config, tmp_path / "out", seeds=1) == whole


def test_another_configuration_in_the_same_folder_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    probe_of(config, tmp_path / "out", seeds=1)
    with pytest.raises(ConfigError, match=r"optim.lr must be 0.001, as in the run of .*, got 0.1"):
        probe_of(config.updated([("optim.lr", 0.1)]), tmp_path / "out", seeds=1)
    with pytest.raises(Stopped):
        probe_of(config, tmp_path / "other", should_stop=lambda: True)


# Commands


def test_the_command_writes_file_and_picture_and_plot_draws_it_again(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe"
    assert main(["probe", "--out", str(out), *options(config)]) == 0
    said = capsys.readouterr().out
    assert "center of keys" in said and str(out) in said
    assert main(["probe", "--out", str(out), "--json", *options(config)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "probe.json").read_text())
    for source in (out, out / "probe.json"):
        picture = tmp_path / "again.png"
        assert main(["plot", str(source), "--out", str(picture), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"out": str(picture), "kind": "probe"}
        assert picture.read_bytes() == (out / "probe.png").read_bytes()
    assert main(["plot", str(out / "seed-0"), "--out", str(tmp_path / "loss.png")]) == 0


def test_ctrl_c_ends_it_with_130_and_the_same_command_goes_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = DecoderTrainer.train_step

    def interrupted(self: DecoderTrainer):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(DecoderTrainer, "train_step", interrupted)
    command = ["probe", "--out", str(tmp_path / "probe"), *options(config)]
    assert main(command) == 130
    assert "resumes" in capsys.readouterr().err and not (tmp_path / "probe" / "probe.json").exists()
    monkeypatch.setattr(DecoderTrainer, "train_step", step)
    assert main(command) == 0
    assert "from step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--set", "model.plan=fusedkv"], "the probe needs a plan whose upper layers"),
        (["--set", "model.plan_options.storage_layers=9"], "storage_layers must be at most"),
    ],
)
def test_wrong_settings_are_one_sentence(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["probe", "--out", str(tmp_path / "x"), *options(config), *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_bad_files_are_named_with_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = KNOWN.to_dict()
    assert read_probe(Path("x"), json.loads(dumps(good))) == KNOWN
    short = {**good, "keys": [good["keys"][0], [[0.0, 1.0]]]}
    for content, message in [
        ("{", "is not JSON"),
        ("[]", "must be the probe.json of `fusedkv probe` or the grads.json of `fusedkv grads`"),
        ('{"kind": "train"}', "the grads.json of `fusedkv grads`, got kind 'train'"),
        (
            json.dumps({**good, "values": None}),
            "'values' must be a list, got NoneType; expected the probe.json",
        ),
        (json.dumps({**good, "format": 2}), "must have format 1, got 2; another version wrote it"),
        (json.dumps(short), "'keys' must have 2 rows of 3 weights for each of 2 seeds"),
        (
            json.dumps({**good, "rms": {"keys": [[1.0]]}}),
            "'rms' must have 3 numbers for the keys of each of 2",
        ),
    ]:
        path = tmp_path / "probe.json"
        path.write_text(content)
        assert main(["plot", str(path), "--out", str(tmp_path / "x.png")]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and message in error
    (tmp_path / "empty").mkdir()
    assert main(["plot", str(tmp_path / "empty")]) == 1
    assert "empty must have one of probe.json, grads.json and metrics.jsonl" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "gone.json")]) == 1
    assert "gone.json is not a file; expected" in capsys.readouterr().err
    assert main(["plot", str(path), str(path)]) == 2
    assert "plot it alone" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
