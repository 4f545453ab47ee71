"""Operations on DTensors: each placement gives the result of one process, and nothing is moved without need.

torchrun runs this very file in two processes: its last lines are what they do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from ranks import HAS_GLOO, rank_main, run_ranks
from torch import Tensor
from torch.torch_version import TorchVersion

import fusedkv_ext as fkv

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

B, T, G, D, GROUP = 4, 6, 2, 16, 2
SOURCES_PLACED = ("whole", "sequences", "tokens", "heads")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(__file__, tmp_path_factory.mktemp("rules"))


def each(ranks: list[dict], part: str) -> Iterator[tuple[str, dict]]:
    """What both ranks found in the cases of a part."""
    assert ranks[0][part].keys() == ranks[1][part].keys() and ranks[0][part]
    for rank in ranks:
        yield from rank[part].items()


def equal(found: dict[str, Any], **tolerance: float) -> None:
    for name, (actual, expected) in found["pairs"].items():
        assert expected.abs().max() > 0.1, name
        torch.testing.assert_close(actual, expected, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_importing_the_package_does_not_import_dtensor() -> None:
    code = "import sys, fusedkv_ext; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_rules_torch_refuses(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "does not have a sharding strategy registered" in rank["before"]


def test_fusion_and_its_gradients_equal_those_of_one_process(ranks: list[dict]) -> None:
    for _, found in each(ranks, "fuse_kv"):
        equal(found, rtol=1e-12, atol=1e-12)


def test_fusion_moves_nothing_where_inputs_fit(ranks: list[dict]) -> None:
    for case, found in each(ranks, "fuse_kv"):
        if "weights whole, sources heads" not in case:  # those weights are cut, which needs no message
            assert found["messages"] == 0, case
        assert found["placements"]["out"] == found["placements"]["sources"], case


def test_gradients_of_whole_weights_are_sums_over_processes(ranks: list[dict]) -> None:
    for case, found in each(ranks, "fuse_kv"):
        if "no gradient" not in case and ("sources sequences" in case or "sources tokens" in case):
            assert found["placements"]["weights.grad"] == "(Partial(sum),)", case


def test_which_gradients_are_wanted_is_not_mixed_up_between_calls(ranks: list[dict]) -> None:
    for _, found in each(ranks, "wanted"):
        equal(found, rtol=1e-12, atol=1e-12)


def test_both_sums_in_one_launch_and_accumulated_gradients(ranks: list[dict]) -> None:
    for _, found in each(ranks, "pair"):
        equal(found, rtol=1e-12, atol=1e-12)
    for _, found in each(ranks, "accumulate"):
        equal(found, rtol=1e-12, atol=1e-12)


def test_decoding_equals_that_of_one_process(ranks: list[dict]) -> None:
    for case, found in each(ranks, "decode"):
        equal(found, rtol=0, atol=0)
        assert found["messages"] == 0, case


def test_caches_of_codes_are_read_and_written_as_by_one_process(ranks: list[dict]) -> None:
    for part in ("coded", "encoded"):
        for case, found in each(ranks, part):
            equal(found, rtol=0, atol=0)
            assert found["messages"] == 0, case


def test_states_merge_where_they_are(ranks: list[dict]) -> None:
    for case, found in each(ranks, "merged"):
        equal(found, rtol=0, atol=0)
        assert found["messages"] == 0, case


def test_what_does_not_fit_is_gathered(ranks: list[dict]) -> None:
    for case, found in each(ranks, "gathered"):
        equal(found, rtol=0, atol=0)
        assert found["messages"] > 0, case


def test_appending_writes_to_the_caches_of_each_process(ranks: list[dict]) -> None:
    for case, found in each(ranks, "append"):
        equal(found, rtol=0, atol=0)
        assert found["messages"] == 0, case


def test_what_would_write_to_a_moved_copy_is_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        for name, message in rank["refused"].items():
            assert message.startswith(name) and "in place and moves no tensor" in message


def test_attention_with_gradients_by_local_map(ranks: list[dict]) -> None:
    for _, found in each(ranks, "local_map"):
        equal(found, rtol=1e-11, atol=1e-12)


def test_attention_without_gradients_folds(ranks: list[dict]) -> None:
    for case, found in each(ranks, "folded"):
        equal(found, rtol=1e-5, atol=1e-6)
        assert found["messages"] == 0, case


# What the processes do


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def counted(function: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and the messages between processes that it needed."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as messages:
        result = function()
    return result, messages.get_total_counts()


class Placed:
    """Places tensors on the mesh; dims of (B, T, G, D)."""

    def __init__(self, mesh: Any) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        self.dims = dict(zip(SOURCES_PLACED, (None, 0, 1, 2), strict=True))
        self.whole = Replicate()
        self._shard, self._place, self.mesh = Shard, distribute_tensor, mesh

    def along(self, dim: int | None) -> Any:
        return self.whole if dim is None else self._shard(dim)

    def __call__(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        return self._place(tensor, self.mesh, [self.along(dim)])


def fuse_kv(place: Placed) -> dict[str, Any]:
    """All placements, for weights of all shapes; sizes that do not divide too."""
    results = {}
    shapes = {"full": (2, G, D), "per head": (2, G, 1), "per channel": (2, 1, D), "scalars": (2, 1, 1)}
    for sources_placed, dim in place.dims.items():
        for name, shape in shapes.items():
            for uneven in (False, True):
                sizes = (B + uneven, T + uneven, G + uneven, D)
                shape = tuple(G + uneven if size == G and i == 1 else size for i, size in enumerate(shape))
                for weights_placed in ("whole", "heads") if dim == 2 and shape[1] > 1 else ("whole",):
                    case = f"weights {weights_placed}, sources {sources_placed}, {name}, uneven {uneven}"
                    w_dim = 1 if weights_placed == "heads" else None
                    results[case] = fused(place, sizes, shape, dim, w_dim)
    return results


def fused(
    place: Placed,
    sizes: tuple[int, ...],
    weights_shape: tuple[int, ...],
    dim: int | None,
    weights_dim: int | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> dict[str, Any]:
    tensors = [draw(*sizes), draw(*sizes), draw(*weights_shape)]
    grad = draw(*sizes)
    alone = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    dims = (dim, dim, weights_dim)
    shared = [place(x, d).requires_grad_(need) for x, d, need in zip(tensors, dims, needs, strict=True)]
    expected = fkv.fuse_kv(alone[:2], alone[2])
    expected.backward(grad)
    grad_shared = place(grad, dim)

    def run() -> Tensor:
        out = fkv.fuse_kv(shared[:2], shared[2])
        out.backward(grad_shared)
        return out

    out, messages = counted(run)
    pairs = {"out": (out.detach().full_tensor(), expected.detach())}
    placements = {"out": str(out.placements), "sources": str(shared[0].placements)}
    for name, x, y in zip(("first", "second", "weights"), shared, alone, strict=True):
        if y.grad is None:
            assert x.grad is None
        else:
            pairs[name] = (x.grad.full_tensor(), y.grad)
            placements[f"{name}.grad"] = str(x.grad.placements)
    return {"pairs": pairs, "messages": messages, "placements": placements}


def wanted(place: Placed) -> dict[str, Any]:
    """The same placements after one another with other gradients: torch keeps decisions by placements."""
    results = {}
    for placed, dim in place.dims.items():
        for needs in ((False, True, True), (True, True, False), (True, True, True), (False, False, True)):
            results[f"{placed} {needs}"] = fused(place, (B, T, G, D), (2, G, D), dim, None, needs)
    return results


def pair(place: Placed) -> dict[str, Any]:
    from fusedkv_ext.ops.fuse import fuse_pair

    results = {}
    for placed, dim in place.dims.items():
        keys, values = [draw(B, T, G, D) for _ in range(2)], [draw(B, T, G, 8) for _ in range(3)]
        a = draw(2, G, 1)
        expected = fuse_pair((keys, a), (values, None))
        on = [[place(x, dim) for x in side] for side in (keys, values)]
        out = fuse_pair((on[0], place(a, 1 if dim == 2 else None)), (on[1], None))
        found = [(x.full_tensor(), y) for x, y in zip(out, expected, strict=True)]
        results[placed] = {"pairs": dict(zip(("keys", "values"), found, strict=True))}
    return results


def accumulate(place: Placed) -> dict[str, Any]:
    results = {}
    for placed, dim in place.dims.items():
        grad, *sources = (draw(B, T, G, D) for _ in range(3))
        weights, buffers = draw(2, G, 1), [draw(B, T, G, D) for _ in range(2)]
        shared = [place(x, dim) for x in (grad, *sources, *buffers)]
        on_weights = place(weights.expand(2, G, D).contiguous(), 1 if dim == 2 else None)
        expected, of_weights = fkv.fuse_kv_backward(grad, sources, weights, grad_sources=buffers)
        got, grad_weights = fkv.fuse_kv_backward(shared[0], shared[1:3], on_weights, grad_sources=shared[3:])
        assert got[0] is shared[3]
        pairs = {str(j): (x.full_tensor(), y) for j, (x, y) in enumerate(zip(got, expected, strict=True))}
        pairs["weights"] = (grad_weights.full_tensor().sum(-1, keepdim=True), of_weights)
        fresh, _ = fkv.fuse_kv_backward(shared[0], shared[1:3], on_weights, needs_weights=False)
        alone, _ = fkv.fuse_kv_backward(grad, sources, weights, needs_weights=False)
        pairs["fresh"] = (torch.stack([x.full_tensor() for x in fresh]), torch.stack(alone))
        results[placed] = {"pairs": pairs}
    return results


def caches(kv_heads: int, paged: bool) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Two key and two value caches, float32, with lengths and, for pages of 4 tokens, a table."""
    capacity = 16
    shape = (B * capacity // 4, 4, kv_heads, D) if paged else (B, capacity, kv_heads, D)
    tensors = {name: draw(*shape, dtype=torch.float32) for name in ("k0", "k1", "v0", "v1")}
    seqlens = torch.tensor([16, 3, 7, 11], dtype=torch.int32)
    table = torch.randperm(shape[0]).int().view(B, -1) if paged else None
    return tensors, seqlens, table


def decode(place: Placed) -> dict[str, Any]:
    results = {}
    for paged in (False, True):
        for placed, dim in place.dims.items():
            if placed != "tokens":
                for weighted in ("both", "keys", "values", "none"):
                    for rows in (1, 40):
                        case = f"{placed}, paged {paged}, weights {weighted}, rows {rows}"
                        results[case] = attended(place, G, dim, dim, paged, weighted, rows)
                results[f"{placed}, paged {paged}, scores"] = attended(
                    place, G, dim, dim, paged, "both", 1, scores=True
                )
        for scores in (False, True):
            case = f"query heads of one KV head, paged {paged}, scores {scores}"
            results[case] = attended(place, 1, 2, None, paged, "both", 1, scores)
    return results


def attended(
    place: Placed,
    kv_heads: int,
    q_dim: int | None,
    dim: int | None,
    paged: bool,
    weighted: str,
    rows: int,
    scores: bool = False,
) -> dict[str, Any]:
    """A decoded step. ``scores``: with a soft cap, sinks (H,) and slopes (B, H)."""
    tensors, seqlens, table = caches(kv_heads, paged)
    q = draw(B, rows, 6 if kv_heads == 3 else 4, D, dtype=torch.float32)
    a, b = (torch.rand(2, kv_heads, 1) + 0.5 for _ in range(2))
    weights = [a if weighted in ("both", "keys") else None, b if weighted in ("both", "values") else None]
    sides = [tensors["k0"], tensors["k1"]], [tensors["v0"], tensors["v1"]]
    options = {"cache_seqlens": seqlens, "block_table": table, "return_lse": True}
    if scores:
        options.update(softcap=3.0, sinks=torch.randn(q.shape[2]), alibi_slopes=torch.rand(B, q.shape[2]))
    expected = fkv.fused_kv_attn_with_kvcache(q, *sides, *weights, **options)

    pool = None if paged and dim == 0 else dim
    of_batch = 0 if dim == 0 else None
    on_sides = [[place(x, pool) for x in side] for side in sides]
    on_weights = [None if x is None else place(x, 1 if dim == 2 else None) for x in weights]
    on = {"cache_seqlens": place(seqlens, of_batch)}
    on["block_table"] = None if table is None else place(table, of_batch)
    if scores:
        on["softcap"] = 3.0
        on["sinks"] = place(options["sinks"], 0 if q_dim == 2 else None)
        on["alibi_slopes"] = place(options["alibi_slopes"], {0: 0, 2: 1}.get(q_dim))
    on_q = place(q, q_dim)
    (out, lse), messages = counted(
        lambda: fkv.fused_kv_attn_with_kvcache(on_q, *on_sides, *on_weights, **on, return_lse=True)
    )
    plain = fkv.fused_kv_attn_with_kvcache(on_q, *on_sides, *on_weights, **on)
    finite = lse.full_tensor().isfinite()
    assert torch.equal(finite, expected[1].isfinite()) and torch.equal(plain.full_tensor(), out.full_tensor())
    pairs = {"out": (out.full_tensor(), expected[0]), "lse": (lse.full_tensor()[finite], expected[1][finite])}
    return {"pairs": pairs, "messages": messages}


def gathered(place: Placed) -> dict[str, Any]:
    """Tokens of a cache; 3 KV heads, which are not cut like 6 query heads."""
    found = {
        "tokens": attended(place, G, None, 1, False, "both", 1),
        "query heads of three KV heads": attended(place, 3, 2, None, False, "both", 1),
    }
    if TorchVersion(torch.__version__) >= "2.13":  # 2.11 gathers 2 + 1 heads with gaps: an error
        found["three KV heads"] = attended(place, 3, 2, 2, False, "both", 1)
    return found


def coded(place: Placed) -> dict[str, Any]:
    """4-bit codes with a codebook, scales of tokens, a query per source and a bias of values."""
    results = {}
    for paged in (False, True):
        for placed, dim in place.dims.items():
            if placed == "tokens":
                continue
            tensors, seqlens, table = caches(G, paged)
            shape = next(iter(tensors.values())).shape[:3]
            of_batch, pool = 0 if dim == 0 else None, None if paged and dim == 0 else dim
            arguments: dict[str, tuple[Any, int | None]] = {
                "q": ([draw(B, 2, 4, D, dtype=torch.float32) for _ in range(2)], dim),
                "key_caches": ([torch.randint(0, 256, (*shape, D // 2)).byte() for _ in range(2)], pool),
                "value_caches": ([torch.randint(0, 256, (*shape, D // 2)).byte() for _ in range(2)], pool),
                "value_weights": (torch.rand(2, G, D) + 0.5, 1 if dim == 2 else None),
                "cache_seqlens": (seqlens, of_batch),
                "codebook": (torch.randn(16), None),
                "key_token_scales": ([torch.rand(shape).half() for _ in range(2)], pool),
                "value_token_scales": ([torch.rand(shape).half() for _ in range(2)], pool),
                "value_bias": (torch.randn(G, D), 0 if dim == 2 else None),
            }
            if table is not None:
                arguments["block_table"] = (table, of_batch)
            expected = fkv.fused_kv_attn_with_kvcache(**{name: x for name, (x, _) in arguments.items()})
            on = {
                name: [place(y, d) for y in x] if isinstance(x, list) else place(x, d)
                for name, (x, d) in arguments.items()
            }
            out, messages = counted(lambda on=on: fkv.fused_kv_attn_with_kvcache(**on))
            pairs = {"out": (out.full_tensor(), expected)}
            results[f"{placed}, paged {paged}"] = {"pairs": pairs, "messages": messages}
    return results


def encoded(place: Placed) -> dict[str, Any]:
    """Rows that ``append_kvcache`` encodes with scales and centers."""
    results = {}
    for placed, dim in place.dims.items():
        if placed == "tokens":
            continue
        seqlens = torch.tensor([16, 3, 7, 11], dtype=torch.int32)
        new = [draw(B, 2, G, D, dtype=torch.float32) for _ in range(2)]
        stored = [torch.zeros(B, 16, G, D, dtype=torch.int8) for _ in range(2)]
        names = ("key_scale", "key_center", "value_scale", "value_center")
        of_codes = {name: torch.rand(G, D) / 64 for name in names}
        on_stored = [place(x.clone(), dim) for x in stored]
        on_new = [place(x, dim) for x in new]
        on = {name: place(x, 0 if dim == 2 else None) for name, x in of_codes.items()}
        on["cache_seqlens"] = place(seqlens, 0 if dim == 0 else None)
        fkv.append_kvcache(*new, *stored, cache_seqlens=seqlens, **of_codes)
        _, messages = counted(lambda new=on_new, to=on_stored, on=on: fkv.append_kvcache(*new, *to, **on))
        pairs = {str(j): (x.full_tensor(), y) for j, (x, y) in enumerate(zip(on_stored, stored, strict=True))}
        results[placed] = {"pairs": pairs, "messages": messages}
    return results


def merged(place: Placed) -> dict[str, Any]:
    results = {}
    for placed, dim in place.dims.items():
        outs = [draw(B, T, G, D, dtype=torch.float32) for _ in range(2)]
        lses = [draw(B, G, T, dtype=torch.float32) for _ in range(2)]
        of_lse = None if dim is None else {0: 0, 1: 2, 2: 1}[dim]
        on = [place(outs[0], dim), place(lses[0], of_lse), place(outs[1], dim), place(lses[1], of_lse)]
        expected = fkv.merge_state(outs[0], lses[0], outs[1], lses[1])
        got, messages = counted(lambda on=on: fkv.merge_state(*on))
        names = ("out", "lse")
        pairs = {n: (x.full_tensor(), y) for n, x, y in zip(names, got, expected, strict=True)}
        results[placed] = {"pairs": pairs, "messages": messages}
    return results


def append(place: Placed) -> dict[str, Any]:
    results = {}
    cos, sin = torch.rand(16, D // 2), torch.rand(16, D // 2)
    for paged in (False, True):
        for placed, dim in place.dims.items():
            if placed == "tokens" or (paged and placed == "sequences"):
                continue
            for rotated in (False, True):
                tensors, seqlens, table = caches(G, paged)
                cached = tensors["k0"], tensors["v0"]
                key, value, query = (draw(B, 2, n, D, dtype=torch.float32) for n in (G, G, 4))
                of_batch = 0 if dim == 0 else None
                on_cached = [place(x.clone(), dim) for x in cached]
                tables = {"rotary_cos": cos, "rotary_sin": sin, "query": query} if rotated else {}
                on = {name: place(x, dim if name == "query" else None) for name, x in tables.items()}
                on["cache_seqlens"] = place(seqlens, of_batch)
                on["block_table"] = None if table is None else place(table, of_batch)
                new = [place(x, dim) for x in (key, value)]
                expected = cases.append(
                    fkv, key, value, *cached, cache_seqlens=seqlens, block_table=table, **tables
                )
                out, messages = counted(
                    lambda new=new, to=on_cached, on=on: cases.append(fkv, *new, *to, **on)
                )
                pairs = {"k": (on_cached[0].full_tensor(), cached[0])}
                pairs["v"] = (on_cached[1].full_tensor(), cached[1])
                if rotated:
                    pairs["query"] = (out.full_tensor(), expected)
                else:
                    assert out is None
                results[f"{placed}, paged {paged}, rotated {rotated}"] = {
                    "pairs": pairs,
                    "messages": messages,
                }
    return results


def refused(place: Placed) -> dict[str, str]:
    tensors, seqlens, _ = caches(G, False)
    key, value = (draw(B, 2, G, D, dtype=torch.float32) for _ in range(2))
    messages = {}
    try:
        fkv.append_kvcache(
            place(key, 2),
            place(value, 2),
            place(tensors["k0"]),
            place(tensors["v0"]),
            cache_seqlens=place(seqlens),
        )
    except ValueError as error:
        messages["append_kvcache"] = str(error)
    sources = [place(draw(B, T, G, D), 0)]
    try:
        fkv.fuse_kv_backward(
            sources[0], sources, place(draw(1, G, D)), grad_sources=[place(draw(B, T, G, D))]
        )
    except ValueError as error:
        messages["fuse_kv_backward with grad_sources"] = str(error)
    assert len(messages) == 2
    return messages


def local_map(place: Placed) -> dict[str, Any]:
    """The way to attend with gradients on DTensors, by heads and by sequences."""
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.experimental import local_map

    results = {}
    for placed, dim in (("heads", 2), ("sequences", 0)):
        q, *sources = draw(B, T, G * GROUP, D), *(draw(B, T, G, D) for _ in range(4))
        weights = [draw(2, G, D), draw(2, G, D)]
        alone = [x.clone().requires_grad_() for x in (q, *sources, *weights)]
        w_dim = 1 if dim == 2 else None
        shared = [place(x, dim).requires_grad_() for x in (q, *sources)]
        shared += [place(x, w_dim).requires_grad_() for x in weights]
        along, of_weights = [place.along(dim)], [place.along(w_dim)]
        attend = local_map(
            lambda q, keys, values, a, b: fkv.fused_kv_attn_func(q, keys, values, a, b, causal=True),
            out_placements=along,
            in_placements=(*[along] * 5, *[of_weights] * 2),
            in_grad_placements=(*[along] * 5, *[[Partial()] if dim == 0 else of_weights] * 2),
        )
        out = attend(shared[0], shared[1:3], shared[3:5], *shared[5:])
        expected = fkv.fused_kv_attn_func(alone[0], alone[1:3], alone[3:5], *alone[5:], causal=True)
        out.sum().backward()
        expected.sum().backward()
        pairs = {"out": (out.detach().full_tensor(), expected.detach())}
        for j, (x, y) in enumerate(zip(shared, alone, strict=True)):
            pairs[f"grad {j}"] = (x.grad.full_tensor(), y.grad)
        results[placed] = {"pairs": pairs}
    return results


def folded(place: Placed) -> dict[str, Any]:
    results = {}
    for placed, dim in (("whole", None), ("heads", 2), ("sequences", 0)):
        q, *sources = (draw(B, 4, n, D, dtype=torch.float32) for n in (G * GROUP, G, G, G, G))
        a = torch.rand(2, G, D)
        expected = fkv.fused_kv_attn_func(q, sources[:2], sources[2:], a, causal=True)
        on = [place(x, dim) for x in (q, *sources)]
        on_a = place(a, 1 if dim == 2 else None)
        out, messages = counted(
            lambda on=on, a=on_a: fkv.fused_kv_attn_func(on[0], on[1:3], on[3:], a, causal=True)
        )
        results[placed] = {"pairs": {"out": (out.full_tensor(), expected)}, "messages": messages}
    return results


def work(folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    place = Placed(init_device_mesh("cpu", (2,)))
    found: dict[str, Any] = {}
    try:
        fkv.fuse_kv([place(draw(B, T, G, D))], place(draw(1, G, D)))
    except NotImplementedError as error:
        found["before"] = str(error)
    import fusedkv_ext.distributed  # noqa: F401

    parts = (fuse_kv, wanted, pair, accumulate, append, local_map)
    found |= {part.__name__: part(place) for part in parts}
    with torch.no_grad():
        found |= {part.__name__: part(place) for part in (decode, coded, encoded, merged, gathered, folded)}
    found["refused"] = refused(place)
    return found


if __name__ == "__main__":
    rank_main(work)
