"""Messages on paper against those that ranks send: every collective of a training step, counted.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from meta_memory import as_on_cuda
from ranks import HAS_GLOO, part, rank_main, run_ranks
from torch import Tensor
from torch.distributed.distributed_c10d import (
    _resolve_process_group,
)  # by name, as functional collectives have it
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkv_ext.distributed import Layout, make_mesh, parallelize, synchronize
from fusedkv_ext.distributed.context import apply_cp
from fusedkv_ext.distributed.tensor import apply_tp
from fusedkv_ext.lab.planner import Job, memory, traffic
from fusedkv_ext.lab.planner.activations import ends, kept
from fusedkv_ext.layers.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

# case: processes, layout, plan, other arguments of the job
CASES: dict[str, tuple[int, Layout, str, dict[str, Any]]] = {
    "dp_shard": (2, Layout(dp_shard=2), "fusedkv", {}),
    "dp_shard, fp32": (2, Layout(dp_shard=2), "vanilla", {"precision": "fp32"}),
    "dp_shard, accumulating": (2, Layout(dp_shard=2), "fusedkv", {"accumulate": 3}),
    "dp_shard, checkpointing": (2, Layout(dp_shard=2), "skipv1", {"checkpointing": "non_reentrant"}),
    "dp_replicate": (2, Layout(dp_replicate=2, dp_shard=1), "fusedkv", {"accumulate": 2}),
    "cp": (2, Layout(dp_shard=1, cp=2), "fusedkv", {}),
    "cp, vanilla": (2, Layout(dp_shard=1, cp=2), "vanilla", {"accumulate": 2}),
    "cp, checkpointing": (2, Layout(dp_shard=1, cp=2), "cla", {"checkpointing": "reentrant"}),
    "tp": (2, Layout(dp_shard=1, tp=2), "fusedkv", {"accumulate": 2}),
    "tp, checkpointing": (2, Layout(dp_shard=1, tp=2), "vanilla", {"checkpointing": "non_reentrant"}),
    "tp, reentrant": (2, Layout(dp_shard=1, tp=2), "cla", {"checkpointing": "reentrant"}),
    "copies and shards": (4, Layout(dp_replicate=2, dp_shard=2), "fusedkv", {}),
    "shards, tokens": (4, Layout(dp_shard=2, cp=2), "fusedkv-lite", {}),
    "tokens, heads": (4, Layout(dp_shard=1, cp=2, tp=2), "fusedkv", {}),
    "more ranks than KV heads": (4, Layout(dp_shard=1, tp=4), "fusedkv", {}),
}
# Ranks that share heads or tokens, on which activations are counted, and plans.
KEPT = [(dim, plan) for dim in ("tp", "cp") for plan in ("vanilla", "fusedkv", "skipv1", "yoco++")]
SMALL = 64  # elements: what the formulas leave out (the loss, gradients of norms of heads) is smaller


def job_of(case: str) -> Job:
    _, layout, plan, options = CASES[case]
    config = DecoderConfig(
        vocab_size=103,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        plan=plan,
        tie_word_embeddings="copies" in case,
    )
    return Job(config, layout, 2, 24, **options)


class Messages(TorchDispatchMode):
    """Bytes that this rank receives: FSDP2's "weights" and "copies" (all-reduces of dp_replicate), and those
    between DTensors by the name of their group."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.received: dict[str, int] = {}
        self.others: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.namespace == "c10d":
            self._native(name, args)
        elif function.namespace == "_c10d_functional" and name not in (
            "wait_tensor",
            "_wrap_tensor_autograd",
        ):
            self._between_dtensors(name, args, result)
        return result

    def _native(self, name: str, args: Any) -> None:
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            self._add("weights", abs(args[0].nbytes - args[1].nbytes))
        elif name == "allreduce_":
            self._add("copies", sum(2 * (self.copies - 1) * x.nbytes // self.copies for x in args[0]))
        else:
            self.others.add(name)

    def _between_dtensors(self, name: str, args: Any, result: Any) -> None:
        group = args[-1]
        ranks = _resolve_process_group(group).size()
        if name.startswith("all_reduce"):
            if args[0].numel() > SMALL:
                self._add(group, 2 * (ranks - 1) * args[0].nbytes // ranks)
        elif name.startswith(("all_gather_into_tensor", "reduce_scatter_tensor")):
            self._add(group, abs(result.nbytes - args[0].nbytes))
        else:
            self.others.add(name)

    def _add(self, kind: str, size: int) -> None:
        self.received[kind] = self.received.get(kind, 0) + size


def step(case: str) -> dict[str, Any]:
    """One training step, and what this rank holds after it."""
    job = job_of(case)
    torch.manual_seed(3)
    model = Decoder(job.config)
    mesh = make_mesh(job.layout, "cpu")
    how = None if job.checkpointing == "none" else job.checkpointing
    parallelize(model, mesh, precision=job.precision, activation_checkpointing=how)
    ids = torch.randint(
        103, (job.batch, job.context), generator=torch.Generator().manual_seed(mesh.data_rank)
    )
    with Messages(job.layout.dp_replicate) as messages:
        for micro_batch in range(job.accumulate):
            synchronize(model, micro_batch == job.accumulate - 1)
            model.loss(ids, ids).backward()
    found = messages.received
    groups = {
        dim: getattr(mesh, dim).get_group().group_name
        for dim in ("cp", "tp")
        if getattr(mesh, dim) is not None
    }
    parts = [part(p) for p in model.parameters()]
    return {
        "weights": found.pop("weights", 0),
        "copies": found.pop("copies", 0),
        **{dim: found.pop(name, 0) for dim, name in groups.items()},
        "others": (messages.others, found),
        "parameters": sum(x.nbytes for x in parts),
        "gradients": sum(part(p.grad).nbytes for p in model.parameters()),
    }


def kept_on_a_rank(layout: Layout, plan: str) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward on this rank, counted, and by the formulas.

    The gradients that the loss keeps are counted in test_scale.py.
    """
    config = DecoderConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        plan=plan,
    )
    job = Job(config, layout, 2, 256, precision="fp32")
    torch.manual_seed(3)
    model, mesh = Decoder(config), make_mesh(layout, "cpu")
    if mesh.tp is not None:
        apply_tp(model, mesh.tp)
    if mesh.cp is not None:
        apply_cp(model, mesh.cp)
    saved: dict[int, Tensor] = {}
    weights = {part(p).untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        local = part(x)
        storage = local.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = local
        return x

    ids = torch.randint(128, (2, 256), generator=torch.Generator().manual_seed(4))
    with as_on_cuda(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss(ids, ids)
    found = sum(local.untyped_storage().nbytes() for local in saved.values())
    return found, kept(job) + ends(job)


def work(folder: Path) -> dict[Any, Any]:
    ranks = torch.distributed.get_world_size()
    found: dict[Any, Any] = {case: step(case) for case, (n, *_) in CASES.items() if n == ranks}
    if ranks == 2:
        for dim, plan in KEPT:
            found[dim, plan] = kept_on_a_rank(Layout(dp_shard=1, **{dim: 2}), plan)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """By case, what each rank found."""
    folder = tmp_path_factory.mktemp("messages")
    ranks = {n: run_ranks(__file__, folder / str(n), processes=n) for n in (2, 4)}
    cases = {**{case: processes for case, (processes, *_) in CASES.items()}, **dict.fromkeys(KEPT, 2)}
    return {case: [rank[case] for rank in ranks[processes]] for case, processes in cases.items()}


@pytest.mark.parametrize("case", CASES)
def test_messages_are_those_of_the_formulas(case: str, found: dict[Any, list[Any]]) -> None:
    expected = traffic(job_of(case))
    for rank in found[case]:
        assert rank["others"] == (set(), {})
        assert rank["weights"] == expected.dp_shard
        assert rank["copies"] == expected.dp_replicate
        assert rank.get("cp", 0) == expected.cp
        assert rank.get("tp", 0) == expected.tp


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_the_parameters_and_gradients_of_the_formulas(
    case: str, found: dict[Any, list[Any]]
) -> None:
    size = memory(job_of(case))
    held = [rank["parameters"] for rank in found[case]]
    assert max(held) == size.parameters
    if job_of(case).accumulate == 1:
        assert max(rank["gradients"] for rank in found[case]) == size.gradients


@pytest.mark.parametrize(("dim", "plan"), KEPT)
def test_activations_are_shared_like_heads_and_tokens(
    dim: str, plan: str, found: dict[Any, list[Any]]
) -> None:
    """On every rank: the two chunks of each see as many keys together."""
    for counted, expected in found[dim, plan]:
        assert counted == pytest.approx(expected, rel=1e-3)


if __name__ == "__main__":
    rank_main(work)
