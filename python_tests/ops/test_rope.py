"""RoPE against formulas written another way: complex products in fp64, and the scaling rules channel by
channel."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fusedkv_ext.ops.rope import RotaryEmbedding, apply_rotary

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def inverse_frequencies(rope: RotaryEmbedding) -> list[float]:
    """Read off the angles of position 1, which cos and sin determine (all are below pi)."""
    cos, sin = (table.double() for table in rope.cos_sin(torch.tensor([1])))
    return torch.atan2(sin, cos)[0].tolist()


def rotated_by_complex_product(x, positions, frequencies, interleaved):
    """(B, S, H, D) fp64, positions (S,) or (B, S): z e^(i p f) on the pairs of the first 2 len(frequencies)
    channels."""
    half = len(frequencies)
    angles = positions.double()[..., None] * torch.tensor(frequencies, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)[..., None, :]
    out = x.clone()
    for d in range(half):
        a, b = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
        z = torch.complex(x[..., a], x[..., b]) * turn[..., d]
        out[..., a], out[..., b] = z.real, z.imag
    return out


# --- The rotation ---


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, None), (64, 16), (24, 24), (8, 2)])
@pytest.mark.parametrize("ragged", [False, True])
def test_rotation_is_a_complex_product(interleaved, head_dim, rotary_dim, ragged):
    rope = RotaryEmbedding(head_dim, theta=500.0, interleaved=interleaved, rotary_dim=rotary_dim)
    x = torch.randn(2, 5, 3, head_dim, dtype=torch.float64)
    positions = torch.tensor([[7, 8, 9, 10, 11], [-2, -1, 0, 1, 2]]) if ragged else torch.arange(3, 8)
    dim = rope.rotary_dim
    frequencies = [500.0 ** (-2 * d / dim) for d in range(dim // 2)]
    expected = rotated_by_complex_product(x, positions, frequencies, interleaved)
    got = apply_rotary(x, *rope.cos_sin(positions), interleaved)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # cos and sin are fp32
    assert torch.equal(got[..., dim:], x[..., dim:])


def test_half_split_is_transformers_rotate_half():
    """x cos + rotate_half(x) sin with rotate_half = cat(-x2, x1) and cos = cat(c, c), as in HF's Llama and
    Qwen3."""
    rope = RotaryEmbedding(32, theta=1e6)
    x, positions = torch.randn(1, 6, 2, 32), torch.arange(100, 106)
    frequencies = 1.0 / (1e6 ** (torch.arange(0, 32, 2, dtype=torch.int64).float() / 32))
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    halves = torch.cat((-x[..., 16:], x[..., :16]), dim=-1)
    expected = x * angles.cos() + halves * angles.sin()
    torch.testing.assert_close(apply_rotary(x, *rope.cos_sin(positions)), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    rope = RotaryEmbedding(64)
    x = torch.randn(1, 9, 2, 64).to(dtype)
    tables = rope.cos_sin(torch.arange(4000, 4009))
    got = apply_rotary(x, *tables)
    assert got.dtype == dtype
    assert torch.equal(got, apply_rotary(x.float(), *tables).to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved):
    rope = RotaryEmbedding(8, rotary_dim=4, interleaved=interleaved)
    x = torch.randn(2, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (table.double() for table in rope.cos_sin(torch.arange(3)))
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin, interleaved), x)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (3, 2)), "cos and sin must both be"),
        (((4, 4), (4, 4)), r"x \(B, S, H, D\) = \(2, 3, 1, 8\)"),
        (((3, 5), (3, 5)), "rotate 10 channels, more than the 8"),
        (((3, 1, 4), (3, 1, 4)), "cos and sin must both be"),
    ],
)
def test_tables_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary(torch.zeros(2, 3, 1, 8), *(torch.zeros(shape) for shape in shapes))


# --- Frequencies ---


def test_linear_divides_the_positions():
    plain, scaled = RotaryEmbedding(32), RotaryEmbedding(32, scaling={"type": "linear", "factor": 4.0})
    torch.testing.assert_close(
        torch.stack(scaled.cos_sin(torch.tensor([4, 40, 4000]))),
        torch.stack(plain.cos_sin(torch.tensor([1, 10, 1000]))),
    )


def test_llama3_channel_by_channel():
    """Llama 3.1's own code: three cases by wavelength."""
    expected = []
    for d in range(64):
        frequency = 500000.0 ** (-d / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 8.0
        elif wavelength >= 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8.0 + smooth * frequency
        expected.append(frequency)
    got = inverse_frequencies(RotaryEmbedding(128, theta=500000.0, scaling=LLAMA3))
    assert got == pytest.approx(expected, rel=1e-6)
    plain = inverse_frequencies(RotaryEmbedding(128, theta=500000.0))
    kinds = [g / p for g, p in zip(got, plain, strict=True)]
    assert kinds[0] == pytest.approx(1) and kinds[-1] == pytest.approx(1 / 8)
    assert any(0.15 < kind < 0.95 for kind in kinds)  # the case in between occurs


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_channel_by_channel(truncate):
    """arXiv:2309.00071: channels between beta_fast and beta_slow turns in the original context are
    interpolated."""
    theta, dim, context, factor = 1e6, 128, 32768, 4.0

    def channel_that_turns(turns):  # solves context * theta^(-2 d / dim) = 2 pi turns for d
        return dim / 2 * math.log(context / (2 * math.pi * turns), theta)

    low, high = channel_that_turns(32), channel_that_turns(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    expected = []
    for d in range(dim // 2):
        frequency = theta ** (-2 * d / dim)
        ramp = min(max((d - low) / (high - low), 0), 1)
        expected.append(ramp * frequency / factor + (1 - ramp) * frequency)
    rope = RotaryEmbedding(dim, theta=theta, scaling={**YARN, "truncate": truncate, "attention_factor": 1.0})
    assert inverse_frequencies(rope) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("parameters", "factor"),
    [
        ({}, 0.1 * math.log(4.0) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.7, "mscale_all_dim": 1.0}, (0.07 * math.log(4.0) + 1) / (0.1 * math.log(4.0) + 1)),
        ({"mscale": 0.7, "mscale_all_dim": 0}, 0.1 * math.log(4.0) + 1),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarn_attention_factor_multiplies_cos_and_sin(parameters, factor):
    cos, sin = RotaryEmbedding(32, scaling={**YARN, **parameters}).cos_sin(torch.tensor([0, 17]))
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, factor**2))


def test_newer_rope_parameters_are_understood():
    rope = RotaryEmbedding(
        64, theta=5e5, scaling={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}
    )
    assert rope.rotary_dim == 16
    assert inverse_frequencies(rope)[1] == pytest.approx(5e5 ** (-1 / 8), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_dim": 7}, ValueError, "rotary_dim must be even and in 2..head_dim=7, got 7"),
        ({"head_dim": 8, "rotary_dim": 10}, ValueError, "rotary_dim must be even .* got 10"),
        ({"head_dim": 8, "theta": 1.0}, ValueError, "theta must be a finite number above 1"),
        ({"head_dim": 8, "theta": math.nan}, ValueError, "theta must be a finite number above 1"),
        ({"head_dim": 8, "scaling": 2.0}, TypeError, "scaling must be a dict"),
        (
            {"head_dim": 8, "scaling": {"rope_type": "longrope"}},
            ValueError,
            "'longrope'; known: default, linear",
        ),
        ({"head_dim": 8, "scaling": {"type": "linear"}}, ValueError, "'linear' lacks factor"),
        (
            {"head_dim": 8, "scaling": {"type": "linear", "factr": 2, "factor": 2}},
            ValueError,
            "unknown factr",
        ),
        (
            {"head_dim": 8, "scaling": {"type": "linear", "factor": "2"}},
            ValueError,
            "must be a positive number",
        ),
        (
            {"head_dim": 8, "scaling": {"type": "linear", "factor": 0.0}},
            ValueError,
            "must be a positive number",
        ),
        ({"head_dim": 8, "scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ValueError, "must be below"),
        (
            {"head_dim": 8, "scaling": {"rope_theta": 5e5}},
            ValueError,
            "contradicts scaling's rope_theta=500000.0",
        ),
    ],
)
def test_bad_parameters(arguments, error, message):
    with pytest.raises(error, match=message):
        RotaryEmbedding(**arguments)


# --- Tables ---


def test_tables_are_cos_sin_of_the_positions(device):
    rope = RotaryEmbedding(32, scaling=YARN)
    for length in (1, 5, 3, 64, 65):
        tables = rope.tables(length, device)
        expected = rope.cos_sin(torch.arange(length, device=device))
        for table, values in zip(tables, expected, strict=True):
            assert table.shape == (length, 16) and table.is_contiguous()
            assert table.dtype == torch.float32 and table.device.type == device.type
            torch.testing.assert_close(table, values, rtol=0, atol=1e-7)


def test_tables_grow_and_old_ones_stay_valid():
    rope = RotaryEmbedding(16)
    before, _ = rope.tables(4)
    kept = before.clone()
    assert rope.tables(4)[0].data_ptr() == before.data_ptr()
    assert rope.tables(100)[0].shape == (100, 8)
    assert torch.equal(before, kept)
    assert torch.equal(rope.tables(100)[0][:4], kept)
    assert rope.tables(0)[0].shape == (0, 8)
    with pytest.raises(ValueError, match="max_len must not be negative, got -1"):
        rope.tables(-1)


def test_large_positions_are_exact():
    """In fp32 the angle of position 2^20 - 1 would be off by up to 0.06."""
    rope, position = RotaryEmbedding(64), 2**20 - 1
    angles = [position * 10000.0 ** (-2 * d / 64) for d in range(32)]
    cos, sin = rope.cos_sin(torch.tensor([position]))
    assert cos[0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=2e-7)
    assert sin[0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=2e-7)


def test_dtype_conversions_and_checkpoints_leave_it_alone():
    rope = RotaryEmbedding(16)
    before = [t.clone() for t in rope.cos_sin(torch.arange(300))]
    rope.tables(8)
    for model in (
        torch.nn.Sequential(rope).to(torch.bfloat16),
        copy.deepcopy(torch.nn.Sequential(rope)).half(),
    ):
        assert not model.state_dict()
        for got in (model[0].cos_sin(torch.arange(300)), model[0].tables(300)):
            assert all(
                torch.equal(g, b) and g.dtype == torch.float32 for g, b in zip(got, before, strict=True)
            )


def test_built_on_the_meta_device_it_still_knows_its_frequencies():
    with torch.device("meta"):
        rope = RotaryEmbedding(16)
    rope.to_empty(device="cpu")
    expected = RotaryEmbedding(16).cos_sin(torch.arange(5))
    assert all(torch.equal(g, e) for g, e in zip(rope.cos_sin(torch.arange(5)), expected, strict=True))


def test_tables_made_under_inference_mode_serve_training():
    rope = RotaryEmbedding(8)
    with torch.inference_mode():
        rope.tables(4)
        rope.cos_sin(torch.arange(4))
    x = torch.randn(1, 4, 1, 8, requires_grad=True)
    apply_rotary(x, *rope.tables(4)).sum().backward()
    assert x.grad is not None


def test_compiles_to_one_graph():
    rope = RotaryEmbedding(8, scaling={"type": "linear", "factor": 2.0})

    @torch.compile(fullgraph=True, backend="eager")
    def rotate(x, positions):
        return apply_rotary(x, *rope.cos_sin(positions))

    x, positions = torch.randn(2, 3, 1, 8), torch.arange(3)
    torch.testing.assert_close(rotate(x, positions), apply_rotary(x, *rope.cos_sin(positions)))
