"""Soft cap, attention sinks and ALiBi slopes: every kernel of cached attention against the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import Case, cache_inputs, dense_inputs, named
from conftest import Simt
from test_packed_queries import COUNTS, packed_inputs
from torch import Tensor

from fusedkv_ext import explain, fused_kv_attn_func, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import cached, reference
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.testing import assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
RAGGED = {"B": 3, "T": 300, "lengths": (300, 0, 170)}

# One case per kernel and shape class: test_attn_kernels.py says which rows take which.
CASES = [
    Case("warp", S=2, H=4, G=2, D=64, dtype=BF16, page_size=16, **RAGGED),
    Case("warp_D128_float16", S=1, H=8, G=1, D=128, m_k=1, m_v=1, dtype=FP16, **RAGGED),
    Case("warp_window", S=5, H=2, G=2, D=64, dtype=BF16, window=(33, 0), page_size=7, **RAGGED),
    Case("block_16", S=4, H=4, G=1, D=64, dtype=BF16, page_size=16, **RAGGED),
    Case("block_32_window", S=8, H=8, G=2, D=128, dtype=BF16, window=(40, -1), **RAGGED),
    Case("block_64", S=16, H=4, G=1, D=64, dtype=FP16, page_size=16, **RAGGED),
    Case("block_in_two_groups", S=50, H=4, G=2, D=64, m_v=1, dtype=BF16, **RAGGED),
    Case("fallback", S=3, H=4, G=2, D=72, Dv=24, page_size=16, **RAGGED),
    Case("fallback_not_causal", S=5, H=3, G=1, D=64, causal=False, window=(40, 2), **RAGGED),
    Case("fallback_three_sources", S=2, H=6, G=2, D=64, m_k=3, dtype=BF16, **RAGGED),
    Case("rows_before_the_first_token", B=3, S=9, T=20, H=4, G=2, D=64, dtype=BF16, lengths=(20, 0, 4)),
    Case("several_splits", B=2, S=2, T=1300, H=4, G=2, D=64, dtype=BF16, lengths=(1300, 700)),
    Case("several_splits_float32", B=2, S=1, T=1300, H=4, G=2, D=64, page_size=16, lengths=(1300, 700)),
]
LARGE = [
    Case("warp", S=2, H=4, G=2, D=64, dtype=BF16, magnitude=30.0, **RAGGED),
    Case("block", S=8, H=4, G=1, D=64, dtype=BF16, magnitude=30.0, **RAGGED),
    Case("fallback", S=2, H=4, G=2, D=64, magnitude=100.0, **RAGGED),
]


def softcap(case: Case) -> dict[str, object]:
    return {"softcap": 2.0}


def sinks(case: Case) -> dict[str, object]:
    return {"sinks": 2 * torch.randn(case.H)}


def slopes(case: Case) -> dict[str, object]:
    return {"alibi_slopes": torch.rand(case.H) / 4}


def slopes_per_sequence(case: Case) -> dict[str, object]:
    return {"alibi_slopes": torch.randn(case.B, case.H) / 16}


def all_three(case: Case) -> dict[str, object]:
    return {**softcap(case), **sinks(case), **slopes_per_sequence(case)}


SCORES = [softcap, sinks, slopes, slopes_per_sequence, all_three]
Scores = Callable[[Case], dict[str, object]]


def on(device: torch.device, options: dict[str, object]) -> dict[str, object]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(**named(CASES))
def test_matches_oracle(case: Case, scores: Scores, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    options = {**state, **case.options, **on(device, scores(case))}
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=case.terms)


@pytest.mark.parametrize(**named(CASES))
def test_batch_invariant_calls_match_oracle(case: Case, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    options = {**state, **case.options, **on(device, all_three(case))}

    def op(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return fused_kv_attn_with_kvcache(*args, **kwargs, batch_invariant=True)

    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(op, oracle, *args, **options, terms=case.terms)


@pytest.mark.parametrize("scores", [softcap, sinks, slopes, all_three])
@pytest.mark.parametrize("kind", ["warp", "block", "fallback"])
def test_packed_queries_match_oracle(kind: str, scores: Scores, device: torch.device) -> None:
    """0 to 40 rows per sequence; each row's ALiBi position and each sequence's slopes are its own."""
    sizes = {"B": 6, "T": 600, "lengths": (300, 0, 170, 1, 40, 600), "D": 64, "page_size": 16}
    shapes = {"warp": {"H": 4, "G": 2, "dtype": BF16}, "block": {"H": 8, "G": 1, "dtype": BF16}}
    case = Case(kind, **sizes, **shapes.get(kind, {"H": 4, "G": 2}))
    args, options = packed_inputs(case, device)
    options |= on(device, scores(case))
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=case.terms)
    assert len(args[0]) == sum(COUNTS)


@pytest.mark.parametrize("cap", [0.1, 3.0, 50.0])
@pytest.mark.parametrize(**named(LARGE))
def test_scores_far_beyond_the_cap_match_oracle(case: Case, cap: float, device: torch.device) -> None:
    """Most scores are at the cap, on either side: there tanh is flat, near zero it is not."""
    args, state = cache_inputs(case, device)
    options = {**state, **case.options, "softcap": cap}
    oracle = reference.fused_kv_attn_with_kvcache
    out, lse = assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=case.terms)
    assert bool(out.isfinite().all())
    seen = lse[lse.isfinite()]
    assert float(seen.max()) <= cap + math.log(case.T) + 1e-2


@pytest.mark.parametrize("scale", [1e-3, 1e-6])
def test_small_scores_pass_the_cap_unchanged(scale: float, device: torch.device) -> None:
    """tanh(x) is x for small x, to every digit: 1 - 2 / (e^2x + 1) would cancel."""
    case = Case("small", S=2, H=4, G=2, D=64, scale=scale, **RAGGED)
    args, state = cache_inputs(case, device)
    slope = torch.full((4,), 0.01, device=device)
    plain, capped = (
        fused_kv_attn_with_kvcache(*args, **state, **case.options, alibi_slopes=slope, softcap=cap)
        for cap in (0.0, 1e3)
    )
    for got, expected in zip(capped, plain, strict=True):
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite)
        assert_near(got[finite], expected[finite], 4)


@pytest.mark.parametrize("sink", [-300.0, -30.0, 30.0, 300.0])
@pytest.mark.parametrize(**named([CASES[0], CASES[4], CASES[7], *CASES[-3:]]))
def test_sinks_far_from_all_scores(case: Case, sink: float, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    values = torch.full((case.H,), sink, device=device)
    options = {**state, **case.options, "sinks": values}
    oracle = reference.fused_kv_attn_with_kvcache
    # e^(s - sink) has the rounding of s - sink, up to 300 of them.
    terms = case.terms + sink**2 / 4
    out, lse = assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=terms)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    assert float(lse.min()) >= sink - 1e-6 * abs(sink)


@pytest.mark.parametrize(**named(CASES))
def test_a_sink_of_minus_infinity_changes_no_bit(case: Case, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    none = torch.full((case.H,), -math.inf, device=device)
    with_sinks, without = (
        fused_kv_attn_with_kvcache(*args, **state, **case.options, sinks=x) for x in (none, None)
    )
    assert_same_bits(with_sinks, without)


@pytest.mark.parametrize(**named([CASES[0], CASES[5], CASES[7], CASES[10]]))
def test_rows_without_tokens_give_zeros_and_their_sink(case: Case, device: torch.device) -> None:
    args, state = cache_inputs(case, device)
    values = torch.randn(case.H, device=device)
    out, lse = fused_kv_attn_with_kvcache(*args, **state, **case.options, sinks=values)
    assert bool((out[1] == 0).all()) and case.lengths is not None and case.lengths[1] == 0
    assert_near(lse[1], values[:, None].expand(case.H, case.S), 2)
    padding = max(case.S - case.lengths[2], 0)
    assert bool((out[2, :padding] == 0).all())
    assert_near(lse[2, :, :padding], values[:, None].expand(case.H, padding), 2)


@pytest.mark.parametrize("sm_count", [1, 2, 5, 132])
@pytest.mark.parametrize(**named([CASES[0], CASES[3], CASES[7], CASES[-2]]))
def test_a_sink_counts_once_however_work_is_split(
    case: Case, sm_count: int, simt: Simt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedkv_ext.ops.native._ops", torch.ops.fusedkv_simt)
    args, state = cache_inputs(case, CPU)
    simt.configure(sm_count=sm_count, seed=sm_count)
    oracle = reference.fused_kv_attn_with_kvcache
    options = {**state, **case.options, **all_three(case)}
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=case.terms)


@pytest.mark.parametrize("scores", SCORES)
def test_every_level_matches_oracle(scores: Scores, level: str) -> None:
    for case in (CASES[0], CASES[6], CASES[7], CASES[-2]):
        args, state = cache_inputs(case, CPU)
        options = {**state, **case.options, **scores(case)}
        oracle = reference.fused_kv_attn_with_kvcache
        assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=case.terms)


def test_slopes_of_a_head_are_those_of_each_sequence(device: torch.device) -> None:
    case = CASES[0]
    args, state = cache_inputs(case, device)
    of_heads = torch.rand(case.H, device=device)
    both = (of_heads, of_heads.expand(case.B, case.H))
    first, second = (fused_kv_attn_with_kvcache(*args, **state, **case.options, alibi_slopes=x) for x in both)
    assert_same_bits(first, second)


@pytest.mark.parametrize(
    "case",
    [
        Case("prefill", B=2, S=70, T=90, H=4, G=2, D=64, page_size=16, lengths=(90, 50)),
        Case("prefill_equal", B=2, S=70, T=90, H=4, G=2, D=64, window=(33, 0)),
        Case("gather", B=3, S=2, T=40, H=4, G=2, D=20, Dv=12, lengths=(40, 0, 7)),
        Case("gather_padding", B=3, S=9, T=40, H=4, G=2, D=20, page_size=16, lengths=(40, 0, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("scores", SCORES)
def test_dense_paths_of_a_cache_match_oracle(case: Case, scores: Scores) -> None:
    """Many rows, and head dims that no kernel takes."""
    args, state = cache_inputs(case, CPU)
    options = {**state, **case.options, **scores(case), "return_lse": case.name.startswith("gather")}
    oracle = reference.fused_kv_attn_with_kvcache
    assert_matches_oracle(fused_kv_attn_with_kvcache, oracle, *args, **options, terms=case.terms)


def test_many_rows_fuse_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, attend = [], cached.sdpa_attention

    def recorded(call: AttentionCall) -> Tensor:
        seen.append((call.softcap, call.sinks is not None, tuple(call.alibi_slopes.shape)))
        return attend(call)

    monkeypatch.setattr(cached, "sdpa_attention", recorded)
    case = Case("prefill", B=2, S=70, T=90, H=4, G=2, D=64, lengths=(90, 50))
    args, state = cache_inputs(case, CPU)
    fused_kv_attn_with_kvcache(*args, **state, **all_three(case))
    assert seen == [(2.0, True, (1, 4))] * 2
    said = explain(*args, **state, **all_three(case))
    assert said.path == "fuse-once" and "SDPA" not in said.kernel


WRONG = [
    ({"softcap": -1.0}, ValueError, r"softcap must be 0.0 \(off\) or a positive float32, got -1.0"),
    ({"softcap": math.nan}, ValueError, "softcap must be 0.0"),
    ({"softcap": math.inf}, ValueError, "softcap must be 0.0"),
    ({"softcap": 1e-42}, ValueError, "softcap must be 0.0"),
    ({"softcap": None}, TypeError, "softcap must be a float, got NoneType"),
    ({"softcap": True}, TypeError, "softcap must be a float, got bool"),
    ({"sinks": 1.0}, TypeError, r"sinks must be a torch.Tensor, got float"),
    ({"sinks": torch.zeros(4, dtype=torch.int32)}, TypeError, "sinks must have a floating dtype, got int32"),
    ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(H,\) = \(4,\), got \(2,\)"),
    ({"sinks": torch.zeros(3, 4)}, ValueError, r"sinks must have shape \(H,\) = \(4,\), got \(3, 4\)"),
    ({"alibi_slopes": torch.zeros(4, dtype=torch.int64)}, TypeError, "alibi_slopes must have a floating"),
    (
        {"alibi_slopes": torch.zeros(2, 4)},
        ValueError,
        r"alibi_slopes must have shape \(H,\) = \(4,\) or \(B, H\) = \(3, 4\), got \(2, 4\)",
    ),
    ({"alibi_slopes": torch.zeros(4, device="meta")}, ValueError, "alibi_slopes must be on cpu as q"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    case = Case("wrong", S=1, H=4, G=2, D=64, **RAGGED)
    args, state = cache_inputs(case, CPU)
    with pytest.raises(error, match=message):
        fused_kv_attn_with_kvcache(*args, **state, **change)
    with pytest.raises(error, match=message):
        fused_kv_attn_func(*dense_inputs(case, CPU), **change)


@pytest.mark.parametrize("score", [sinks, slopes, all_three])
def test_opcheck(score: Scores) -> None:
    """Schema, fake and autograd registration of the operation with its optional tensors."""
    args, state = cache_inputs(Case("opcheck", B=2, S=3, T=9, D=16, lengths=(9, 2), page_size=4), CPU)
    call = AttentionCall(*args, *state.values(), 0.25, -1, 0)._replace(**score(Case("opcheck", B=2)))
    results = torch.library.opcheck(torch.ops.fusedkv.attn_with_kvcache.default, tuple(call[:17]))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("score", SCORES)
def test_compiles_into_one_graph_with_the_same_bits(score: Scores) -> None:
    torch._dynamo.reset()
    case = Case("compile", B=2, S=3, T=9, D=16, lengths=(9, 2), page_size=4)
    args, state = cache_inputs(case, CPU)
    options = {**state, **case.options, **score(case)}
    compiled = torch.compile(fused_kv_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*args, **options), fused_kv_attn_with_kvcache(*args, **options))


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_a_cached_call_refuses_gradients(name: str) -> None:
    args, state = cache_inputs(CASES[0], CPU)
    with pytest.raises(ValueError, match=f"{name} must not require grad"):
        fused_kv_attn_with_kvcache(*args, **state, **{name: torch.zeros(4, requires_grad=True)})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("softcap", -1.0, ValueError, "softcap must be 0.0"),
        ("sinks", torch.zeros(3), ValueError, r"sinks must have shape \(H,\) = \(4,\), got \(3\)"),
        ("sinks", torch.zeros(4, dtype=BF16), TypeError, "sinks must be float32, got bfloat16"),
        ("sinks", torch.zeros(8)[::2], ValueError, "sinks must be contiguous"),
        ("alibi_slopes", torch.zeros(4, 4), ValueError, r"\(4,\) or \(B, H\) = \(3, 4\), got \(4, 4\)"),
        ("alibi_slopes", torch.zeros(4).double(), TypeError, "alibi_slopes must be float32, got float64"),
    ],
)
def test_the_operation_itself_checks(
    name: str, value: object, error: type[Exception], message: str, device: torch.device
) -> None:
    """Whoever calls torch.ops gets the same checks, on every backend."""
    args, state = cache_inputs(CASES[0], device)
    call = AttentionCall(*args, *state.values(), 0.125, -1, 0)
    with pytest.raises(error, match=message):
        call._replace(**on(device, {name: value})).fold()
