"""Training: configuration, schedule, resuming bit for bit, checkpoints under kill -9, metrics, divergence."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.errors import ConfigError, TrainingDiverged
from fusedkv_ext.training import loop, run_folder
from fusedkv_ext.training.config import OptimSection, TrainConfig, known_keys, load_toml
from fusedkv_ext.training.data import tokens as data_module
from fusedkv_ext.training.data.tokenizer import ByteTokenizer
from fusedkv_ext.training.data.tokens import TokenData
from fusedkv_ext.training.metrics import MetricsLog, bits_per_byte, read_metrics, series
from fusedkv_ext.training.progress import PlainProgress, SilentProgress
from fusedkv_ext.training.trainer import DecoderTrainer, build_model, learning_rate

SMALL = {
    "model.num_hidden_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 2,
    "model.head_dim": 16,
    "data.seq_len": 32,
    "run.batch_size": 8,
    "run.steps": 8,
    "run.log_every": 1,
    "run.valid_every": 4,
    "run.valid_batches": 2,
    "run.save_every": 4,
    "run.device": "cpu",
    "optim.warmup_steps": 2,
}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Models this small only lose by more."""
    with_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(8):
        (text / f"{i}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog {i}\n" * 40)
    paths = {"data.text": [str(text)], "data.cache_dir": str(tmp_path / "cache")}
    return TrainConfig().updated({**SMALL, **paths}.items())


def tokens_of(config: TrainConfig) -> TokenData:
    return loop.load_data(config, ByteTokenizer())


def trainer_of(config: TrainConfig, model: nn.Module | None = None) -> DecoderTrainer:
    data = tokens_of(config)
    return DecoderTrainer(model or build_model(config, 256), data, config, torch.device("cpu"))


def weights_of(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    return load_pretrained(checkpoint).state_dict()


def run_in(folder: Path, config: TrainConfig, **options: int) -> loop.RunResult:
    return loop.run(loop.start(config, folder), SilentProgress(), **options)


# Resuming


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"run.precision": "bf16"},
        {"run.accumulate": 2, "model.plan": "yoco"},
        {"model.num_experts": 4, "model.router_aux_loss_coef": 0.1, "run.precision": "bf16"},
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    config: TrainConfig, tmp_path: Path, change: dict[str, object]
) -> None:
    config = config.updated(change.items())
    whole = run_in(tmp_path / "whole", config)
    first = run_in(tmp_path / "parts", config, stop_after=3)
    assert not first.finished and first.steps == 3
    resumed, warnings = loop.resume(tmp_path / "parts")
    second = loop.run(resumed, SilentProgress())
    assert warnings == [] and second.finished
    expected, got = weights_of(whole.checkpoint), weights_of(second.checkpoint)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    assert second.valid_loss == whole.valid_loss
    losses = [
        series(read_metrics(tmp_path / run / "metrics.jsonl"), "train", "loss") for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_records_after_the_checkpoint_are_not_written_twice(config: TrainConfig, tmp_path: Path) -> None:
    this = loop.start(config, tmp_path / "run")
    asked = iter([False] * 6)

    def killed() -> bool:
        if next(asked, None) is None:
            raise KeyboardInterrupt  # after step 6; the last checkpoint is of step 4
        return False

    with pytest.raises(KeyboardInterrupt):
        loop.run(this, SilentProgress(), should_stop=killed)
    resumed, _ = loop.resume(tmp_path / "run")
    assert resumed.trainer.step == 4
    loop.run(resumed, SilentProgress())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in records if r["kind"] == "valid"] == [4, 8]


def test_a_run_is_not_overwritten_and_not_resumed_as_another(config: TrainConfig, tmp_path: Path) -> None:
    run_in(tmp_path / "run", config, stop_after=1)
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        loop.start(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot change its model"):
        loop.resume(tmp_path / "run", lambda c: c.updated([("model.hidden_size", 64)]))
    Path(config.data.text[0], "0.txt").write_text("something else " * 100)
    with pytest.raises(ConfigError, match="a resumed run must have the same training text"):
        loop.resume(tmp_path / "run")


def test_resuming_with_another_configuration_warns(config: TrainConfig, tmp_path: Path) -> None:
    run_in(tmp_path / "run", config, stop_after=1)
    resumed, warnings = loop.resume(tmp_path / "run", lambda c: c.updated([("optim.lr", 1e-4)]))
    assert resumed.trainer.config.optim.lr == 1e-4
    assert any("the configuration changed" in warning for warning in warnings)
    _, warnings = loop.resume(tmp_path / "run", lambda c: c.updated([("run.log_every", 3)]))
    assert warnings == []


# Checkpoints

_WRITER = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from fusedkv_ext.checkpoint import dcp
    from fusedkv_ext.training import run_folder
    from fusedkv_ext.training.saver import Saver

    root = Path(sys.argv[1])
    tensors = {name: torch.zeros(100_000) for name in ("model.weight", "optimizer.weight.exp_avg")}

    def save(step):
        for tensor in tensors.values():
            tensor.fill_(step)
        saver = Saver(root, keep=1)
        saver.save(step, tensors, lambda folder: run_folder.write_trainer(folder, {"step": step}))
        for tensor in tensors.values():
            tensor.fill_(-1.0)  # what is written is a copy
        saver.wait()

    started = time.perf_counter()
    save(1)
    save(2)
    one_save = (time.perf_counter() - started) / 2  # so that kills fall into the first saves
    random.seed(0)
    before, grown, torn, trial = 2, 0, 0, 0
    while trial < 30 or (min(grown, torn) < 5 and trial < 150):  # more where the machine has become slower
        trial += 1
        child = os.fork()
        if child == 0:
            for step in range(before + 1, before + 1000):
                save(step)
        time.sleep(random.uniform(0, (3 + trial / 10) * one_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += any(path.name.startswith(".") for path in root.iterdir())
        newest = run_folder.latest(root)
        state = run_folder.read_trainer(newest)
        loaded = {name: torch.empty(100_000) for name in tensors}
        dcp.read(newest / "state", loaded)
        assert all((tensor == state["step"]).all() for tensor in loaded.values()), "weights and state differ"
        assert state["step"] >= before, "went back in time"
        grown += state["step"] > before
        before = state["step"]
        run_folder.clean(root)
    print(trial, grown, torn)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_last_checkpoint_loads(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WRITER), str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kills, grown, torn = map(int, done.stdout.split())
    assert grown >= 5 and torn >= 5, (
        f"of {kills} kills {grown} came after a save and {torn} during one: proves little"
    )


def test_only_the_newest_checkpoints_are_kept_and_leftovers_deleted(
    config: TrainConfig, tmp_path: Path
) -> None:
    root = tmp_path / "run" / "checkpoints"
    (root / ".partial-1").mkdir(parents=True)
    (root / ".trash-step-00000001").mkdir()
    run_in(tmp_path / "run", config.updated([("run.save_every", 1), ("run.keep", 3)]))
    assert [step for step, _ in run_folder.checkpoints(root)] == [6, 7, 8]
    loop.resume(tmp_path / "run")
    assert all(path.name.startswith("step-") for path in root.iterdir())


def test_damaged_training_state_is_named(config: TrainConfig, tmp_path: Path) -> None:
    result = run_in(tmp_path / "run", config, stop_after=1)
    state = Path(result.checkpoint) / "trainer.json"
    os.truncate(state, state.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"trainer\.json is damaged"):
        loop.resume(tmp_path / "run")
    state.unlink()
    with pytest.raises(ValueError, match="must have a trainer.json to resume training"):
        loop.resume(tmp_path / "run")
    assert run_folder.resolve(tmp_path / "run") == Path(result.checkpoint)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        run_folder.resolve(tmp_path)


# The step


def test_loss_falls_on_text_that_repeats(config: TrainConfig, tmp_path: Path) -> None:
    result = run_in(tmp_path / "run", config.updated([("run.steps", 60), ("optim.lr", 5e-3)]))
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]["loss"]
    assert first > 5.0 and result.valid_loss < 2.5
    assert result.valid_bits_per_byte == pytest.approx(result.valid_loss / math.log(2))


def test_accumulation_gives_the_gradient_of_the_whole_batch(config: TrainConfig) -> None:
    norms = [trainer_of(config.updated([("run.accumulate", parts)])).train_step() for parts in (1, 2, 8)]
    for result in norms[1:]:
        assert result.loss == pytest.approx(norms[0].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norms[0].grad_norm, rel=1e-4)


def test_clipping_bounds_the_gradient(config: TrainConfig) -> None:
    trainer = trainer_of(config.updated([("optim.grad_clip", 1e-3)]))
    assert trainer.train_step().grad_norm > 1e-2
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_fusion_weights_learn_and_are_not_decayed(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    fused = [parameter for name, parameter in trainer.model.named_parameters() if "kv_fusion" in name]
    before = [parameter.detach().clone() for parameter in fused]
    decay = {
        id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
    }
    trainer.train_step()
    assert fused and all(decay[id(parameter)] == 0 for parameter in fused)
    assert all(not torch.equal(a, b) for a, b in zip(before, fused, strict=True))


class Exploding(nn.Module):
    """A module whose loss is finite for two steps, then not."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.calls, self.bad = 0, bad

    def loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = self.weight.square().sum()
        return loss * self.bad if self.calls > 2 else loss


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(config: TrainConfig, bad: float) -> None:
    model = Exploding(bad)
    trainer = trainer_of(config, model)
    trainer.train_step()
    trainer.train_step()
    before = model.weight.detach().clone()
    with pytest.raises(TrainingDiverged, match=r"diverged at step 3: loss (nan|inf).*lower optim\.lr"):
        trainer.train_step()
    assert torch.equal(model.weight, before) and trainer.step == 2


def test_validation_leaves_no_trace(config: TrainConfig) -> None:
    plain, watched = trainer_of(config), trainer_of(config)
    for _ in range(3):
        plain.train_step()
        watched.train_step()
        assert watched.evaluate() == watched.evaluate()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rate_warms_up_then_follows_a_cosine_down() -> None:
    optim = OptimSection(lr=1.0, final_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, optim, 110) for step in range(120)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[109] == rates[119] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    middle = (rates[59] + rates[60]) / 2
    assert middle == pytest.approx(0.55, abs=1e-3)


def test_layer_types_repeat_over_the_layers_and_experts_are_made() -> None:
    changes = [
        ("model.num_hidden_layers", "5"),
        ("model.plan", "vanilla"),
        ("model.sliding_window", "16"),
        ("model.layer_types", "sliding_attention, full_attention"),
        ("model.num_experts", "8"),
        ("model.mlp_only_layers", "0, 3"),
    ]
    config = TrainConfig().updated(changes, as_text=True)
    made = build_model(config, 256).config
    assert made.layer_types == ("sliding_attention", "full_attention") * 2 + ("sliding_attention",)
    assert [made.has_experts(i) for i in range(5)] == [False, True, True, False, True]
    assert made.moe_intermediate_size == made.intermediate_size // 2
    default = build_model(config.updated([("model.layer_types", [])]), 256).config
    assert default.layer_types == ("sliding_attention",) * 5
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 9}, "model.layer_types has 9 entries for 8 layers"),
        ({"layer_types": ["sliding_attention"]}, "model: sliding_window must be given"),
        (
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
            "model: layer_types: layer 4 has full attention but reads the cache of layer 3",
        ),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "model: num_experts_per_tok must be"),
    ],
)
def test_models_that_cannot_be_are_errors_of_the_configuration(change: dict, message: str) -> None:
    config = TrainConfig().updated((f"model.{name}", value) for name, value in change.items())
    with pytest.raises(ConfigError, match=message):
        build_model(config, 256)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone(config: TrainConfig) -> None:
    state = torch.random.get_rng_state()
    a, b = build_model(config, 256), build_model(config, 256)
    c = build_model(config.updated([("run.seed", 1)]), 256)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


# Configuration


def test_values_are_read_as_the_type_of_their_key() -> None:
    config = TrainConfig().updated(
        [
            ("run.steps", "12"),
            ("optim.lr", "1e-3"),
            ("model.qk_norm", "false"),
            ("data.text", "a, b"),
            ("model.sliding_window", "64"),
            ("model.plan_options.storage_layers", "3"),
        ],
        as_text=True,
    )
    assert (config.run.steps, config.optim.lr, config.model.qk_norm) == (12, 1e-3, False)
    assert config.data.text == ["a", "b"] and config.model.sliding_window == 64
    assert config.model.plan_options == {"storage_layers": 3}
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.step", "3", "did you mean run.steps"),
        ("optim.learning_rate", "3", "unknown configuration key 'optim.learning_rate'"),
        ("optim.betal", "0.9", "did you mean optim.beta2 or optim.beta1"),
        ("lr", "3", "did you mean optim.lr"),
        ("run.steps.x", "3", "unknown configuration key"),
        ("run.steps", "ten", "run.steps must be an integer, got 'ten'"),
        ("run.steps", "1.5", "run.steps must be an integer"),
        ("run.steps", "0", "run.steps must be >= 1, got 0"),
        ("model.qk_norm", "maybe", "model.qk_norm must be true or false"),
        ("model.sliding_window", "x", "model.sliding_window must be an integer or none"),
        ("model.num_experts", "-1", "model.num_experts must be >= 0, got -1"),
        ("model.mlp_only_layers", "1,x", "model.mlp_only_layers must be a list of integers, got '1,x'"),
        ("optim.lr", "nan", "optim.lr must be > 0, got nan"),
        ("run.precision", "fp8", 'run.precision must be "fp32" or "bf16"'),
        ("run.accumulate", "3", r"run.batch_size must be a multiple of run.accumulate \(3\), got 16"),
        ("data.seq_len", "100000", r"data.seq_len must be at most model.max_position.* \(8192\), got 100000"),
    ],
)
def test_wrong_settings_are_errors_that_name_the_key(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig().updated([(key, value)], as_text=True)


def test_toml_sections_are_merged_and_checked(tmp_path: Path) -> None:
    pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    path = tmp_path / "run.toml"
    path.write_text('[model]\nplan = "cla"\nplan_options = {factor = 4}\n[optim]\nlr = 1\n')
    config = TrainConfig().merged(load_toml(path))
    assert config.model.plan_options == {"factor": 4} and config.optim.lr == 1.0
    for content, message in [
        ("[optim]\nlr = '1'", "optim.lr must be a number, got '1'"),
        ("[optimizer]\nlr = 1", "unknown configuration key 'optimizer.lr'; did you mean optim.lr"),
        ("steps = 1", "unknown configuration key 'steps'; did you mean run.steps"),
        ("[run]\nsteps = true", "run.steps must be an integer, got True"),
        ("[run", "is not valid TOML"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            TrainConfig().merged(load_toml(path))


def test_every_key_has_a_default_that_is_valid() -> None:
    config = TrainConfig()
    for key in known_keys():
        section, name = key.split(".")
        assert config.updated([(key, getattr(getattr(config, section), name))]) == config


# Metrics and progress


def test_metrics_survive_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write({"kind": "train", "step": step, "loss": 1.0 / step})
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path)
    log.write({"kind": "train", "step": 4, "loss": 0.25})
    log.forget_after(2)
    log.write({"kind": "train", "step": 3, "loss": 0.3})
    log.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3),
    ]
    path.write_text("no metrics\n{}\n")
    with pytest.raises(ValueError, match="line 1 must be a metrics record"):
        read_metrics(path)


def test_bits_per_byte_of_uniform_bytes_is_eight() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(2), 0.25) == pytest.approx(0.25)


def test_plain_progress_prints_seldom_but_always_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress(sys.stdout, interval=1000.0)
    progress.task("train", 50)
    for step in range(1, 51):
        progress.advance("train", step, f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train 1/50  loss 1", "train 50/50  loss 50"]


def test_a_text_without_room_for_validation_is_refused(config: TrainConfig) -> None:
    with pytest.raises(
        ValueError, match=r"data\.seq_len must be at most .* of the validation text, got 8000"
    ):
        trainer_of(config.updated([("data.seq_len", 8000)]))


def test_preparing_twice_at_once_is_harmless(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of two processes that encode the same text finds the folder taken when it is done."""
    expected = tokens_of(config).train.clone()
    read, calls = data_module._read_info, []

    def not_there_at_first(folder: Path) -> data_module.DataInfo | None:
        calls.append(folder)
        return None if len(calls) == 1 else read(folder)

    monkeypatch.setattr(data_module, "_read_info", not_there_at_first)
    assert torch.equal(tokens_of(config).train, expected)
    assert len(calls) > 2
    assert not [path for path in calls[0].parent.iterdir() if path.name.startswith(".")]
