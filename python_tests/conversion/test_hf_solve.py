"""Fusion weights in closed form, against least squares on the vectors themselves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fusedkv_ext.conversion.least_squares import explained, fit
from fusedkv_ext.conversion.second_moments import SecondMoments
from fusedkv_ext.layers.fusion import FusionWeights
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment

L, G, D, N = 3, 2, 8, 400


def of_vectors(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> SecondMoments:
    """keys, values (L, N, G, D), queries (N, G, D) of the last layer. Keys are taken as they are."""
    second_moments = SecondMoments(L, G, D, tokens=keys.shape[1])
    for name, x in (("keys", keys), ("values", values)):
        rows = x.permute(2, 1, 0, 3).flatten(2).double()
        setattr(second_moments, name, rows.mT @ rows)
    second_moments.queries[-1] = torch.einsum("ngd,nge->gde", queries, queries).double()
    return second_moments


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    keys, values = torch.randn(2, L, N, G, D).double() * torch.rand(D).double()
    return keys, values, torch.randn(N, G, D).double() @ torch.randn(D, D).double()


def plan_of(fusion: Fusion, sources=(0, 1)) -> CachePlan:
    part = Segment(sources, fusion=fusion)
    return CachePlan(
        "test", (*(LayerPlan(Segment((i,)), Segment((i,))) for i in range(2)), LayerPlan(part, part))
    )


def solved(
    fusion: Fusion, second_moments: SecondMoments, metric="plain", ridge=0.0, o_proj=None
) -> FusionWeights:
    weights = FusionWeights(plan_of(fusion), 2, G, D).double()
    o_proj = o_proj or torch.nn.Linear(G * D, 5, bias=False).double()
    for segment in weights.fused_segments:
        fit(weights, segment, second_moments, o_proj, metric=metric, ridge=ridge)
    return weights


@pytest.mark.parametrize("granularity", ["channel", "shared_channel", "head", "scalar"])
@pytest.mark.parametrize("multiplier", [1.0, 35.0])
def test_weights_are_those_of_least_squares(vectors, granularity, multiplier):
    keys, values, queries = vectors
    found = solved(Fusion(granularity, "normal", multiplier=multiplier), of_vectors(keys, values, queries))
    for x, weights, tied in ((keys, found.key_weights(), True), (values, found.value_weights(), False)):
        tied = tied and "channel" in granularity
        # One least squares problem per group of (head, channel)s that have one weight.
        label = torch.arange(D) % (D // 2) if tied else torch.arange(D)
        head = torch.arange(G)[:, None]
        groups = {
            "channel": head * D + label,
            "shared_channel": label.expand(G, D),
            "head": head.expand(G, D),
            "scalar": torch.zeros(G, D).long(),
        }[granularity]
        for group in groups.unique():
            rows = x[:, :, groups == group].flatten(1)
            expected = torch.linalg.lstsq(rows[:2].mT, rows[2][:, None]).solution[:, 0]
            actual = weights[:, groups == group]
            torch.testing.assert_close(actual, expected[:, None].expand_as(actual), rtol=1e-8, atol=1e-8)


def test_planted_weights_are_found(vectors):
    keys, values, queries = vectors
    a = torch.rand(2, G, D // 2).double().repeat(1, 1, 2)
    b = torch.randn(2, G, D).double()
    keys[2] = torch.einsum("jgd,jngd->ngd", a, keys[:2])
    values[2] = torch.einsum("jgd,jngd->ngd", b, values[:2])
    second_moments = of_vectors(keys, values, queries)
    o_proj = torch.nn.Linear(3 * G * D, 20, bias=False).double()
    for metric in ("plain", "score"):
        found = solved(Fusion(), second_moments, metric=metric, o_proj=o_proj)
        torch.testing.assert_close(found.key_weights(), a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.value_weights(), b, rtol=1e-6, atol=1e-6)
        for head in range(G):
            for side, weights in (("key", a), ("value", b)):
                share = explained(second_moments, side, 2, head, (0, 1), weights[:, head], o_proj, metric)
                assert share == pytest.approx(1, abs=1e-9)


def test_the_score_metric_makes_the_error_of_scores_smaller(vectors):
    keys, values, queries = vectors
    keys[2] = keys[0] @ torch.randn(D, D).double()
    second_moments = of_vectors(keys, values, queries)

    def error(metric: str) -> float:
        fused = torch.einsum(
            "jgd,jngd->ngd", solved(Fusion(), second_moments, metric=metric).key_weights(), keys[:2]
        )
        left = torch.einsum("mgd,ngd->gmn", queries, keys[2] - fused)
        return left.square().mean().item()

    assert error("score") < 0.98 * error("plain")


def test_values_are_weighed_by_what_the_output_projection_sees(vectors):
    keys, values, queries = vectors
    values[2] = values[0] @ torch.randn(D, D).double()
    second_moments, o_proj = (
        of_vectors(keys, values, queries),
        torch.nn.Linear(2 * G * D, 4, bias=False).double(),
    )

    def error(metric: str) -> float:
        weights = solved(Fusion(), second_moments, metric=metric, o_proj=o_proj).value_weights()
        left = values[2] - torch.einsum("jgd,jngd->ngd", weights, values[:2])
        heads = left.repeat_interleave(2, dim=1) * torch.randn(N, 2 * G, 1)  # query heads attend differently
        columns = o_proj.weight.unflatten(1, (2 * G, D))
        return torch.einsum("nhd,ohd->nho", heads, columns).square().sum().item()

    torch.manual_seed(1)
    score = error("score")
    torch.manual_seed(1)
    assert score < error("plain")


def test_ridge_pulls_towards_the_initial_weights(vectors):
    keys, values, queries = vectors
    found = solved(Fusion(init=(0.25, 0.75)), of_vectors(keys, values, queries), ridge=1e9)
    expected = torch.tensor([0.25, 0.75]).double()[:, None, None].expand(2, G, D)
    torch.testing.assert_close(found.key_weights(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_known_is_refused(vectors):
    with pytest.raises(ValueError, match="metric must be one of score, plain"):
        solved(Fusion(), of_vectors(*vectors), metric="cosine")
    broken = of_vectors(*vectors)
    broken.keys[:] = float("nan")
    with pytest.raises(ValueError, match="key weights of layer 2 must be finite"):
        solved(Fusion(), broken, ridge=1e-3)
