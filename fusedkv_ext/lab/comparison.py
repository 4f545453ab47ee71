"""Result of a comparison: mean and standard deviation over seeds, tables, and the papers' orderings."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusedkv_ext.lab.compare import Budget, Results, RunKey, best_rate, parameters
from fusedkv_ext.lab.entries import Entry
from fusedkv_ext.lab.reporting import aligned, table
from fusedkv_ext.training.config import TrainConfig
from fusedkv_ext.training.trainer import resolve_plan

FORMAT = 1
Result = dict[str, Any]


def cache_bytes_per_token(config: TrainConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Cache bytes per token of a configuration's plan: all layers, one sequence."""
    model, plan = config.model, resolve_plan(config.model)
    if model.kv_lora_rank is not None:
        return plan.latent_bytes_per_token(model.kv_lora_rank, model.qk_rope_head_dim or 0, dtype)
    return plan.bytes_per_token(model.num_key_value_heads, model.head_dim, dtype)


def summarize(
    budget: Budget,
    methods: Mapping[Entry, TrainConfig],
    results: Results,
    tokens_per_s: Mapping[Entry, float],
    data: Mapping[str, Any],
) -> Result:
    """The result as one JSON object: the conditions, and one row per method in the given order.

    Differences are to the first method and paired by seed, because equal seeds train on the same windows.

    Args:
        budget: The common budget.
        methods: The configuration of each method; the first is the baseline.
        results: The results of all runs.
        tokens_per_s: Measured training speeds.
        data: Description of the text, with its `vocab_size`.
    """
    entries = list(methods)
    baseline = _losses(entries[0], budget, results)
    first = budget.first_seed
    rows = []
    for entry, config in methods.items():
        losses = _losses(entry, budget, results)
        gaps = _gaps(losses, baseline)
        rows.append(
            {
                "label": entry.label,
                "method": entry.method,
                "options": dict(entry.options),
                "paper": entry.paper,
                "parameters": parameters(config, data["vocab_size"]),
                "kv_heads": config.model.num_key_value_heads,
                "intermediate_size": config.model.intermediate_size,
                "cache_bytes_per_token": cache_bytes_per_token(config),
                "rates": {f"{rate:g}": _loss(results, RunKey(entry, rate, first)) for rate in budget.rates},
                "rate": best_rate(entry, budget, results),
                "losses": losses,
                **_spread("loss", [loss for loss in losses if loss is not None]),
                **_spread("gap", gaps),
                "tokens_per_s": tokens_per_s.get(entry),
            }
        )
    return {
        "format": FORMAT,
        "kind": "comparison",
        "baseline": entries[0].label,
        "seeds": budget.seeds,
        "equal": budget.equal,
        "tokens": budget.config.run.steps * budget.config.run.batch_size * budget.config.data.seq_len,
        "config": budget.config.to_dict(),
        "data": dict(data),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "rows": rows,
    }


def _loss(results: Results, key: RunKey) -> float | None:
    return results[key]["valid_bits_per_byte"] if key in results else None


def _losses(entry: Entry, budget: Budget, results: Results) -> list[float | None]:
    """Validation losses in bits per byte at the method's rate, one per seed; None for a diverged run."""
    rate = best_rate(entry, budget, results)
    if rate is None:
        return [None] * budget.seeds
    return [_loss(results, RunKey(entry, rate, seed)) for seed in budget.all_seeds]


def _gaps(losses: Sequence[float | None], others: Sequence[float | None]) -> list[float]:
    """Differences of losses by seed, without seeds for which one method has none."""
    pairs = zip(losses, others, strict=True)
    return [one - other for one, other in pairs if one is not None and other is not None]


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None if there are too few values."""
    return {
        f"{name}_mean": statistics.fmean(values) if values else None,
        f"{name}_sd": statistics.stdev(values) if len(values) > 1 else None,
    }


TITLES = (
    "method",
    "bits/byte",
    "to {baseline}",
    "cache B/token",
    "of {baseline}",
    "parameters",
    "lr",
    "training tokens/s",
)


def cells(result: Result, row: Mapping[str, Any]) -> list[str]:
    """The cells of one row of the table."""
    first = result["rows"][0]
    speed = f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "not measured"
    diverged = row["losses"].count(None)
    some = f" ({diverged} of {len(row['losses'])} diverged)" if 0 < diverged < len(row["losses"]) else ""
    return [
        row["label"],
        (_plus_minus(row["loss_mean"], row["loss_sd"], "{:.3f}") + some) or "diverged",
        _plus_minus(row["gap_mean"], row["gap_sd"], "{:+.3f}") if row is not first else "",
        f"{row['cache_bytes_per_token']:,}",
        f"{row['cache_bytes_per_token'] / first['cache_bytes_per_token']:.3f}",
        f"{row['parameters']:,}",
        f"{row['rate']:g}" if row["rate"] else "diverged",
        speed,
    ]


def _plus_minus(mean: float | None, deviation: float | None, form: str) -> str:
    if mean is None:
        return ""
    return form.format(mean) + (f" ± {deviation:.3f}" if deviation is not None else "")


def ordered(result: Result) -> list[dict[str, Any]]:
    """Rows sorted by loss, the lowest first; diverged methods are last."""
    return sorted(result["rows"], key=lambda row: math.inf if row["loss_mean"] is None else row["loss_mean"])


def text_table(result: Result) -> str:
    """The table as aligned text."""
    titles = [title.format(baseline=result["baseline"]) for title in TITLES]
    return aligned([titles, *(cells(result, row) for row in ordered(result))], rule=False)


def markdown_table(result: Result) -> str:
    """The table as Markdown."""
    titles = [title.format(baseline=result["baseline"]) for title in TITLES]
    return table(titles, (cells(result, row) for row in ordered(result)), numbers=True)


# Orderings reported by the papers: (claim, better, worse). Lower loss is better.
CLAIMS = (
    ("FusedKV < Lite", "fusedkv", "fusedkv-lite"),
    ("Lite < vanilla", "fusedkv-lite", "vanilla"),
    ("FusedKV < vanilla", "fusedkv", "vanilla"),
    ("Lite-Learnable < Lite", "fusedkv-lite-learnable", "fusedkv-lite"),
    ("Lite < Lite-Rev", "fusedkv-lite", "fusedkv-lite-rev"),
    ("vanilla < YOCO", "vanilla", "yoco"),
    ("vanilla < CLA", "vanilla", "cla"),
    ("vanilla < GQA at half the cache", "vanilla", "gqa"),
    ("FusedKV < YOCO at equal cache", "fusedkv", "yoco"),
    ("YOCO++ < FusedKV at equal cache", "yoco++", "fusedkv"),
    ("YOCO++ < vanilla", "yoco++", "vanilla"),
    ("SkipV1 < vanilla", "skipv1", "vanilla"),
    ("SkipV1 < V-only YOCO", "skipv1", "yoco-v"),
    ("SkipV1 < V-only CLA", "skipv1", "cla-v"),
    ("vanilla < SkipKV1", "vanilla", "skipkv1"),
    ("SkipV1-YOCO < YOCO", "skipv1-yoco", "yoco"),
    ("ResFormer < vanilla", "resformer", "vanilla"),
)


def verdicts(result: Result) -> list[dict[str, Any]]:
    """Paired difference and verdict for each claim whose two methods are in the result.

    The verdict is "yes" if the mean difference has the claimed sign and exceeds its limit, and "no" if it has
    the opposite sign and exceeds it. Otherwise it is "not decided". The limit is the standard error times the
    two-sided 95 % quantile of Student's t.
    """
    rows = {row["label"]: row for row in result["rows"]}
    found = []
    for claim, better, worse in CLAIMS:
        if better not in rows or worse not in rows:
            continue
        gaps = _gaps(rows[better]["losses"], rows[worse]["losses"])
        if len(gaps) < 2:
            continue
        mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
        limit = _t_quantile(len(gaps) - 1) * error
        holds = "yes" if mean < -limit else "no" if mean > limit else "not decided"
        found.append({"claim": claim, "gap": mean, "error": error, "limit": limit, "holds": holds})
    return found


def _t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: a table up to 10 degrees of freedom, an upper bound beyond."""
    table = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    return table[min(freedom, len(table)) - 1]


def verdicts_table(result: Result) -> str:
    """The verdicts as a Markdown table."""
    rows = ([v["claim"], f"{v['gap']:+.3f}", f"{v['limit']:.3f}", v["holds"]] for v in verdicts(result))
    return table(["the papers' ordering", "difference", "± (95 %)", "here"], rows)
