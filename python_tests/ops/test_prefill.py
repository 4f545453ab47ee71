"""Many query rows over a cache: what they see is fused once, then attended to densely."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cache_inputs, named
from torch import Tensor

from fusedkv_ext import fused_kv_attn_func, fused_kv_attn_with_kvcache
from fusedkv_ext.ops import cached, dispatch, fuse, reference, sdpa
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.testing import assert_matches_oracle, assert_near, assert_same_bits

CPU = torch.device("cpu")
NO_SUCH_LENGTH = 2**31 - 1


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Sequences, query rows and tokens of each call of dense attention."""
    shapes: list[tuple[int, int, int]] = []

    def recorded(call: AttentionCall) -> Tensor:
        shapes.append((*call.q.shape[:2], call.keys[0].shape[1]))
        return sdpa.sdpa_attention(call)

    monkeypatch.setattr(cached, "sdpa_attention", recorded)
    return shapes


@pytest.mark.parametrize("page_size", [None, 16])
def test_one_call_for_equal_lengths_and_one_a_sequence_for_others(
    page_size: int | None, attended: list[tuple[int, int, int]]
) -> None:
    for lengths, expected in (
        ((50, 50, 50), [(3, 33, 50)]),
        ((50, 20, 0), [(1, 33, 50), (1, 20, 20)]),
    ):
        args, state = cache_inputs(Case("calls", B=3, S=33, T=50, lengths=lengths, page_size=page_size), CPU)
        attended.clear()
        fused_kv_attn_with_kvcache(*args, **state)
        assert attended == expected


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_window_fuses_only_what_some_row_sees(
    page_size: int | None, attended: list[tuple[int, int, int]], device: torch.device
) -> None:
    case = Case("window", S=33, T=200, lengths=(200, 60), page_size=page_size, window=(40, -1))
    args, state = cache_inputs(case, device)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    options = {**case.options, "return_lse": False}
    assert_matches_oracle(op, oracle, *args, **state, **options, terms=case.terms)
    if device.type == "cpu":
        assert attended == [(1, 33, 73), (1, 33, 60)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_in_chunks_equals_the_prompt_at_once(dtype: torch.dtype, device: torch.device) -> None:
    case = Case("chunks", S=100, T=100, m_v=3, page_size=7, lengths=(100, 100), dtype=dtype)
    (q, *caches, a, b), state = cache_inputs(case, device)
    contiguous = [
        [x[state["block_table"].long()].flatten(1, 2)[:, : case.T] for x in side] for side in caches
    ]
    expected = fused_kv_attn_func(q, *contiguous, a, b, causal=True)
    for begin, end in ((0, 40), (40, 100)):
        seqlens = torch.full_like(state["cache_seqlens"], end)
        chunk = fused_kv_attn_with_kvcache(
            q[:, begin:end], *caches, a, b, cache_seqlens=seqlens, block_table=state["block_table"]
        )
        assert_near(chunk, expected[:, begin:end], rounding_steps=32)


@pytest.mark.parametrize("backend", ["simt1", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_and_pages_out_of_range_give_nan(page_size: int | None, device: torch.device) -> None:
    """On a GPU nobody checks them on the host, and the other sequences do not notice."""
    case = Case("wrong", B=4, S=33, T=64, lengths=(64, 40, 50, 64), page_size=page_size)
    args, state = cache_inputs(case, device)
    expected = fused_kv_attn_with_kvcache(*args, **state)
    state["cache_seqlens"][1], state["cache_seqlens"][2] = NO_SUCH_LENGTH, -1
    wrong = {1, 2}
    if page_size is not None:
        state["block_table"][3, 1] = 10**6
        wrong.add(3)
    out = fused_kv_attn_with_kvcache(*args, **state)
    for b in range(case.B):
        if b in wrong:
            assert bool(out[b].isnan().all())
        else:
            assert_same_bits(out[b], expected[b])


PACKED = [
    Case("contiguous", B=4, S=33, T=64, lengths=(64, 40, 0, 7)),
    Case("pages", B=4, S=33, T=64, lengths=(64, 40, 0, 7), page_size=7),
    Case("pages_bfloat16", B=3, S=33, T=64, lengths=(64, 33, 40), page_size=16, dtype=torch.bfloat16),
    Case("window", B=3, S=33, T=200, lengths=(200, 60, 12), page_size=16, window=(40, -1)),
    Case("not_causal", B=3, S=33, T=64, lengths=(64, 40, 7), page_size=16, causal=False),
    Case("values_wider_three_sources", B=2, S=33, T=64, D=24, Dv=40, m_v=3, lengths=(64, 9)),
    Case("one_source", B=2, S=33, T=64, m_k=1, m_v=1, weights="none", lengths=(64, 9), page_size=16),
]


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA, on any device."""
    monkeypatch.setattr(cached, "_packs", lambda call: True)


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("left_padding", [True, False])
@pytest.mark.parametrize(**named(PACKED))
def test_prompts_of_different_lengths_in_one_pack(
    case: Case, left_padding: bool, device: torch.device
) -> None:
    args, state = cache_inputs(case, device)
    op, oracle = fused_kv_attn_with_kvcache, reference.fused_kv_attn_with_kvcache
    options = {**case.options, "return_lse": False, "left_padding": left_padding}
    assert_matches_oracle(op, oracle, *args, **state, **options, terms=case.terms)


@pytest.mark.usefixtures("packs")
def test_a_pack_gives_what_the_sequences_give_in_turn(
    attended: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for page_size in (None, 16):
        args, state = cache_inputs(
            Case("bits", B=3, S=33, T=64, lengths=(64, 40, 7), page_size=page_size), CPU
        )
        together = fused_kv_attn_with_kvcache(*args, **state)
        assert not attended, "the pack goes to varlen attention"
        with monkeypatch.context() as context:
            context.setattr(cached, "_packs", lambda call: False)
            assert_near(together, fused_kv_attn_with_kvcache(*args, **state), 4)
        attended.clear()


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("backend", ["simt1", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_and_pages_out_of_range_give_nan_in_a_pack(
    page_size: int | None, device: torch.device
) -> None:
    test_lengths_and_pages_out_of_range_give_nan(page_size, device)


def test_head_major_caches_take_turns() -> None:
    args, _ = cache_inputs(Case("head_major", T=40, layout="transposed"), CPU)
    assert fuse.tokens_as_pages(args[1][0]) is None
    args, _ = cache_inputs(Case("token_major", T=40, page_size=4), CPU)
    pages = fuse.tokens_as_pages(args[1][0])
    assert pages is not None and pages.data_ptr() == args[1][0].data_ptr()


def test_a_graph_of_torch_compile_keeps_to_the_kernel(attended: list[tuple[int, int, int]]) -> None:
    """Fusing first needs the lengths on the host."""
    args, state = cache_inputs(Case("compiled", S=33, T=50, lengths=(50, 20)), CPU)
    torch._dynamo.reset()
    compiled = torch.compile(fused_kv_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    got = compiled(*args, **state)
    assert not attended
    assert_same_bits(got, fused_kv_attn_with_kvcache(*args, **state, return_lse=True)[0])
    assert_near(got, fused_kv_attn_with_kvcache(*args, **state), rounding_steps=32)
    assert attended


@pytest.mark.parametrize("capturing", [False, True])
def test_a_cuda_graph_keeps_to_the_kernel(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:  # what the rule looks at
        is_cuda, dtype, shape = True, torch.bfloat16, (1, 600, 2, 128)

    caches = [torch.empty(1, 700, 2, 128, dtype=torch.bfloat16, device="meta")]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert dispatch.folds_cached(OnGpu(), caches, caches, "cuda") == capturing


def test_host_lengths_change_nothing_and_must_be_those_of_the_tensor(device: torch.device) -> None:
    case = Case("host", B=3, S=40, T=70, lengths=(70, 5, 40), page_size=16)
    args, state = cache_inputs(case, device)
    expected = fused_kv_attn_with_kvcache(*args, **state)
    assert_same_bits(fused_kv_attn_with_kvcache(*args, **state, host_seqlens=case.lengths), expected)
    with pytest.raises(ValueError, match="host_seqlens"):
        fused_kv_attn_with_kvcache(*args, **state, host_seqlens=(70, 5))
