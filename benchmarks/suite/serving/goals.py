"""What serving is to reach, beside plain Llama on vLLM's own attention in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from suite.cpu.goals import Figures, Goal, Record, Rows
from suite.serving.settings import PLAIN


def beside_plain(figure: str, wanted: Figures) -> Figures:
    """The figure of the wanted rows over that of plain Llama in the same scenario."""

    def figures(rows: Rows) -> Iterable[float]:
        for row in wanted(rows):
            base = [x for x in rows if x["engine"] == PLAIN and x["scenario"] == row["scenario"]]
            if base and base[0].get(figure) and row.get(figure):
                yield row[figure] / base[0][figure]

    return figures


def rows_of(scenario: str, **fields: Any) -> Any:
    return lambda rows: [
        row
        for row in rows
        if row["scenario"] == scenario and all(row[name] == value for name, value in fields.items())
    ]


def half(scenario: str) -> Any:
    """Plans that store half of the cache or less."""
    return lambda rows: [row for row in rows if row["scenario"] == scenario and row["cache_ratio"] <= 0.5]


GOALS = (
    Goal("pressure", "requests at once with half the cache", beside_plain("running", half("pressure")), 1.9),
    Goal(
        "pressure", "output tokens/s with half the cache", beside_plain("tokens_per_s", half("pressure")), 1.3
    ),
    Goal(
        "room",
        "best step, vanilla",
        beside_plain("step_ms", rows_of("room", engine="vanilla")),
        1.0,
        at_least=False,
    ),
    Goal(
        "room",
        "best step, fusedkv",
        beside_plain("step_ms", rows_of("room", plan="fusedkv")),
        1.1,
        at_least=False,
    ),
    Goal(
        "room",
        "prefill, vanilla",
        beside_plain("prefill_s", rows_of("room", engine="vanilla")),
        1.0,
        at_least=False,
    ),
    Goal(
        "room",
        "prefill with early exit",
        beside_plain("prefill_s", rows_of("room", early_exit=True)),
        0.6,
        at_least=False,
    ),
)


def judge(rows: Sequence[Record], scenarios: Iterable[str]) -> list[Record]:
    return [goal.judged(rows) for goal in GOALS if goal.family in scenarios]
