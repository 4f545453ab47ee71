"""Steps of a serving engine: its paged caches, one vector per token, its slots, tables and padded batches."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from cases import to_device
from torch import Tensor

from fusedkv_ext import append_kvcache, decode_schedule, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_matches_oracle

PAGE, PAGES, D, HEADS = 16, 40, 64, 8
STORED = [(4, 4), (4, 2), (2, 4), (4, 0)]  # key and value heads of the layers


class Engine(NamedTuple):
    """Caches (pages, page_size, (g + gv) D) of some layers, and the batch of a step."""

    caches: list[Tensor]
    lengths: Tensor
    table: Tensor

    def views(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, page_size, heads, D) of a layer, side by side in memory."""
        keys, values = STORED[layer]
        return self.caches[layer].unflatten(-1, (keys + values, D)).split((keys, values), dim=2)

    def layer(self, layer: int, values: bool = False) -> list[Tensor]:
        return [self.views(layer)[values]]

    def slots(self, counts: tuple[int, ...]) -> Tensor:
        """Where the last rows of each sequence go."""
        found = []
        for pages, end, count in zip(self.table, self.lengths.tolist(), counts, strict=True):
            position = torch.arange(end - count, end, device=pages.device)
            found.append(pages[position // PAGE] * PAGE + position % PAGE)
        return torch.cat(found).long()


def engine(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...]) -> Engine:
    """Pages out of order; those that no sequence has are NaN."""
    torch.manual_seed(0)
    caches = [torch.randn(PAGES, PAGE, sum(heads) * D).to(dtype) for heads in STORED]
    order, table = torch.randperm(PAGES - 1) + 1, torch.full((len(lengths), 12), PAGES - 1)
    for row, length in enumerate(lengths):
        used = -(-length // PAGE)
        table[row, :used], order = order[:used], order[used:]
    for cache in caches:
        cache[order] = math.nan
    return Engine(*to_device((caches, torch.tensor(lengths).int(), table.int()), device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layer", range(len(STORED)), ids=[f"{k}+{v}" for k, v in STORED])
def test_new_tokens_are_written_beside_each_other(
    layer: int, dtype: torch.dtype, device: torch.device
) -> None:
    step, counts = engine(device, dtype, (70, 16, 33)), (1, 16, 5)
    keys, values = STORED[layer]
    new = [torch.randn(sum(counts), n, D).to(dtype).to(device) for n in (keys, values)]
    slots = step.slots(counts)
    expected = step.caches[layer].clone().flatten(0, 1)
    expected[slots] = torch.cat(new, dim=1).flatten(1)
    append_kvcache(*new, *step.views(layer), slot_mapping=slots)
    torch.testing.assert_close(step.caches[layer].flatten(0, 1), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 4], ids=["decode", "drafts"])
@pytest.mark.parametrize("fused", [False, True], ids=["own", "two_sources"])
def test_layers_of_a_uniform_step_share_a_schedule(
    fused: bool, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The last two sequences are padding of a graph: they have no tokens."""
    step = engine(device, dtype, (170, 5, 64, 0, 0))
    q = torch.randn(5, rows, HEADS, D).to(dtype).to(device)
    keys, values, weights = step.layer(0), step.layer(0, values=True), (None, None)
    if fused:  # a layer that stores all heads, and heads of one that stores fewer values
        keys, values = keys + step.layer(1), values + step.layer(2, values=True)
        weights = torch.randn(2, 4, D, device=device), torch.randn(2, 4, D, device=device)
    schedule = decode_schedule(
        step.lengths, query_length=rows, num_heads=HEADS, num_kv_heads=4, capacity=PAGE * step.table.shape[1]
    )

    def op(*args: object, **options: object) -> Tensor:
        return fused_kv_attn_with_kvcache(*args, schedule=schedule, **options)

    options = {"cache_seqlens": step.lengths, "block_table": step.table}
    oracle = reference.fused_kv_attn_with_kvcache
    out = assert_matches_oracle(op, oracle, q, keys, values, *weights, **options, terms=1 + fused)
    assert out[:3].all() and not out[3:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decodes_and_prompts_of_a_step_are_one_call(dtype: torch.dtype, device: torch.device) -> None:
    """Two of the four key heads of one layer, and both of another."""
    step, counts = engine(device, dtype, (170, 5, 64, 31)), (1, 5, 2, 1)
    q = torch.randn(sum(counts), HEADS, D).to(dtype).to(device)
    keys = [step.layer(0)[0][:, :, 1:3], *step.layer(2)]
    values = [*step.layer(1, values=True), step.layer(0, values=True)[0][:, :, 1:3]]
    weights = [torch.randn(2, 2, D, device=device) for _ in range(2)]
    options = {"cache_seqlens": step.lengths, "block_table": step.table, "max_seqlen_q": max(counts)}
    options["cu_seqlens_q"] = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, q, keys, values, *weights, **options, terms=2)
