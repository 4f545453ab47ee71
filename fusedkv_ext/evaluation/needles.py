"""Questions about needles in a haystack of real text, after RULER (arXiv 2404.06654, section 3).

A needle is a line that gives a key a value, `key_7f3a = "48213"`. It stands at some depth of a haystack of
lines of held-out text, and the text ends with a question, `assert key_7f3a == "`, that the value answers.

* "single": the haystack holds one needle. The other choices are values that stand nowhere in the text, so
  copying the only value there is enough.
* "multikey": it holds needles of all keys, the others anywhere; all choices stand in the text, and only
  binding the key to its value tells them apart.

Everything is drawn from a seed and the place in the grid alone, so all models answer the same questions.
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
GUESS_NLL = DIGITS * math.log(10.0)  # nats of a value, for who knows that digits come and nothing else
_DRAWS = 64  # places of the text that are tried for one with a line start at the wanted depth
_CLOSE = 0.01  # a place is good enough when the line start is that near to the depth


@dataclass(frozen=True)
class Style:
    """How a needle reads, and the question that its value answers."""

    needle: str
    question: str


STYLES = {
    "python": Style('{key} = "{value}"\n', 'assert {key} == "'),
    "prose": Style('The magic number of {key} is "{value}".\n', 'The magic number of {key} is "'),
}


@dataclass(frozen=True)
class Example:
    """One question as token ids. `values[0]` is the right answer, `candidates` are the ids of all values.

    prompt: haystack with needles, then the question. baseline: the same without the needle that answers it,
    and as many more tokens of the text in front, so that both are equally long. depth: tokens of the haystack
    before the needle, as a share of all.
    """

    key: str
    values: tuple[str, ...]
    prompt: tuple[int, ...]
    baseline: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    depth: float


@dataclass(frozen=True)
class Questions:
    """The examples of one place in the grid: prompts of one length, and room for an answer up to `length`."""

    task: str
    length: int
    depth: float
    examples: tuple[Example, ...]


class Haystack:
    """Documents as one row of lines; each line is encoded for itself, so that needles fit between them."""

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = array("i")
        self.ends: list[int] = []  # of the lines, in tokens
        for document in documents:
            for line in document.removesuffix("\n").split("\n"):
                self.ids.extend(tokenizer.encode(line + "\n"))
                self.ends.append(len(self.ids))

    def place(
        self, rng: random.Random, size: int, spare: int, depth: float, words: Sequence[str]
    ) -> tuple[list[int], list[int], int]:
        """(ids, boundaries, nearest): `spare` + `size` tokens that end with a line and contain none of
        `words`, where lines begin or end within the last `size`, and which of these is nearest to `depth`.

        Of several random places the one with a boundary near `depth`. Raises ValueError for too little text.
        """
        first = bisect.bisect_left(self.ends, spare + size)
        if first == len(self.ends):
            raise ValueError(
                f"the text has {len(self.ids)} tokens, but a haystack needs {spare + size}; give more text "
                "or shorter lengths"
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
            raise ValueError(f"the text is full of {', '.join(words)}; choose another seed or other text")
        return best[1:]


def _insert(ids: Sequence[int], pieces: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """`ids` with each piece put in at its position; pieces at one position in their order."""
    out: list[int] = []
    before = 0
    for position, piece in sorted(pieces, key=lambda item: item[0]):
        out += ids[before:position]
        out += piece
        before = position
    return out + list(ids[before:])


@dataclass(frozen=True)
class _Draw:
    """What is asked in one example, before it has a haystack; the first key and value are the right ones."""

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
            f"retrieval: a length of {length} tokens has no room for a haystack, as {taken} go to needles, "
            f"question and answer of task {task}; choose lengths of at least {taken + (taken - 1) // 3}, or "
            "fewer keys"
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
    """The grid of questions: a pure function of the arguments.

    documents: the haystack, text that no model was trained on. lengths: tokens of haystack, needles, question
    and answer together. depths: 0 (the needle comes first) to 1 (right before the question). examples: per
    place in the grid. keys: number of keys and of choices. style: of STYLES.

    Raises ConfigError for numbers out of range and lengths without room, ValueError for too little text.
    """
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ConfigError(f"tasks must be of {', '.join(TASKS)}, got {unknown[0]!r}")
    if style not in STYLES:
        raise ConfigError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if examples < 1 or not 2 <= keys <= 1000:
        raise ConfigError(f"examples must be at least 1 and keys from 2 to 1000, got {examples} and {keys}")
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ConfigError(f"depths must be from 0 to 1, got {wrong[0]}")
    haystack = Haystack(documents, tokenizer)
    grid = []
    # Each place once; 1 and 1.0 are one depth, and draw the same.
    for place in itertools.product(
        dict.fromkeys(tasks), dict.fromkeys(lengths), dict.fromkeys(map(float, depths))
    ):
        draws = [_draw(seed, place, index, keys) for index in range(examples)]
        room = max(len(tokenizer.encode(value)) for draw in draws for value in draw.values)
        made = tuple(_example(haystack, draw, STYLES[style], place, room) for draw in draws)
        task, length, depth = place
        grid.append(Questions(task, length, depth, made))
    return grid
