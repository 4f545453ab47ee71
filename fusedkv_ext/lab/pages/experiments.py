"""Generator of the tables and figures of docs/experiments.md, docs/analysis.md and docs/conversion.md.

    python -m fusedkv_ext.lab.pages.experiments ROOT

The input is ROOT/benchmarks/results/experiments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from fusedkv_ext.lab import comparison, comparison_plots, compressions, conversions, gradients, probe
from fusedkv_ext.lab.comparison import Result
from fusedkv_ext.lab.reporting import filled_from_results, table

DOCUMENTS = ("docs/experiments.md", "docs/analysis.md", "docs/conversion.md", "docs/compression.md")
RESULTS = "benchmarks/results/experiments"
PICTURES = "docs/img"


def conditions(result: Result) -> str:
    """One paragraph: the training conditions of all methods."""
    config, data = result["config"], result["data"]
    model, run, optim, seq_len = config["model"], config["run"], config["optim"], config["data"]["seq_len"]
    sentences = (
        f"{model['num_hidden_layers']} layers, {model['hidden_size']} wide, "
        f"{model['num_attention_heads']} heads of {model['head_dim']}, {data['vocab_size']} tokens (bytes);",
        f"{run['steps']} steps of {run['batch_size']} x {seq_len} = {result['tokens'] / 1e6:.2f} M tokens;",
        f"AdamW, weight decay {optim['weight_decay']:g}, {optim['warmup_steps']} steps of warm-up, cosine to",
        f"{optim['final_lr']:g} of the learning rate; rates tried: {', '.join(result['rows'][0]['rates'])};",
        f"{result['seeds']} seeds; equal {result['equal']}.",
        f"Text: {data['origin']}, {data['train_bytes'] / 1e6:.1f} MB; validation on",
        f"{run['valid_batches'] * run['batch_size'] * seq_len / 1e3:.0f} k tokens of held-out files.",
        f"torch {result['torch']}.",
    )
    return " ".join(sentences) + "\n"


def losses(result: Result) -> str:
    """The table of all methods, sorted by loss."""
    return comparison.markdown_table(result)


def orderings(result: Result) -> str:
    """The table of the papers' orderings and our verdicts."""
    return comparison.verdicts_table(result)


def rates(result: Result) -> str:
    """The learning-rate sweep: the loss of the first seed at each rate."""
    tried = list(result["rows"][0]["rates"])
    rows = []
    for row in result["rows"]:
        found = (row["rates"][rate] for rate in tried)
        rows.append([row["label"], *("diverged" if loss is None else f"{loss:.3f}" for loss in found)])
    return table(["method", *tried], rows, numbers=True)


def evaluated(result: Result) -> str:
    """Results of `fusedkv eval` on trained models: loss at both ends of the context, and retrieval."""
    models = list(result["checkpoints"].values())
    spans = models[0]["positions"]
    near, far = 4, -1  # buckets: the first with more than one position, and the last
    ends = [f"after {spans['first'][i]} to {spans['last'][i]} tokens" for i in (near, far)]
    rows = []
    for model in models:
        losses = model["positions"]["loss"]
        rows.append(
            [
                model["plan"],
                f"{model['perplexity']['loss']:.3f}",
                f"{losses[near]:.3f}",
                f"{losses[far]:.3f}",
                f"{losses[far] - losses[near]:+.3f}",
                *(f"{t['choice']:.0%} ± {t['choice_stderr']:.0%}" for t in model["retrieval"]["totals"]),
            ]
        )
    tasks = [f"{total['task']}: right of 4" for total in models[0]["retrieval"]["totals"]]
    return table(["method", "nats/token", *ends, "difference", *tasks], rows, numbers=True)


def probe_centers(result: Result) -> str:
    """The table that `fusedkv probe` prints."""
    return f"```text\n{probe.table(probe.read_probe(Path(RESULTS), result))}\n```\n"


def gradient_ratios(result: Result) -> str:
    """The table that `fusedkv grads` prints."""
    return f"```text\n{gradients.table(gradients.read_gradients(Path(RESULTS), result))}\n```\n"


BLOCKS: dict[str, Callable[[Result], str]] = {
    "comparison-conditions": conditions,
    "comparison-losses": losses,
    "comparison-orderings": orderings,
    "comparison-rates": rates,
    "compression": compressions.compression_table,
    "compression-claims": compressions.claims_table,
    "compression-ranks": compressions.ranks_table,
    "compression-peers": compressions.peers_table,
    "compression-trained": compressions.trained_table,
    "conversion": conversions.conversion_table,
    "conversion-pooling": conversions.pooling_table,
    "evaluation": evaluated,
    "probe": probe_centers,
    "grads": gradient_ratios,
}


def made(text: str, results: Path) -> str:
    """The document with generated parts from the result files in ``results``."""
    return filled_from_results(text, BLOCKS, results)


def main(root: Path) -> None:
    """Generates the pages of the repository at ``root`` and their figures."""
    from fusedkv_ext.lab.figures import save

    for path in (root / name for name in DOCUMENTS):
        path.write_text(made(path.read_text(encoding="utf-8"), root / RESULTS), encoding="utf-8")
        print(f"wrote {path}")
    for file in sorted((root / RESULTS).glob("comparison_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        for name, figure in (
            ("cache", comparison_plots.loss_over_cache(result)),
            ("tokens", comparison_plots.loss_over_tokens(result["curves"])),
        ):
            print(f"wrote {save(figure, root / PICTURES / f'{file.stem}_{name}.png')}")
    for kind, draw in (
        ("conversion", conversions.conversion_figure),
        ("compression", compressions.compression_figure),
        ("trained_codes", compressions.trained_figure),
    ):
        for file in sorted((root / RESULTS).glob(f"{kind}_*.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            print(f"wrote {save(draw(result), root / PICTURES / f'{file.stem}.png')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
