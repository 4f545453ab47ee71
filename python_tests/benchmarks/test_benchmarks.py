"""The GPU benchmark as a dry run on the CPU: every kind of cell with its checks, the result file, the tables.

And what happens when the process that measures dies or hangs.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedkv_ext.testing import WrongResult

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from suite import report, tables
from suite.clocks import GraphClock
from suite.gpu import decode, worker
from suite.gpu.inputs import Decode, DecodeInputs
from suite.gpu.lab import Lab
from suite.gpu.supervise import read_log, supervise
from suite.gpu.tasks import FAMILIES, NO_TIME, TINY, TITLES, Sizes
from suite.gpu.worker import ordered_tasks
from suite.measure import Cell, Contestant, Entry, require_same_function


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    log = tmp_path_factory.mktemp("gpu") / "log"
    families = [family for family in FAMILIES if family != "decode"]
    worker.run(
        worker.Log(log), device="cpu", families=FAMILIES, only_quick=True, compile_peers=False, deadline=None
    )
    # The second worker goes on where the first one ended.
    worker.run(
        worker.Log(log), device="cpu", families=families, only_quick=False, compile_peers=False, deadline=None
    )
    return report.collect(read_log(log))


def test_every_row_builder_runs_and_every_result_is_right(result: dict[str, Any]) -> None:
    assert not [(row["op"], row["error"]) for row in result["rows"] if row["error"]]
    assert {row["family"] for row in result["rows"]} == set(FAMILIES)
    assert not result["not_run"]
    keys = [(row["op"], row["shape"]) for row in result["rows"]]
    assert len(keys) == len(set(keys))
    for row in result["rows"]:
        assert row["us"] > 0
        if row["best_peer"] is not None:
            assert row["x_best"] == pytest.approx(row["peers"][row["best_peer"]]["us"] / row["us"])


def test_rows_have_the_peers_that_run_here(result: dict[str, Any]) -> None:
    peers = {name for row in result["rows"] for name, peer in row["peers"].items() if "us" in peer}
    assert peers >= {
        "SDPA flash",
        "SDPA math",
        "concat SDPA math",
        "eager fuse + SDPA",
        "eager",
        "separate torch ops",
        "KV projection + RoPE + SDPA",
        "SDPA alone",
        "planned in the call",
        "fuse_kv + SDPA",
        "vanilla",
    }
    # Without torch.compile there is no time for a search either, and the peer's name says so.
    names = {name for row in result["rows"] for name in row["peers"]}
    assert {name for name in names if "Triton" in name} == {
        "Triton, fusing in the loop, not tuned",
        "Triton split-KV, not tuned",
    }
    missing = [p["reason"] for row in result["rows"] for p in row["peers"].values() if "us" not in p]
    assert missing and not [reason for reason in missing if "Error" in reason or "WrongResult" in reason]


def test_result_is_json_and_makes_tables(result: dict[str, Any]) -> None:
    read = json.loads(json.dumps(result, allow_nan=False))
    assert read["roofs"]["best"].keys() == {"read", "copy", "matmul"}
    assert read["two_sources_per_byte"] > 0
    text = tables.gpu_tables(read)
    for family in FAMILIES:
        assert f"### {TITLES[family]}" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= len(FAMILIES)
    for lines in blocks:
        assert len({line.count("|") for line in lines}) == 1, lines[0]
    for row in read["rows"]:
        assert report.line(row).count(" | ") == 5


def test_rows_with_a_shared_schedule_stand_beside_those_that_plan_and_share_their_peers(
    result: dict[str, Any],
) -> None:
    rows = {(row["family"], row["op"], row["shape"]): row for row in result["rows"]}
    planning = [key for key in rows if key[0] in ("decode", "latency", "ragged", "head_dim")]
    planning = [key for key in planning if not key[1].endswith(", shared schedule")]
    assert len(planning) > 20
    for family, op, shape in planning:
        own, shared = rows[family, op, shape], rows[family, f"{op}, shared schedule", shape]
        times = [{n: p["us"] for n, p in row["peers"].items() if "us" in p} for row in (own, shared)]
        assert times[0] and times[0] == times[1]
        assert shared["versus"]["to"] == op and own["versus"] is None
        assert shared["versus"]["x"] == pytest.approx(shared["us"] / own["us"])


def test_many_query_rows_are_measured_against_fusing_first(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["family"] in ("crossover", "chunked")]
    assert {row["params"]["rows"] for row in rows if row["family"] == "crossover"} == {*TINY.crossover_rows}
    assert {row["params"]["S"] for row in rows if row["family"] == "chunked"} == {*TINY.chunks}
    assert all(row["best_peer"] == "fuse_kv + SDPA" for row in rows)
    assert Sizes().crossover_rows == (16, 32, 64, 128, 256, 512) and Sizes().chunks == (512, 1024, 2048)


def test_pages_with_heads_first_are_other_memory_and_another_result() -> None:
    x = DecodeInputs(Decode((40, 23), 4, 2, 32, 2, 16), Lab(torch.device("cpu"), torch.bfloat16))
    (usual, _), (permuted, _) = (view(x.key_buffers[0]) for view in (x.paged, x.heads_first))
    assert usual.shape == permuted.shape and usual.data_ptr() == permuted.data_ptr()
    assert usual.stride()[1:] == (2 * 32, 32, 1) and permuted.stride()[1:] == (32, 16 * 32, 1)
    out = decode.ours(x, x.heads_first)[0]()
    x.check("ours", "heads first", out, ours=True)
    with pytest.raises(WrongResult):
        x.check("ours", "paged", out, ours=True)


def test_each_peer_is_announced_before_it_is_tried(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options: dict[str, Any] = {"only_quick": True, "only_headline": True, "compile_peers": False}
    worker.run(worker.Log(log), device="cpu", families=["decode"], deadline=None, **options)
    events = [event for event in read_log(log) if event.get("cell", "").startswith("decode: decode, 2")]
    kinds = [event["event"] for event in events]
    tried = [event["peer"] for event in events if event["event"] == "peer"]
    row = next(event["row"] for event in events if event["event"] == "row")
    assert tried == [name for name, peer in row["peers"].items() if "us" in peer] and len(tried) > 2
    assert kinds.index("partial") < kinds.index("peer") < kinds.index("row")


def test_a_call_that_the_host_decides_is_timed_without_a_graph() -> None:
    entry = Entry("op", "op", {}, torch.float32, list, lambda result: None, captured=False)
    ready = GraphClock(torch.device("cpu"))._launcher(entry.ours, entry.check, entry, Cell("op", []), None)
    assert (ready.timing, ready.calls) == ("stream", 1)


def test_cells_are_unique_and_the_important_ones_come_first() -> None:
    for sizes in (Sizes(), TINY):
        cells = ordered_tasks(sizes, FAMILIES, quick=False)
        assert len({cell.key for cell in cells}) == len(cells)
        assert [cell.priority for cell in cells] == sorted(cell.priority for cell in cells)
        assert {cell.family for cell in ordered_tasks(sizes, FAMILIES, quick=True)} == set(FAMILIES)
        headline = [cell.key for cell in ordered_tasks(sizes, FAMILIES, quick=True, headline=True)]
        assert headline == [cell.key for cell in cells if cell.priority == 0] != []
    assert len(ordered_tasks(Sizes(), ["decode"], quick=False)) == 2 * 3**4


def test_a_wrong_result_is_not_timed_and_a_wrong_peer_is_not_compared() -> None:
    lab = Lab(torch.device("cpu"), torch.float32)
    x = torch.randn(4, 8)

    def judge(name: str) -> Callable[[torch.Tensor], None]:
        return lambda got: require_same_function(name, got, x)

    def entry(mine: float, peer: float) -> Entry:
        rival = Contestant([lambda: x * peer], judge("peer"))
        return Entry(
            "op", "op", {}, x.dtype, lambda: x * mine, judge("mine"), x.nbytes, "read", {"peer": rival}
        )

    with pytest.raises(WrongResult, match="mine computes something else"):
        lab.row("fuse", entry(1.5, 1.0))
    row = lab.row("fuse", entry(1.0, 1.5))
    assert row.best_peer is None and "peer computes something else" in row.peers["peer"]["reason"]
    for bad in (math.nan, math.inf):
        with pytest.raises(WrongResult):
            require_same_function("bad", torch.full((2, 3), bad), torch.ones(2, 3))


def test_ours_is_held_to_the_criterion_and_not_to_a_flat_distance() -> None:
    """One element that is off by two percent of its vector's length would pass for a peer."""
    lab = Lab(torch.device("cpu"), torch.bfloat16)
    x = DecodeInputs(Decode((40, 23), 4, 2, 32, 2, 16), lab)
    right = decode.ours(x)[0]()
    x.check("ours", "paged", right, ours=True)
    wrong = right.clone()
    wrong[0, 0, 0, 3] += 0.02 * right[0, 0, 0].norm()
    x.check("peer", "paged", wrong)
    with pytest.raises(WrongResult, match="ours, sequence 0, KV head 0: .* error"):
        x.check("ours", "paged", wrong, ours=True)


FAKE_WORKER = """
import json, os, sys, time
path, fate = sys.argv[1:]
text = open(path).read() if os.path.exists(path) else ""
begun = [json.loads(line)["cell"] for line in text.splitlines() if '"begin"' in line]
row = dict(family="decode", op="op", shape="", dtype="", us=1.0, peers={}, error=None)
def write(event, **content):
    with open(path, "a") as file:
        file.write(json.dumps({"event": event, **content}) + "\\n")
for cell in ("decode: a", "decode: b", "decode: c"):
    if cell in begun:
        continue
    write("begin", cell=cell)
    if cell == "decode: b":
        write("partial", cell=cell, row={**row, "shape": cell})
        write("peer", cell=cell, peer="the slow one")
        if fate == "dies":
            os.abort()
        time.sleep(100)
    write("row", cell=cell, row={**row, "shape": cell})
    write("done", cell=cell)
"""


@pytest.fixture
def fake_worker(tmp_path: Path) -> Iterator[Path]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_WORKER)
    yield script


@pytest.mark.parametrize("fate, reason", [("dies", "SIGABRT"), ("hangs", "no progress")])
def test_a_lost_worker_costs_only_its_cell(fake_worker: Path, fate: str, reason: str) -> None:
    log, shown = fake_worker.with_name("log"), []
    command = [sys.executable, "-S", str(fake_worker), str(log), fate]
    events = supervise(command, log, stall_seconds=1.0, deadline=None, show=shown.append)
    assert events == shown
    rows = {row["shape"]: row for row in report.collect(events)["rows"]}
    assert rows.keys() == {"decode: a", "decode: b", "decode: c"}
    assert rows["decode: a"]["error"] is None and rows["decode: c"]["error"] is None
    assert reason in rows["decode: b"]["error"] and rows["decode: b"]["us"] == 1.0
    assert rows["decode: b"]["error"].startswith("while the slow one was tried: ")


def test_time_ends_a_run_and_costs_no_error(fake_worker: Path) -> None:
    log = fake_worker.with_name("log")
    command = [sys.executable, "-S", str(fake_worker), str(log), "hangs"]
    deadline = time.time() + 1.0
    events = supervise(command, log, stall_seconds=60, deadline=deadline, show=lambda event: None)
    assert time.time() < deadline + 5
    result = report.collect(events)
    assert [row["shape"] for row in result["rows"]] == ["decode: a"]
    assert result["not_run"] == {"decode: b": NO_TIME}


def test_a_worker_that_never_starts_is_not_tried_again(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-S",
        "-c",
        f"open({os.fspath(tmp_path / 'tries')!r}, 'a').write('x'); exit(4)",
    ]
    events = supervise(command, tmp_path / "log", stall_seconds=10, deadline=None, show=lambda event: None)
    assert [event["event"] for event in events] == ["worker lost"]
    assert (tmp_path / "tries").read_text() == "x"
