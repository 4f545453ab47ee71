"""Needles in a haystack: where they stand, that nothing else gives the answer away, and what scores count."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor, nn

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.evaluation import needles, retrieval
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.training.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer

BYTES = ByteTokenizer()
DOCUMENTS = [
    "".join(
        f"def area_{i}_{j}({', '.join('abcdefghij'[: i * j % 11])}):\n    return 0\n\n" for j in range(20)
    )
    for i in range(20)
]


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


class Recorded:
    """A cache that keeps the tokens themselves."""

    def __init__(self, rows: int) -> None:
        self.ids = torch.zeros(rows, 0, dtype=torch.int64)

    def crop(self, length: int) -> None:
        self.ids = self.ids[:, :length]


class Reader(nn.Module):
    """Reads text as a person would: finds the key of the question in the context and copies its value.

    answers "right": that value; "last": the value that stands last in the context, whatever its key; None:
    all tokens are equally likely everywhere.
    """

    def __init__(self, answers: str | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=256, max_position_embeddings=1024)
        self.nothing = nn.Parameter(torch.zeros(()))
        self.answers = answers

    def make_cache(self, batch_size: int, max_len: int) -> Recorded:
        return Recorded(batch_size)

    def forward(self, ids: Tensor, *, cache: Recorded, logits_to_keep: int = 0) -> Tensor:
        cache.ids = torch.cat((cache.ids, ids), dim=1)
        wanted = logits_to_keep or ids.shape[1]
        ends = range(cache.ids.shape[1] - wanted + 1, cache.ids.shape[1] + 1)
        return torch.stack([torch.stack([self.next(row[:end]) for end in ends]) for row in cache.ids])

    def next(self, ids: Tensor) -> Tensor:
        logits = torch.zeros(256)
        text = BYTES.decode(ids.tolist())
        context, _, question = text.rpartition("\n")
        asked = re.fullmatch(r'assert (key_\w{4}) == "(\d*)', question)
        if asked is None or self.answers is None:
            return logits
        key, said = asked.groups()
        found = re.findall(rf'^{key if self.answers == "right" else "key_.{4}"} = "(\d+)"$', context, re.M)
        if found and found[-1].startswith(said) and len(said) < len(found[-1]):
            logits[ord(found[-1][len(said)])] = 40.0
        return logits


def questions(tokenizer: Tokenizer = BYTES, **changes: object) -> list[needles.Questions]:
    settings: dict[str, object] = {"lengths": [192, 256], "depths": [0.0, 0.5, 1.0], "examples": 4}
    return needles.make_questions(tokenizer, DOCUMENTS, **(settings | changes))


def examples(grid: Sequence[needles.Questions]) -> list[tuple[needles.Questions, needles.Example]]:
    return [(cell, example) for cell in grid for example in cell.examples]


# Questions


def test_prompts_hold_the_needle_at_its_depth_and_the_answer_nowhere_else() -> None:
    for cell, example in examples(questions()):
        prompt, baseline = (BYTES.decode(ids) for ids in (example.prompt, example.baseline))
        question = f'assert {example.key} == "'
        assert prompt.endswith("\n" + question) and baseline.endswith("\n" + question)
        assert len(example.prompt) == len(example.baseline) == cell.length - needles.DIGITS
        assert prompt.count(example.values[0]) == 1 and example.values[0] not in baseline
        assert prompt.count(example.key) == 2 and baseline.count(example.key) == 1

        lines = re.findall(r'^key_\w{4} = "\d+"\n', prompt, re.M)
        assert len(lines) == (1 if cell.task == "single" else 4)
        needle = f'{example.key} = "{example.values[0]}"\n'
        before, after = prompt.removesuffix(question).split(needle)
        strays = [len(re.sub(r'^key_\w{4} = "\d+"\n', "", part, flags=re.M)) for part in (before, after)]
        assert example.depth == strays[0] / sum(strays)
        assert abs(example.depth - cell.depth) < 0.02  # lines of the haystack are up to 20 % of it
        others = [value in prompt for value in example.values[1:]]
        assert others == [cell.task == "multikey"] * 3
        assert example.candidates == tuple(tuple(value.encode()) for value in example.values)


def test_without_its_needle_a_prompt_is_the_same_text_with_more_of_it_in_front() -> None:
    for _, example in examples(questions()):
        prompt, baseline = (BYTES.decode(ids) for ids in (example.prompt, example.baseline))
        needle = f'{example.key} = "{example.values[0]}"\n'
        assert baseline[len(needle) :] == prompt.replace(needle, "") and needle not in baseline


def test_questions_are_a_pure_function_of_seed_and_place() -> None:
    grid = questions(seed=3)
    assert grid == questions(seed=3) == questions(seed=3, depths=[0, 0.5, 1, 1.0])
    assert {example.key for _, example in examples(grid)}.isdisjoint(
        example.key for _, example in examples(questions(seed=4))
    )
    part = questions(seed=3, tasks=["multikey"], lengths=[256], depths=[0.5])
    assert part == [cell for cell in grid if (cell.task, cell.length, cell.depth) == ("multikey", 256, 0.5)]
    assert len({example.prompt for _, example in examples(grid)}) == len(examples(grid)) == 2 * 2 * 3 * 4


def test_haystacks_that_hold_a_key_or_a_value_are_passed_over() -> None:
    settings = {"lengths": [192], "depths": [0.5], "examples": 2, "tasks": ["single"]}
    values = [value for _, example in examples(questions(**settings)) for value in example.values]
    spoilt = "".join(f"known = {', '.join(values[i : i + 4])}\n" for i in range(0, len(values), 4)) * 8
    made = needles.make_questions(BYTES, [spoilt, "".join(DOCUMENTS[:2])], **settings)
    for _, example in examples(made):
        assert BYTES.decode(example.prompt).count(example.values[0]) == 1
        assert not any(value in BYTES.decode(example.baseline) for value in example.values)
    with pytest.raises(
        ValueError, match=r"the text must not contain key_\w+, .*; choose another seed or other text"
    ):
        needles.make_questions(BYTES, [spoilt], **settings)


def test_prose_asks_in_prose() -> None:
    _, example = examples(questions(style="prose", lengths=[320]))[0]
    prompt = BYTES.decode(example.prompt)
    assert f'The magic number of {example.key} is "{example.values[0]}".\n' in prompt
    assert prompt.endswith(f'The magic number of {example.key} is "')


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"lengths": [120]},
            ConfigError,
            "lengths must be at least 134 for task .*, got 120: needles, question and answer take 101 tokens",
        ),
        ({"lengths": [256], "keys": 20}, ConfigError, "at least .*, got 256: .* or fewer keys"),
        (
            {"lengths": [60_000]},
            ValueError,
            "the text must have at least 59.* tokens for a haystack, got 1.*; give more text",
        ),
        ({"tasks": ["single", "double"]}, ConfigError, "tasks must be from single, multikey, got 'double'"),
        ({"style": "verse"}, ConfigError, "style must be one of python, prose, got 'verse'"),
        ({"depths": [50.0]}, ConfigError, "depths must be from 0 to 1, got 50.0"),
        ({"examples": 0}, ConfigError, "examples must be at least 1 and keys from 2 to 1000, got 0 and 4"),
        ({"keys": 1}, ConfigError, "got 4 and 1"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        questions(**settings)


def test_the_shortest_length_that_an_error_names_is_long_enough() -> None:
    with pytest.raises(ConfigError) as caught:
        questions(lengths=[120])
    least = int(re.search(r"lengths must be at least (\d+)", str(caught.value))[1])
    assert questions(lengths=[least])
    with pytest.raises(ConfigError):
        questions(lengths=[least - 1])


# Scores


def test_a_model_that_reads_is_always_right() -> None:
    result = retrieval.score(Reader("right"), BYTES, DOCUMENTS, lengths=[192], examples=3)
    assert len(result.cells) == 2 * 5 and len(result.totals) == 2
    for score in (*result.cells, *result.totals):
        assert score.exact == score.choice == 1.0 and score.exact_stderr == score.choice_stderr == 0.0
        assert score.nll < 1e-6 and score.baseline_nll == pytest.approx(5 * math.log(256))
        assert score.gain == pytest.approx(score.baseline_nll - score.nll) and score.chance == 0.25
    assert [score.examples for score in result.totals] == [15, 15]


def test_a_model_that_copies_any_value_solves_one_needle_but_not_several_keys() -> None:
    result = retrieval.score(Reader("last"), BYTES, DOCUMENTS, lengths=[256], depths=[0.0], examples=40)
    single, several = result.totals
    assert single.exact == single.choice == 1.0
    assert (
        several.exact == several.choice < 0.5
    )  # the needle that is asked for stands first, others behind it
    assert several.choice_stderr == math.sqrt(several.choice * (1 - several.choice) / 40)


def test_a_uniform_model_chooses_at_chance_and_gains_nothing() -> None:
    result = retrieval.score(Reader(None), BYTES, DOCUMENTS, lengths=[256], examples=4, keys=3)
    for score in (*result.cells, *result.totals):
        assert score.choice == pytest.approx(score.chance) and score.chance == 1 / 3 and score.exact == 0.0
        assert score.nll == pytest.approx(5 * math.log(256)) and score.gain == 0.0
        assert score.nll_stderr == pytest.approx(0.0, abs=1e-9)
    assert needles.GUESS_NLL == pytest.approx(5 * math.log(10))


def test_an_untrained_model_is_within_the_error_of_chance() -> None:
    torch.manual_seed(5)
    model = tiny.tiny_decoder("fusedkv", vocab_size=256, max_position_embeddings=256, num_hidden_layers=4)
    result = retrieval.score(model, BYTES, DOCUMENTS, lengths=[192], examples=40, tasks=["single"])
    (score,) = result.totals
    assert score.examples == 200 and abs(score.choice - score.chance) < 4 * score.choice_stderr
    assert score.exact == 0.0 and abs(score.place - 0.5) < 0.02


def alone(model: Decoder, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """-log p of an answer by one forward pass over everything, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]]))[0].double()
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return -sum(logits[p].log_softmax(-1)[token].item() for p, token in zip(places, answer, strict=True))


def check_against_plain_forward(
    model: Decoder, tokenizer: Tokenizer, grid: Sequence[needles.Questions]
) -> None:
    for cell in grid:
        found = retrieval.answers(model, tokenizer, cell)
        for example, answer in zip(cell.examples, found, strict=True):
            choices = [alone(model, example.prompt, ids) for ids in example.candidates]
            assert answer.nll == pytest.approx(choices[0], rel=1e-4)
            assert answer.baseline_nll == pytest.approx(
                alone(model, example.baseline, example.candidates[0]), rel=1e-4
            )
            assert answer.choice == float(choices[0] == min(choices))
            room = max(len(ids) for other in cell.examples for ids in other.candidates)
            greedy = model.generate(torch.tensor([example.prompt]), room, use_cache=False)[0, -room:].tolist()
            assert answer.text == tokenizer.decode(greedy)
            assert answer.exact == answer.text.startswith(example.values[0])


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "fusedkv-lite", "yoco", "skipv1", "resformer"])
def test_scores_out_of_the_cache_are_those_of_a_plain_forward_pass(plan: str) -> None:
    model = tiny.tiny_decoder(plan, vocab_size=256, max_position_embeddings=160)
    check_against_plain_forward(model, BYTES, questions(lengths=[160], depths=[0.5], examples=2))


def test_values_of_unequal_length_in_tokens_are_scored_whole(tmp_path: Path) -> None:
    """A vocabulary that has some pairs of digits: five digits are three to five tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    characters = [chr(code) for code in (10, *range(32, 127))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=130, initial_alphabet=characters, show_progress=False)
    words.train_from_iterator([f"{i:02d}" for i in range(40)] * 9, trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    grid = questions(tokenizer, lengths=[160], depths=[0.5], examples=6)
    for cell, example in examples(grid):
        room = max(len(ids) for other in cell.examples for ids in other.candidates)
        assert len(example.prompt) == len(example.baseline) == 160 - room
    assert len({len(ids) for _, example in examples(grid) for ids in example.candidates}) > 1
    model = tiny.tiny_decoder("fusedkv", vocab_size=tokenizer.vocab_size, max_position_embeddings=160)
    check_against_plain_forward(model, tokenizer, grid)


def test_a_length_beyond_the_model_is_refused_before_anything_runs() -> None:
    model = tiny.tiny_decoder("fusedkv", vocab_size=256, max_position_embeddings=200)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=r"max_position_embeddings of the model \(200\), got 256"):
        retrieval.score_questions(model, BYTES, questions(lengths=[192, 256]))


def test_a_damaged_model_is_an_error_and_no_number() -> None:
    model = tiny.tiny_decoder("vanilla", vocab_size=256, max_position_embeddings=256)
    nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(RuntimeError, match="logits must be finite, got NaN"):
        retrieval.score_questions(model, BYTES, questions(lengths=[192]))
