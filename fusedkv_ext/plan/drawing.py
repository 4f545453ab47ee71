"""The table that ``print(plan)`` draws."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from fusedkv_ext.plan.pieces import SIDES, Fusion, Segment, Side

if TYPE_CHECKING:
    from fusedkv_ext.plan.cache_plan import CachePlan

_LETTERS = {"keys": ("K", "a"), "values": ("V", "b")}  # the papers' letters: tensor and fusion weight


def draw(plan: CachePlan) -> str:
    """The table as text: what every layer stores and reads, the fusion weights, and the cache size."""
    rows = [("layers", "stores", "keys", "values")]
    for rule, group in groupby(range(plan.num_layers), key=lambda i: _rule(plan, i)):
        run = list(group)
        rows.append((str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}", *rule))
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    lines = ["  ".join(row[c].ljust(widths[c]) for c in range(4)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    title = f"{plan.name}: {plan.num_layers} layers, counted from 0"
    return "\n".join([title, "", *lines, "", *_draw_weights(plan), *_draw_totals(plan), *_draw_own_use(plan)])


def _rule(plan: CachePlan, i: int) -> tuple[str, str, str]:
    """Cells (stores, keys, values) of layer i. Consecutive layers with equal cells get one row."""
    stores = []
    for side in SIDES:
        letter, ranges = _LETTERS[side][0], plan.stored_shares(i, side)
        whole = sum(b - a for a, b in ranges) == 1
        stores += [letter] if whole else [f"{letter}[{a}:{b}]" for a, b in ranges]
    layer = plan.layers[i]
    keys = ", ".join(_term(segment, i, "keys") for segment in layer.keys)
    values = ", ".join(_term(segment, i, "values") for segment in layer.values)
    return ", ".join(stores) or "nothing", keys, values


def _term(segment: Segment, i: int, side: Side) -> str:
    tensor, weight = _LETTERS[side]
    names = ["own" if j == i else f"{tensor}{j}" for j in segment.sources]
    if segment.fusion is not None:
        names = [f"{weight}{'i' if j == i else j}*{x}" for j, x in zip(segment.sources, names, strict=True)]
    start, stop = segment.heads
    heads = "" if start == 0 and stop == 1 else f"[{start}:{stop}] "
    return heads + " + ".join(names)


def _draw_weights(plan: CachePlan) -> list[str]:
    """One line per kind of fusion weights."""
    users: dict[tuple[Side, Fusion], list[int]] = {}
    for i, layer in enumerate(plan.layers):
        for side in SIDES:
            for fusion in dict.fromkeys(s.fusion for s in getattr(layer, side) if s.fusion is not None):
                users.setdefault((side, fusion), []).append(i)
    lines = []
    for (side, fusion), layers in users.items():
        start = "N(0, 1)" if isinstance(fusion.init, str) else ", ".join(f"{x:g}" for x in fusion.init)
        text = [fusion.granularity.replace("_", " ")]
        text += ["tied per RoPE pair"] if fusion.tied and "channel" in fusion.granularity else []
        text += [f"start at {start}"]
        text += [f"parameter times {fusion.multiplier:g}"] if fusion.multiplier != 1 else []
        text += [] if fusion.learnable else ["fixed"]
        lines.append(f"weights {_LETTERS[side][1]} of {_format_layers(layers)}: {', '.join(text)}")
    return lines


def _draw_totals(plan: CachePlan) -> list[str]:
    keys, values, total = plan.stored_tensors("keys"), plan.stored_tensors("values"), 2 * plan.num_layers
    return [
        f"cache: {float(keys):g} key and {float(values):g} value tensors of vanilla's {total}: "
        f"{plan.cache_ratio} ({float(plan.cache_ratio):.1%}) of vanilla",
        f"prefill: {plan.prefill_layers} of {plan.num_layers} layers see the whole prompt",
    ]


def _draw_own_use(plan: CachePlan) -> list[str]:
    """Lists stored tensors that no other layer reads. They are part of the cache too."""
    read = {
        (side, j)
        for i, layer in enumerate(plan.layers)
        for side in SIDES
        for segment in getattr(layer, side)
        for j in segment.sources
        if j != i
    }
    if not read:
        return []
    kept: dict[str, list[int]] = {}
    for i in plan.storage_layers:
        unread = [
            _LETTERS[side][0] for side in SIDES if plan.stored_shares(i, side) and (side, i) not in read
        ]
        if unread:
            kept.setdefault(" and ".join(unread), []).append(i)
    if not kept:
        return []
    parts = "; ".join(f"{what} of {_format_layers(layers)}" for what, layers in kept.items())
    return [
        f"kept for the layer's own attention alone: {parts}",
        "  (no later layer reads these, but the layer itself does at every step: they belong to the cache)",
    ]


def _format_layers(layers: Iterable[int]) -> str:
    """[0] -> "layer 0"; [0, 1, 2, 5] -> "layers 0-2, 5"."""
    layers = list(layers)
    runs = [list(run) for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"
