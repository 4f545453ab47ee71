"""Codecs: bit packing, grids, rotation, distortion, folding into attention, sizes, fitting, and refusals."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkv_ext.cache.codec import RAW, SCHEMES, Codec, CodecPlan, Coding, TensorCodec
from fusedkv_ext.cache.codec.bits import look_up, pack, packed_bytes, unpack
from fusedkv_ext.cache.codec.fit import fit, spectrum
from fusedkv_ext.cache.codec.rotation import gaussian_grid, rotation
from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.testing import assert_near

HEADS, DIM, TOKENS = 2, 64, 512
VANILLA = CachePlan.named("vanilla", 4)

# Relative mean squared error on a standard normal sample: an upper bound for each codec, a few per cent above
# what theory says where it says something.
CODECS: dict[str, tuple[Codec, float]] = {
    "int8 per channel": (Codec("int", 8, "channel"), 5e-4),
    "int4 per channel": (Codec("int", 4, "channel"), 0.015),
    "int2 per channel": (Codec("int", 2, "channel"), 0.16),
    "int3 per channel": (Codec("int", 3, "channel"), 0.05),
    "e4m3 per channel": (Codec("e4m3", 0, "channel"), 1.1e-3),
    "e4m3 per token": (Codec("e4m3", 0, "token"), 1.1e-3),
    "int8 per token": (Codec("int", 8, "token"), 1e-4),
    "int4 per token": (Codec("int", 4, "token"), 0.02),
    "int4, channel groups": (Codec("int", 4, "channel-group", 32), 0.0065),
    "int2, channel groups": (Codec("int", 2, "channel-group", 32), 0.165),
    "int4, token groups": (Codec("int", 4, "token-group", 32), 0.0065),
    "int2, token groups": (Codec("int", 2, "token-group", 32), 0.165),
    "rotated grid of 4 bits": (Codec("grid", 4, "token", rotate=True), 0.0100),
    "rotated grid of 3 bits": (Codec("grid", 3, "token", rotate=True), 0.0360),
    "rotated grid of 2 bits": (Codec("grid", 2, "token", rotate=True), 0.125),
    "rotated grid of 1 bit": (Codec("grid", 1, "token", rotate=True), 0.41),
    "balanced": (Codec("grid", 4, "token", rotate=True, balance=True), 0.0105),
    "rotated int4": (Codec("int", 4, "token", rotate=True), 0.02),
    "full rank": (Codec(rank=DIM), 1e-9),
    "full rank, int8": (Codec("int", 8, "channel", rank=DIM), 5e-4),
}


def sample(tokens: int = TOKENS, heads: int = HEADS, dim: int = DIM) -> Tensor:
    return torch.randn(tokens, heads, dim)


def correlated(tokens: int = 2000, heads: int = HEADS, dim: int = 16) -> Tensor:
    """Vectors with a mean, and channels of different sizes that depend on each other."""
    mix = torch.randn(heads, dim, dim) * torch.linspace(0.1, 2, dim)
    return torch.einsum("ngi,gij->ngj", torch.randn(tokens, heads, dim), mix) + torch.randn(heads, dim)


def positive(heads: int = HEADS, dim: int = 16) -> Tensor:
    """A metric, float64 (g, D, D)."""
    root = torch.randn(heads, dim, dim, dtype=torch.float64)
    return root @ root.mT


def fitted(codec: Codec, x: Tensor, metric: Tensor | None = None) -> TensorCodec:
    return fit(TensorCodec(codec, x.shape[1], x.shape[2]), x, metric)


# Bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_takes_the_bytes_of_the_codes_and_loses_nothing(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 5, 24), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, packed_bytes(24, bits)) == (3, 5, 3 * bits)
    assert torch.equal(unpack(packed, 24, bits), codes)
    numbers = torch.randn(2**bits)
    assert torch.equal(look_up(packed, numbers, 24), numbers[codes.long()])


def test_a_byte_holds_a_code_of_the_first_half_and_one_of_the_second() -> None:
    """The layout that kernels read: the low nibbles of n / 2 bytes are the first n / 2 codes."""
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [i | (i + 8) << 4 for i in range(8)]
    assert pack(codes % 4, 2).tolist() == [(i % 4) * 0b01010101 for i in range(4)]


def test_codes_that_fill_no_whole_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="must fill whole bytes, got 7 codes of 4 bits; use a multiple of 2"):
        packed_bytes(7, 4)
    with pytest.raises(ValueError, match="got 12 codes of 3 bits; use a multiple of 8"):
        packed_bytes(12, 3)


# Grids and the rotation


def normal_error(grid: Tensor) -> tuple[float, float, float]:
    """Mean, variance and squared error of a standard normal number on a grid, by integration."""
    x = torch.linspace(-9, 9, 400_000, dtype=torch.float64)
    weight = (-x * x / 2).exp()
    weight /= weight.sum()
    y = grid.double()[torch.bucketize(x, ((grid[1:] + grid[:-1]) / 2).double())]
    mean = (weight * y).sum().item()
    return mean, (weight * y * y).sum().item() - mean**2, (weight * (x - y) ** 2).sum().item()


@pytest.mark.parametrize(("bits", "error"), [(1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_grids_have_the_errors_of_lloyd_and_max(bits: int, error: float) -> None:
    """And the variance that belongs to it: a grid for another variance has neither."""
    grid = gaussian_grid(bits)
    mean, variance, found = normal_error(grid)
    assert len(grid) == 2**bits and torch.equal(grid, grid.sort().values) and torch.equal(grid, -grid.flip(0))
    assert found == pytest.approx(error, rel=0.01)
    assert mean == pytest.approx(0, abs=1e-9)
    assert variance == pytest.approx(1 - found, abs=5e-5)  # points are the means of their cells
    assert normal_error(grid * 0.7)[2] > 1.1 * found and normal_error(grid * 1.3)[2] > 1.1 * found


@pytest.mark.parametrize("dim", [8, 48, 64, 96, 128, 256])
def test_the_rotation_is_orthogonal_and_spreads_a_channel(dim: int) -> None:
    R = rotation(dim)
    assert (R @ R.T - torch.eye(dim)).abs().max() < 1e-6
    block = dim & -dim
    assert R.abs().max().item() == pytest.approx(block**-0.5) and (R != 0).sum(0).eq(block).all()
    assert 0.2 < (R[0][R[0] != 0] > 0).float().mean() < 0.8 or block < 16, "signs differ"


# Codecs


@pytest.mark.parametrize("name", CODECS)
def test_distortion_of_normal_numbers_is_within_its_bound(name: str) -> None:
    codec, bound = CODECS[name]
    x = sample()
    made = fitted(codec, x)
    error = ((made.decode(made.encode(x)) - x).square().mean() / x.square().mean()).item()
    assert error <= bound
    assert error >= bound / 2.5 or codec.rank or codec.bits == 8, "the bound says something"


@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_those_of_the_formula(name: str) -> None:
    codec, _ = CODECS[name]
    x = sample().bfloat16()
    encoded = fitted(codec, x.float()).encode(x)
    per_head = codec.code_bytes(DIM, 2) + codec.scale_bytes(DIM)
    assert encoded.nbytes == TOKENS * HEADS * per_head
    assert codec.bits_per_channel(DIM) == 8 * encoded.nbytes / x.numel()
    assert encoded.scales is None or encoded.scales.dtype == torch.float16


FOLDED = [name for name, (codec, _) in CODECS.items() if not codec.scale.endswith("-group")]


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_query_scores_codes_as_the_query_scores_vectors(name: str) -> None:
    """q . x^ = q . center + q' . u, where a scale per token belongs to u."""
    x, q = correlated(40, dim=DIM), torch.randn(3, 2 * HEADS, DIM)
    made = fitted(CODECS[name][0], x)
    encoded = made.encode(x)
    u = made.values(encoded.codes)
    if made.codec.scale == "token":
        u = u * encoded.scales.float()[..., None]
    grouped = made.fold_query(q).unflatten(1, (HEADS, 2))
    found = torch.einsum("sghr,tgr->sght", grouped.double(), u.double())
    error = made.decode(encoded).double() - made.center.double()
    expected = torch.einsum("sghd,tgd->sght", q.unflatten(1, (HEADS, 2)).double(), error)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_output_is_the_output_over_vectors(name: str) -> None:
    """Rows that see nothing stay zero: the center is added where probabilities sum to 1."""
    x = correlated(40, dim=DIM)
    made = fitted(CODECS[name][0], x)
    encoded = made.encode(x)
    u = made.values(encoded.codes)
    if made.codec.scale == "token":
        u = u * encoded.scales.float()[..., None]
    p = torch.randn(3, HEADS, 2, 40).softmax(-1)
    p[1] = 0
    seen = torch.tensor([True, False, True])[:, None].expand(3, 2 * HEADS)
    out = torch.einsum("sght,tgr->sghr", p, u).flatten(1, 2)
    found = made.fold_output(out, seen)
    expected = torch.einsum("sght,tgd->sghd", p.double(), made.decode(encoded).double()).flatten(1, 2)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    assert found[1].eq(0).all()


@pytest.mark.parametrize("name", FOLDED)
def test_shifting_the_center_changes_no_attention_over_codes(name: str) -> None:
    """q . center is the same for every token, so softmax drops it."""
    x, q = correlated(40, dim=DIM), torch.randn(5, HEADS, DIM)
    made, shifted = fitted(CODECS[name][0], x), fitted(CODECS[name][0], x)
    shifted.center.add_(torch.randn(HEADS, DIM))
    encoded = made.encode(x)
    scores = [torch.einsum("sgd,tgd->sgt", q, codec.decode(encoded)).softmax(-1) for codec in (made, shifted)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    assert (made.decode(encoded) - shifted.decode(encoded)).abs().max() > 0.1


def test_codes_outlive_vectors_of_zeros_and_of_large_numbers() -> None:
    x = torch.zeros(32, HEADS, DIM)
    x[1] = 6e4
    for codec, _ in CODECS.values():
        made = fitted(codec, sample())
        assert made.decode(made.encode(x)).isfinite().all(), codec


def test_scales_per_token_are_of_that_token_alone() -> None:
    x = sample()
    x[7] *= 1000
    for name in ("int8 per token", "rotated grid of 4 bits", "int4, channel groups"):
        made = TensorCodec(CODECS[name][0], HEADS, DIM)
        together = made.decode(made.encode(x))
        alone = torch.cat([made.decode(made.encode(row[None])) for row in x])
        assert torch.equal(together, alone)


# Fitting


def test_weighted_pca_leaves_the_sum_of_the_other_eigenvalues() -> None:
    x, metric, rank = correlated(), positive(), 5
    made = fitted(Codec(rank=rank), x, metric)
    centered = (x - x.mean(0)).double()
    error = (made.decode(made.encode(x)) - x).double()
    found = torch.einsum("ngi,gij,ngj->g", error, metric, error) / len(x)
    covariance = torch.einsum("ngi,ngj->gij", centered, centered) / len(x)
    numbers, vectors = torch.linalg.eigh(metric)
    root = vectors * numbers.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT
    expected = torch.linalg.eigvalsh(root @ covariance @ root)[:, :-rank].sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    plain = fitted(Codec(rank=rank), x)
    error = (plain.decode(plain.encode(x)) - x).double()
    assert (torch.einsum("ngi,gij,ngj->g", error, metric, error) / len(x) > found).all()


def test_pairs_are_those_with_the_largest_scores_of_queries_and_keys() -> None:
    """ThinK (arXiv:2407.21018, eq. 6) on a head made for it: pair 3 is large in queries, 1 and 6 in keys."""
    x, metric = sample(4000, 1, 16), torch.eye(16, dtype=torch.float64)[None].clone()
    x[:, :, [1, 6 + 8]] *= 4.0
    metric[:, 3 + 8, 3 + 8] = 9.0
    x[:, :, 5] += 100.0  # a mean is in the center
    made = fitted(Codec(rank=6, basis="pairs"), x, metric)
    assert made.down is not None and made.down[0].nonzero()[:, 1].tolist() == [1, 3, 6, 9, 11, 14]
    y = made.decode(made.encode(x))
    kept = torch.zeros(16, dtype=torch.bool)
    kept[[1, 3, 6, 9, 11, 14]] = True
    assert_near(y[..., kept], x[..., kept])
    assert_near(y[..., ~kept], x.mean(0)[..., ~kept].expand_as(y[..., ~kept]))
    everything = fitted(Codec(rank=16, basis="pairs"), x, metric)
    assert_near(everything.decode(everything.encode(x)), x, rounding_steps=4)


def test_scores_over_pairs_depend_on_the_distance_alone_and_those_over_channels_do_not() -> None:
    """RoPE turns a pair as one. A channel without its partner leaves a term in the sum of the positions."""
    rope = RotaryEmbedding(16, theta=100.0)
    cos, sin = rope.tables(64, "cpu")
    q, k = torch.randn(16), torch.randn(16)

    def score(kept: list[int], m: int, n: int) -> float:
        a, b = (
            apply_rotary(x.view(1, 1, 1, 16), cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, m), (k, n))
        )
        return float((a * b)[..., kept].sum())

    pairs, channels = [0, 2, 3, 8, 10, 11], [0, 1, 2, 3, 4, 5]
    moved = {name: abs(score(x, 9, 4) - score(x, 49, 44)) for name, x in (("p", pairs), ("c", channels))}
    assert moved["p"] < 1e-5 < 1e-2 < moved["c"]


@pytest.mark.parametrize("basis", ["components", "pairs"])
def test_the_spectrum_is_what_each_coefficient_saves(basis: str) -> None:
    x = correlated()
    metric = positive() if basis == "components" else torch.diag_embed(positive().diagonal(dim1=-2, dim2=-1))
    saved = spectrum(Codec(rank=16, basis=basis), x, metric)
    assert saved.shape == (HEADS, 16) and (saved.diff() <= 0).all()
    for rank in (2, 6, 16):
        made = fitted(Codec(rank=rank, basis=basis), x, metric)
        error = (made.decode(made.encode(x)) - x).double()
        found = torch.einsum("ngi,gij,ngj->g", error, metric, error) / len(x)
        torch.testing.assert_close(found, saved[:, rank:].sum(-1), rtol=2e-3, atol=1e-4)


def test_balance_undoes_a_large_channel_that_queries_ignore() -> None:
    x, metric = sample(2000), torch.eye(DIM, dtype=torch.float64).repeat(HEADS, 1, 1)
    x[:, :, 3] *= 30
    metric[:, 3, 3] = 1 / 900
    errors = {}
    for balance in (False, True):
        made = fitted(Codec("grid", 4, "token", rotate=True, balance=balance), x, metric)
        error = (made.decode(made.encode(x)) - x).double()
        errors[balance] = torch.einsum("ngi,gij,ngj->", error, metric, error).item() / (len(x) * HEADS * DIM)
    assert errors[True] < 0.0105, "as if no channel were large"
    assert errors[False] > 5 * errors[True]


def test_static_scales_clip_rare_outliers_instead_of_covering_them() -> None:
    x = sample(4000)
    x[5, 0, 9], x[6, 0, 9] = 12.0, -12.0
    made = fitted(Codec("int", 4, "channel"), x)
    error = (made.decode(made.encode(x)) - x).square().mean(0)
    covering = (24 / 15) ** 2 / 12  # steps that reach from one outlier to the other
    assert error[0, 9] < 0.35 * covering


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_of_a_grid_keep_the_norm(bits: int) -> None:
    """So that scores and outputs are not all shorter, as with the scale of the smallest error."""
    x = 3 * sample() + 5
    codec = fitted(Codec("grid", bits, "token", rotate=True), x)
    found, expected = ((y - codec.center).norm(dim=-1) for y in (codec.decode(codec.encode(x)), x))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("codec", [Codec("int", 8, "channel"), Codec("e4m3", 0, "channel")], ids=str)
def test_static_ranges_of_8_bits_hold_the_first_tokens(codec: Codec) -> None:
    """Which have ten times the norm of others, and most of the attention."""
    x, first = sample(), 10 * sample(8)
    made = fit(TensorCodec(codec, HEADS, DIM), x, first=first)
    without = fit(TensorCodec(codec, HEADS, DIM), x)
    error, saturated = ((c.decode(c.encode(first)) - first).norm() / first.norm() for c in (made, without))
    assert error < 0.03 < 0.3 < saturated


def test_ranges_of_few_bits_have_no_room_for_the_first_tokens() -> None:
    x, codec = sample(), Codec("int", 4, "channel")
    made = fit(TensorCodec(codec, HEADS, DIM), x, first=10 * sample(8))
    assert torch.equal(made.scale, fit(TensorCodec(codec, HEADS, DIM), x).scale)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (torch.zeros(3, HEADS, 32), r"first must be \(N, 2, 64\), got \(3, 2, 32\)"),
        (torch.full((1, HEADS, DIM), float("inf")), "first must be finite"),
    ],
)
def test_wrong_first_tokens_are_refused(first: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(TensorCodec(Codec("int", 8, "channel"), HEADS, DIM), sample(), first=first)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_refused(damage: float) -> None:
    x = sample()
    x[3, 1, 2] = damage
    with pytest.raises(ValueError, match="sample must be finite, got NaN or inf"):
        fitted(Codec("int", 8, "channel"), x)


@pytest.mark.parametrize("shape", [(5, 3, DIM), (5, HEADS, 32), (1, HEADS, DIM), (5, DIM)])
def test_a_sample_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sample must be \(N, 2, 64\) with N >= 2"):
        fit(TensorCodec(Codec("int", 8, "channel"), HEADS, DIM), torch.zeros(shape))


# Plans of codecs


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "skipv1"])
def test_every_scheme_survives_json_and_counts_its_bytes(name: str, plan: str) -> None:
    cache_plan = CachePlan.named(plan, 4)
    codecs = CodecPlan.named(name, cache_plan)
    codecs.check(cache_plan, 4, DIM)
    assert CodecPlan.from_json(codecs.to_json()) == codecs and not codecs.is_raw and str(codecs)
    total, coded = Fraction(0), 0
    for i, layer in enumerate(codecs.layers):
        heads = len(cache_plan.stored_key_heads(i, 4)), len(cache_plan.stored_value_heads(i, 4))
        for codec, g in zip(layer, heads, strict=True):
            if not g:
                assert codec.is_raw
                continue
            x = torch.randn(codecs.token_group, g, DIM).bfloat16()
            size = x.nbytes if codec.is_raw else TensorCodec(codec, g, DIM).encode(x).nbytes
            total += Fraction(size, codecs.token_group)
            coded += 0 if codec.is_raw else g * DIM * 2
    assert codecs.bytes_per_token(cache_plan, 4, DIM, torch.bfloat16) == total
    assert codecs.raw_bytes(cache_plan, 4, DIM, torch.bfloat16) == (codecs.sinks + codecs.tail) * coded


def test_sources_of_several_layers_get_more_bits() -> None:
    plan = CachePlan.named("fusedkv", 4)
    layers = CodecPlan.named("kivi:bits=2", plan).layers
    assert [layer.keys.bits for layer in layers] == [4, 4, 0, 0]
    same = CodecPlan.named("kivi:bits=2,source_factor=1", plan).layers
    assert [layer.keys.bits for layer in same] == [2, 2, 0, 0]
    assert CodecPlan.named("int4", plan).layers[0].keys.bits == 8
    assert CodecPlan.named("int4", VANILLA).layers[0].keys.bits == 4
    assert CodecPlan.named("turboquant:bits=3", plan).layers[0].values.bits == 4  # the most that a grid has


@pytest.mark.parametrize("length", [0, 3, 8, 13, 40])
@pytest.mark.parametrize(("sinks", "tail", "group"), [(0, 0, 1), (4, 0, 1), (2, 5, 1), (1, 4, 4)])
def test_coded_tokens_are_those_between_the_first_and_the_last(
    length: int, sinks: int, tail: int, group: int
) -> None:
    codec = Codec("int", 2, "token-group", group) if group > 1 else Codec("int", 8, "token")
    coded = CodecPlan("some", [(codec, codec)], sinks, tail).coded_tokens(length)
    assert len(coded) % group == 0 and (not coded or coded.start == sinks)
    assert 0 <= max(length - sinks, 0) - len(coded) - min(tail, max(length - sinks, 0)) < group


GROUPS = Codec("int", 2, "token-group", 32)
REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: Codec("int5"), ValueError, "kind must be one of raw, int, e4m3, grid, got 'int5'"),
    (lambda: Codec("int", 9, "channel"), ValueError, "bits of int codes must be from 2 to 8, got 9"),
    (lambda: Codec("int", 1, "channel"), ValueError, "bits of int codes must be from 2 to 8, got 1"),
    (lambda: Codec("grid", 5, "token"), ValueError, "bits of grid codes must be from 1 to 4, got 5"),
    (lambda: Codec("e4m3", 8, "token"), ValueError, "bits of e4m3 codes must be 0, got 8"),
    (lambda: Codec("int", 4.0, "token"), TypeError, "bits"),
    (
        lambda: Codec("grid", 2, "channel"),
        ValueError,
        "scale of grid codes must be one of token, got 'channel'",
    ),
    (
        lambda: Codec("int", 4, "channel", rotate=True),
        ValueError,
        "rotate must be False with scale 'channel'",
    ),
    (lambda: Codec("int", 4, "token-group", 8, rotate=True), ValueError, "the rotation mixes the channels"),
    (lambda: Codec("int", 4, "token", balance=True), ValueError, "balance must be False without rotate"),
    (lambda: Codec("int", 4, "token", rotate=1), TypeError, "rotate must be a bool, got 1"),
    (lambda: Codec("int", 4, "channel", 32), ValueError, "group must be given with scales of groups only"),
    (
        lambda: Codec("int", 4, "token-group"),
        ValueError,
        "group must be given with scales of groups only, got 0",
    ),
    (lambda: Codec("grid", 4, "token", rotate=True, rank=8), ValueError, "rank must be None with rotate"),
    (lambda: Codec(rank=5, basis="pairs"), ValueError, "rank must be even with a basis of pairs, got 5"),
    (lambda: Codec(basis="pairs"), ValueError, "rank must be even with a basis of pairs, got None"),
    (lambda: Codec(rank=4, basis="rows"), ValueError, "basis must be one of components, pairs, got 'rows'"),
    (lambda: Codec(rank=0), ValueError, "rank"),
    (lambda: TensorCodec(Codec(rank=65), 1, 64), ValueError, "rank must be at most the head dim 64, got 65"),
    (
        lambda: Codec("int", 4, "channel-group", 48).channels(64),
        ValueError,
        "group must divide the 64 channels",
    ),
    (lambda: Codec("int", 3, "channel").channels(20), ValueError, "must fill whole bytes, got 20 codes of 3"),
    (
        lambda: CodecPlan("x", [(GROUPS, RAW)], 0, 31),
        ValueError,
        "tail must be at least the largest group of 32",
    ),
    (lambda: CodecPlan("", [(RAW, RAW)]), TypeError, "name must be a non-empty str"),
    (lambda: CodecPlan("x", [RAW]), TypeError, "layer 0 must be two codecs, of keys and values"),
    (lambda: CodecPlan("x", [(RAW, RAW)], -1), ValueError, "sinks"),
    (
        lambda: CodecPlan.named("int7", VANILLA),
        ValueError,
        "codecs must be one of .*, got 'int7'; did you mean",
    ),
    (
        lambda: CodecPlan.named("kivi:size=2", VANILLA),
        ValueError,
        "'kivi' have no option 'size'; their options:",
    ),
    (
        lambda: CodecPlan.named("kivi:group=two", VANILLA),
        ValueError,
        "option 'group' must be a number, true or false, got 'two'",
    ),
    (lambda: CodecPlan.named("kivi:group=8,group=4", VANILLA), ValueError, "must be given once"),
    (lambda: CodecPlan.named("kivi:2", VANILLA), ValueError, "expected option=value"),
    (
        lambda: CodecPlan.named("kivi:tail=8", VANILLA),
        ValueError,
        "tail must be at least the largest group of 32",
    ),
    (lambda: CodecPlan.named("int4:key_bits=1.5", VANILLA), ValueError, "bits"),
    (lambda: CodecPlan.named("int8:source_factor=0", VANILLA), ValueError, "source_factor"),
    (
        lambda: CodecPlan.named("int8", VANILLA).check(CachePlan.named("vanilla", 5), 4, 64),
        ValueError,
        "5 layers",
    ),
    (
        lambda: CodecPlan.named("int8", VANILLA).check(CachePlan.named("fusedkv", 4), 4, 64),
        ValueError,
        "layer 2 keys: the codec must be raw, got int8, .* stores no keys there",
    ),
    (
        lambda: CodecPlan.named("pca", VANILLA).check(VANILLA, 4, 32),
        ValueError,
        "layer 0 keys: rank must be at most",
    ),
    (lambda: CodecPlan.from_json("{"), ValueError, "codecs must be JSON"),
    (lambda: CodecPlan.from_dict([]), TypeError, "codecs must be a mapping, got list"),
    (lambda: CodecPlan.from_dict({"name": "x"}), ValueError, 'codecs must have "format"'),
    (lambda: Codec.from_dict({"kind": "int", "width": 4}), ValueError, "a codec has no field 'width'"),
]


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_contradicts_itself_or_the_plan_is_refused(index: int) -> None:
    make, kind, message = REFUSED[index]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format of the codecs must be at most 1, got 2; upgrade fusedkv_ext"),
        ({"entropy": 1}, "codecs have no field 'entropy'"),
        ({"layers": [[{}]]}, "layers must be a list"),
        ({"layers": [[{"kind": "int", "bits": 40}, {}]]}, "scale of int codes|bits of int codes"),
        ({"tail": "8"}, "tail"),
    ],
)
def test_json_of_another_format_or_with_unknown_fields_is_refused(
    change: dict[str, Any], message: str
) -> None:
    data = {**json.loads(CodecPlan.named("int8", VANILLA).to_json()), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        CodecPlan.from_dict(data)


def test_schemes_say_where_they_are_from() -> None:
    for name, scheme in SCHEMES.items():
        assert scheme.paper and scheme.summary.endswith(".") and scheme.name == name
        assert isinstance(scheme.build(), Coding)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_outlier_on_one_side_does_not_widen_the_range(sign: int) -> None:
    torch.manual_seed(0)
    sample = torch.randn(4000, 1, 8)
    errors = []
    for outlier in (None, 12.0 * sign):
        if outlier is not None:
            sample[0] = outlier
        codec = fit(TensorCodec(Codec("int", 4, "channel"), 1, 8), sample)
        rest = sample[1:]
        errors.append((codec.decode(codec.encode(rest)) - rest).square().mean().item())
    assert errors[1] < 1.5 * errors[0]
