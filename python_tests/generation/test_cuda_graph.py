"""Generation out of a captured decode step gives the tokens of generation without.

On the CPU a recording of operations stands in for a CUDA graph (recorded_steps.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recorded_steps import RecordedSteps
from tiny import PLANS, tiny_decoder
from torch import Tensor

from fusedkv_ext.cache.kv_cache import KVCache
from fusedkv_ext.generation import cuda_graph
from fusedkv_ext.generation.cuda_graph import CAPTURES, MIN_STEPS, Inputs, Step
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.layers.fusion import FusionWeights

LENGTHS = (7, 1, 11, 4)
NEW = 20
KINDS = {"contiguous": None, "paged": 4}
VARIANTS = {
    "plain": {},
    "groups of heads, tied": dict(num_attention_heads=6, tie_word_embeddings=True),
    "windows, interleaved": dict(
        sliding_window=4,
        layer_types=("full_attention", "full_attention", "full_attention", "sliding_attention"),
        rope_interleaved=True,
    ),
    "yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def some_prompts() -> list[Tensor]:
    return [torch.randint(1, 61, (length,)) for length in LENGTHS]


@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_same_tokens_with_every_plan(plan: str, page_size: int | None, recorded: RecordedSteps) -> None:
    model, prompts = tiny_decoder(plan), some_prompts()
    expected = model.generate(prompts, NEW, cuda_graph=False)
    assert recorded.captures == 0
    assert torch.equal(model.generate(prompts, NEW, page_size=page_size), expected)
    assert recorded.captures == 1 and recorded.replays == NEW - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_with_every_kind_of_layer(
    variant: str, dtype: torch.dtype, recorded: RecordedSteps
) -> None:
    model, prompts = tiny_decoder("fusedkv", **VARIANTS[variant]).to(dtype), some_prompts()
    equally_long = torch.randint(1, 61, (3, 5))
    for page_size in KINDS.values():
        for ids in (prompts, equally_long):
            expected = model.generate(ids, NEW, page_size=page_size, cuda_graph=False)
            assert torch.equal(model.generate(ids, NEW, page_size=page_size), expected)
    assert recorded.captures == 4


def test_experts_in_bf16_are_chosen_anew_at_every_step(recorded: RecordedSteps) -> None:
    model, prompts = tiny_decoder("fusedkv", num_experts=4).bfloat16(), some_prompts()
    expected = model.generate(prompts, NEW, cuda_graph=False)
    assert torch.equal(model.generate(prompts, NEW), expected)
    assert recorded.captures == 1 and recorded.replays == NEW - 1


def test_stop_tokens_streams_and_sampling_stay_outside(recorded: RecordedSteps) -> None:
    model, prompts = tiny_decoder("yoco"), some_prompts()
    free = model.generate(prompts, NEW, cuda_graph=False)[:, -NEW:]
    sampling = dict(seed=5, temperature=1.5, top_k=20, top_p=0.9)
    for options in (dict(stop=[int(free[0, 2]), int(free[1, 4])], pad_token_id=60), sampling):
        seen: list[list[Tensor]] = [[], []]
        outs = [
            model.generate(prompts, NEW, cuda_graph=graph, stream=seen[graph].append, **options)
            for graph in (False, True)
        ]
        assert torch.equal(*outs) and torch.equal(*(torch.stack(steps) for steps in seen))
    assert recorded.captures == 2
    alone = model.generate(prompts[:1], NEW, stop=int(free[0, 2]))
    assert torch.equal(alone, model.generate(prompts[:1], NEW, stop=int(free[0, 2]), cuda_graph=False))


def test_under_autocast_and_outside_of_evaluation_mode(recorded: RecordedSteps) -> None:
    model, prompts = tiny_decoder("fusedkv").train(), some_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(prompts, NEW, cuda_graph=False)
        assert torch.equal(model.generate(prompts, NEW), expected)
    assert recorded.captures == 1 and model.training


def test_weights_changed_between_calls_are_seen(recorded: RecordedSteps) -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    before = model.generate(prompts, NEW)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.kv_fusion.value_0.mul_(-3)
    after = model.generate(prompts, NEW)
    assert not torch.equal(after, before)
    assert torch.equal(after, model.generate(prompts, NEW, cuda_graph=False))


def test_numbers_from_the_host_would_be_noticed(
    recorded: RecordedSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in does what it is for: positions computed on the host spoil the tokens."""
    model, ids = tiny_decoder("resformer"), torch.randint(1, 61, (2, 5))
    assert model.model.layers[1].self_attn.needs_positions
    expected = model.generate(ids, NEW, cuda_graph=False)

    def from_the_host(cache: KVCache, steps: int) -> Tensor:
        return torch.arange(cache.lengths[0] - steps, cache.lengths[0])

    monkeypatch.setattr(KVCache, "positions", from_the_host)
    assert torch.equal(model.generate(ids, NEW, cuda_graph=False), expected)
    assert not torch.equal(model.generate(ids, NEW), expected)
    ids = ids[:, :1]
    monkeypatch.setattr(KVCache, "positions", lambda cache, _: torch.tensor(cache.seq_lens[:1].tolist()) - 1)
    with pytest.raises(pytest.fail.Exception, match="the host reads a tensor"):
        model.generate(ids, NEW)


@pytest.mark.parametrize("page_size", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_may_run_twice(plan: str, page_size: int | None) -> None:
    """Which warming up relies on."""
    model, prompt = tiny_decoder(plan), torch.randint(1, 61, (2, 5))
    cache, token = model.make_cache(2, 6, page_size=page_size), torch.randint(1, 61, (2, 1))
    with torch.inference_mode():
        model(prompt, cache=cache)
        cache.advance(1)
        first = model(token, cache=cache, advance=False)
        stored = [t.clone() for t in (*cache._keys, *cache._values) if t is not None]
        assert torch.equal(model(token, cache=cache, advance=False), first)
    assert cache.lengths == (6, 6) and cache.seq_lens.tolist() == [6, 6]
    for tensor, before in zip(
        (t for t in (*cache._keys, *cache._values) if t is not None), stored, strict=True
    ):
        torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)


def test_advancing_is_the_callers_business_if_the_caller_says_so() -> None:
    model, ids = tiny_decoder("fusedkv", max_position_embeddings=8), torch.randint(1, 61, (2, 8))
    caches = [model.make_cache(2, 8) for _ in range(2)]
    with torch.inference_mode():
        for part in ids.split((5, 1, 2), dim=1):
            caches[1].advance(part.shape[1])
            logits = [model(part, cache=cache, advance=cache is caches[0]) for cache in caches]
            assert torch.equal(*logits) and caches[0].lengths == caches[1].lengths
        with pytest.raises(ValueError, match="must get the 2 rows of this step, got 3"):
            model(ids[:, :3], cache=caches[1], advance=False)
        with pytest.raises(ValueError, match="advance=False needs a cache"):
            model(ids, advance=False)
        with pytest.raises(ValueError, match="advance=False needs a cache that has advanced already, and no"):
            model(ids, cache=model.make_cache(2, 8), lengths=[8, 8], advance=False)


def test_what_cannot_be_captured_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()

    def capture(step: Step, ids: Tensor) -> Callable[[], Tensor]:
        step(ids)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(CAPTURES, "cpu", capture)
    expected = model.generate(prompts, NEW, cuda_graph=False)
    for page_size in KINDS.values():
        with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted when stream is capturing"):
            assert torch.equal(model.generate(prompts, NEW, page_size=page_size), expected)
    with pytest.raises(RuntimeError, match="not permitted"):
        model.generate(prompts, NEW, cuda_graph=True)


@pytest.mark.parametrize("plan", PLANS)
def test_what_a_graph_reads_is_kept_and_nothing_else(plan: str) -> None:
    model = tiny_decoder(plan)
    cache = model.make_cache(2, 6)
    with torch.inference_mode():
        model(torch.randint(1, 61, (2, 5)), cache=cache)
        cache.advance(1)
        ids = torch.randint(1, 61, (2, 1))
        with Inputs() as inputs:
            model(ids, cache=cache, advance=False)
        with (
            Inputs() as again
        ):  # Results would lie elsewhere: the first ones are still there if they are kept.
            model(ids, cache=cache, advance=False)
    kept = {x.untyped_storage().data_ptr() for x in inputs.kept.values()}
    assert kept == {x.untyped_storage().data_ptr() for x in again.kept.values()}
    fusion = [m for m in model.modules() if isinstance(m, FusionWeights)]
    needed = [p for name, p in model.named_parameters() if "kv_fusion" not in name]
    needed += [weights for m in fusion for _, weights in m._expanded.values()]
    needed += [t for t in (*cache._keys, *cache._values, cache.seq_lens, ids) if t is not None]
    if not any(layer.self_attn.needs_positions for layer in model.model.layers):
        needed += model.model.rope.tables(cache.max_len)
    assert kept >= {x.untyped_storage().data_ptr() for x in needed}


def test_when_a_graph_is_captured(recorded: RecordedSteps) -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()

    def captures(new: int = MIN_STEPS + 1, **options: object) -> int:
        before = recorded.captures
        model.generate(prompts, new, **options)
        return recorded.captures - before

    assert captures() == 1 and captures(MIN_STEPS) == 0 and captures(cuda_graph=False) == 0
    assert captures(2, cuda_graph=True) == 1 and captures(1, cuda_graph=True) == 0
    assert captures(use_cache=False) == 0
    with pytest.raises(ValueError, match="cuda_graph=True needs .* use_cache=False"):
        captures(cuda_graph=True, use_cache=False)
    handle = model.model.layers[1].register_forward_hook(lambda *args: None)
    assert captures() == 0
    handle.remove()
    assert captures() == 1


def test_the_cpu_has_no_graphs() -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    assert not cuda_graph.pays_off(model, torch.device("cpu"), 10**6)
    with pytest.raises(ValueError, match="cuda_graph=True needs a model on a CUDA device .* on cpu"):
        model.generate(prompts, NEW, cuda_graph=True)


# ---- CUDA ----------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each captured step was replayed."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and a torch built with CUDA")
    counts: list[int] = []
    capture_cuda = CAPTURES["cuda"]

    def capture(step: Step, ids: Tensor) -> Callable[[], Tensor]:
        replay, mine = capture_cuda(step, ids), len(counts)
        counts.append(0)

        def counted() -> Tensor:
            counts[mine] += 1
            return replay()

        return counted

    monkeypatch.setitem(CAPTURES, "cuda", capture)
    return counts


def on_cuda(plan: str, dtype: torch.dtype, **changes: object) -> Decoder:
    return tiny_decoder(plan, **(dict(head_dim=64) | changes)).to("cuda", dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "fusedkv-lite", "yoco", "cla"])
def test_cuda_graphs_give_the_same_tokens(
    plan: str, dtype: torch.dtype, variant: str, cuda_replays: list[int]
) -> None:
    model, prompts = on_cuda(plan, dtype, **VARIANTS[variant]), some_prompts()
    for page_size in (None, 16):
        expected = model.generate(prompts, NEW, page_size=page_size, cuda_graph=False)
        assert torch.equal(model.generate(prompts, NEW, page_size=page_size), expected)
        assert torch.equal(model.generate(prompts, NEW, page_size=page_size, cuda_graph=True), expected)
    assert cuda_replays == [NEW - 1] * 4


@pytest.mark.cuda
@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "fusedkv-lite", "yoco", "cla"])
def test_cuda_gives_the_tokens_of_the_cpu(plan: str, cuda_replays: list[int]) -> None:
    model, prompts = tiny_decoder(plan, head_dim=64), some_prompts()
    expected = model.generate(prompts, NEW)
    assert torch.get_float32_matmul_precision() == "highest"
    model.cuda()
    for graph in (True, False):
        assert torch.equal(model.generate(prompts, NEW, cuda_graph=graph).cpu(), expected)
    assert cuda_replays == [NEW - 1]


@pytest.mark.cuda
def test_a_step_that_synchronizes_falls_back_on_cuda(cuda_replays: list[int]) -> None:
    model, prompts = on_cuda("fusedkv", torch.bfloat16), some_prompts()
    expected = model.generate(prompts, NEW, cuda_graph=False)
    stream = torch.cuda.current_stream()
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x * (1 if float(x.flatten()[0]) < 1e9 else 0))
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert torch.equal(model.generate(prompts, NEW), expected)
    del model.model.norm.forward
    assert torch.cuda.current_stream() == stream
    assert torch.equal(model.generate(prompts, NEW), expected)
    assert cuda_replays == [NEW - 1]
