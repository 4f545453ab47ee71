"""The configurations of the package: they load, and have the sizes that their papers state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fusedkv_ext.cli.main import main
from fusedkv_ext.errors import ConfigError
from fusedkv_ext.lab import recipes
from fusedkv_ext.training.config import TrainConfig, load_toml
from fusedkv_ext.training.trainer import build_model


def load(name: str) -> TrainConfig:
    return TrainConfig.from_dict(load_toml(recipes.find(name)))


def parameters(config: TrainConfig, plan: str, vocab_size: int) -> int:
    """Of the model that training would build, made without memory for its weights."""
    with torch.device("meta"):
        model = build_model(config.updated([("model.plan", plan)]), vocab_size)
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", recipes.names())
def test_every_configuration_loads(name: str) -> None:
    config = load(name).to_dict()
    for section, values in load_toml(recipes.find(name)).items():
        assert values.items() <= config[section].items()


@pytest.mark.parametrize("name", ["60m", "332m", "1.5b"])
def test_every_value_names_its_source(name: str) -> None:
    values = [line for line in recipes.find(name).read_text().splitlines() if re.match(r"\w+ = ", line)]
    assert len(values) > 25
    assert all(re.search(r"# \[(paper|code|fit|ours)\]", line) for line in values)


@pytest.mark.parametrize(
    ("name", "plan", "millions"),
    [
        # 8 (4 x 512^2 + 3 x 512 x 1376) + 2 x 32,000 x 512, and the norms
        ("60m", "vanilla", 58.07),
        # four layers without key and value projections: 4 x 2 x 512^2 fewer, and the fusion weights
        ("60m", "fusedkv", 55.98),
        # 16 (4 x 1024^2 + 3 x 1024 x 2720) + 128,000 x 1024, and the norms: the paper's 332M
        ("332m", "vanilla", 331.91),
        ("332m", "fusedkv", 315.16),
        # 24 (4 x 2048^2 + 3 x 2048 x 5472) + 128,000 x 2048, and the norms: the paper's 1.5B
        ("1.5b", "vanilla", 1471.78),
        ("1.5b", "fusedkv", 1371.19),
    ],
)
def test_sizes_are_those_of_the_papers(name: str, plan: str, millions: float) -> None:
    config = load(name)
    assert parameters(config, plan, config.data.vocab_size) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("name", "per_step", "tokens"),
    [("60m", 512 * 1024, 1.31e9), ("332m", 256 * 8192, 200e9), ("1.5b", 256 * 8192, 400e9)],
)
def test_budgets_are_those_of_the_papers(name: str, per_step: int, tokens: float) -> None:
    config = load(name)
    assert config.run.batch_size * config.data.seq_len == per_step
    assert config.run.steps * per_step == pytest.approx(tokens, rel=1e-3)
    assert config.optim.lr * config.optim.final_lr == pytest.approx({"60m": 2e-4}.get(name, 3e-5))


def test_documents_and_help_name_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    help_text = capsys.readouterr().out
    training = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (known,) = re.findall(r"one that comes with the package: (.*?)\)", training, re.DOTALL)
    assert set(re.findall(r"`(.*?)`", known)) == set(recipes.names())
    assert all(name in help_text for name in recipes.names())


def test_a_configuration_for_a_tokenizer_is_not_trained_on_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    arguments = [
        "train",
        "--config",
        "60m",
        "--text",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "about 32,000 tokens (data.vocab_size), got 256 from the byte vocabulary" in message
    assert "give another one with --tokenizer" in message


def test_names_and_paths_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("60m").mkdir()  # a run of that name, say
    assert recipes.find("60m").name == "60m.toml"
    own = tmp_path / "own.toml"
    own.write_text("[run]\nsteps = 7\n")
    assert recipes.find("own.toml").resolve() == own
    with pytest.raises(ConfigError, match=r"61m does not exist; expected a TOML file or one of .*332m, 60m"):
        recipes.find("61m")
