"""The package leaves the process as it was: levels of loggers and filters of warnings."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ranks import HAS_GLOO
from tiny import tiny_run

from fusedkv_ext.training import loop, session
from fusedkv_ext.training.progress import SilentProgress

_PARALLELIZE = """
import logging, os, tempfile, warnings
import torch, torch.distributed as dist, torch.distributed.fsdp, torch.distributed.checkpoint

def state():
    levels = {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}
    return levels, list(warnings.filters)

before = state()
import fusedkv_ext.distributed, fusedkv_ext.training.loop, fusedkv_ext.cli.main
from fusedkv_ext import Decoder, DecoderConfig
from fusedkv_ext.distributed import Layout, make_mesh, parallelize

dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/group", rank=0, world_size=1)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)
model = Decoder(DecoderConfig(vocab_size=61, num_key_value_heads=2, head_dim=16, plan="fusedkv", **sizes))
parallelize(model, make_mesh(Layout(dp_shard=1), "cpu"))
levels, filters = state()
assert {name: levels[name] for name in before[0]} == before[0]
assert filters == before[1], [f for f in filters if f not in before[1]]
print("as it was", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")
def test_parallelize_changes_no_log_level_and_no_filter() -> None:
    done = subprocess.run([sys.executable, "-c", _PARALLELIZE], capture_output=True, text=True, check=False)
    assert done.stdout == "as it was\n", done.stderr[-2000:]


def test_a_run_changes_them_for_its_own_time(tmp_path: Path) -> None:
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    before, filters = logger.level, list(warnings.filters)
    with session.quiet():
        assert logger.level == logging.ERROR and list(warnings.filters) != filters
    loop.run(loop.start(tiny_run(tmp_path), tmp_path / "run"), SilentProgress(), stop_after=1)
    loop.resume(tmp_path / "run")
    assert logger.level == before and list(warnings.filters) == filters
