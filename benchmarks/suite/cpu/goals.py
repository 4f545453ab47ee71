"""The goals: one table of what is promised, how it follows from the rows, and where the line is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from suite.cpu.codes import APPEND, FUSED
from suite.cpu.decode import BATCH, CONTEXT, SHORT
from suite.cpu.fuse import AUTOGRAD, BACKWARD, FORWARD
from suite.cpu.models import OPERATIONS, STEP, TINY_ATTENTION, TPOT, TTFT

Record = dict[str, Any]  # a Row as a dictionary, as it comes out of a JSON file
Rows = Sequence[Record]
Figures = Callable[[Rows], Iterable[float]]


@dataclass(frozen=True)
class Goal:
    """``figures``: what the rows say, one number each; the worst of them has to reach ``threshold``.

    at_least: whether larger is better. unit: "x" for ratios, "%" of a roof, "us".
    """

    family: str
    text: str
    figures: Figures
    threshold: float
    at_least: bool = True
    unit: str = "x"

    def judged(self, rows: Rows) -> Record:
        """measured: the worst figure; None, and ``met`` None, where the rows have none."""
        found = list(self.figures(rows))
        measured = (min(found) if self.at_least else max(found)) if found else None
        met = None
        if measured is not None:
            met = measured >= self.threshold if self.at_least else measured <= self.threshold
        return {
            "family": self.family,
            "goal": self.text,
            "threshold": self.threshold,
            "at_least": self.at_least,
            "unit": self.unit,
            "measured": measured,
            "met": met,
        }


def select(rows: Rows, op: str, dtype: str | None = None, **params: Any) -> list[Record]:
    return [
        row
        for row in rows
        if row["op"] == op
        and (dtype is None or row["dtype"] == dtype)
        and all(row["params"].get(name) == value for name, value in params.items())
    ]


def roof(op: str, dtype: str | None = None, **params: Any) -> Figures:
    """Percent of the roof."""
    return lambda rows: [row["percent_of_roof"] for row in select(rows, op, dtype, **params)]


def beside(peer: str, op: str, dtype: str | None = None, **params: Any) -> Figures:
    """How many times as fast as the fastest peer whose name begins with ``peer``."""

    def figures(rows: Rows) -> Iterable[float]:
        for row in select(rows, op, dtype, **params):
            ratios = [x["x"] for name, x in row["peers"].items() if name.startswith(peer) and "x" in x]
            if ratios:
                yield min(ratios)

    return figures


def limit(op: str, dtype: str | None = None, **params: Any) -> Figures:
    """Percent of the limit by reading and by products."""
    return lambda rows: [row["percent_of_limit"] for row in select(rows, op, dtype, **params)]


def best(op: str, *, tokens: range | None = None) -> Figures:
    """How many times as fast as the best of all peers, on contexts of so many tokens."""

    def figures(rows: Rows) -> Iterable[float]:
        for row in select(rows, op):
            if row["x_best"] and (tokens is None or row["params"]["T"] in tokens):
                yield row["x_best"]

    return figures


def versus(op: str, dtype: str | None = None, *, per_byte: bool = False, **params: Any) -> Figures:
    """Our time / the time of the base of the same cell; per_byte: both divided by their bytes."""

    which = "per_byte" if per_byte else "x"
    return lambda rows: [row["versus"][which] for row in select(rows, op, dtype, **params) if row["versus"]]


def fused_layers(rows: Rows) -> Iterable[float]:
    """Mean of a storing and a fusing layer of FusedKV, as its layers are half and half, over vanilla's."""
    for storing in select(rows, FUSED, m=1):
        shape = {name: storing["params"][name] for name in ("R", "T")}
        layers = [storing, *select(rows, FUSED, m=2, **shape)]
        yield sum(row["versus"]["x"] for row in layers) / len(layers)


def memory(rows: Rows) -> Iterable[float]:
    """Peak of a training step over vanilla's, at equal shapes."""
    for row in select(rows, STEP):
        shape = {name: value for name, value in row["params"].items() if name != "plan"}
        base = select(rows, STEP, plan="vanilla", **shape)
        if row["params"]["plan"] != "vanilla" and base and row["peak_mb"] and base[0]["peak_mb"]:
            yield row["peak_mb"] / base[0]["peak_mb"]


def python_time(rows: Rows) -> Iterable[float]:
    """Of an attention layer: its time less that of torch's modules and the native operations in it."""
    for row in select(rows, TINY_ATTENTION):
        if "us" in row["peers"].get(OPERATIONS, {}):
            yield row["us"] - row["peers"][OPERATIONS]["us"]


def both(first: Figures, second: Figures) -> Figures:
    return lambda rows: [*first(rows), *second(rows)]


def _readers(op: str, **params: Any) -> Figures:
    """Lite and FusedKV over vanilla."""
    return both(*(versus(op, plan=plan, **params) for plan in ("fusedkv-lite", "fusedkv")))


BF16 = "bfloat16"
FEW, LONG = range(64, 2049), range(4096, 1 << 30)  # tokens

GOALS = (
    Goal("decode", "bfloat16: of the limit", limit("decode", BF16), 80, unit="%"),
    Goal("decode", "float16: of the limit", limit("decode", "float16"), 80, unit="%"),
    Goal("decode", "float32: of the limit", limit("decode", "float32"), 80, unit="%"),
    Goal(
        "decode",
        "from 4096 tokens on: as fast as the best formulation in torch",
        both(best("decode"), both(best(CONTEXT, tokens=LONG), best(BATCH))),
        1.3,
    ),
    Goal(
        "decode",
        "64 to 2048 tokens: as fast as the best formulation in torch",
        both(best(SHORT), best(CONTEXT, tokens=FEW)),
        1,
    ),
    Goal(
        "decode",
        "time per byte of 2 sources, to 1 source",
        versus("decode", per_byte=True, m=2),
        1.03,
        at_least=False,
    ),
    Goal(
        "decode", "time in pages of 16, to contiguous", versus("decode, paged", page=16), 1.03, at_least=False
    ),
    Goal(
        "decode", "time in pages of 64, to contiguous", versus("decode, paged", page=64), 1.03, at_least=False
    ),
    Goal(
        "decode",
        "time of a ragged batch, to an equal one of the same bytes",
        versus("decode, ragged lengths"),
        1.10,
        at_least=False,
    ),
    Goal("coded", "int8: time to bfloat16", versus("decode, int8"), 0.60, at_least=False),
    Goal("coded", "int4: time to bfloat16", versus("decode, int4"), 0.40, at_least=False),
    Goal("coded", "FusedKV in int8: time to vanilla in bfloat16", fused_layers, 0.85, at_least=False),
    Goal("coded", "encoding a token: time to a plain append", versus(APPEND), 1.3, at_least=False),
    Goal("fuse", "forward: of the copy roof", roof(FORWARD), 85, unit="%"),
    Goal("fuse", "forward: as fast as eager", beside("eager", FORWARD), 2),
    Goal("fuse", "backward: of the copy roof", both(roof(BACKWARD), roof(AUTOGRAD)), 75, unit="%"),
    Goal(
        "fuse",
        "backward: as fast as eager autograd",
        both(beside("eager", BACKWARD), beside("eager", AUTOGRAD)),
        2,
    ),
    Goal(
        "prefill", "time to first token of Lite and FusedKV, to vanilla", _readers(TTFT), 0.58, at_least=False
    ),
    Goal("train", "training step of Lite and FusedKV, to vanilla", _readers(STEP), 1, at_least=False),
    Goal("train", "peak memory of training Lite and FusedKV, to vanilla", memory, 1, at_least=False),
    Goal(
        "model",
        "time per output token, cache-bound: Lite, to vanilla",
        versus(TPOT, plan="fusedkv-lite", bound="cache"),
        0.9,
        at_least=False,
    ),
    Goal(
        "model",
        "time per output token, cache-bound: FusedKV, to vanilla",
        versus(TPOT, plan="fusedkv", bound="cache"),
        1.1,
        at_least=False,
    ),
    Goal(
        "model",
        "time per output token, weight-bound at a long context: Lite and FusedKV, to vanilla",
        _readers(TPOT, bound="weights"),
        1,
        at_least=False,
    ),
    Goal(
        "model",
        "time per output token, weight-bound at a short context: Lite and FusedKV, to vanilla",
        _readers(TPOT, bound="weights-short"),
        1,
        at_least=False,
    ),
    Goal(
        "model",
        "Python time per token and layer: attention less the operations in it",
        python_time,
        25,
        at_least=False,
        unit="us",
    ),
)


def judge(rows: Rows, families: Iterable[str]) -> list[Record]:
    """Every goal of these families. Those of others were not asked for."""
    return [goal.judged(rows) for goal in GOALS if goal.family in families]
