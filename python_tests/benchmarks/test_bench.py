"""The benchmark suite: every row runs and is checked, wrong results are refused, goals come out right."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.lab import timing
from fusedkv_ext.testing import WrongResult

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from cpu import main
from suite import machine, measure, report, tables
from suite.clocks import HostClock
from suite.cpu import decode, goals, models, plots, settings
from suite.cpu.run import run
from suite.measure import Bench, Cell, Entry, require_same_function

ROOT = Path(__file__).resolve().parents[2]
ALL = settings.FAMILIES


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A run of everything at tiny sizes, through JSON."""
    shown: list[measure.Row] = []
    found = json.loads(json.dumps(run(ALL, settings.TINY, shown.append), allow_nan=False))
    assert [asdict(row) for row in shown] == found["rows"]
    return found


def test_every_row_runs_is_checked_and_beside_peers_that_run(result: dict[str, Any]) -> None:
    assert {row["family"] for row in result["rows"]} == set(ALL)
    keys = [(row["op"], row["shape"], row["dtype"], row["label"]) for row in result["rows"]]
    assert len(keys) == len(set(keys))
    for row in result["rows"]:
        assert 0 < row["us_low"] <= row["us"] <= row["us_high"]
        assert not [peer for peer in row["peers"].values() if "reason" in peer]
        assert (row["percent_of_roof"] is None) == (row["roof"] is None)
        assert (row["percent_of_limit"] is None) == (row["products_gb_per_s"] is None)
        if row["peers"]:
            assert row["best_peer"] == min(row["peers"], key=lambda name: row["peers"][name]["us"])
        if row["num_bytes"]:
            assert row["gb_per_s"] == pytest.approx(row["num_bytes"] / row["us"] / 1e3)
    assert result["geomean"].keys() == set(ALL) and result["geomean"]["fuse"]["percent_of_roof"] > 0


def test_every_goal_is_measured(result: dict[str, Any]) -> None:
    # Memory takes a process per plan: not in tiny runs.
    unmeasured = [goal["goal"] for goal in result["goals"] if goal["measured"] is None]
    assert unmeasured == ["peak memory of training Lite and FusedKV, to vanilla"]
    assert {goal["family"] for goal in result["goals"]} == set(ALL)


def test_tables_are_tables_and_pictures_are_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    blocks = [block for name, block in tables.BLOCKS.items() if not name.startswith("serving")]
    for block in blocks:
        text = block(result)
        found = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
        assert found or block is tables.conditions
        for lines in found:
            assert len({line.count("|") for line in lines}) == 1, lines[0]
    for row in result["rows"]:
        assert row["op"] in report.line(row)
    assert "goals met" in tables.summary(result)
    for path in plots.save_all(result, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == len(plots.PANELS)


def entry(run: Callable[[], Tensor], check: measure.Check = lambda result: None, **more: Any) -> Entry:
    return Entry("op", more.pop("label", "mine"), {}, torch.float32, run, check, **more)


@pytest.fixture
def bench() -> Bench:
    return Bench(HostClock(3, 1 << 12, 1 << 12))


def test_a_wrong_operation_is_refused_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = fkv.fused_kv_attn_with_kvcache, []

    def wrong(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        out = true(*args, **options).clone()
        out[..., -1] *= 1.1
        return out

    monkeypatch.setattr(fkv, "fused_kv_attn_with_kvcache", wrong)
    with pytest.raises(WrongResult, match="largest error"):
        run(["decode"], settings.TINY)
    assert len(calls) == 1


def test_a_wrong_peer_stops_the_run_and_a_missing_one_is_noted(bench: Bench) -> None:
    x = torch.randn(64)
    with pytest.raises(WrongResult, match="computes something else"):
        bench.rows(Cell("decode", [entry(lambda: x, peers={"peer": lambda: x + 1})]))

    def broken() -> Tensor:
        raise RuntimeError("no such kernel")

    peers = {"a": broken, "b": "not here", "c": x.clone}
    (row,) = bench.rows(Cell("decode", [entry(lambda: x, peers=peers)]))
    assert row.peers["a"] == {"reason": "RuntimeError: no such kernel"}
    assert row.peers["b"] == {"reason": "not here"}
    assert row.best_peer == "c" and row.x_best > 0
    with pytest.raises(WrongResult):
        require_same_function("peer", torch.full((64,), torch.nan), x)


def test_times_ratios_and_rehearsals(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """With a clock that only our calls move: 2 s, 3 s beside a peer of 6 s, and their small twins untimed."""
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(seconds: float, name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            now[0] += seconds
            order.append(name)
            return torch.ones(1)

        return call

    def cell(prefix: str, unit: float) -> Cell:
        return Cell(
            "decode",
            [
                entry(takes(2 * unit, f"{prefix}first"), label="first", num_bytes=100),
                entry(
                    takes(3 * unit, f"{prefix}second"),
                    label="second",
                    num_bytes=300,
                    peers={"peer": takes(6 * unit, f"{prefix}peer")},
                ),
            ],
            base="first",
        )

    timed = cell("", 1.0)
    timed.twin = cell("small ", 0.01)
    first, second = bench.rows(timed)
    assert (first.us, second.us, second.x_best) == (2e6, 3e6, 2.0)
    assert first.versus is None
    assert second.versus == {"to": "first", "x": 1.5, "per_byte": 0.5}
    assert second.gb_per_s == pytest.approx(1e-7)
    last = order[-6:]
    assert sorted(last) == ["first", "peer", "second", "small first", "small peer", "small second"]
    assert all(last[i] == f"small {last[i + 1]}" for i in (0, 2, 4))


def row(op: str, **more: Any) -> dict[str, Any]:
    base = {"family": "decode", "op": op, "label": "", "dtype": "bfloat16", "params": {}, "us": 1.0}
    base |= {"peers": {}, "percent_of_roof": None, "x_best": None, "versus": None, "peak_mb": None}
    return base | more


def judged(rows: list[dict[str, Any]], start: str) -> tuple[float | None, bool | None]:
    (goal,) = [goal for goal in goals.GOALS if goal.text.startswith(start)]
    found = goal.judged(rows)
    return found["measured"], found["met"]


def test_goals_take_the_worst_row() -> None:
    rows = [
        row("decode", params={"m": 1, "R": 1, "T": 8192}, percent_of_limit=85.0, x_best=1.4),
        row("decode", params={"m": 1, "R": 4, "T": 8192}, percent_of_limit=81.0, x_best=3.0),
        row(
            "decode",
            dtype="float16",
            params={"m": 2, "R": 4, "T": 8192},
            percent_of_limit=10.0,
            versus={"x": 2.0, "per_byte": 1.02},
        ),
        row(decode.CONTEXT, params={"T": 4096}, x_best=1.2),
        row(decode.CONTEXT, params={"T": 2048}, x_best=1.0),
        row(decode.CONTEXT, params={"T": 32}, x_best=0.5),
        row("decode, paged", params={"page": 16}, versus={"x": 1.06, "per_byte": 1.06}),
        row(models.TINY_ATTENTION, us=60.0, peers={models.OPERATIONS: {"us": 40.0, "x": 0.67}}),
    ]
    assert judged(rows, "bfloat16: of the limit") == (81.0, True)
    assert judged(rows, "float16: of the limit") == (10.0, False)
    assert judged(rows, "from 4096 tokens on") == (1.2, False)
    assert judged(rows, "64 to 2048 tokens") == (1.0, True)
    assert judged(rows, "time per byte of 2 sources") == (1.02, True)
    assert judged(rows, "time in pages of 16") == (1.06, False)
    assert judged(rows, "time in pages of 64") == (None, None)
    assert judged(rows, "Python time per token and layer") == (20.0, True)


def test_the_limit_is_the_slower_of_reading_and_products() -> None:
    found = measure.Row("decode", "decode", num_bytes=100)
    # A byte takes 1, 2 and 4 s; the products take 300 s; the row takes 400, 500 and 600 s.
    measure.share_of_limit(found, [1.0, 2.0, 4.0], [300.0] * 3, [400.0, 500.0, 600.0])
    assert found.percent_of_limit == pytest.approx(100 * 400 / 600)
    assert found.products_gb_per_s == pytest.approx(1e-9 / 3)


@pytest.mark.parametrize("page_size", [None, 16])
def test_products_alone_are_the_same_call_on_four_tokens(page_size: int | None) -> None:
    problem = decode.make([40, 64], 2, 2, torch.float32, settings.TINY, page_size=page_size)
    alone = problem.resident()
    assert alone.num_bytes == problem.num_bytes and len(alone.keys) == 2
    assert alone.keys[0].untyped_storage().nbytes() == 4 * settings.TINY.G * settings.TINY.D * 4
    alone.check(alone.run())


def test_memory_goal_compares_equal_shapes() -> None:
    peaks = {(1, "vanilla"): 100, (1, "fusedkv"): 90, (2, "vanilla"): 200, (2, "fusedkv"): 210}
    rows = [
        row(models.STEP, params={"plan": plan, "batch": batch}, peak_mb=peak)
        for (batch, plan), peak in peaks.items()
    ]
    assert judged(rows, "peak memory") == (1.05, False)


def test_peak_memory_comes_from_a_process_of_its_own() -> None:
    small = settings.QUICK
    assert models.peak_megabytes("fusedkv", small) > 50


def test_decode_problems_have_the_layout_of_the_cache_and_its_bytes() -> None:
    s = settings.TINY
    cache = fkv.KVCache(fkv.CachePlan.named("vanilla", 1), 1, 64, s.G, s.D, dtype=torch.float32)
    problem = decode.make([64], 2, 1, torch.float32, s)
    assert problem.keys[0].stride() == cache.keys(0).stride()
    assert problem.num_bytes == 2 * 64 * s.G * s.D * 4
    paged = decode.make([40, 64], 2, 2, torch.float32, s, page_size=16)
    assert paged.num_bytes == 2 * 2 * 104 * s.G * s.D * 4
    paged.check(paged.run())


# Documents and the command


def test_documents_equal_what_the_generator_makes_of_the_committed_results() -> None:
    for name in tables.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert tables.filled(text, ROOT / tables.RESULTS) == text, f"{name}: run make performance-doc"
        assert "<!-- generated:" in text
    assert all((ROOT / picture).exists() for picture in tables.PICTURES)


def test_generated_blocks_follow_the_file(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result))
    text = "before\n<!-- generated: goals r.json -->\noutdated\n<!-- end -->\nafter\n"
    made = tables.filled(text, tmp_path)
    assert "outdated" not in made and "| not measured |" in made and made.endswith("<!-- end -->\nafter\n")
    assert tables.filled(made, tmp_path) == made
    with pytest.raises(ValueError, match="a generated block must be one of .*, got 'x'"):
        tables.filled("<!-- generated: x r.json -->\n<!-- end -->", tmp_path)


def test_command_writes_json_and_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept: list[int] = []
    monkeypatch.setattr(settings, "QUICK", settings.TINY)
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: kept.append(1))  # not in the tests' process
    target = tmp_path / "new" / "r{threads}.json"
    arguments = ["fuse", "--quick", "--rounds", "1"]
    assert main([*arguments, "--dtype", "float32", "--json", str(target)]) == 0
    out, _ = capsys.readouterr()
    written = json.loads((tmp_path / "new" / f"r{torch.get_num_threads()}.json").read_text())
    assert written["families"] == ["fuse"] and {r["dtype"] for r in written["rows"]} == {"float32"}
    assert "fuse_kv_backward" in out and "fuse: forward: of the copy roof" in out
    assert main([*arguments, "--json", "-"]) == 0
    assert len(kept) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["rounds"] == 1 and "fuse_kv_backward" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decoode"], "unknown family 'decoode'; known: decode, coded, fuse, prefill, train, model"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["fuse", "--plots", "x"], "--plots draws the curves of decode"),
        (["--dtype", "float8"], "invalid choice"),
    ],
)
def test_command_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr()[1]


def test_the_benchmarks_are_no_part_of_the_package() -> None:
    assert not [path for path in (ROOT / "fusedkv_ext").rglob("*") if path.name.startswith("bench")]
    for path in (ROOT / "fusedkv_ext").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (suite|benchmarks)\b", path.read_text(), re.MULTILINE), path
