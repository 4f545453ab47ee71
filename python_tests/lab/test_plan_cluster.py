"""`fusedkv plan --cluster`, and docs/scale.md: its tables are what the formulas give, its recipes start."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from fusedkv_ext.cli.cluster import parse_layout
from fusedkv_ext.cli.main import build_parser, main
from fusedkv_ext.cli.train import changes
from fusedkv_ext.distributed import Layout
from fusedkv_ext.lab.pages import planner as page
from fusedkv_ext.lab.planner import Job, Server, choose, memory, shapes, traffic
from fusedkv_ext.lab.planner.recipes import RECIPES, Recipe
from fusedkv_ext.lab.planner.report import number, parse_tokens, tokens
from fusedkv_ext.lab.reporting import filled
from fusedkv_ext.training.config import TrainConfig

DOCUMENT = Path(__file__).parents[2] / page.DOCUMENT


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_training_rows_are_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    asked = planned(
        capsys,
        "fusedkv,cla:factor=3",
        "--cluster",
        "gpus=16,tp=2,cp=2",
        "--config",
        "1.5b",
        "--context",
        "8k,16384",
        "--batch",
        "2",
        "--accumulate",
        "4",
        "--checkpointing",
        "reentrant",
        "--bandwidth",
        "100",
    )
    assert asked["layout"] == {"dp_replicate": 1, "dp_shard": 4, "cp": 2, "tp": 2}
    assert [(row["plan"], row["context"]) for row in asked["rows"]] == [
        ("fusedkv", 8192),
        ("fusedkv", 16384),
        ("cla:factor=3", 8192),
        ("cla:factor=3", 16384),
    ]
    config = shapes.shape(shapes.load("1.5b"), "cla:factor=3")
    job = Job(config, Layout(1, 4, 2, 2), 2, 16384, 4, checkpointing="reentrant")
    row = asked["rows"][-1]
    assert row["memory"] == {**memory(job)._asdict(), "state": memory(job).state}
    assert row["traffic"] == {**traffic(job)._asdict(), "total": traffic(job).total}
    assert row["traffic_seconds"] == traffic(job).total / 100e9
    assert row["fits"] == (memory(job).peak <= 80e9)


def test_serving_rows_are_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    asked = planned(
        capsys,
        "fusedkv",
        "--cluster",
        "tp=4",
        "--config",
        "70b",
        "--context",
        "32k",
        "--serve",
        "--gpu-memory",
        "140",
        "--dtype",
        "float8_e4m3fn",
        "--prefill-chunk",
        "8192",
        "--bandwidth",
        "3000",
    )
    server = Server(shapes.shape(shapes.load("70b"), "fusedkv"), 4, 32768, cache_element=1, chunk=8192)
    (row,) = asked["rows"]
    assert row["sequences"] == server.sequences(140e9) > 0
    assert {name: getattr(server, name) for name in row["bytes"]} == row["bytes"]
    assert {name: getattr(server, name) for name in row["flops"]} == row["flops"]
    one, everything = row["step_seconds"].values()
    assert one == (server.weights_read + server.cache_read) / 3000e9
    assert everything == (server.weights_read + row["sequences"] * server.cache_read) / 3000e9


def test_without_a_method_four_are_compared_and_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cluster", "dp_shard=8", "--context", "8k,1m"]) == 0
    out = capsys.readouterr().out
    for method in page.METHODS:
        assert len(re.findall(rf"^{method} +(?:8k|1M) ", out, re.MULTILINE)) == 2
    assert len(re.findall(r" NO +", out)) == 4 and len(re.findall(r" yes +", out)) == 4
    assert "dp_shard: received per step." in out and "seconds" not in out


def test_serving_says_how_many_sequences_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "vanilla", "--cluster", "tp=1", "--serve", "--context", "8k,1m", "--bandwidth", "1"])
        == 0
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("vanilla")]
    assert [line[7] for line in lines] == [str(shapes_server().sequences(80e9)), "0"]
    assert lines[1][-1] == "-"  # no step of all sequences where none fits


def shapes_server() -> Server:
    return Server(shapes.shape(shapes.load("1.5b"), "vanilla"), 1, 8192)


def test_a_file_and_changes_give_the_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[model]\nnum_hidden_layers = 6\n[data]\nvocab_size = 1000\n")
    common = ("fusedkv", "--cluster", "dp_shard=1", "--config", str(own))
    (whole,) = planned(capsys, *common)["rows"]
    (half,) = planned(capsys, *common, "--set", "model.num_hidden_layers=3")["rows"]
    layers = whole["num_parameters"] - half["num_parameters"]
    assert 0 < half["num_parameters"] - 1000 * 256 < layers < whole["num_parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "dp=8"], "--cluster must be NAME=N,..., with gpus, dp_replicate, dp_shard, cp, tp"),
        (["--cluster", "tp=0"], "at most once and N >= 1, got 'tp=0'"),
        (["--cluster", "tp=2,tp=4"], "at most once"),
        (
            ["--cluster", "gpus=8,tp=3"],
            "dp_replicate x dp_shard x cp x tp is 1 x any x 1 x 3, but there are 8",
        ),
        (["--cluster", "tp=3"], "num_attention_heads (16) must be a multiple of tp (3)"),
        (
            ["--cluster", "tp=1", "--context", "8x"],
            "--context must be numbers of tokens, as in 8k,32k,1m, got '8x'",
        ),
        (["--cluster", "tp=1", "--context", "0"], "--context must be numbers of tokens"),
        (["--cluster", "tp=1", "--config", "7b"], "7b does not exist; expected a TOML file or one of"),
        (["--cluster", "tp=1", "--layers", "4"], "--layers must not be given with --cluster"),
        (["--cluster", "tp=1", "--batch", "0"], "batch must be at least 1"),
        (["--cluster", "tp=1", "--gpu-memory", "-3"], "--gpu-memory must be a positive number of GB"),
        (["--cluster", "tp=1", "--serve", "--prefill-chunk", "-1"], "chunk must be at least 1 token, or 0"),
        (["--cluster", "tp=1", "--set", "model.num_experts=4"], "a dense decoder with full attention, got"),
        (["--cluster", "tp=1", "--head-dim", "64"], "--head-dim must not be given with --cluster"),
        (
            ["--cluster", "tp=1", "--serve", "--accumulate", "2"],
            "--accumulate must not be given with",
        ),
        (["--cluster", "tp=1", "--dtype", "float16"], "--dtype is an option of serving and needs --serve"),
        (["--serve"], "--serve needs --cluster"),
        (["fusedkv", "--config", "70b"], "--config needs --cluster"),
        (["fusedkv,vanilla"], "got 'fusedkv,vanilla'"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_layouts_and_tokens_are_read() -> None:
    assert parse_layout("dp_replicate=2, dp_shard=4") == Layout(2, 4)
    assert parse_layout("gpus=64,tp=8,cp=2") == Layout(1, 4, 2, 8)
    for text, value in (("8k", 8192), ("1M", 2**20), ("1000", 1000), ("3k", 3072)):
        assert parse_tokens(text) == value and tokens(value).lower() == text.lower()


def test_chosen_layouts_fit_and_nothing_smaller_does() -> None:
    config = shapes.shape(shapes.load("1.5b"), "vanilla")
    job, fits = choose.training(config, 8, 2**17, 80e9)
    assert fits and memory(job).peak <= 80e9 and job.gpus == 8 and job.layout.cp > 1
    alone = Job(config, Layout(dp_shard=8), 1, 2**17)
    assert memory(alone).peak > 80e9
    job, fits = choose.training(config, 8, 2**21, 80e9)
    assert not fits and memory(job).peak > 80e9
    assert choose.server(config, 2**20, 80e9, 8192).sequences(80e9) > 0


def test_the_tables_of_the_document_are_those_of_the_formulas() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- generated: (\w+)", text)) == set(page.BLOCKS)
    assert filled(text, page.BLOCKS) == text, "run `make docs`"


def parsed(command: str) -> tuple[int, TrainConfig, Any]:
    """Processes, configuration and arguments of a recipe, as torchrun and `fusedkv train` read it."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "torchrun"
    launch = get_args_parser().parse_args(words[1:])
    assert launch.module and launch.training_script == "fusedkv_ext"
    machines = int(launch.nnodes.split(":")[-1])  # torchrun's default is 1:1
    assert launch.standalone if machines == 1 else launch.rdzv_backend == "c10d" and launch.rdzv_endpoint
    assert launch.max_restarts > 0
    arguments = build_parser().parse_args(launch.training_script_args)
    return machines * int(launch.nproc_per_node), changes(arguments)(TrainConfig()), arguments


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.config} on {recipe.machines}")
def test_a_recipe_starts_what_it_was_planned_for(recipe: Recipe) -> None:
    assert f"```sh\n{recipe.command}\n```" in DOCUMENT.read_text(encoding="utf-8")
    processes, config, arguments = parsed(recipe.command)
    section, run = config.parallel, config.run
    layout = Layout(section.dp_replicate, section.dp_shard, section.cp, section.tp)
    assert processes == 8 * recipe.machines
    assert layout.sizes(processes) == (recipe.machines, 8, 1, 1)
    data_ranks = layout.dp_replicate * layout.dp_shard
    assert run.batch_size % (data_ranks * run.accumulate) == 0
    batch = run.batch_size // (data_ranks * run.accumulate)
    model = shapes.shape(config.updated([("model.plan", "vanilla")]), "fusedkv")
    assert config.model.plan == "fusedkv" and arguments.resume and section.activation_checkpointing == "none"
    job = Job(model, layout, batch, config.data.seq_len, run.accumulate, run.precision)
    assert job == recipe.job()
    assert job.tokens_per_step == run.batch_size * config.data.seq_len
    peak = memory(job).peak
    assert peak < 80e9 and f"**{number(peak / 1e9)} GB** at the peak" in str(recipe)
