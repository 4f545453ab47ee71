"""fused_kv_attn_varlen_func: packed sequences of different lengths give what each gives alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Case, random_tensor, random_weights
from test_scores import SCORES, Scores
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import varlen as torchs

from fusedkv_ext import debug_checks, fused_kv_attn_func, fused_kv_attn_varlen_func
from fusedkv_ext.ops import reference, varlen
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_near, assert_same_bits

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Pack:
    """One call; ``rows`` and ``tokens``: the lengths of the sequences. Other letters as in ``Case``."""

    name: str
    rows: tuple[int, ...] = (7, 1, 12, 3)
    tokens: tuple[int, ...] | None = None
    H: int = 4
    G: int = 2
    D: int = 32
    Dv: int | None = None
    m_k: int = 2
    m_v: int = 2
    dtype: torch.dtype = torch.float32
    weights: str = "channel"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    layout: str = "contiguous"

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tensors of the call, and its keyword arguments."""
        total_q, total_k, value_dim = sum(self.rows), sum(self.keys), self.Dv or self.D
        layout = "contiguous" if self.layout == "expanded" else self.layout

        def packed(total: int, heads: int, dim: int) -> Tensor:
            if self.layout == "expanded":  # all heads are one
                return random_tensor((1, total, 1, dim), self.dtype)[0].expand(total, heads, dim)
            return random_tensor((1, total, heads, dim), self.dtype, layout)[0]

        q = packed(total_q, self.H, self.D)
        keys = [packed(total_k, self.G, self.D) for _ in range(self.m_k)]
        values = [packed(total_k, self.G, value_dim) for _ in range(self.m_v)]
        key_weights = random_weights(self.weights, self.m_k, self.G, self.D)
        value_weights = random_weights(self.weights, self.m_v, self.G, value_dim)
        return (q, keys, values, key_weights, value_weights), self.options

    @property
    def keys(self) -> tuple[int, ...]:
        return self.rows if self.tokens is None else self.tokens

    @property
    def options(self) -> dict[str, Any]:
        return {
            "cu_seqlens_q": cumulative(self.rows),
            "cu_seqlens_k": cumulative(self.keys),
            "max_seqlen_q": max(self.rows, default=0),
            "max_seqlen_k": max(self.keys, default=0),
            "softmax_scale": self.scale,
            "causal": self.causal,
            "window_size": self.window,
            "return_lse": True,
        }

    @property
    def terms(self) -> float:
        return self.m_k**0.5 if self.dtype in (BF16, FP16) else self.m_k


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


MIXED = ((5, 1, 0, 9, 3, 0, 1), (8, 6, 4, 4, 0, 0, 1))  # also more rows than tokens, none of one, of both
PACKS = [
    Pack("causal"),
    Pack("not_causal", causal=False),
    Pack("one_sequence", rows=(33,)),
    Pack("sequences_of_one_token", rows=(1,) * 9),
    Pack("equal_lengths", rows=(6,) * 5),
    Pack("equal_lengths_between", rows=(2, 6, 6, 6, 2)),
    Pack("mixed", *MIXED),
    Pack("mixed_not_causal", *MIXED, causal=False),
    Pack("mixed_bfloat16", *MIXED, dtype=BF16),
    Pack("mixed_window", *MIXED, window=(2, -1)),
    Pack("mixed_window_both", *MIXED, window=(2, 1), causal=False),
    Pack("mixed_window_right", *MIXED, window=(-1, 1), causal=False),
    Pack("mixed_window_of_itself", *MIXED, window=(0, 0)),
    Pack("mixed_wide_window", *MIXED, window=(10**6, 10**6), causal=False),
    Pack("empty_between", rows=(4, 0, 0, 5)),
    Pack("no_rows", rows=(0, 0), tokens=(3, 2)),
    Pack("no_tokens", rows=(3, 2), tokens=(0, 0)),
    Pack("nothing", rows=(0, 0)),
    Pack("no_sequences", rows=()),
    Pack("last_rows", rows=(1, 2, 5), tokens=(9, 30, 5)),
    Pack("many_sequences", rows=tuple(range(1, 30))),
    Pack("long", rows=(600, 3, 1100), H=2, G=1, D=16),
    Pack("long_window", rows=(600, 3, 1100), H=2, G=1, D=16, window=(70, -1)),
    Pack("kv_heads_equal_query_heads", H=3, G=3),
    Pack("one_kv_head", H=6, G=1),
    Pack("more_keys_than_values", m_k=3, m_v=1),
    Pack("more_values_than_keys", m_k=1, m_v=3),
    Pack("without_weights", m_k=1, m_v=1, weights="none"),
    Pack("without_weights_two_sources", weights="none"),
    Pack("scalar_weights", weights="scalar"),
    Pack("odd_head_dim", D=13),
    Pack("odd_head_dims", D=13, Dv=7, dtype=BF16),
    Pack("values_narrower", D=40, Dv=24),
    Pack("values_wider_float16", D=40, Dv=64, dtype=FP16),
    Pack("wide_heads", D=264),
    Pack("float64", *MIXED, dtype=FP64),
    Pack("scale", scale=0.7),
    Pack("negative_scale", scale=-0.3),
    Pack("zero_scale", scale=0.0),
    Pack("transposed", *MIXED, layout="transposed"),
    Pack("unaligned_bfloat16", *MIXED, layout="sliced", dtype=BF16),
    Pack("every_other", *MIXED, layout="every_other"),
    Pack("expanded_heads", *MIXED, layout="expanded"),
]


def found(name: str) -> Pack:
    return next(pack for pack in PACKS if pack.name == name)


def named(*names: str) -> Any:
    packs = [found(name) for name in names] or PACKS
    return pytest.mark.parametrize("pack", packs, ids=lambda pack: pack.name)


def check(pack: Pack) -> None:
    args, options = pack.inputs()
    out, lse = assert_matches_oracle(
        fused_kv_attn_varlen_func,
        reference.fused_kv_attn_varlen_func,
        *args,
        **options,
        terms=pack.terms,
    )
    assert out.dtype == pack.dtype and out.is_contiguous() and lse.dtype == torch.float32


@named()
def test_matches_oracle(pack: Pack) -> None:
    check(pack)


@named()
def test_the_mask_of_graphs_matches_oracle(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "host_reads", lambda x: False)
    check(pack)


@named("causal", "mixed", "mixed_window_both", "odd_head_dims", "unaligned_bfloat16")
def test_equals_separate_calls(pack: Pack) -> None:
    """Of fused_kv_attn_func, which knows nothing of packs."""
    (q, keys, values, *weights), options = pack.inputs()
    out, lse = fused_kv_attn_varlen_func(q, keys, values, *weights, **options)
    shared = {name: options[name] for name in ("softmax_scale", "causal", "window_size", "return_lse")}
    bounds = [itertools.pairwise(options[f"cu_seqlens_{x}"].tolist()) for x in "qk"]
    for (first, last), (begin, end) in zip(*bounds, strict=True):
        sides = [[x[None, begin:end] for x in side] for side in (keys, values)]
        alone = fused_kv_attn_func(q[None, first:last], *sides, *weights, **shared)
        assert_near(out[first:last], alone[0][0], rounding_steps=32)
        # The call alone may fold, which does not round the fused keys.
        assert_near(lse[:, first:last].to(q.dtype), alone[1][0].to(q.dtype), rounding_steps=32)


def test_sequences_share_nothing() -> None:
    (q, keys, values, *weights), options = found("causal").inputs()
    before = fused_kv_attn_varlen_func(q, keys, values, *weights, **options)
    for x in (q, *keys, *values):
        x[:7] = math.nan
    after = fused_kv_attn_varlen_func(q, keys, values, *weights, **options)
    assert_same_bits(after[0][7:], before[0][7:])
    assert_same_bits(after[1][:, 7:], before[1][:, 7:])


def test_lengths_may_be_bounded_from_above() -> None:
    args, options = found("mixed").inputs()
    longer = {**options, "max_seqlen_q": 100, "max_seqlen_k": 200}
    assert_same_bits(*(fused_kv_attn_varlen_func(*args, **x) for x in (options, longer)))


def test_no_score_of_two_sequences_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA gets the sequences one by one, and neighbors of equal lengths as one batch."""
    shapes = []
    attend = varlen.sdpa_attention_lse

    def recorded(call: Any) -> tuple[Tensor, Tensor | None]:
        shapes.append((*call.q.shape[:2], call.keys[0].shape[1]))
        return attend(call)

    monkeypatch.setattr(varlen, "sdpa_attention_lse", recorded)
    args, options = found("equal_lengths_between").inputs()
    fused_kv_attn_varlen_func(*args, **options)
    assert shapes == [(1, 2, 2), (3, 6, 6), (1, 2, 2)]


# Gradients


def gradients(
    function: Callable[..., Tensor], pack: Pack, dtype: torch.dtype, **changes: Any
) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    (q, keys, values, *weights), options = pack.inputs()
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, *keys, *values)]
    sums = FP64 if dtype == FP64 else torch.float32
    both = [None if x is None else x.to(sums).requires_grad_() for x in weights]
    sides = leaves[1 : 1 + pack.m_k], leaves[1 + pack.m_k :]
    out = function(leaves[0], *sides, *both, **{**options, "return_lse": False, **changes})
    return torch.autograd.grad(out, [*leaves, *(x for x in both if x is not None)], torch.randn_like(out))


GRADIENTS = (
    "causal",
    "mixed",
    "mixed_window_both",
    "mixed_bfloat16",
    "odd_head_dims",
    "more_keys_than_values",
)


@pytest.mark.parametrize("masked", [False, True], ids=["by_sequence", "masked"])
@named(*GRADIENTS, "without_weights", "equal_lengths_between")
def test_gradients_match_oracle(pack: Pack, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:
        monkeypatch.setattr(varlen, "host_reads", lambda x: False)
    exact = gradients(reference.fused_kv_attn_varlen_func, pack, FP64)
    same_maths = gradients(reference.fused_kv_attn_varlen_func, pack, pack.dtype)
    got = gradients(fused_kv_attn_varlen_func, pack, pack.dtype)
    terms = pack.terms * sum(pack.rows) * pack.H // pack.G
    assert_close(got, exact, same_maths, "gradient", terms=terms)


@named("causal", "mixed", "mixed_bfloat16")
def test_recomputed_fusion_gives_the_same_bits(pack: Pack) -> None:
    kept, again = (
        gradients(fused_kv_attn_varlen_func, pack, pack.dtype, recompute_fusion=x) for x in (False, True)
    )
    assert_same_bits(again, kept)


@pytest.mark.parametrize("masked", [False, True], ids=["by_sequence", "masked"])
@pytest.mark.parametrize(
    "pack",
    [
        Pack("lengths_differ", (2, 0, 3, 1), (3, 2, 1, 0), H=2, G=1, D=4, Dv=3, m_v=1),
        Pack("not_causal", (2, 3), H=2, G=2, D=4, causal=False, window=(1, 1)),
    ],
    ids=lambda pack: pack.name,
)
def test_gradcheck_in_float64(pack: Pack, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:
        monkeypatch.setattr(varlen, "host_reads", lambda x: False)
    (q, keys, values, *weights), options = pack.inputs()
    leaves = [x.double().requires_grad_() for x in (q, *keys, *values, *weights)]

    def attention(q: Tensor, *rest: Tensor) -> Tensor:
        keys, rest = rest[: pack.m_k], rest[pack.m_k :]
        sides = keys, rest[: pack.m_v]
        return fused_kv_attn_varlen_func(q, *sides, *rest[pack.m_v :], **{**options, "return_lse": False})

    assert torch.autograd.gradcheck(attention, leaves)


# Soft cap, sinks, ALiBi

SCORED = ("causal", "mixed", "mixed_not_causal", "mixed_window_both", "mixed_bfloat16", "no_rows")


@pytest.mark.parametrize("masked", [False, True], ids=["by_sequence", "masked"])
@pytest.mark.parametrize("score", SCORES)
@named(*SCORED, "no_tokens", "no_sequences", "equal_lengths_between", "odd_head_dims", "float64")
def test_other_scores_match_oracle(
    pack: Pack, score: Scores, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked:
        monkeypatch.setattr(varlen, "host_reads", lambda x: False)
    args, options = pack.inputs()
    options.update(score(Case("scores", B=len(pack.rows), H=pack.H)))
    op, oracle = fused_kv_attn_varlen_func, reference.fused_kv_attn_varlen_func
    out, lse = assert_matches_oracle(op, oracle, *args, **options, terms=pack.terms)
    assert out.dtype == pack.dtype and lse.dtype == torch.float32 and not lse.requires_grad


@pytest.mark.parametrize("masked", [False, True], ids=["by_sequence", "masked"])
@pytest.mark.parametrize("per_sequence", [False, True], ids=["H", "BH"])
@named("mixed", "equal_lengths_between")
def test_gradients_of_other_scores_match_oracle(
    pack: Pack, per_sequence: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked:
        monkeypatch.setattr(varlen, "host_reads", lambda x: False)
    (q, *sides), options = pack.inputs()
    shape = (len(pack.rows), pack.H) if per_sequence else (pack.H,)
    scores = (torch.randn(pack.H), torch.rand(shape))
    options["return_lse"] = False

    def attention(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, *scores)]
        sinks, slopes = leaves[1:]
        keys, values = ([x.to(dtype) for x in side] for side in sides[:2])
        more = {"softcap": 2.0, "sinks": sinks, "alibi_slopes": slopes}
        out = function(leaves[0], keys, values, *(x.to(dtype) for x in sides[2:]), **options, **more)
        torch.manual_seed(5)
        return torch.autograd.grad(out, leaves, torch.randn(out.shape).to(dtype))

    exact = attention(reference.fused_kv_attn_varlen_func, FP64)
    same_maths = attention(reference.fused_kv_attn_varlen_func, torch.float32)
    got = attention(fused_kv_attn_varlen_func, torch.float32)
    assert_close(got, exact, same_maths, "gradient", terms=pack.terms * sum(pack.rows))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"softcap": -1.0}, ValueError, "softcap must be 0.0"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \(H,\) = \(4,\), got \(3,\)"),
        (
            {"alibi_slopes": torch.zeros(1, 4)},
            ValueError,
            r"alibi_slopes .* \(B, H\) = \(4, 4\), got \(1, 4\)",
        ),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks must be on cpu"),
    ],
)
def test_wrong_scores_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args, options = found("causal").inputs()
    with pytest.raises(error, match=message):
        fused_kv_attn_varlen_func(*args, **options, **change)


def test_lse_has_no_gradient() -> None:
    (q, *rest), options = found("mixed").inputs()
    out, lse = fused_kv_attn_varlen_func(q.requires_grad_(), *rest, **options)
    assert out.requires_grad and not lse.requires_grad


def test_tangents_match_oracle() -> None:
    (q, keys, values, *weights), options = Pack("tangents", *MIXED, D=8, dtype=FP64).inputs()
    options["return_lse"] = False

    def tangent(function: Callable[..., Tensor]) -> Tensor:
        attend = lambda q, key: function(q, [key, keys[1]], values, *weights, **options)  # noqa: E731
        return torch.func.jvp(attend, (q, keys[0]), (q.flip(0), keys[1]))[1]

    with sdpa_kernel(SDPBackend.MATH):  # the only one with tangents
        got = tangent(fused_kv_attn_varlen_func)
    torch.testing.assert_close(got, tangent(reference.fused_kv_attn_varlen_func), rtol=1e-9, atol=1e-11)


def test_lse_refuses_tangents() -> None:
    (q, *rest), options = found("mixed").inputs()
    with pytest.raises(ValueError, match="q must not have a forward-mode tangent, as return_lse gives none"):
        torch.func.jvp(lambda q: fused_kv_attn_varlen_func(q, *rest, **options)[0], (q,), (q,))


# torch.compile


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@named("causal", "mixed", "mixed_window_both", "odd_head_dims", "without_weights")
def test_compiles_in_one_graph(pack: Pack) -> None:
    torch._dynamo.reset()
    (q, keys, values, *weights), options = pack.inputs()
    leaves = [q, *keys, *values]
    for x in leaves:
        x.requires_grad_()
    compiled = torch.compile(fused_kv_attn_varlen_func, fullgraph=True, backend="aot_eager")
    (out, lse), expected = (
        f(q, keys, values, *weights, **options) for f in (compiled, fused_kv_attn_varlen_func)
    )
    assert_near(out.detach(), expected[0].detach(), rounding_steps=16)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-4)
    grad = torch.randn_like(out)
    for got, exact in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected[0], leaves, grad), strict=True
    ):
        assert_near(got, exact, rounding_steps=64)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_one_graph_serves_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fused_kv_attn_varlen_func, fullgraph=True, backend=counter, dynamic=True)
    for rows in ((3, 5, 2), (4, 4, 9), (2, 0, 6)):
        args, options = Pack("lengths", rows=rows).inputs()
        options["max_seqlen_q"] = options["max_seqlen_k"] = 64
        got, expected = (f(*args, **options) for f in (compiled, fused_kv_attn_varlen_func))
        assert_near(got[0], expected[0], rounding_steps=16)
    assert counter.frame_count == 1


def test_shapes_are_known_without_data() -> None:
    (q, keys, values, *weights), options = found("mixed").inputs()
    moved = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in options.items()}
    sides = [[x.to("meta") for x in side] for side in (keys, values)]
    out, lse = fused_kv_attn_varlen_func(q.to("meta"), *sides, *(x.to("meta") for x in weights), **moved)
    assert out.shape == (19, 4, 32) and lse.shape == (4, 19)


# CUDA, as far as a machine without a GPU can tell


class FlashAttention:
    """varlen_attn in torch's signature: what its kernel takes, and its results, by the oracle."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def grouped(self, *tensors: Any, enable_gqa: bool = False, **options: Any) -> Any:
        """As of torch 2.12 on."""
        return self._run(enable_gqa, *tensors, **options)

    def of_equal_heads(
        self, *tensors: Any, return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1)
    ) -> Any:
        """As of torch 2.11."""
        return self._run(False, *tensors, return_aux=return_aux, scale=scale, window_size=window_size)

    def _run(
        self,
        gqa: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        return_aux: Any = None,
    ) -> Any:
        assert q.shape[1] == k.shape[1] or gqa
        for x in (q, k, v):
            assert x.shape[2] % 8 == 0 and x.shape[2] == q.shape[2] and x.stride(2) == 1
            assert x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:2])
        self.calls.append({"heads": k.shape[1], "window": window_size})
        lengths = {"cu_seqlens_q": cu_seq_q, "cu_seqlens_k": cu_seq_k}
        longest = {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
        options = {"softmax_scale": scale, "window_size": window_size, "return_lse": True}
        out, lse = reference.fused_kv_attn_varlen_func(
            q, k, v, **lengths, **longest, **options, dtype=torch.float32
        )
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        return (out.to(q.dtype), lse) if return_aux is not None and return_aux.lse else out.to(q.dtype)


@pytest.fixture(params=["of_equal_heads", "grouped"])
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A FlashAttention in the signature of one torch, which takes the calls of CPU tensors."""
    kernel = FlashAttention()
    monkeypatch.setattr(torchs, "varlen_attn", getattr(kernel, request.param))
    monkeypatch.setattr(varlen, "_takes_flash", lambda call, packing: True)
    varlen._torchs.cache_clear()
    kernel.takes_groups = request.param == "grouped"
    yield kernel
    varlen._torchs.cache_clear()


HALF = [
    Pack("causal", dtype=BF16),
    Pack("mixed", *MIXED, dtype=FP16),
    Pack("mixed_window", *MIXED, dtype=BF16, window=(2, 1), causal=False),
    Pack("one_head_per_group", H=2, G=2, dtype=BF16),
    Pack("odd_head_dims", D=13, Dv=7, dtype=BF16),
    Pack("values_wider", D=24, Dv=40, dtype=BF16),
    Pack("unaligned", layout="sliced", dtype=BF16, m_k=1, m_v=1, weights="none"),
    Pack("transposed", layout="transposed", dtype=BF16, m_k=1, m_v=1, weights="none"),
]


@pytest.mark.parametrize("pack", HALF, ids=lambda pack: pack.name)
def test_flash_attention_gets_what_it_takes_and_its_results_are_ours(pack: Pack, flash: Any) -> None:
    args, options = pack.inputs()
    assert_matches_oracle(
        fused_kv_attn_varlen_func, reference.fused_kv_attn_varlen_func, *args, **options, terms=4 * pack.terms
    )
    heads = pack.G if flash.takes_groups else pack.H
    window = (pack.window[0], 0) if pack.causal else pack.window
    assert flash.calls == [{"heads": heads, "window": window}]
    alone = fused_kv_attn_varlen_func(*args, **{**options, "return_lse": False})
    assert isinstance(alone, Tensor) and len(flash.calls) == 2


def test_flash_attention_takes_cuda_calls_of_16_bits_and_positive_scale() -> None:
    """And leaves those whose windows its kernel would bound wrongly, and all that are empty."""

    class Shaped:  # what the rule looks at
        def __init__(self, cuda: bool, dtype: torch.dtype, tokens: int, dim: int) -> None:
            self.is_cuda, self.dtype, self.shape = cuda, dtype, (1, tokens, 4, dim)

    base = {"cuda": True, "dtype": BF16, "dim": 64, "value_dim": 64, "rows": 9, "tokens": 9, "scale": 0.1}
    base |= {"left": -1, "right": 0, "longest": (5, 5)}
    for change, takes in (
        ({}, True),
        ({"dtype": FP16}, True),
        ({"dim": 13}, True),
        ({"left": 4}, True),
        ({"right": -1, "longest": (7, 5)}, True),
        ({"longest": (7, 5)}, True),
        ({"cuda": False}, False),
        ({"dtype": torch.float32}, False),
        ({"dim": 264}, False),
        ({"value_dim": 264}, False),
        ({"scale": 0.0}, False),
        ({"scale": -1.0}, False),
        ({"softcap": 2.0}, False),
        ({"left": 4, "longest": (7, 5)}, False),
        ({"right": 2, "longest": (7, 5)}, False),
        ({"rows": 0}, False),
        ({"tokens": 0}, False),
        ({"longest": (5, 0)}, False),
    ):
        of = base | change
        q = Shaped(of["cuda"], of["dtype"], of["rows"], of["dim"])
        v = Shaped(of["cuda"], of["dtype"], of["tokens"], of["value_dim"])
        options = (None, None, None, None, of["scale"], of["left"], of["right"])
        call = varlen.AttentionCall(q, [v], [v], *options, softcap=of.get("softcap", 0.0))
        assert varlen._takes_flash(call, varlen.Packing(None, None, *of["longest"])) == takes, change


@pytest.mark.parametrize("dim", [64, 20])
def test_the_installed_torch_takes_our_arguments(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own varlen_attn, by its kernel for meta tensors."""
    monkeypatch.setattr(varlen, "_takes_flash", lambda call, packing: True)
    meta: dict[str, Any] = {"dtype": BF16, "device": "meta"}
    q = torch.empty(10, 4, dim, **meta, requires_grad=True)
    keys, values = ([torch.empty(12, 2, dim, **meta) for _ in range(2)] for _ in range(2))
    weights = torch.empty(2, 2, dim, device="meta")
    lengths = torch.empty(4, dtype=torch.int32, device="meta")
    out, lse = fused_kv_attn_varlen_func(
        q,
        keys,
        values,
        weights,
        weights,
        cu_seqlens_q=lengths,
        cu_seqlens_k=lengths,
        max_seqlen_q=6,
        max_seqlen_k=6,
        causal=True,
        return_lse=True,
    )
    assert out.shape == (10, 4, dim) and lse.shape == (4, 10) and lse.dtype == torch.float32
    assert not lse.requires_grad
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape


# Wrong calls


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(1, 6, 4, 16)}, ValueError, r"q must have 3 dims \(total_q, H, D\), got"),
    ({"keys": torch.zeros(1, 6, 2, 16)}, ValueError, r"keys\[0\] must have 3 dims \(total_k, G, D\)"),
    ({"keys": torch.zeros(6, 2, 8)}, ValueError, r"keys\[0\] must be .* D = 16, got \(6, 2, 8\)"),
    ({"values": torch.zeros(5, 2, 16)}, ValueError, r"values\[0\] must have .* \(6, 2\), got \(5, 2, 16\)"),
    ({"keys": [torch.zeros(6, 2, 16), torch.zeros(5, 2, 16)]}, ValueError, r"keys\[1\] must have shape"),
    ({"q": torch.zeros(6, 3, 16)}, ValueError, r"q must have a multiple of keys\[0\]'s 2 heads, got 3"),
    ({"q": torch.zeros(6, 4, 16).long()}, TypeError, "q must be float32, .* got int64"),
    ({"cu_seqlens_q": [0, 2, 6]}, TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    (
        {"cu_seqlens_q": torch.tensor([0, 2, 6])},
        TypeError,
        "cu_seqlens_q must be int32, got int64; call .int",
    ),
    (
        {"cu_seqlens_k": torch.tensor([[0, 2, 6]]).int()},
        ValueError,
        r"cu_seqlens_k must have shape \(B \+ 1,\)",
    ),
    (
        {"cu_seqlens_q": torch.zeros(0).int()},
        ValueError,
        r"cu_seqlens_q must have shape \(B \+ 1,\), got \(0,\)",
    ),
    ({"cu_seqlens_k": torch.tensor([0, 6]).int()}, ValueError, r"cu_seqlens_k must have shape \(3,\) as"),
    ({"cu_seqlens_q": torch.tensor([1, 2, 6]).int()}, ValueError, "cu_seqlens_q must start with 0, got 1"),
    (
        {"cu_seqlens_k": torch.tensor([0, 7, 6]).int()},
        ValueError,
        "cu_seqlens_k must not fall, got 7 before 6",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, 2, 5]).int()},
        ValueError,
        r"must end with 6, the tokens of keys\[0\], got 5",
    ),
    ({"cu_seqlens_q": torch.tensor([0, 2, 9]).int()}, ValueError, "must end with 6, the rows of q, got 9"),
    ({"cu_seqlens_q": torch.zeros(3, device="meta").int()}, ValueError, "cu_seqlens_q must be on cpu as q"),
    ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q must be at least 4, the longest sequence .* got 3"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0, got -1"),
    ({"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k must be an int, got float"),
    ({"max_seqlen_q": torch.tensor(4)}, TypeError, "max_seqlen_q must be an int, got Tensor; call .item"),
    ({"window_size": 3}, TypeError, "window_size must be two ints"),
    ({"causal": torch.tensor(True)}, TypeError, "causal must be a bool"),
    ({"recompute_fusion": "no"}, TypeError, "recompute_fusion must be a bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    right = {
        "q": torch.zeros(6, 4, 16),
        "keys": torch.zeros(6, 2, 16),
        "values": torch.zeros(6, 2, 16),
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }
    fused_kv_attn_varlen_func(**right)
    with pytest.raises(error, match=message):
        fused_kv_attn_varlen_func(**{**right, **change})


def test_debug_checks_read_lengths_that_the_kernel_would_trust(flash: Any) -> None:
    args, options = HALF[0].inputs()
    options["cu_seqlens_q"] = options["cu_seqlens_q"] + 1
    with debug_checks(), pytest.raises(ValueError, match="cu_seqlens_q must start with 0, got 1"):
        fused_kv_attn_varlen_func(*args, **options)
    assert not flash.calls
