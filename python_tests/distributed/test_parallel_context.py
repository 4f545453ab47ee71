"""Context parallelism: ranks that share the tokens compute the loss and every gradient of one process, and
move the bytes that the formula says.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import HAS_GLOO, gradients, rank_main, run_ranks
from tiny import LAYERS, PLANS, hybrid, tiny_decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.ops.recompute import Checkpointing
from fusedkv_ext.training.config import TrainConfig

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

if HAS_GLOO:
    from torch.distributed.device_mesh import init_device_mesh

    from fusedkv_ext.distributed import Layout, make_mesh, parallelize
    from fusedkv_ext.distributed.context import ContextParallel, apply_cp, context_traffic

TOKENS, BATCH, HEADS, HEAD_DIM = 24, 2, 2, 16
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
MLA = {"head_dim": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = ("vanilla", "fusedkv", "fusedkv-lite", "yoco", "cla", "skipv1", "resformer", "yoco++", "patchwork")
PACKED = ("documents", "documents, windows", "documents, latents")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{plan: (plan, {}) for plan in SHARED},
    "windows": ("vanilla", {"sliding_window": 5}),
    "windows between": ("fusedkv", hybrid("fusedkv")),
    "window of a chunk": ("vanilla", {"sliding_window": 7}),
    "one head": ("fusedkv", {"num_key_value_heads": 1}),
    "recomputed fusion": ("fusedkv", {"recompute_fusion": True}),
    "experts": ("fusedkv", EXPERTS),
    "latents": ("fusedkv-lite", MLA),
    "mixed latents": ("resformer", MLA),
    "documents": ("fusedkv", {}),
    "documents, windows": ("vanilla", {"sliding_window": 7}),
    "documents, latents": ("fusedkv-lite", MLA),
}
FOUR = ("vanilla", "fusedkv", "resformer", "windows", "documents")
MEASURED = [
    *((plan, 2) for plan in ("vanilla", "fusedkv", "fusedkv-lite", "yoco", "skipv1", "resformer")),
    *((plan, 4) for plan in ("vanilla", "fusedkv", "resformer")),
]
WITH_HEADS = ("fusedkv", "resformer", "one head", "documents")
# Weights shared over the same ranks by FSDP2, and layers that gather again in the backward.
SHARDED: dict[str, tuple[str, Checkpointing | None]] = {
    f"{case}, {how}": (case, how)
    for case, how in (
        *(("fusedkv", how) for how in (None, "reentrant", "non_reentrant")),
        ("resformer", "reentrant"),
        ("experts", "non_reentrant"),
        ("latents", "reentrant"),
    )
}


def model_of(case: str) -> Decoder:
    torch.manual_seed(5)
    plan, changes = CASES[case]
    return tiny_decoder(plan, **changes).double()


def batch(case: str = "", rows: int = BATCH) -> dict[str, Tensor]:
    """Ids, labels whose target tokens are spread unevenly over the ranks, and documents that cross chunks."""
    ids = torch.randint(61, (rows, TOKENS), generator=torch.Generator().manual_seed(6))
    labels = ids.clone()
    labels[0, 3:14] = -100
    if case not in PACKED:
        return {"ids": ids, "labels": labels}
    begins = torch.zeros_like(ids)
    begins[0, [5, 13, 14]] = begins[1, [10, 21]] = 1
    return {"ids": ids, "labels": labels, "document_ids": begins.cumsum(1)}


class Counted(TorchDispatchMode):
    """Bytes of the whole tensor of each collective, by name; not FSDP2's, which are of another namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, list[int]] = {name: [] for name in COLLECTIVES}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "_c10d_functional":
            name = function.overloadpacket.__name__
            if name not in ("wait_tensor", "_wrap_tensor_autograd"):  # they move nothing
                self.moved[name].append(max(args[0].nbytes, result.nbytes))
        return result


def found_in(model: Decoder, inputs: dict[str, Tensor]) -> dict[str, Any]:
    with Counted() as forward:
        logits, loss = model(**inputs)
    with Counted() as backward:
        loss.backward()
    found = {"loss": loss.detach(), "logits": logits.detach(), "gradients": gradients(model)}
    model.zero_grad()  # now: after a forward without gradients FSDP2 has other parameters in their place
    with torch.no_grad():
        evaluated = model(**inputs)[1]
    without = model.loss(**inputs)
    without.backward()
    found["without logits"] = {"loss": without.detach(), "gradients": gradients(model)}
    return {**found, "evaluated": evaluated, "forward": forward.moved, "backward": backward.moved}


def added(ranks: list[dict[str, Any]], name: str) -> Tensor:
    return sum(rank["gradients"][name] for rank in ranks)


def without_logits(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rank["without logits"] for rank in ranks]


def compare(loss: Tensor, gradient: Callable[[str], Tensor], alone: dict[str, Any], where: str) -> None:
    torch.testing.assert_close(loss, alone["loss"], rtol=1e-10, atol=0, msg=where)
    for name, expected in alone["gradients"].items():
        largest = expected.abs().max().item()
        assert largest > 1e-6, f"{where}: {name} has no gradient to compare"
        torch.testing.assert_close(
            gradient(name),
            expected,
            rtol=1e-8,
            atol=1e-10 * largest,
            msg=lambda text, name=name: f"{where}, {name}: {text}",
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(__file__, folder / "two", processes=2)


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(__file__, folder / "four", processes=4)


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_add_up_to_one_process(case: str, two: list[dict[str, Any]]) -> None:
    alone = found_in(model_of(case), batch(case))
    for rank in two:
        compare(rank[case]["loss"], lambda name: added([r[case] for r in two], name), alone, case)
        lean = without_logits([r[case] for r in two])
        compare(rank[case]["without logits"]["loss"], partial(added, lean), alone, case)
        torch.testing.assert_close(rank[case]["evaluated"], alone["evaluated"], rtol=1e-10, atol=0)
    assert torch.equal(two[0][case]["loss"], two[1][case]["loss"])


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_add_up_to_one_process(case: str, four: list[dict[str, Any]]) -> None:
    alone = found_in(model_of(case), batch(case))
    for rank in four:
        compare(rank[case]["loss"], lambda name: added([r[case] for r in four], name), alone, case)


@pytest.mark.parametrize("case", SHARDED)
def test_with_sharded_weights_every_rank_has_the_whole_gradient(case: str, two: list[dict[str, Any]]) -> None:
    name, how = SHARDED[case]
    alone = found_in(model_of(name), batch(name))
    for rank in two:
        compare(rank[case]["loss"], rank[case]["gradients"].__getitem__, alone, case)
        lean = rank[case]["without logits"]
        compare(lean["loss"], lean["gradients"].__getitem__, alone, case)
        again = rank[case]["backward"]["all_gather_into_tensor"]
        assert again == (rank[name]["forward"]["all_gather_into_tensor"][::-1] if how else [])


@pytest.mark.parametrize("case", WITH_HEADS)
def test_two_ranks_share_the_tokens_and_two_the_heads(case: str, four: list[dict[str, Any]]) -> None:
    alone = found_in(model_of(case), batch(case))
    for rank in four:
        found = rank[f"{case}, heads"]
        compare(found["loss"], found["gradients"].__getitem__, alone, case)
        lean = found["without logits"]
        compare(lean["loss"], lean["gradients"].__getitem__, alone, case)
        one_head = context_traffic(PLANS[CASES[case][0]], 1, HEAD_DIM, BATCH * TOKENS, 2, torch.float64)
        assert sum(found["backward"]["reduce_scatter_tensor"]) == 2 * one_head  # sent: half of each


def test_compiled_layers_compute_the_same(two: list[dict[str, Any]]) -> None:
    alone = found_in(model_of("fusedkv"), batch())
    for rank in two:
        compare(rank["compiled"]["loss"], rank["compiled"]["gradients"].__getitem__, alone, "compiled")
        again = rank["compiled, again"]
        compare(again["loss"], again["gradients"].__getitem__, alone, "compiled, again")
        assert rank["graphs, again"] == rank["graphs"] > 0


def test_two_data_ranks_of_two_context_ranks(four: list[dict[str, Any]]) -> None:
    """Each data rank's loss is a mean over its own rows, all of them targets: the gradients' sum is twice the
    whole batch's."""
    ids = batch(rows=4)["ids"]
    alone = found_in(model_of("fusedkv"), {"ids": ids, "labels": ids})
    losses = [rank["data x context"]["loss"] for rank in four]
    assert losses[0] == losses[1] != losses[2] == losses[3]
    for rank in four:
        gradients = rank["data x context"]["gradients"]
        loss = (losses[0] + losses[2]) / 2
        compare(loss, lambda name, gradients=gradients: gradients[name] / 2, alone, "data x context")


def test_a_rank_has_the_first_and_the_last_of_what_is_left(two: list[dict[str, Any]]) -> None:
    alone = found_in(model_of("fusedkv"), batch())["logits"]
    chunk = TOKENS // 4
    for number, rank in enumerate(two):
        own = [i for i in range(TOKENS) if i // chunk in (number, 3 - number)]
        assert rank["positions"].tolist() == own
        torch.testing.assert_close(rank["fusedkv"]["logits"], alone[:, own], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packed", (False, True))
def test_a_layer_alone_knows_its_positions(packed: bool, two: list[dict[str, Any]]) -> None:
    out = layer_alone(packed)
    for rank in two:
        torch.testing.assert_close(
            rank["layer alone"][packed], out[:, rank["positions"]], rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(("plan", "cp"), MEASURED)
def test_bytes_are_what_the_formula_says(plan: str, cp: int, request: pytest.FixtureRequest) -> None:
    ranks = request.getfixturevalue("two" if cp == 2 else "four")
    said = context_traffic(PLANS[plan], HEADS, HEAD_DIM, BATCH * TOKENS, cp, torch.float64)
    stored = [
        len(PLANS[plan].stored_key_heads(i, HEADS)) + len(PLANS[plan].stored_value_heads(i, HEADS))
        for i in range(LAYERS)
    ]
    whole = [heads * HEAD_DIM * BATCH * TOKENS * 8 for heads in stored if heads]
    for rank in ranks:
        forward, backward = rank[plan]["forward"], rank[plan]["backward"]
        assert forward["all_gather_into_tensor"] == whole  # one collective per layer that stores
        assert backward["reduce_scatter_tensor"] == whole[::-1]
        assert len(forward["all_reduce"]) == 1  # the loss
        assert not (forward["reduce_scatter_tensor"] or backward["all_gather_into_tensor"])
        assert not backward["all_reduce"]
    assert sum(whole) * (cp - 1) // cp == said
    assert said == PLANS[plan].cache_ratio * context_traffic(
        PLANS["vanilla"], HEADS, HEAD_DIM, BATCH * TOKENS, cp, torch.float64
    )


def test_one_rank_alone_receives_nothing() -> None:
    assert context_traffic(PLANS["vanilla"], HEADS, HEAD_DIM, 128, 1, torch.bfloat16) == 0
    with pytest.raises(ValueError, match="tokens=127 and cp=2"):
        context_traffic(PLANS["vanilla"], HEADS, HEAD_DIM, 127, 2, torch.bfloat16)


def test_a_sequence_that_cannot_be_cut_is_said_before_the_run() -> None:
    changes = {"data.seq_len": 130, "parallel.cp": 2}
    with pytest.raises(
        ConfigError, match=r"data.seq_len must be a multiple of 2 x parallel.cp \(4\), got 130"
    ):
        TrainConfig().updated(changes.items())


def test_what_cannot_be_shared_is_said(two: list[dict[str, Any]]) -> None:
    for rank in two:
        said = rank["said"]
        assert "2 x cp = 4 equal chunks, but seq_len is 22" in said["length"]
        assert "generate with another model" in said["generate"]
        assert "cache must be None and logits_to_keep 0" in said["cache"]
        assert "cache must be None and logits_to_keep 0" in said["keep"]
        assert "cache and last must be None" in said["layer"]
        assert "q must have 12 tokens, 1/2 of keys' 24, got 24" in said["rows"]
        assert "mesh must have one dimension" in said["mesh"]
        assert "causal must be True" in said["causal"]


@contextmanager
def saying(said: dict[str, str], what: str) -> Iterator[None]:
    """Keeps the words of the ValueError that its body raises."""
    with pytest.raises(ValueError) as error:
        yield
    said[what] = str(error.value)


def errors(context: ContextParallel, mesh: Any) -> dict[str, str]:
    model, said = model_of("fusedkv"), {}
    apply_cp(model, mesh)
    ids = batch()["ids"]
    x = torch.zeros(2, TOKENS, 4, HEAD_DIM)
    with torch.no_grad():
        with saying(said, "length"):
            model(ids[:, :22])
        with saying(said, "cache"):
            model(ids, cache=model.make_cache(2, TOKENS))
        with saying(said, "generate"):
            model.generate(ids, 1, use_cache=False)
        with saying(said, "keep"):
            model(ids, logits_to_keep=1)
        with saying(said, "layer"):
            model.model.layers[0].self_attn(torch.zeros(2, 4, 32), last=1)
        with saying(said, "rows"):
            context.attend(x, [x], [x])
        with saying(said, "mesh"):
            ContextParallel(init_device_mesh("cpu", (1, 2)))
        with saying(said, "causal"):
            context.attend(x, [x], [x], causal=False)
    return said


def layer_alone(packed: bool, context: ContextParallel | None = None) -> Tensor:
    """Attention of a layer that makes its positions itself, from the tokens of all or of this rank."""
    attention = model_of("fusedkv").model.layers[0].self_attn
    attention.context = context
    x = torch.randn(BATCH, TOKENS, 32, generator=torch.Generator().manual_seed(7)).double()
    document_ids = batch("documents")["document_ids"] if packed else None
    with torch.no_grad():
        return attention(x if context is None else context.take(x), document_ids=document_ids)[0]


def work(folder: Path) -> dict[str, Any]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    found: dict[str, Any] = {}
    for case in CASES if size == 2 else FOUR:
        model = model_of(case)
        apply_cp(model, mesh)
        found[case] = found_in(model, batch(case))
    if size == 2:
        shared = make_mesh(Layout(cp=2), "cpu")
        for case, (name, how) in SHARDED.items():
            model = model_of(name)
            parallelize(model, shared, activation_checkpointing=how)
            found[case] = found_in(model, batch(name))
        model = model_of("fusedkv")
        parallelize(model, shared)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
        loss = model(**batch())[1]  # not counted: torch.compile does nothing within a dispatch mode
        loss.backward()
        found["compiled"] = {"loss": loss.detach(), "gradients": gradients(model)}
        counters = torch._dynamo.utils.counters
        found["graphs"] = counters["stats"]["unique_graphs"]
        counters.clear()
        torch._dynamo.reset()  # or the graphs of the layers above would do
        model, compile = model_of("fusedkv"), torch.compile
        torch.compile = partial(compile, backend="aot_eager")
        parallelize(model, shared, activation_checkpointing="non_reentrant", compile=True)
        torch.compile = compile
        loss = model(**batch())[1]
        loss.backward()
        found["compiled, again"] = {"loss": loss.detach(), "gradients": gradients(model)}
        found["graphs, again"] = counters["stats"]["unique_graphs"]
        context = ContextParallel(mesh)
        found["positions"] = context.positions(TOKENS)
        found["layer alone"] = [layer_alone(packed, context) for packed in (False, True)]
        found["said"] = errors(context, mesh)
    else:
        shared = make_mesh(Layout(dp_shard=2, cp=2), "cpu")
        model = model_of("fusedkv")
        parallelize(model, shared)
        ids = batch(rows=4)["ids"].chunk(2)[shared.data_rank]
        found["data x context"] = found_in(model, {"ids": ids, "labels": ids})
        shared = make_mesh(Layout(cp=2, tp=2), "cpu")
        for case in WITH_HEADS:
            model = model_of(case)
            parallelize(model, shared)
            found[f"{case}, heads"] = found_in(model, batch(case))
    return found


if __name__ == "__main__":
    rank_main(work)
