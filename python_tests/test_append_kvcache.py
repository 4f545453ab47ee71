"""append_kvcache: writes new tokens into contiguous and paged caches, rotating the keys on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import NO_SUCH_PAGE, block_table, random_tensor, to_device
from compare import assert_close, assert_same_bits
from torch import Tensor

from fusedkv_ext import append_kvcache, reference

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One append; ``rotary``: number of rotated channels r, 0 for none."""

    name: str
    S: int = 3
    T: int = 20
    G: int = 2
    Gv: int | None = None
    D: int = 64
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    cache_layout: str = "contiguous"
    lengths: tuple[int, ...] = (20, 7)
    page_size: int | None = None
    rotary: int = 0
    interleaved: bool = False
    rotary_dtype: torch.dtype = torch.float32

    def inputs(self, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        """(key, value, key_cache, value_cache) and keyword arguments; both caches start as NaN."""
        B = len(self.lengths)
        dims = (self.G, self.D), (self.Gv or self.G, self.Dv or self.D)
        new = [random_tensor((B, self.S, *dim), self.dtype, self.layout) for dim in dims]
        table = block_table(self.lengths, self.T, self.page_size) if self.page_size else None
        pages = sum(math.ceil(n / self.page_size) for n in self.lengths) + 2 if self.page_size else 0
        slots = (pages, self.page_size) if self.page_size else (B, self.T)
        caches = [
            random_tensor((*slots, *dim), self.dtype, self.cache_layout).fill_(math.nan) for dim in dims
        ]
        options: dict[str, object] = {
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32),
            "block_table": table,
        }
        if self.rotary:
            angles = 10 * torch.randn(self.T, self.rotary // 2)
            options["rotary_cos"] = angles.cos().to(self.rotary_dtype)
            options["rotary_sin"] = angles.sin().to(self.rotary_dtype)
            options["rotary_interleaved"] = self.interleaved
        return to_device((*new, *caches), device), to_device(options, device)


CASES = [
    Case("one_token", S=1),
    Case("one_token_into_a_fresh_cache", S=1, lengths=(1, 1)),
    Case("several_tokens"),
    Case("whole_cache", S=20, lengths=(20, 20)),
    Case("shorter_than_S", S=8, lengths=(20, 3, 8)),
    Case("empty_sequence", S=1, lengths=(5, 0, 20)),
    Case("all_sequences_empty", lengths=(0, 0)),
    Case("one_head_bfloat16", G=1, dtype=BF16),
    Case("many_heads_float16", G=16, D=24, dtype=FP16),
    Case("values_wider_than_keys", D=40, Dv=72),
    Case("fewer_value_heads_than_key_heads", G=4, Gv=1, rotary=64),
    Case("fewer_key_heads_than_value_heads_paged", G=1, Gv=4, page_size=7, dtype=BF16),
    Case("page_size_1", page_size=1),
    Case("page_size_7_across_pages", S=9, page_size=7, lengths=(20, 14, 15, 3)),
    Case("page_size_16_bfloat16", S=5, page_size=16, dtype=BF16, lengths=(17, 16, 0)),
    Case("page_size_64", page_size=64, T=130, lengths=(130, 65)),
    Case("transposed_input", layout="transposed", dtype=BF16),
    Case("unaligned_input", layout="sliced", D=40),
    Case("every_other_token_input", layout="every_other"),
    Case("transposed_cache", cache_layout="transposed"),
    Case("unaligned_cache_bfloat16", cache_layout="sliced", dtype=BF16, D=72),
    Case("transposed_pages", cache_layout="transposed", page_size=7),
    Case("rotary_half_split", rotary=64),
    Case("rotary_interleaved", rotary=64, interleaved=True),
    Case("rotary_partial", rotary=16),
    Case("rotary_partial_interleaved", rotary=24, D=40, interleaved=True),
    Case("rotary_odd_pairs", rotary=6, D=16),
    Case("rotary_odd_pairs_interleaved", rotary=10, D=16, interleaved=True),
    Case("rotary_bfloat16", rotary=128, D=128, dtype=BF16),
    Case("rotary_bfloat16_interleaved", rotary=128, D=128, dtype=BF16, interleaved=True),
    Case("rotary_float16_paged", rotary=32, dtype=FP16, page_size=7, S=9, lengths=(20, 3)),
    Case("rotary_shorter_than_S", rotary=64, S=8, lengths=(20, 3, 0)),
    Case("rotary_unaligned", rotary=40, D=40, layout="sliced", cache_layout="sliced"),
    Case("rotary_bfloat16_tables", rotary=64, dtype=BF16, rotary_dtype=BF16),
    Case("D256", D=256, rotary=256, dtype=BF16),
    Case("many_tokens", S=300, T=300, lengths=(300, 123), D=16),
]


def contents_after(
    append: Callable[..., None], inputs: tuple[Tensor, ...], options: dict, dtype: torch.dtype
):
    """Caches of ``dtype`` after ``append``, which gets copies; the oracle computes in that dtype as well."""
    key, value, key_cache, value_cache = inputs
    caches = key_cache.to(dtype, copy=True), value_cache.to(dtype, copy=True)
    extra = {} if append is append_kvcache else {"dtype": dtype}
    append(key, value, *caches, **options, **extra)
    return caches


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_oracle_and_leaves_other_slots_alone(case: Case, device: torch.device) -> None:
    inputs, options = case.inputs(device)
    exact = contents_after(reference.append_kvcache, inputs, options, torch.float64)
    same_maths = contents_after(reference.append_kvcache, inputs, options, case.dtype)
    assert append_kvcache(*inputs, **options) is None
    # Slots that nobody may write still hold NaN, which the comparison demands to stay where it is.
    assert_close(inputs[2:], exact, same_maths, "cache")
    assert_same_bits(inputs[3].nan_to_num(), same_maths[1].nan_to_num())


@pytest.mark.parametrize("case", [case for case in CASES if not case.rotary], ids=lambda case: case.name)
def test_without_rotation_bits_are_copied(case: Case, device: torch.device) -> None:
    inputs, options = case.inputs(device)
    expected = contents_after(reference.append_kvcache, inputs, options, case.dtype)
    append_kvcache(*inputs, **options)
    assert_same_bits(inputs[2], expected[0])
    assert_same_bits(inputs[3], expected[1])


def test_specials_are_copied_bit_by_bit(device: torch.device) -> None:
    (key, value, key_cache, value_cache), options = Case("specials", S=1, lengths=(1,), D=16).inputs(device)
    key[0, 0, 0, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    value.copy_(key)
    append_kvcache(key, value, key_cache, value_cache, **options)
    assert_same_bits(key_cache[:, :1], key)
    assert_same_bits(value_cache[:, :1], value)


@pytest.mark.parametrize("page_size", [None, 7])
def test_token_by_token_equals_all_at_once(page_size: int | None, device: torch.device) -> None:
    case = Case("steps", S=9, T=20, lengths=(20, 13), rotary=32, page_size=page_size, dtype=BF16)
    (key, value, *caches), options = case.inputs(device)
    stepwise = [x.clone() for x in caches]
    append_kvcache(key, value, *caches, **options)
    for i in range(9):
        lengths = options["cache_seqlens"] - 8 + i
        step = slice(i, i + 1)
        append_kvcache(key[:, step], value[:, step], *stepwise, **{**options, "cache_seqlens": lengths})
    assert_same_bits(tuple(stepwise), tuple(caches))


def test_rotation_keeps_the_length_of_every_pair(device: torch.device) -> None:
    for interleaved in (False, True):
        case = Case("norm", S=20, lengths=(20, 20), rotary=64, interleaved=interleaved)
        (key, value, key_cache, value_cache), options = case.inputs(device)
        append_kvcache(key, value, key_cache, value_cache, **options)

        def pair_norms(x: Tensor, interleaved: bool = interleaved) -> Tensor:
            pairs = x.unflatten(-1, (32, 2)) if interleaved else x.unflatten(-1, (2, 32)).transpose(-1, -2)
            return pairs.norm(dim=-1)

        torch.testing.assert_close(pair_norms(key_cache), pair_norms(key))


def test_position_zero_of_real_tables_is_not_rotated(device: torch.device) -> None:
    (key, value, key_cache, value_cache), options = Case("zero", S=1, lengths=(1, 1)).inputs(device)
    angles = torch.outer(torch.arange(20.0), 10000 ** -torch.linspace(0, 1, 32)).to(device)
    append_kvcache(
        key, value, key_cache, value_cache, **options, rotary_cos=angles.cos(), rotary_sin=angles.sin()
    )
    assert_same_bits(key_cache[:, :1], key)


def test_inputs_stay_untouched(device: torch.device) -> None:
    inputs, options = Case("untouched", rotary=64, page_size=7).inputs(device)
    watched = [*inputs[:2], *(x for x in options.values() if isinstance(x, Tensor))]
    before = [x.clone() for x in watched]
    append_kvcache(*inputs, **options)
    assert all(torch.equal(x, y) for x, y in zip(watched, before, strict=True))


def test_number_of_threads_changes_no_bit(with_threads: Callable[[int], None]) -> None:
    inputs, options = Case("threads", S=65, T=65, lengths=(65, 30), rotary=64, dtype=BF16).inputs(
        torch.device("cpu")
    )
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        results.append(contents_after(append_kvcache, inputs, options, BF16))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_failed_append_writes_nothing() -> None:
    case = Case("atomic", S=2, lengths=(20, 7), page_size=7)
    (key, value, key_cache, value_cache), options = case.inputs(torch.device("cpu"))
    options["block_table"][1, 0] = NO_SUCH_PAGE
    with pytest.raises(ValueError, match="block_table"):
        append_kvcache(key, value, key_cache, value_cache, **options)
    assert bool(key_cache.isnan().all()) and bool(value_cache.isnan().all())


@pytest.mark.parametrize("which", range(4), ids=["key", "value", "key_cache", "value_cache"])
def test_input_that_requires_grad_raises_only_in_grad_mode(which: int) -> None:
    inputs, options = Case("grad").inputs(torch.device("cpu"))
    inputs[which].requires_grad_()
    with pytest.raises(ValueError, match="grad"):
        append_kvcache(*inputs, **options)
    with torch.no_grad():
        append_kvcache(*inputs, **options)
