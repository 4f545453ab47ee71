"""benchmarks/serving.py --quick on vLLM: two engines in one process, both scenarios."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("FUSEDKV_REQUIRE_VLLM") is None:
    pytest.importorskip("vllm", reason="needs vllm; run `make test-vllm`")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from serving import main
from suite.serving.settings import QUICK

Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    path = tmp_path_factory.mktemp("serving") / "result.json"
    assert main(["plain", "fusedkv", "--quick", "--threads", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["machine"]["vllm"] != "unknown" and result["machine"]["threads"] == 1
    return {(row["scenario"], row["engine"]): row for row in result["rows"]}


def test_every_engine_has_a_row_in_each_scenario(rows: Rows) -> None:
    assert list(rows) == [(s, e) for s in ("pressure", "room") for e in ("plain", "fusedkv")]
    for (scenario, _), row in rows.items():
        (turn,) = row["rounds"]
        sent, answer = QUICK.sent(scenario), QUICK.answer(scenario)
        assert turn["output_tokens"] == sent * answer and len(turn["ttft"]) == len(turn["tpot"]) == sent
        assert row["tokens_per_s"] == pytest.approx(sent * answer / turn["seconds"])
        assert 0 < row["prefill_s"] <= turn["seconds"]


def test_equal_bytes_hold_twice_the_tokens_of_half_the_cache(rows: Rows) -> None:
    for scenario in ("pressure", "room"):
        plain, fused = rows[scenario, "plain"], rows[scenario, "fusedkv"]
        assert plain["cache_tokens"] * QUICK.token_bytes == plain["cache_bytes"] == fused["cache_bytes"]
        assert fused["cache_tokens"] == 2 * plain["cache_tokens"]


def test_twice_the_requests_run_at_once_where_memory_is_short(rows: Rows) -> None:
    plain, fused = rows["pressure", "plain"], rows["pressure", "fusedkv"]
    assert plain["running"] < QUICK.queue and fused["running"] == 2 * plain["running"]
    assert plain["preemptions"] > 0


def test_with_room_for_all_every_step_decodes_all_requests(rows: Rows) -> None:
    for name in ("plain", "fusedkv"):
        row = rows["room", name]
        assert row["running"] == QUICK.requests and row["preemptions"] == 0
        assert len(row["rounds"][0]["step"]) == QUICK.steps
        assert 0 < row["step_ms"] <= row["step_median_ms"]
