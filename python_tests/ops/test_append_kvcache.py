"""append_kvcache: writes new tokens into contiguous and paged caches, rotating keys and queries with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import NO_SUCH_PAGE, append, block_table, random_tensor, to_device
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext import append_kvcache
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_close, assert_same_bits

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One append; ``rotary``: number of rotated channels r, 0 for none; ``H``: query heads, likewise."""

    name: str
    S: int = 3
    T: int = 20
    G: int = 2
    Gv: int | None = None
    H: int = 0
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
        if self.H:
            options["query"] = random_tensor((B, self.S, self.H, self.D), self.dtype, self.layout)
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
    Case("rotary_partial", rotary=16, H=3),
    Case("rotary_partial_interleaved", rotary=24, D=40, H=3, interleaved=True),
    Case("rotary_odd_pairs", rotary=6, D=16, H=4),
    Case("rotary_odd_pairs_interleaved", rotary=10, D=16, H=4, interleaved=True),
    Case("rotary_bfloat16", rotary=128, D=128, H=8, dtype=BF16),
    Case("rotary_bfloat16_interleaved", rotary=128, D=128, H=8, dtype=BF16, interleaved=True),
    Case("rotary_float16_paged", rotary=32, dtype=FP16, page_size=7, S=9, lengths=(20, 3)),
    Case("rotary_float16_interleaved_paged", rotary=48, H=5, dtype=FP16, interleaved=True, page_size=16),
    Case("rotary_shorter_than_S", rotary=64, H=2, S=8, lengths=(20, 3, 0)),
    Case("rotary_unaligned", rotary=40, D=40, H=2, layout="sliced", cache_layout="sliced"),
    Case("rotary_unaligned_interleaved", rotary=40, D=40, H=2, layout="sliced", interleaved=True, dtype=BF16),
    Case("rotary_transposed", rotary=64, H=6, layout="transposed", cache_layout="transposed", dtype=BF16),
    Case("rotary_bfloat16_tables", rotary=64, dtype=BF16, rotary_dtype=BF16),
    Case("rotary_D8", D=8, rotary=8, H=1, G=1, dtype=BF16),
    Case("rotary_D24", D=24, rotary=24, H=4, Dv=8, dtype=FP16),
    Case("rotary_D24_float32", D=24, rotary=24, H=4, page_size=1),
    Case("rotary_D200", D=200, rotary=200, H=2, S=1, dtype=BF16),
    Case("rotary_D200_partial", D=200, rotary=64, H=2, S=1, Dv=256),
    Case("D256", D=256, rotary=256, H=4, dtype=BF16),
    Case("D256_float32_paged", D=256, rotary=256, H=4, page_size=16, lengths=(17, 20)),
    Case("float64", rotary=32, H=2, page_size=7, dtype=torch.float64),
    Case("decode_step", S=1, H=8, D=128, rotary=128, page_size=16, dtype=BF16, lengths=(1, 16, 17, 0)),
    Case("many_tokens", S=300, T=300, lengths=(300, 123), D=16),
]


our_append, oracle_append = partial(append, fkv), partial(append, reference)


def contents_after(
    append: Callable[..., Tensor | None], inputs: tuple[Tensor, ...], options: dict, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Caches of ``dtype`` after ``append``, which gets copies, and the rotated query if there is one; the
    oracle computes in that dtype as well."""
    key, value, key_cache, value_cache = inputs
    caches = key_cache.to(dtype, copy=True), value_cache.to(dtype, copy=True)
    extra = {} if append is our_append else {"dtype": dtype}
    rotated = append(key, value, *caches, **options, **extra)
    return caches if rotated is None else (*caches, rotated)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_oracle_and_leaves_other_slots_alone(case: Case, device: torch.device) -> None:
    inputs, options = case.inputs(device)
    exact = contents_after(oracle_append, inputs, options, torch.float64)
    same_maths = contents_after(oracle_append, inputs, options, case.dtype)
    rotated = our_append(*inputs, **options)
    assert (rotated is None) == (case.H == 0)
    # Slots that nobody may write still hold NaN, which the comparison demands to stay where it is.
    assert_close(inputs[2:], exact[:2], same_maths[:2], "cache")
    assert_same_bits(inputs[3].nan_to_num(), same_maths[1].nan_to_num())
    if rotated is not None:
        assert rotated.is_contiguous() and rotated.dtype == case.dtype
        assert_close(rotated, exact[2], same_maths[2], "query")


@pytest.mark.parametrize("case", [case for case in CASES if not case.rotary], ids=lambda case: case.name)
def test_without_rotation_bits_are_copied(case: Case, device: torch.device) -> None:
    inputs, options = case.inputs(device)
    expected = contents_after(oracle_append, inputs, options, case.dtype)
    our_append(*inputs, **options)
    assert_same_bits(inputs[2], expected[0])
    assert_same_bits(inputs[3], expected[1])


def test_specials_are_copied_bit_by_bit(device: torch.device) -> None:
    (key, value, key_cache, value_cache), options = Case("specials", S=1, lengths=(1,), D=16).inputs(device)
    key[0, 0, 0, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    value.copy_(key)
    our_append(key, value, key_cache, value_cache, **options)
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


def test_one_call_gives_the_bits_of_three(device: torch.device) -> None:
    case = Case("split", H=8, rotary=48, S=5, lengths=(20, 3), page_size=7, dtype=BF16)
    (key, value, key_cache, value_cache), options = case.inputs(device)
    together = [key_cache.clone(), value_cache.clone()]
    rotated = our_append(key, value, *together, **options)
    query = options.pop("query")
    none, no_cache = key[:, :, :0], key_cache[:, :, :0]
    assert append_kvcache(key, none, key_cache, no_cache, **options) is None
    assert append_kvcache(none, value, no_cache, value_cache, **options) is None
    alone = our_append(none, none, no_cache, no_cache, query=query, **options)
    assert_same_bits((key_cache, value_cache, alone), (*together, rotated))
    assert_same_bits(rotated[1, :2], query[1, :2])  # before the start of the sequence


@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("length", [-1, -(2**31), 21, 2**31 - 1])
def test_sequences_of_impossible_length_are_not_written(
    length: int, page_size: int | None, backend: str, device: torch.device
) -> None:
    case = Case("length", T=21 if page_size else 20, H=2, rotary=64, lengths=(20, 7, 13), page_size=page_size)
    inputs, options = case.inputs(device)
    expected = contents_after(oracle_append, inputs, options, case.dtype)
    untouched = contents_after(lambda *_, **__: None, inputs, options, case.dtype)
    for b in (0, 2):
        options["cache_seqlens"][b] = length + (page_size is not None and length == 21)
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"cache_seqlens\[0\] must be from 0 to .*, got "):
            our_append(*inputs, **options)
        assert_same_bits(inputs[2:], untouched)
        return
    rotated = our_append(*inputs, **options)
    table = options["block_table"]
    mine = [1] if table is None else table[1, :1].tolist()  # what the sequence in the middle may write to
    for cache, before, after in zip(inputs[2:], untouched, expected, strict=False):
        before[mine] = after[mine]
        torch.testing.assert_close(cache, before, equal_nan=True)
        assert_same_bits(cache.isnan().half(), before.isnan().half())
    assert_same_bits(rotated[::2], options["query"][::2])


@pytest.mark.parametrize("page", [-1, 2**31 - 1, -(2**31), "pages"])
def test_tokens_of_pages_that_do_not_exist_are_not_written(
    page: int | str, backend: str, device: torch.device
) -> None:
    case = Case("page", S=9, H=2, rotary=64, lengths=(20, 12), page_size=7)
    inputs, options = case.inputs(device)
    untouched = contents_after(lambda *_, **__: None, inputs, options, case.dtype)
    kept = contents_after(oracle_append, inputs, options, case.dtype)
    lost = int(options["block_table"][0, 2])
    options["block_table"][0, 2] = inputs[2].shape[0] if page == "pages" else page
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"block_table\[0, 2\] must be a page from 0 to .*, got "):
            our_append(*inputs, **options)
        assert_same_bits(inputs[2:], untouched)
        return
    rotated = our_append(*inputs, **options)
    for cache, before, after in zip(inputs[2:], untouched, kept, strict=False):
        after[lost] = before[lost]
        torch.testing.assert_close(cache, after, equal_nan=True)
    torch.testing.assert_close(rotated, kept[2])


def test_positions_beyond_the_tables_are_not_written(backend: str, device: torch.device) -> None:
    case = Case("tables", S=4, H=2, rotary=64, lengths=(20, 12))
    inputs, options = case.inputs(device)
    kept = contents_after(oracle_append, inputs, options, case.dtype)
    for name in ("rotary_cos", "rotary_sin"):
        options[name] = options[name][:18].clone()
    if backend == "cpu":
        with pytest.raises(
            ValueError, match="rotary_cos must have at least 20 rows, the longest length, got 18"
        ):
            our_append(*inputs, **options)
        return
    rotated = our_append(*inputs, **options)
    for cache, after in zip(inputs[2:], kept, strict=False):
        after[0, 18:] = math.nan
        torch.testing.assert_close(cache, after, equal_nan=True)
    assert_same_bits(rotated[0, 2:], options["query"][0, 2:])
    torch.testing.assert_close(rotated[0, :2], kept[2][0, :2])


@pytest.mark.parametrize("offset", [3, 0], ids=["address", "strides"])
@pytest.mark.parametrize("which", ["key", "value", "key_cache", "value_cache", "query", "rotary"])
def test_a_single_unaligned_tensor(which: str, offset: int, device: torch.device) -> None:
    """Only the address of one tensor is no multiple of 16 bytes, or only its strides."""

    def misplaced(x: Tensor) -> Tensor:
        wide = x.new_empty(*x.shape[:-1], x.shape[-1] + (8 if offset else 3))
        return wide[..., offset : offset + x.shape[-1]].copy_(x)

    case = Case("unaligned", S=2, H=2, Dv=32, rotary=64, lengths=(20,), dtype=BF16)
    inputs, options = case.inputs(device)
    expected = contents_after(our_append, inputs, options, BF16)
    names = ("key", "value", "key_cache", "value_cache")
    arguments = {**dict(zip(names, inputs, strict=True)), **options}
    if which == "rotary":
        for name in ("rotary_cos", "rotary_sin"):
            flat = arguments[name].new_empty(arguments[name].numel() + offset)
            arguments[name] = flat[offset:].view_as(arguments[name]).copy_(arguments[name])
    else:
        arguments[which] = misplaced(arguments[which])
    rotated = our_append(**arguments)
    # The compiler contracts products and sums in one of the two paths: a rounding in fp32, a step in bf16.
    for got, wanted in zip(
        (arguments["key_cache"], arguments["value_cache"], rotated), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-14, equal_nan=True)


def test_one_tensor_for_keys_and_values(device: torch.device) -> None:
    """Into two caches; test_writes.py has one cache as both, which is refused."""
    (key, _, *caches), options = Case("twice", page_size=7, dtype=BF16).inputs(device)
    expected = contents_after(oracle_append, (key, key, *caches), options, BF16)
    append_kvcache(key, key, *caches, **options)
    assert_same_bits(tuple(caches), expected)


def test_query_without_angles_or_of_another_shape_is_an_error() -> None:
    case = Case("bad_query", H=2, rotary=64)
    inputs, options = case.inputs(torch.device("cpu"))
    query = options.pop("query")
    for wrong, error, message in (
        (query[:, :2], ValueError, "query must have B and S of key"),
        (query[..., :56], ValueError, "query must have the head dim of key, 64"),
        (query[0], ValueError, "query must have 4 dims"),
        (query.bfloat16(), TypeError, "query must be float32 as key, got bfloat16"),
        ([query], TypeError, "query must be .* got list"),
        (query.to("meta"), ValueError, "query must be on .* got a tensor on meta"),
    ):
        with pytest.raises(error, match=message):
            our_append(*inputs, **options, query=wrong)
    options.update(rotary_cos=None, rotary_sin=None)
    with pytest.raises(ValueError, match="query must be passed with rotary_cos and rotary_sin"):
        our_append(*inputs, **options, query=query)
    assert bool(inputs[2].isnan().all())


def test_rotation_keeps_the_length_of_every_pair(device: torch.device) -> None:
    for interleaved in (False, True):
        case = Case("norm", S=20, lengths=(20, 20), rotary=64, interleaved=interleaved)
        (key, value, key_cache, value_cache), options = case.inputs(device)
        our_append(key, value, key_cache, value_cache, **options)

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
    our_append(*inputs, **options)
    assert all(torch.equal(x, y) for x, y in zip(watched, before, strict=True))


def test_number_of_threads_changes_no_bit(with_threads: Callable[[int], None]) -> None:
    inputs, options = Case("threads", S=65, T=65, lengths=(65, 30), rotary=64, dtype=BF16).inputs(
        torch.device("cpu")
    )
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        results.append(contents_after(our_append, inputs, options, BF16))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_failed_append_writes_nothing() -> None:
    case = Case("atomic", S=2, lengths=(20, 7), page_size=7)
    (key, value, key_cache, value_cache), options = case.inputs(torch.device("cpu"))
    options["block_table"][1, 0] = NO_SUCH_PAGE
    with pytest.raises(ValueError, match="block_table"):
        our_append(key, value, key_cache, value_cache, **options)
    assert bool(key_cache.isnan().all()) and bool(value_cache.isnan().all())


@pytest.mark.parametrize("which", range(5), ids=["key", "value", "key_cache", "value_cache", "query"])
def test_input_that_requires_grad_raises_only_in_grad_mode(which: int) -> None:
    inputs, options = Case("grad", H=2, rotary=64).inputs(torch.device("cpu"))
    (*inputs, options["query"])[which].requires_grad_()
    with pytest.raises(ValueError, match="grad"):
        our_append(*inputs, **options)
    with torch.no_grad():
        our_append(*inputs, **options)
