"""benchmarks/serving.py without vLLM: turns, errors, figures, goals and tables."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import serving
from suite import tables
from suite.serving import report, run
from suite.serving.engines import Turn
from suite.serving.settings import PLAIN, QUICK, EngineSpec, specs

ENGINES = ["plain", "vanilla", "fusedkv", "cla:factor=4"]


class Scripted:
    """An engine of known speed: fused plans take half as long. ``cla`` breaks in its second turn."""

    turns: list[str]

    def __init__(self, folder: Path, spec: EngineSpec, settings: Any, scenario: str) -> None:
        self.name, self.cache_tokens = spec.name, 640
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"][0].startswith("Llama") == (spec.name == PLAIN)

    def turn(self, requests: int, prompt: int, answer: int, seed: int) -> Turn:
        if not seed:
            return Turn(requests)
        self.turns.append(f"{seed} {self.name}")
        if self.name.startswith("cla") and seed == 2:
            raise RuntimeError("no kernel")
        scale = (1 if self.name in ("plain", "vanilla") else 0.5) * (3 - seed)
        return Turn(
            requests, 4 * scale, requests * answer, 3, 0, [scale], [0.1 * scale], [0.2 * scale, scale]
        )

    def shutdown(self) -> None:
        self.turns.append(f"end {self.name}")


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    Scripted.turns = []
    monkeypatch.setattr(run, "Engine", Scripted)
    monkeypatch.setattr(run.torch, "set_num_threads", lambda threads: None)
    sizes = serving.replace(QUICK, rounds=2)
    found = run.run(["pressure", "room"], specs(ENGINES, sizes.layers, early_exit=False), sizes)
    return json.loads(json.dumps(found, allow_nan=False))


def test_engines_take_turns_and_a_broken_one_costs_its_own_row(result: dict[str, Any]) -> None:
    one = [f"{seed} {name}" for seed in (1, 2) for name in ENGINES] + [f"end {name}" for name in ENGINES]
    assert Scripted.turns == one + one
    for row in result["rows"]:
        broken = row["engine"].startswith("cla")
        assert row["error"] == ("RuntimeError: no kernel" if broken else None)
        assert len(row["rounds"]) == (1 if broken else 2)


def test_figures_are_those_of_the_best_round(result: dict[str, Any]) -> None:
    row = next(row for row in result["rows"] if (row["scenario"], row["engine"]) == ("room", "vanilla"))
    assert row["tokens_per_s"] == QUICK.requests * (QUICK.steps + 1) / 4
    assert (row["prefill_s"], row["ttft_s"], row["tpot_ms"]) == (1, 1, 100)
    assert row["step_ms"] == pytest.approx(200) and row["step_median_ms"] == pytest.approx(700)


def test_goals_compare_with_plain_llama_of_the_run(result: dict[str, Any]) -> None:
    measured = {goal["goal"]: (goal["measured"], goal["met"]) for goal in result["goals"]}
    assert measured == {
        "requests at once with half the cache": (1, False),
        "output tokens/s with half the cache": (1, False),  # that of cla's slow first round
        "best step, vanilla": (1, True),
        "best step, fusedkv": (0.5, True),
        "prefill, vanilla": (1, True),
        "prefill with early exit": (None, None),
    }


def test_tables_have_ratios_and_errors(result: dict[str, Any]) -> None:
    text = tables.BLOCKS["serving"](result)
    assert re.search(r"\| fusedkv \| 640 \(1\.00x\) \| 3 \(1\.00x\) \| 64\.0 \(2\.00x\) \|", text)
    assert text.count("* cla:factor=4: RuntimeError: no kernel") == 2
    assert "**Under pressure**: 8 requests" in text and "**Room for all**: 2 requests" in text
    assert text == report.document(result)
    assert tables.BLOCKS["serving-pressure"](result) in text


def test_early_exit_adds_plans_whose_last_layers_store_nothing() -> None:
    labels = [spec.label for spec in specs(["plain", "vanilla", "fusedkv", "cla"], 4, early_exit=True)]
    assert labels == ["plain", "vanilla", "fusedkv", "fusedkv, early exit", "cla", "cla, early exit"]


def test_memory_holds_the_plain_requests_to_their_ends() -> None:
    for scenario, blocks in (("pressure", 1 + 2 * 3), ("room", 1 + 2 * 3)):
        assert QUICK.cache_bytes(scenario) == blocks * 128 * 2 * 4 * 1 * 32 * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [(["nothing"], "nothing"), (["--prompt", "0"], "--prompt must be at least 1, got 0")],
)
def test_wrong_options_are_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.arguments(given)
    assert message in capsys.readouterr().err
