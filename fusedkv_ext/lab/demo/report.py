"""Results of the demo as a table in the terminal, a JSON file and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusedkv_ext.lab import reporting


@dataclass(frozen=True)
class ModelResult:
    """Measurements of one model. Times are medians in milliseconds."""

    name: str
    parameters: int
    valid_loss: float  # nats per token
    valid_bits_per_byte: float
    cache_bytes_per_token: float  # from KVCache.nbytes
    first_token_ms: float
    token_ms: float
    train_step_ms: float


@dataclass(frozen=True)
class DemoResult:
    """Results of a demo run. The first of `models` is the baseline."""

    models: tuple[ModelResult, ...]
    settings: Mapping[str, Any]  # sizes, steps, context, threads, versions
    sample_prompt: str
    sample_text: str
    sample_cache_bytes: int  # of the model that generated the sample, then of the first model at that length
    sample_cache_bytes_first: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# (title, value of a model, format)
_ROWS: tuple[tuple[str, Callable[[ModelResult], float], str], ...] = (
    ("parameters", lambda m: m.parameters, ",.0f"),
    ("validation loss, bits per byte", lambda m: m.valid_bits_per_byte, ".4f"),
    ("cache, bytes per token", lambda m: m.cache_bytes_per_token, ",.0f"),
    ("time to first token, {context}-token prompt, ms", lambda m: m.first_token_ms, ",.1f"),
    ("decoding at {context} tokens, ms per token", lambda m: m.token_ms, ".2f"),
    ("training step, ms", lambda m: m.train_step_ms, ",.0f"),
)


def cells(result: DemoResult) -> list[list[str]]:
    """Header and rows of the table. Cells of all models but the first include the ratio to the first."""
    first = result.models[0]
    rows = [["", *(model.name for model in result.models)]]
    for title, value, form in _ROWS:
        row = [title.format(context=result.settings["context"]), format(value(first), form)]
        row += [f"{format(value(m), form)}  ({value(m) / value(first):.3f}x)" for m in result.models[1:]]
        rows.append(row)
    return rows


def table(result: DemoResult) -> str:
    """The table as aligned text."""
    return reporting.aligned(cells(result))


def settings_text(settings: Mapping[str, Any]) -> str:
    """The settings in sentences."""
    s = settings
    early = ""
    if s["steps"] < s["planned_steps"]:
        early = f" (of {s['planned_steps']:,} planned; the time limit stopped all models at the same step)"
    return (
        f"Each model: {s['layers']} layers, {s['hidden_size']} wide, {s['heads']} heads of {s['head_dim']} "
        f"with {s['kv_heads']} KV heads, byte vocabulary. Trained on the same {s['tokens']:,} tokens in the "
        f"same order: {s['steps']:,} steps{early} of {s['batch_size']} x {s['seq_len']}, {s['precision']}. "
        f"Text: {s['text']}. Decoding and cache in {s['decode_dtype']}, batch 1; medians of "
        f"{s['prompt_repeats']} prompts and {s['decode_repeats']} tokens per model, interleaved. "
        f"{s['processor']}, {s['threads']} thread{'s' * (s['threads'] != 1)}, torch {s['torch']}."
    )


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; font-weight: normal; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
pre { background: #f5f5f2; padding: 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
      font-size: .85rem; }
pre b { color: #777; font-weight: normal; } .note { color: #555; font-size: .92rem; }
"""


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FusedKV demo</title>
<style>$style</style>
</head>
<body>
<h1>Attention from half a cache</h1>
<p>Models of equal width, trained under equal conditions. Vanilla attention stores keys and values in every
layer. The FusedKV models store them in the lower half of the layers, and the upper half reads that cache.</p>
$table
<p class="note">$settings</p>
<p class="note">In parentheses: ratio to the first column. All numbers were measured in this run, on this
machine. One run of small models shows how the mechanism works, not how large models compare.</p>
$sections
<h2>Text generated by $writer</h2>
<p class="note">Its cache has $bytes bytes, $ratio of the cache of $first for the same text.
The prompt is gray.</p>
<pre><b>$prompt</b>$text</pre>
</body>
</html>
""")

_SECTION = string.Template("""<h2>$heading</h2>
<img alt="$text" src="data:image/png;base64,$content">
<p class="note">$text</p>
""")


def page(result: DemoResult, pictures: Sequence[tuple[str, str, bytes]]) -> str:
    """The self-contained HTML page.

    Args:
        result: The results.
        pictures: (heading, caption, PNG content) of each figure.
    """
    sections = [
        _SECTION.substitute(
            heading=html.escape(heading),
            text=html.escape(text),
            content=base64.b64encode(content).decode(),
        )
        for heading, text, content in pictures
    ]
    return _PAGE.substitute(
        style=_STYLE,
        settings=html.escape(settings_text(result.settings)),
        table=_html_table(cells(result)),
        sections="".join(sections),
        writer=html.escape(result.models[-1].name),
        first=html.escape(result.models[0].name),
        bytes=f"{result.sample_cache_bytes:,}",
        ratio=f"{result.sample_cache_bytes / result.sample_cache_bytes_first:.2f}",
        prompt=html.escape(result.sample_prompt),
        text=html.escape(result.sample_text),
    )


def write_json(path: Path, result: DemoResult) -> Path:
    return reporting.write(path, json.dumps(result.to_dict(), indent=1) + "\n")
