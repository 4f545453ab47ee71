"""`fusedkv eval` and `generate` under torchrun on Hugging Face folders: transformers shares the heads.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import hf_folders
import torch
from ranks import HAS_GLOO, rank_main, run_ranks
from test_parallel_serving import said

from fusedkv_ext.cli import main as cli
from fusedkv_ext.errors import ConfigError

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

TEXT = "".join(f"line {i} says {i * 37 % 101}\n" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    (folder / "text.txt").write_text(TEXT)
    torch.manual_seed(0)
    plain = hf_folders.tiny_llama()
    hf_folders.save_folder(plain, folder / "plain")
    hf_folders.save_folder(hf_folders.converted(plain), folder / "fusedkv")
    odd = hf_folders.tiny_llama(num_key_value_heads=1)
    hf_folders.save_folder(odd, folder / "odd")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    return run_ranks(__file__, folder)


def generate(folder: Path, name: str) -> list[str]:
    options = ["--prompt", "line 1", "--max-new-tokens", "8", "--seed", "3", "--json"]
    return ["generate", str(folder / name), *options]


def evaluate(folder: Path) -> list[str]:
    options = ["--text", str(folder / "text.txt"), "--context", "64", "--tasks", "perplexity", "--json"]
    return ["eval", str(folder / "plain"), str(folder / "fusedkv"), *options]


@pytest.mark.parametrize("name", ["plain", "fusedkv"])
def test_generate_gives_the_text_of_one_process(name: str, ranks: list[dict], folder: Path) -> None:
    found, alone = json.loads(ranks[0][name][0]), json.loads(said(generate(folder, name), cli.main)[0])
    found["cache_bytes"] *= 2  # of this rank, which has half of the heads
    assert {**found, "seconds": 0} == {**alone, "seconds": 0} and alone["new_tokens"] > 1
    assert ranks[1][name] == ("", "")


def test_eval_gives_the_numbers_of_one_process(ranks: list[dict], folder: Path) -> None:
    found, alone = (json.loads(out) for out in (ranks[0]["eval"], said(evaluate(folder), cli.main)[0]))
    assert alone["checkpoints"].keys() == {"plain", "fusedkv"} and ranks[1]["eval"] == ""
    for name, expected in alone["checkpoints"].items():
        same = found["checkpoints"][name]
        for fact in ("plan", "parameters", "cache_bytes_per_token"):
            assert same[fact] == expected[fact], fact
        assert same["perplexity"]["loss"] == pytest.approx(expected["perplexity"]["loss"], rel=1e-6)


def test_heads_that_do_not_divide_are_an_error(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["odd"].startswith("num_key_value_heads of the model in ")
        assert "must be a multiple of the 2 processes, got 1" in rank["odd"]


def work(folder: Path) -> dict[str, Any]:
    from fusedkv_ext.cli import eval as eval_command
    from fusedkv_ext.cli import generate as generate_command
    from fusedkv_ext.training import session

    def run(arguments: list[str]) -> int:
        """Without joining the processes, which they have done already."""
        args = cli.build_parser().parse_args(arguments)
        if args.command == "eval":
            return eval_command._run(args, speaks=session.rank() == 0)
        return generate_command._generate(args)

    found: dict[str, Any] = {name: said(generate(folder, name), run) for name in ("plain", "fusedkv")}
    found["eval"] = said(evaluate(folder), run)[0]
    try:
        run(generate(folder, "odd"))
    except ConfigError as error:
        found["odd"] = str(error)
    return found


if __name__ == "__main__":
    rank_main(work)
