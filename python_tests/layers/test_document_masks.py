"""fused_kv_attn_func with document_ids: rows see their own document, and the masks are not kept.

Documents that are runs of tokens are computed one by one, all others with masks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, dense_inputs, named
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fusedkv_ext import fused_kv_attn_func
from fusedkv_ext.ops import checks, reference, sdpa
from fusedkv_ext.ops.packing import Documents, read_documents
from fusedkv_ext.testing import assert_close, assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
CHUNK = sdpa._CHUNK


Lengths = tuple[tuple[int, ...], ...]

TOKENS = 2 * CHUNK + 76
# They end at a chunk's edge, one before and one behind it, and within a chunk.
EDGES = ((CHUNK - 1, 1, 1, CHUNK - 1, 1, 75),)
LONG = {"B": 1, "S": TOKENS, "T": TOKENS, "H": 2, "G": 1, "D": 16}
TWO = ((20, 13),)

# The lengths of the documents of each sequence; those of the last one serve the rest.
CASES: list[tuple[Case, Lengths]] = [
    (Case("two_documents", S=33, T=33), TWO),
    (Case("sequences_differ", S=33, T=33), ((1, 31, 1), (7, 7, 19))),
    (Case("one_document", S=33, T=33), ((33,),)),
    (Case("every_token_a_document", S=33, T=33), ((1,) * 33,)),
    (Case("not_causal", S=33, T=33, causal=False), ((20, 13), (1, 32))),
    (Case("not_causal_every_token_a_document", S=33, T=33, causal=False), ((1,) * 33,)),
    (Case("last_rows", S=7, T=40), ((30, 5, 5), (40,))),
    (Case("last_rows_not_causal", S=7, T=40, causal=False), ((30, 5, 5), (34, 6))),
    (Case("one_row_within", S=1, T=65), ((60, 5),)),
    (Case("one_row_alone", S=1, T=65), ((64, 1),)),
    (Case("window_left", S=33, T=33, window=(4, -1)), ((20, 13), (2, 31))),
    (Case("window_both", S=33, T=33, window=(6, 2), causal=False), TWO),
    (Case("window_right", S=33, T=33, window=(-1, 3), causal=False), TWO),
    (Case("window_of_itself", S=33, T=33, window=(0, 0)), TWO),
    (Case("bfloat16", S=33, T=33, dtype=BF16), ((20, 12, 1),)),
    (Case("bfloat16_last_rows", S=40, T=70, dtype=BF16), ((35, 1, 34),)),
    (Case("float16_grouped", S=33, T=33, H=8, G=2, dtype=FP16), TWO),
    (Case("float64", S=33, T=33, dtype=FP64), TWO),
    (Case("kv_heads_equal_query_heads", S=33, T=33, H=3, G=3), TWO),
    (Case("values_narrower", S=33, T=33, D=40, Dv=24), TWO),
    (Case("unequal_counts", S=33, T=33, m_k=3, m_v=1), TWO),
    (Case("without_weights", S=33, T=33, m_k=1, m_v=1, weights="none"), TWO),
    (Case("negative_scale", S=33, T=33, scale=-0.3), TWO),
    (Case("transposed", S=33, T=33, layout="transposed"), TWO),
    (Case("chunks", **LONG), EDGES),
    (Case("chunks_bfloat16", **LONG, dtype=BF16), EDGES),
    (Case("chunks_not_causal", **LONG, causal=False), EDGES),
    (Case("chunks_last_rows", **LONG | {"S": CHUNK + 1}), EDGES),
    (Case("chunks_window", **LONG, window=(70, -1)), EDGES),
    (Case("chunks_window_both", **LONG, window=(9, 600), causal=False), EDGES),
    (Case("no_rows", S=0, T=3), ((2, 1),)),
    (Case("no_keys", S=0, T=0), ((),)),
    (Case("empty_batch", B=0, S=3, T=3), ((3,),)),
]


def packed(case: Case, lengths: Lengths) -> Tensor:
    """document_ids (B, T) int64: 0, 1, ..."""
    rows = [lengths[min(b, len(lengths) - 1)] for b in range(case.B)]
    assert all(sum(row) == case.T for row in rows)
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row, dtype=torch.long)) for row in rows]
    return torch.stack(ids) if ids else torch.zeros(0, case.T, dtype=torch.long)


def found(name: str) -> tuple[Case, Tensor]:
    case, lengths = next(entry for entry in CASES if entry[0].name == name)
    return case, packed(case, lengths)


def returning(ids: Tensor) -> Tensor:
    """The ids with the last token in the first one's document, which is no run then: attention masks it."""
    ids = ids.clone()
    ids[:, -1] = ids[:, 0]
    return ids


@pytest.fixture(params=["one_by_one", "masked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute documents that are runs."""
    if request.param == "masked":
        monkeypatch.setattr(checks, "read_documents", lambda ids: Documents(ids, None))
    return request.param


def check(case: Case, ids: Tensor, device: torch.device) -> None:
    args = dense_inputs(case, device)
    options = {**case.options, "document_ids": ids.to(device)}
    out, lse = assert_matches_oracle(
        fused_kv_attn_func, reference.fused_kv_attn_func, *args, **options, terms=case.terms
    )
    assert out.dtype == case.dtype and lse.dtype == torch.float32


@pytest.mark.parametrize(("case", "lengths"), CASES, ids=lambda x: x.name if isinstance(x, Case) else "")
def test_matches_oracle(case: Case, lengths: Lengths, device: torch.device, way: str) -> None:
    check(case, packed(case, lengths), device)


IDS = {
    "int32": lambda ids: ids.int(),
    "equal_in_their_low_32_bits": lambda ids: ids * 2**32,
    "negative": lambda ids: ids - 2,
    "falling": lambda ids: -ids,
    "strided": lambda ids: ids.repeat_interleave(2, dim=1)[:, ::2],
    "returning": lambda ids: torch.arange(33).remainder(3).expand(2, 33),
}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
def test_documents_are_equal_ids_whatever_they_are(
    kind: str, causal: bool, device: torch.device, way: str
) -> None:
    case = Case(kind, S=33, T=33, causal=causal)
    check(case, IDS[kind](packed(case, ((9, 11, 13),))), device)


def test_the_oracle_keeps_documents_apart() -> None:
    """What all else is judged by, against calls of single documents."""
    case, ids = found("two_documents")
    q, keys, values, a, b = dense_inputs(case, CPU)
    for causal in (True, False):
        together = reference.fused_kv_attn_func(q, keys, values, a, b, causal=causal, document_ids=ids)
        for document in (slice(0, 20), slice(20, 33)):
            own = [[x[:, document] for x in side] for side in ([q], keys, values)]
            alone = reference.fused_kv_attn_func(own[0][0], *own[1:], a, b, causal=causal)
            assert_near(together[:, document], alone)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not_causal"])
def test_nothing_of_another_document_is_seen(causal: bool, way: str) -> None:
    case, ids = found("two_documents")
    q, keys, values, a, b = dense_inputs(case, CPU)
    before = fused_kv_attn_func(q, keys, values, a, b, causal=causal, document_ids=ids)
    for x in (*keys, *values):
        x[:, :20] = torch.randn_like(x[:, :20]) * 50
    after = fused_kv_attn_func(q, keys, values, a, b, causal=causal, document_ids=ids)
    assert_same_bits(after[:, 20:], before[:, 20:])
    ignored = fused_kv_attn_func(q, keys, values, a, b, causal=causal)
    assert (ignored[:, 20:] - before[:, 20:]).abs().max() > 0.1


GRAD_CASES = [
    "sequences_differ",
    "not_causal",
    "last_rows",
    "window_both",
    "bfloat16",
    "float16_grouped",
    "values_narrower",
    "chunks",
]


@pytest.mark.parametrize("name", GRAD_CASES)
def test_gradients_match_oracle(name: str, device: torch.device, way: str) -> None:
    case, ids = found(name)
    q, keys, values, a, b = dense_inputs(case, device)
    options = {**case.options, "return_lse": False, "document_ids": ids.to(device)}
    out_grad = torch.randn(case.B, case.S, case.H, case.value_dim, device=device)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        weight_dtype = FP64 if dtype == FP64 else torch.float32
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, *keys, *values)]
        weights = [x.detach().to(weight_dtype).requires_grad_() for x in (a, b)]
        end = 1 + case.m_k
        out = function(tensors[0], tensors[1:end], tensors[end:], *weights, **options)
        return torch.autograd.grad(out, [*tensors, *weights], out_grad.to(dtype))

    exact = gradients(reference.fused_kv_attn_func, FP64)
    same_maths = gradients(reference.fused_kv_attn_func, case.dtype)
    got = gradients(fused_kv_attn_func, case.dtype)
    assert_close(got, exact, same_maths, "gradient", terms=case.terms * case.S * case.H // case.G)


@pytest.mark.parametrize(
    **named(
        [
            Case("causal", B=2, S=4, T=4, H=2, G=1, D=8),
            Case("last_rows_not_causal", B=2, S=3, T=4, H=2, G=2, D=8, causal=False),
        ]
    )
)
def test_gradcheck_in_float64(case: Case, way: str) -> None:
    q, keys, values, a, b = dense_inputs(case, CPU)
    inputs = [x.double().requires_grad_() for x in (q, *keys, *values, a, b)]
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])

    def attention(q: Tensor, *rest: Tensor) -> Tensor:
        return fused_kv_attn_func(q, rest[:2], rest[2:4], *rest[4:], causal=case.causal, document_ids=ids)

    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


def leaves(case: Case) -> tuple[list[Tensor], Tensor]:
    q, keys, values, a, b = dense_inputs(case, CPU)
    inputs = [x.detach().requires_grad_() for x in (q, *keys, *values, a, b)]
    return inputs, torch.randn(case.B, case.S, case.H, case.value_dim).to(case.dtype)


def attend(case: Case, inputs: list[Tensor], ids: Tensor, **options: object) -> Tensor:
    options = {**case.options, "return_lse": False, "document_ids": ids, **options}
    return fused_kv_attn_func(inputs[0], inputs[1:3], inputs[3:5], *inputs[5:], **options)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """Grows by the storage of every mask that attention makes."""
    storages: list[StorageWeakRef] = []
    make = sdpa._document_mask

    def recorded(*args: object) -> Tensor:
        mask = make(*args)
        storages.append(StorageWeakRef(mask.untyped_storage()))
        return mask

    monkeypatch.setattr(sdpa, "_document_mask", recorded)
    return storages


@pytest.mark.parametrize("recompute_fusion", [False, True], ids=["fused_kept", "fused_again"])
@pytest.mark.parametrize("name", ["two_documents", "chunks", "bfloat16"])
def test_no_mask_is_kept_for_the_backward(
    name: str, recompute_fusion: bool, masks: list[StorageWeakRef]
) -> None:
    case, ids = found(name)
    ids = returning(ids)
    inputs, grad = leaves(case)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # then they are kept
        out = attend(case, inputs, ids)
    chunks = len(masks)
    assert chunks == -(-case.S // CHUNK) and not any(mask.expired() for mask in masks)
    expected = torch.autograd.grad(out, inputs, grad)
    del out
    masks.clear()
    out = attend(case, inputs, ids, recompute_fusion=recompute_fusion)
    assert len(masks) == chunks and all(mask.expired() for mask in masks)
    for times in (2, 3):
        assert_same_bits(torch.autograd.grad(out, inputs, grad, retain_graph=times == 2), expected)
        assert len(masks) == times * chunks and all(mask.expired() for mask in masks)


@pytest.mark.parametrize("name", ["two_documents", "chunks"])
@pytest.mark.parametrize("change", [returning, lambda ids: ids], ids=["masks", "one_by_one"])
def test_recomputed_fusion_and_masks_nest(
    name: str, change: Callable[[Tensor], Tensor], fused: list[StorageWeakRef]
) -> None:
    case, ids = found(name)
    ids = change(ids)
    inputs, grad = leaves(case)
    expected = torch.autograd.grad(attend(case, inputs, ids), inputs, grad)
    fused.clear()
    out = attend(case, inputs, ids, recompute_fusion=True)
    assert len(fused) == 2 and all(storage.expired() for storage in fused)
    assert_same_bits(torch.autograd.grad(out, inputs, grad), expected)
    assert len(fused) == 4 and all(storage.expired() for storage in fused)


def test_ids_modified_before_the_backward_raise() -> None:
    case, ids = found("two_documents")
    inputs, grad = leaves(case)
    ids = returning(ids)
    out = attend(case, inputs, ids)
    ids.zero_()
    with pytest.raises(RuntimeError, match="document_ids.*modified by an inplace operation"):
        torch.autograd.grad(out, inputs, grad)


def test_documents_that_are_runs_need_no_mask(masks: list[StorageWeakRef]) -> None:
    case, ids = found("sequences_differ")
    inputs, _ = leaves(case)
    attend(case, inputs, ids)
    assert not masks
    attend(case, inputs, returning(ids))
    assert len(masks) == 1


@pytest.mark.parametrize("name", ["sequences_differ", "last_rows", "every_token_a_document"])
def test_documents_that_a_model_has_read_give_the_same_bits(name: str) -> None:
    case, ids = found(name)
    inputs, grad = leaves(case)
    outs = [attend(case, inputs, x) for x in (ids, read_documents(ids))]
    assert_same_bits(*outs)
    assert_same_bits(*(torch.autograd.grad(out, inputs, grad) for out in outs))


def test_documents_are_read_where_each_is_a_run() -> None:
    for ids, lengths in (
        ([[3, 3, 5, 5, 5], [0, 0, 0, 0, 0]], ((2, 3), (5,))),
        ([[1, 2, 3, -4, 9], [2, 2, 1, 1, 1]], ((1, 1, 1, 1, 1), (2, 3))),
        ([[3, 3, 5, 3, 5], [0, 0, 0, 0, 0]], None),
        ([[], []], ((), ())),
    ):
        for dtype in (torch.int32, torch.int64):
            assert read_documents(torch.tensor(ids, dtype=dtype)).lengths == lengths
    assert read_documents(torch.zeros(2, 3, dtype=torch.long, device="meta")).lengths is None
    documents = read_documents(torch.tensor([[3, 3, 5, 5, 5], [0, 0, 0, 0, 1]]))
    part = documents.tokens(1, 4)
    assert part.ids.tolist() == [[3, 5, 5], [0, 0, 0]] and part.lengths == ((1, 2), (3,))
    assert documents.tokens(2, 2).lengths == ((), ())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["sequences_differ", "last_rows_not_causal", "chunks_window"])
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    case, ids = found(name)
    inputs, grad = leaves(case)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, expected = (function(case, inputs, ids) for function in (compiled, attend))
    assert_near(out.detach(), expected.detach())
    for got, exact in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_near(got, exact, rounding_steps=64)


def test_shapes_are_known_without_data() -> None:
    case, ids = found("last_rows")
    args = [
        x.to("meta") if isinstance(x, Tensor) else [y.to("meta") for y in x] for x in dense_inputs(case, CPU)
    ]
    out, lse = fused_kv_attn_func(*args, causal=True, return_lse=True, document_ids=ids.to("meta"))
    assert out.shape == (case.B, case.S, case.H, case.D) and lse.shape == (case.B, case.H, case.S)


def test_autocast_runs_in_the_lower_dtype() -> None:
    case, ids = found("two_documents")
    q, keys, values, a, b = dense_inputs(case, CPU)
    with torch.autocast("cpu", dtype=BF16):
        out = fused_kv_attn_func(q, keys, values, a, b, causal=True, document_ids=ids)
    lower = [[x.to(BF16) for x in group] for group in ([q], keys, values)]
    assert out.dtype == BF16
    expected = fused_kv_attn_func(lower[0][0], *lower[1:], a, b, causal=True, document_ids=ids)
    assert_near(out.detach(), expected.detach())


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(2, 9), TypeError, "document_ids must .* got float32"),
        (torch.zeros(2, 9, dtype=torch.bool), TypeError, "document_ids must .* got bool"),
        ([[0] * 9] * 2, TypeError, "document_ids must be .* got list"),
        (torch.zeros(9, dtype=torch.long), ValueError, r"must have keys\[0\]'s \(B, T\) = .* got \(9,\)"),
        (torch.zeros(2, 5, dtype=torch.long), ValueError, r"must have .* \(2, 9\), got \(2, 5\)"),
        (
            torch.zeros(2, 9, dtype=torch.long, device="meta"),
            ValueError,
            "document_ids must be on cpu as q, got a tensor on meta",
        ),
    ],
)
def test_wrong_ids_are_named(ids: object, error: type[Exception], message: str) -> None:
    args = dense_inputs(Case("", S=5, T=9), CPU)
    with pytest.raises(error, match=message):
        fused_kv_attn_func(*args, document_ids=ids)


def test_rows_before_the_first_token_are_refused() -> None:
    args = dense_inputs(Case("", S=9, T=5), CPU)
    with pytest.raises(ValueError, match="q must have at most 5 rows with document_ids, .* got 9"):
        fused_kv_attn_func(*args, document_ids=torch.zeros(2, 5, dtype=torch.long))
