"""Results as Markdown: a table for each scenario with ratios to plain Llama, the goals, the machine."""

from __future__ import annotations

from typing import Any

from fusedkv_ext.lab import reporting
from suite.serving.settings import PLAIN

Record = dict[str, Any]

# Title, field, format of the number.
COLUMNS = {
    "pressure": (
        ("tokens of cache", "cache_tokens", "{:,}"),
        ("requests at once", "running", "{}"),
        ("output tokens/s", "tokens_per_s", "{:.1f}"),
        ("TTFT, median (s)", "ttft_s", "{:.1f}"),
        ("TPOT, median (ms)", "tpot_ms", "{:.1f}"),
        ("preemptions", "preemptions", "{}"),
    ),
    "room": (
        ("tokens of cache", "cache_tokens", "{:,}"),
        ("prefill (s)", "prefill_s", "{:.2f}"),
        ("step, best (ms)", "step_ms", "{:.1f}"),
        ("step, median (ms)", "step_median_ms", "{:.1f}"),
    ),
}


def _cell(row: Record, base: Record | None, field: str, form: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    text = form.format(value)
    if base is None or row is base or not base.get(field):
        return text
    return f"{text} ({value / base[field]:.2f}x)"


def scenario_table(result: Record, scenario: str) -> str:
    """The rows of one scenario; in parentheses the ratio to plain Llama in the same run."""
    rows = [row for row in result["rows"] if row["scenario"] == scenario]
    base = next((row for row in rows if row["engine"] == PLAIN), None)
    columns = COLUMNS[scenario]
    lines = [
        [
            "plain Llama, vLLM's own attention" if row["engine"] == PLAIN else row["engine"],
            *([_cell(row, base, field, form) for _, field, form in columns]),
        ]
        for row in rows
    ]
    text = reporting.table(["engine", *(title for title, _, _ in columns)], lines, numbers=True)
    errors = [f"* {row['engine']}: {row['error']}" for row in rows if row["error"]]
    return text + ("\n" + "\n".join(errors) + "\n" if errors else "")


def pressure_table(result: Record) -> str:
    """For README.md: the rows under pressure."""
    return scenario_table(result, "pressure")


def conditions(result: Record) -> str:
    """The machine and the sizes, as sentences."""
    m, s = result["machine"], result["sizes"]
    mode = "eager" if s["eager"] else "torch.compile"
    return (
        f"{m['cpu']}, {m['threads']} threads, kernels for {m['level']}; vLLM {m['vllm']}, "
        f"torch {m['torch']}, Python {m['python']}, commit {m['commit']}. {s['layers']} layers, hidden size "
        f"{s['hidden']}, {s['heads']} heads and {s['kv_heads']} KV heads of {s['head_dim']}, {s['dtype']}, "
        f"{mode}. Blocks of {s['block']} tokens, at most {s['chunk']:,} tokens a step. {s['rounds']} rounds "
        f"in turns, {result['seconds']:.0f} s in all; other processes used "
        f"{m['other_processes_percent']:.1f} % of the CPUs.\n"
    )


def _heading(result: Record, scenario: str) -> str:
    s = result["sizes"]
    memory = next(row["cache_bytes"] for row in result["rows"] if row["scenario"] == scenario)
    if scenario == "pressure":
        return (
            f"**Under pressure**: {s['queue']} requests at once, {s['prompt']:,} tokens each, {s['output']} "
            f"tokens out, {memory / 2**20:.1f} MiB of KV memory for every engine. The figures are those of "
            "the best round.\n"
        )
    return (
        f"**Room for all**: {s['requests']} requests of {s['prompt']:,} tokens, {s['steps']} decode steps, "
        f"{memory / 2**20:.1f} MiB of KV memory for every engine. The prefill is that of the best round; the "
        "best step is that of all rounds.\n"
    )


def document(result: Record) -> str:
    """Everything that docs/serving.md shows."""
    parts = [conditions(result)]
    for scenario in result["scenarios"]:
        parts += [_heading(result, scenario), scenario_table(result, scenario)]
    return "\n".join(parts)
