"""accelerate's FSDP2 wraps each decoder layer by itself, as `accelerate launch` and the Trainer ask for it.

torchrun runs this very file: its last lines are what the two processes do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hf_tiny import VOCAB, tiny_model
from ranks import HAS_GLOO, rank_main, run_ranks
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

STEPS = 5
CASES = [("llama", "fusedkv"), ("qwen3", "skipv1")]


def model_and_optimizer(family: str, plan: str) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = tiny_model(family, plan, use_cache=False).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def batch(step: int) -> Tensor:
    return torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(step))


def accelerator_with_fsdp2() -> Accelerator:
    """On CPUs accelerate leaves FSDP out without a word, so its state is told what it is on GPUs."""
    accelerator = Accelerator(cpu=True)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    # A plugin remembers the layers of the first model that it is for.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    return accelerator


def ranks(folder: Path) -> dict[str, Any]:
    """The losses of five steps of each case over the halves of a batch, and what was wrapped."""
    found = {}
    for case in CASES:
        accelerator = accelerator_with_fsdp2()
        model, optimizer = accelerator.prepare(*model_and_optimizer(*case))
        losses = []
        for step in range(STEPS):
            ids = batch(step).chunk(2)[dist.get_rank()]
            loss = model(ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(mean := loss.detach() / 2)
            losses.append(mean.item())
        wrapped = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        found["/".join(case)] = losses, wrapped
    return found


def test_five_steps_under_accelerate_have_the_losses_of_one_process(tmp_path: Path) -> None:
    found = run_ranks(__file__, tmp_path)
    assert found[0] == found[1]
    for case in CASES:
        losses, wrapped = found[0]["/".join(case)]
        assert {f"model.layers.{i}" for i in range(4)} < set(wrapped)
        model, optimizer = model_and_optimizer(*case)
        for step in range(STEPS):
            ids = batch(step)
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert losses[step] == pytest.approx(loss.item(), rel=1e-4)


if __name__ == "__main__":
    rank_main(ranks)
