"""What a request can ask for, and how requests share a batch: one engine, against transformers in float32."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import save_byte_tokenizer
from vllm_models import (
    LLM,
    TOKENS,
    SamplingParams,
    StructuredOutputsParams,
    engine,
    generate,
    load,
    log_probs,
    make_model,
    metric,
    prompts,
)

END = 256  # of a text, in the tokenizer of bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fusedkv")
    make_model(folder, "llama", "fusedkv", bos_token_id=END, eos_token_id=END)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """In transformers."""
    return load(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Four requests at once, in chunks of 64 tokens."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 32}
    structured = {"backend": "xgrammar", "disable_any_whitespace": True}
    with engine(folder, skip_tokenizer_init=False, structured_outputs_config=structured, **options) as found:
        yield found


def ask(llm: LLM, inputs: list[list[int]], **options: Any) -> list[Any]:
    """Answers with all that vLLM says of them."""
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **options})
    return llm.generate([{"prompt_token_ids": x} for x in inputs], sampling, use_tqdm=False)


def check_log_probs(found: list[Any], expected: torch.Tensor, top: int) -> None:
    """Compares what vLLM says of each position with all log-probabilities there, (positions, vocabulary)."""
    assert len(found) == len(expected)
    for position, wanted in zip(found, expected, strict=True):
        for token, entry in position.items():
            assert entry.logprob == pytest.approx(wanted[token].item(), abs=2e-4)
        assert set(wanted.topk(top).indices.tolist()) <= set(position)


@pytest.mark.parametrize(
    ("lengths", "seed"),
    [((5, 70, 150), None), ((13,), 3)],  # vLLM cannot take a seed for a prompt in chunks on a CPU
    ids=["chunks", "seed"],
)
def test_samples_have_the_log_probabilities_of_transformers(
    lengths: tuple[int, ...], seed: int | None, llm: LLM, model: Any
) -> None:
    inputs = prompts(lengths)
    options = {"n": 4, "temperature": 1.0, "top_k": 40, "seed": seed, "logprobs": 0}
    first, second = ask(llm, inputs, **options), ask(llm, inputs, **options)
    for prompt, found, again in zip(inputs, first, second, strict=True):
        samples, others = ([list(x.token_ids) for x in y.outputs] for y in (found, again))
        assert len({tuple(x) for x in samples}) == 4
        assert (samples == others) == (seed is not None)
        for sample, output in zip(samples, found.outputs, strict=True):
            expected = log_probs(model, prompt + sample)[len(prompt) - 1 : -1]
            check_log_probs(output.logprobs, expected, top=0)
            ranks = [(row > row[token]).sum().item() for row, token in zip(expected, sample, strict=True)]
            assert max(ranks) < 40


def test_answers_to_one_prompt_share_its_blocks(llm: LLM, model: Any) -> None:
    """vLLM wants n=1 of greedy answers; the most likely of one token is the same."""
    inputs = prompts((150,))
    llm.reset_prefix_cache()
    before = metric(llm, "prefix_cache_hits")
    (found,) = ask(llm, inputs, n=4, temperature=1.0, top_k=1)
    assert [list(x.token_ids) for x in found.outputs] == generate(model, inputs) * 4
    assert metric(llm, "prefix_cache_hits") - before == 3 * 128  # whole blocks of 32


def test_log_probabilities_of_answers(llm: LLM, model: Any) -> None:
    inputs = prompts()
    for prompt, found in zip(inputs, ask(llm, inputs, logprobs=5), strict=True):
        (output,) = found.outputs
        expected = log_probs(model, prompt + list(output.token_ids))[len(prompt) - 1 : -1]
        check_log_probs(output.logprobs, expected, top=5)


def test_log_probabilities_of_prompts(llm: LLM, model: Any) -> None:
    """Prompts in several chunks, while others answer."""
    inputs = prompts()
    for prompt, found in zip(inputs, ask(llm, inputs, prompt_logprobs=5), strict=True):
        assert found.prompt_logprobs[0] is None  # nothing comes before the first token
        check_log_probs(found.prompt_logprobs[1:], log_probs(model, prompt)[:-1], top=5)


def text(tokenizer: Any, found: Any) -> str:
    """An answer; vLLM's own text begins with what is left over of a prompt that is not UTF-8."""
    return tokenizer.decode(found.outputs[0].token_ids, skip_special_tokens=True)


def spelled(tokenizer: Any, choices: list[str], length: int) -> Any:
    """For ``generate``: the tokens that continue one of the choices after a prompt, then the end."""

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        done = tokenizer.decode(ids[length:])
        found = {choice[len(done)] for choice in choices if choice.startswith(done) and choice != done}
        return [tokenizer.convert_tokens_to_ids(x) for x in found] or [END]

    return allowed


CHOICES = ["red", "green", "great", "blue", "black", "orange"]
NUMBERS = ["".join(x) for x in itertools.product("0123456789", repeat=3)]


@pytest.mark.parametrize(
    ("constraint", "choices"),
    [({"choice": CHOICES}, CHOICES), ({"regex": "[0-9]{3}"}, NUMBERS)],
    ids=["choice", "regex"],
)
def test_structured_output_is_the_likeliest_of_what_is_allowed(
    constraint: dict[str, Any], choices: list[str], llm: LLM, model: Any, tokenizer: Any
) -> None:
    """Greedy answers to prompts of unequal lengths, besides one that may say anything."""
    free, *inputs = prompts()
    structured = SamplingParams(
        temperature=0, max_tokens=TOKENS, structured_outputs=StructuredOutputsParams(**constraint)
    )
    sampling = [SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)] + [structured] * len(
        inputs
    )
    said = llm.generate([{"prompt_token_ids": x} for x in (free, *inputs)], sampling, use_tqdm=False)
    assert list(said[0].outputs[0].token_ids) == generate(model, [free])[0]
    for prompt, found in zip(inputs, said[1:], strict=True):
        allowed = spelled(tokenizer, choices, len(prompt))
        options = {"min_new_tokens": 0, "prefix_allowed_tokens_fn": allowed}
        assert list(found.outputs[0].token_ids) == generate(model, [prompt], **options)[0]
        assert text(tokenizer, found) in choices
    assert len({text(tokenizer, x) for x in said[1:]}) > 1


def test_answers_fit_a_json_schema(llm: LLM, tokenizer: Any) -> None:
    properties = {"even": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}}
    schema = {"type": "object", "properties": properties, "required": ["even", "kind"]}
    constraint = StructuredOutputsParams(json=schema | {"additionalProperties": False})
    for found in ask(llm, prompts(), max_tokens=64, ignore_eos=False, structured_outputs=constraint):
        answer = json.loads(text(tokenizer, found))
        assert set(answer) == set(properties)
        assert isinstance(answer["even"], bool) and answer["kind"] in ("a", "b")


def free_blocks(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def test_requests_join_and_leave_a_running_batch(llm: LLM, model: Any) -> None:
    """A new request at every step, answers of unequal lengths, and some that are given up halfway."""
    engine, free = llm.llm_engine, free_blocks(llm)
    inputs = {str(i): x for i, x in enumerate(prompts((5, 17, 64, 129, 1, 300, 40, 90)))}
    wanted = {name: 3 + 4 * int(name) % 10 for name in inputs}
    given_up = {"3": 2, "6": 1}
    arriving, answered, together = list(inputs), {}, set()
    while arriving or engine.has_unfinished_requests():
        if arriving:
            name = arriving.pop(0)
            sampling = SamplingParams(temperature=0, max_tokens=wanted[name], ignore_eos=True)
            engine.add_request(name, {"prompt_token_ids": inputs[name]}, sampling)
        for found in engine.step():
            answered[found.request_id] = list(found.outputs[0].token_ids)
        engine.abort_request([x for x, tokens in given_up.items() if len(answered.get(x, ())) == tokens])
        together.add(engine.get_num_unfinished_requests())
    expected = dict(zip(inputs, generate(model, list(inputs.values())), strict=True))
    wanted |= given_up
    assert answered == {name: tokens[: wanted[name]] for name, tokens in expected.items()}
    assert max(together) >= 4
    assert free_blocks(llm) == free
