"""generate: what comes out with a cache is what comes out without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import NAMED, PLANS, hybrid, tiny_decoder
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.generation.sampling import Sampling

LENGTHS = (7, 1, 11, 4)
NEW = 8
VARIANTS = ("plain", "windows, interleaved")


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def some_prompts() -> list[Tensor]:
    return [torch.randint(1, 61, (length,)) for length in LENGTHS]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", PLANS)
def test_greedy_tokens_do_not_depend_on_the_cache(plan: str, variant: str) -> None:
    changes = {} if variant == "plain" else dict(rope_interleaved=True, **hybrid(plan))
    model, prompts = tiny_decoder(plan, **changes), some_prompts()
    slow = model.generate(prompts, NEW, use_cache=False)
    assert slow.shape == (4, 11 + NEW) and slow.dtype == torch.int64
    for b, prompt in enumerate(prompts):
        assert torch.equal(slow[b, 11 - len(prompt) : 11], prompt) and not slow[b, : 11 - len(prompt)].any()
    for page_size in (None, 4):
        assert torch.equal(model.generate(prompts, NEW, page_size=page_size), slow)
    alone = [model.generate(prompt[None], NEW)[0, -NEW:] for prompt in prompts]
    assert torch.equal(torch.stack(alone), slow[:, -NEW:])


@pytest.mark.parametrize("plan", NAMED)
def test_grouped_heads_and_low_precision(plan: str) -> None:
    model = tiny_decoder(plan, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)
    prompts = some_prompts()
    assert torch.equal(model.generate(prompts, NEW), model.generate(prompts, NEW, use_cache=False))
    model.bfloat16()
    assert torch.equal(model.generate(prompts, NEW), model.generate(prompts, NEW, page_size=2))


def test_sampling_follows_its_seed_with_and_without_a_cache() -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    options = dict(temperature=1.5, top_k=20, top_p=0.9)
    first = model.generate(prompts, NEW, seed=3, **options)
    assert torch.equal(first, model.generate(prompts, NEW, seed=3, page_size=4, **options))
    assert torch.equal(first, model.generate(prompts, NEW, seed=3, use_cache=False, **options))
    assert not torch.equal(first, model.generate(prompts, NEW, seed=4, **options))
    torch.manual_seed(3)
    once = model.generate(prompts, NEW, **options)
    torch.manual_seed(3)
    assert torch.equal(once, model.generate(prompts, NEW, **options))
    assert torch.equal(model.generate(prompts, NEW, temperature=5.0, top_k=1), model.generate(prompts, NEW))


def test_sampling_is_one_value_for_three_arguments() -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    options = dict(temperature=1.5, top_k=20, top_p=0.9)
    first = model.generate(prompts, NEW, seed=3, **options)
    assert torch.equal(first, model.generate(prompts, NEW, seed=3, sampling=fkv.Sampling(**options)))
    for name, value in options.items():
        with pytest.raises(
            ValueError, match="sampling must be given instead of temperature, top_k and top_p"
        ):
            model.generate(prompts, NEW, sampling=fkv.Sampling(), **{name: value})


def test_sampling_keeps_what_it_says() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(400, 1)
    generator = torch.Generator().manual_seed(0)
    for sampling, kept in (
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2), {0, 1}),
        (Sampling(1.0, top_k=9), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.6), {0, 1}),
        (Sampling(1.0, top_p=0.4), {0}),
        (Sampling(1.0, top_p=1e-9), {0}),
        (Sampling(1.0, top_k=3, top_p=0.9), {0, 1, 2}),
        (Sampling(0.0), {0}),
    ):
        assert set(sampling(logits, generator).tolist()) == kept
    shares = torch.bincount(Sampling(1.0)(logits.repeat(50, 1), generator), minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.02)


def test_stop_tokens_finish_each_sequence() -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    free = model.generate(prompts, NEW)[:, -NEW:]
    stop = [int(free[0, 2]), int(free[1, 4])]
    for use_cache in (True, False):
        out = model.generate(prompts, NEW, stop=stop, pad_token_id=60, use_cache=use_cache)[:, 11:]
        for row, whole in zip(out.tolist(), free.tolist(), strict=True):
            end = next((i for i, token in enumerate(whole) if token in stop), NEW)
            expected = whole[: end + 1] + [60] * NEW
            assert row == expected[: len(row)]
    all_at_once = model.generate(prompts[:1], NEW, stop=stop[0])
    assert all_at_once.shape[1] == 7 + free[0].tolist().index(stop[0]) + 1


def test_stream_sees_every_step() -> None:
    model, prompts, steps = tiny_decoder("yoco"), some_prompts(), []
    out = model.generate(prompts, NEW, stream=steps.append)
    assert torch.equal(torch.stack(steps, dim=1), out[:, -NEW:])


def test_masked_padding_may_stand_anywhere() -> None:
    model = tiny_decoder("fusedkv")
    ids = torch.randint(1, 61, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1]])
    out = model.generate(ids, NEW, attention_mask=mask)
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    assert out.shape == (3, 6 + NEW)
    assert torch.equal(out[:, 2:], model.generate(rows, NEW)) and not out[:, :2].any()
    assert torch.equal(
        model.generate(ids, NEW, attention_mask=torch.ones_like(ids)), model.generate(ids, NEW)
    )


def test_modes_come_back_and_the_result_is_an_ordinary_tensor() -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    model.train()
    model.model.norm.eval()
    out = model.generate(prompts, 2)
    assert model.training and model.model.layers[0].training and not model.model.norm.training

    def interrupt(_tokens: Tensor) -> None:
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompts, 2, stream=interrupt)
    assert model.training and not model.model.norm.training
    model(out, labels=out)[1].backward()  # also with the fusion weights that generation has expanded
    assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model.generate(prompts, 2), out)


def test_weights_changed_between_calls_are_seen() -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    before = model.generate(prompts, NEW)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.kv_fusion.value_0.mul_(-3)
    after = model.generate(prompts, NEW)
    assert not torch.equal(after, before)
    assert torch.equal(after, model.generate(prompts, NEW, use_cache=False))


def test_nothing_to_do() -> None:
    model, prompts = tiny_decoder("fusedkv"), some_prompts()
    assert torch.equal(model.generate(prompts, 0), model.generate(prompts, 1)[:, :-1])
    assert model.generate([], 5).shape == (0, 0)
    assert model.generate(torch.zeros(0, 6, dtype=torch.int64), 5).shape == (0, 6)


def test_the_longest_possible_sequence() -> None:
    model = tiny_decoder("fusedkv", max_position_embeddings=12)
    assert model.generate(torch.ones(1, 4, dtype=torch.int64), 8).shape == (1, 12)
    with pytest.raises(
        ValueError, match="embeddings=12 .*, got 4 tokens in the longest prompt .* max_new_tokens=9"
    ):
        model.generate(torch.ones(1, 4, dtype=torch.int64), 9)
    with pytest.raises(ValueError, match="got 13 tokens in the longest prompt"):
        model.generate(torch.ones(1, 13, dtype=torch.int64), 1)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.ones(4, dtype=torch.int64), {}, r"ids must have shape \(B, S\) or be a list"),
        ([torch.ones(2, 2, dtype=torch.int64)], {}, "prompt 0 must be a 1-D integer tensor"),
        ([torch.ones(2)], {}, "prompt 0 must be a 1-D integer tensor, got torch.float32"),
        (
            [torch.tensor([1]), torch.tensor([], dtype=torch.int64)],
            {},
            "prompt 1 must have at least one token",
        ),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "prompt 0 must have at least one token"),
        ([torch.tensor([61])], {}, r"token ids must be in 0..60, got ids from 61 to 61"),
        ([torch.tensor([-1, 5])], {}, "got ids from -1 to 5"),
        ([torch.tensor([1])], {"attention_mask": torch.ones(1, 1)}, "attention_mask must be None for a list"),
        (
            torch.ones(1, 3, dtype=torch.int64),
            {"attention_mask": torch.ones(3)},
            "must have the shape of ids",
        ),
        (torch.ones(1, 2, dtype=torch.int64), {"attention_mask": torch.zeros(1, 2)}, "prompt 0 must have"),
        ([torch.tensor([1])], {"max_new_tokens": -1}, "max_new_tokens must not be negative"),
        ([torch.tensor([1])], {"temperature": -0.5}, "temperature must be finite"),
        ([torch.tensor([1])], {"temperature": float("nan")}, "temperature must be finite"),
        ([torch.tensor([1])], {"top_k": -1}, "top_k must be at least 0"),
        ([torch.tensor([1])], {"top_p": 0.0}, "top_p must be above 0"),
        ([torch.tensor([1])], {"pad_token_id": 61}, "pad_token_id must be in 0..60"),
        ([torch.tensor([1])], {"page_size": 0}, "page_size must be a positive int"),
    ],
)
def test_calls_that_cannot_be(ids: Tensor | list[Tensor], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_decoder("yoco").generate(ids, **({"max_new_tokens": 2} | options))
