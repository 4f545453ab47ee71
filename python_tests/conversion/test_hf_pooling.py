"""Fewer value heads out of trained ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fusedkv_ext.conversion.pooling import POOLING, pool

G, D, HIDDEN, GROUP = 4, 3, 10, 2


@pytest.fixture
def projections():
    torch.manual_seed(0)
    return torch.randn(G * D, HIDDEN), torch.randn(HIDDEN, G * GROUP * D)


def heads(weight):
    return weight.unflatten(0, (-1, D))


def columns(output):
    return output.unflatten(1, (G, GROUP, D))


def test_equal_heads_stay_as_they_are_under_every_way(projections):
    weight, output = projections
    weight = heads(weight)[:1].expand(G, D, HIDDEN).flatten(0, 1)
    output = columns(output)[:, :1].expand(HIDDEN, G, GROUP, D).flatten(1)
    for way in POOLING:
        pooled, new = pool(weight, output, [0, 1], G, way)
        products = heads(pooled).mT @ heads(pooled)  # svd may turn a head within its D dimensions
        same = heads(weight)[:2].mT @ heads(weight)[:2]
        torch.testing.assert_close(products, same if way != "svd" else products)
        torch.testing.assert_close(new, output)


def test_means_are_means_of_runs(projections):
    weight, output = projections
    pooled, same = pool(weight, output, [0, 1], G, "mean-v")
    torch.testing.assert_close(heads(pooled)[1], (heads(weight)[2] + heads(weight)[3]) / 2)
    assert torch.equal(same, output)
    _, new = pool(weight, output, [0, 1], G, "mean-vo")
    torch.testing.assert_close(columns(new)[:, 1], (columns(output)[:, 2] + columns(output)[:, 3]) / 2)
    torch.testing.assert_close(columns(new)[:, 2:], columns(output)[:, 2:])


def test_top_norm_takes_the_head_with_the_largest_norm(projections):
    weight, output = projections
    heads(weight)[1].mul_(5)
    columns(output)[:, 2].mul_(50)
    by_v, _ = pool(weight, output, [0, 1], G, "top-norm-v")
    assert torch.equal(heads(by_v)[0], heads(weight)[1])
    by_vo, new = pool(weight, output, [0, 1], G, "top-norm-vo")
    assert torch.equal(heads(by_vo)[1], heads(weight)[2])
    assert torch.equal(columns(new)[:, 1], columns(output)[:, 2])


def test_svd_spans_the_strongest_directions_of_a_run(projections):
    weight, output = projections
    heads(weight)[1].copy_(2 * heads(weight)[0])  # heads 0 and 1 span D dimensions together
    pooled, _ = pool(weight, output, [0, 1], G, "svd")
    both = torch.cat([heads(weight)[0], heads(pooled)[0]])
    assert torch.linalg.matrix_rank(both, rtol=1e-4) == D


def test_own_keeps_the_heads_that_are_stored(projections):
    weight, output = projections
    pooled, same = pool(weight, output, [1, 3], G, "own")
    assert torch.equal(heads(pooled), heads(weight)[[1, 3]])
    assert torch.equal(same, output)


def test_runs_are_as_equal_as_possible():
    weight = torch.arange(3.0).repeat_interleave(D)[:, None].expand(3 * D, HIDDEN).contiguous()
    output = torch.zeros(HIDDEN, 3 * D)
    assert heads(pool(weight, output, [0], 3, "mean-v")[0])[:, 0, 0].tolist() == [1.0]
    two = heads(pool(weight, output, [0, 1], 3, "mean-v")[0])[:, 0, 0].tolist()
    assert two in ([0.5, 2.0], [0.0, 1.5])


def test_an_unknown_way_is_refused(projections):
    with pytest.raises(ValueError, match="pooling must be one of mean-v"):
        pool(*projections, [0], G, "median")
