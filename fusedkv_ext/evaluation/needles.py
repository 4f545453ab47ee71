"""Needle-in-a-haystack questions on real text, after RULER (arXiv 2404.06654, section 3).

A needle is a line that assigns a value to a key, `key_7f3a = "48213"`. It is inserted at a given depth of a
haystack: lines of held-out text. The prompt ends with a question, `assert key_7f3a == "`, and the value is
the answer.

* "single": the haystack contains one needle. The other choices do not occur in the text, so the model only
  needs to copy the one value.
* "multikey": the haystack contains the needles of all keys, the others at random depths. All choices occur in
  the text, so the model must bind the key to its value.

All random draws depend only on the seed and the grid point, so all models answer the same questions.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from fusedkv_ext.errors import ConfigError
from fusedkv_ext.training.data.tokenizer import Tokenizer

TASKS = ("single", "multikey")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGITS = 5
GUESS_NLL = DIGITS * math.log(10.0)  # nats of a value under uniform random digits
_DRAWS = 64  # random haystacks to try for a line start near the requested depth
_CLOSE = 0.01  # largest deviation from the depth that ends the search


@dataclass(frozen=True)
class Style:
    """Templates of a needle and of its question."""

    needle: str
    question: str


STYLES = {
    "python": Style('{key} = "{value}"\n', 'assert {key} == "'),
    "prose": Style('The magic number of {key} is "{value}".\n', 'The magic number of {key} is "'),
}


@dataclass(frozen=True)
class Example:
    """One question as token ids.

    Attributes:
        key: The key that the question asks for.
        values: The choices; `values[0]` is the right answer.
        prompt: Haystack with needles, then the question.
        baseline: The prompt without the answering needle. Additional text in front keeps the length equal.
        candidates: The token ids of all values.
        depth: Fraction of the haystack's tokens that precede the needle.
    """

    key: str
    values: tuple[str, ...]
    prompt: tuple[int, ...]
    baseline: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    depth: float


@dataclass(frozen=True)
class Questions:
    """The examples of one grid point. Prompt and answer together have at most `length` tokens."""

    task: str
    length: int
    depth: float
    examples: tuple[Example, ...]


class Haystack:
    """Documents as one sequence of lines. Each line is encoded separately, so needles fit in between."""

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = array("i")
        self.ends: list[int] = []  # end of each line, in tokens
        for document in documents:
            for line in document.removesuffix("\n").split("\n"):
                self.ids.extend(tokenizer.encode(line + "\n"))
                self.ends.append(len(self.ids))

    def place(
        self, rng: random.Random, size: int, spare: int, depth: float, words: Sequence[str]
    ) -> tuple[list[int], list[int], int]:
        """Draws a haystack that has a line boundary near `depth`.

        Args:
            rng: Source of the random positions.
            size: Tokens of the haystack.
            spare: Additional tokens in front of it.
            depth: Requested depth, from 0 to 1.
            words: Strings that the text must not contain.

        Returns:
            `spare + size` token ids that end with a line; the line boundaries within the last `size` tokens;
            and the boundary nearest to `depth`.

        Raises:
            ValueError: The text is too short, or every draw contains one of `words`.
        """
        first = bisect.bisect_left(self.ends, spare + size)
        if first == len(self.ends):
            raise ValueError(
                f"the text must have at least {spare + size} tokens for a haystack, got {len(self.ids)}; "
                "give more text or shorter lengths"
            )
        best: tuple[float, list[int], list[int], int] | None = None
        for _ in range(_DRAWS):
            line = rng.randrange(first, len(self.ends))
            end = self.ends[line]
            start = bisect.bisect_right(self.ends, end - size)
            boundaries = [0, *(e - (end - size) for e in self.ends[start:line]), size]
            nearest = min(boundaries, key=lambda boundary: abs(boundary - depth * size))
            error = abs(nearest / size - depth)
            if best is not None and error >= best[0]:
                continue
            ids = self.ids[end - size - spare : end].tolist()
            text = self.tokenizer.decode(ids)
            if not any(word in text for word in words):
                best = error, ids, boundaries, nearest
                if error <= _CLOSE:
                    break
        if best is None:
            raise ValueError(
                f"the text must not contain {', '.join(words)}, got one of them in all {_DRAWS} draws; "
                "choose another seed or other text"
            )
        return best[1:]


def _insert(ids: Sequence[int], pieces: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """Inserts each piece at its position. Pieces at one position keep their order."""
    out: list[int] = []
    before = 0
    for position, piece in sorted(pieces, key=lambda item: item[0]):
        out += ids[before:position]
        out += piece
        before = position
    return out + list(ids[before:])


@dataclass(frozen=True)
class _Draw:
    """Keys and values of one example; the first pair is the right answer."""

    rng: random.Random
    keys: list[str]
    values: list[str]


def _draw(seed: int, place: tuple[str, int, float], index: int, keys: int) -> _Draw:
    rng = random.Random(f"{seed} {place} {index}")
    names = [f"key_{number:04x}" for number in rng.sample(range(16**4), keys)]
    values = [f"{number:0{DIGITS}d}" for number in rng.sample(range(10**DIGITS), keys)]
    return _Draw(rng, names, values)


def _example(
    haystack: Haystack, draw: _Draw, style: Style, place: tuple[str, int, float], room: int
) -> Example:
    task, length, depth = place
    encode = haystack.tokenizer.encode
    lines = [
        encode(style.needle.format(key=key, value=value))
        for key, value in zip(draw.keys, draw.values, strict=True)
    ]
    needle, others = lines[0], lines[1:] if task == "multikey" else []
    question = encode(style.question.format(key=draw.keys[0]))
    taken = room + len(question) + len(needle) + sum(map(len, others))
    size = length - taken
    if size < length // 4:
        raise ConfigError(
            f"retrieval: lengths must be at least {taken + (taken - 1) // 3} for task {task}, got {length}: "
            f"needles, question and answer take {taken} tokens; choose longer lengths or fewer keys"
        )
    spare = len(needle)
    ids, boundaries, nearest = haystack.place(draw.rng, size, spare, depth, [*draw.keys, *draw.values])
    pieces = [(draw.rng.choice(boundaries), other) for other in others]
    baseline = _insert(ids, [(spare + position, other) for position, other in pieces])
    pieces.insert(draw.rng.randint(0, len(pieces)), (nearest, needle))
    return Example(
        key=draw.keys[0],
        values=tuple(draw.values),
        prompt=(*_insert(ids[spare:], pieces), *question),
        baseline=(*baseline, *question),
        candidates=tuple(tuple(encode(value)) for value in draw.values),
        depth=nearest / size,
    )


def make_questions(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    tasks: Sequence[str] = TASKS,
    examples: int = 25,
    keys: int = 4,
    seed: int = 0,
    style: str = "python",
) -> list[Questions]:
    """Creates the grid of questions. The result is a pure function of the arguments.

    Args:
        tokenizer: The tokenizer of the models.
        documents: Text of the haystack. No model may have been trained on it.
        lengths: Tokens of haystack, needles, question and answer together.
        depths: Positions of the needle, from 0 (start of the text) to 1 (right before the question).
        tasks: Names from `TASKS`.
        examples: Number of examples per grid point.
        keys: Number of keys, which is also the number of choices.
        seed: Seed of all random draws.
        style: A name from `STYLES`.

    Returns:
        One entry per task, length and depth.

    Raises:
        ConfigError: A number is out of range, or a length leaves no room for a haystack.
        ValueError: The text is too short.
    """
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ConfigError(f"tasks must be from {', '.join(TASKS)}, got {unknown[0]!r}")
    if style not in STYLES:
        raise ConfigError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if examples < 1 or not 2 <= keys <= 1000:
        raise ConfigError(f"examples must be at least 1 and keys from 2 to 1000, got {examples} and {keys}")
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ConfigError(f"depths must be from 0 to 1, got {wrong[0]}")
    haystack = Haystack(documents, tokenizer)
    grid = []
    # Without duplicates: the depths 1 and 1.0 are equal and have equal draws.
    for place in itertools.product(
        dict.fromkeys(tasks), dict.fromkeys(lengths), dict.fromkeys(map(float, depths))
    ):
        draws = [_draw(seed, place, index, keys) for index in range(examples)]
        room = max(len(tokenizer.encode(value)) for draw in draws for value in draw.values)
        made = tuple(_example(haystack, draw, STYLES[style], place, room) for draw in draws)
        task, length, depth = place
        grid.append(Questions(task, length, depth, made))
    return grid
