"""The demo and its report: equal conditions, measured numbers, pictures, a page that needs nothing else."""

from __future__ import annotations

import html.parser
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedkv_ext.training.progress import SilentProgress

pytest.importorskip("matplotlib")

from fusedkv_ext.lab import figures, timing
from fusedkv_ext.lab.demo import plots, report, training
from fusedkv_ext.lab.demo.run import run_demo
from fusedkv_ext.lab.demo.settings import PLANS, DemoSettings, quick
from fusedkv_ext.training.data.tokenizer import ByteTokenizer
from fusedkv_ext.training.loop import load_data


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.fixture
def settings(tmp_path: Path) -> DemoSettings:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n\n\n" * 60)
    base = quick(0.1)
    changes = {
        "data.text": [str(text)],
        "data.cache_dir": str(tmp_path / "cache"),
        "data.seq_len": 32,
        "model.hidden_size": 32,
        "model.head_dim": 16,
        "model.num_attention_heads": 2,
        "model.num_key_value_heads": 2,
        "model.num_hidden_layers": 4,
        "run.batch_size": 4,
        "run.device": "cpu",
    }
    return replace(base, config=base.config.updated(changes.items()), context=128, sample_tokens=20)


class Images(html.parser.HTMLParser):
    """Collects what a page refers to and shows."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.alternatives: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                self.sources.append(value or "")
            if name == "alt":
                self.alternatives.append(value or "")


def test_demo_measures_and_writes_everything(settings: DemoSettings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_demo(settings, out, SilentProgress())
    vanilla, lite, fused = result.models
    assert (vanilla.name, lite.name, fused.name) == PLANS
    assert vanilla.cache_bytes_per_token == 2 * 4 * 2 * 16 * 4  # K and V, layers, heads, channels, bytes
    assert lite.cache_bytes_per_token == fused.cache_bytes_per_token == vanilla.cache_bytes_per_token / 2
    assert result.sample_cache_bytes * 2 == result.sample_cache_bytes_first
    assert fused.parameters > lite.parameters and vanilla.parameters > fused.parameters
    assert all(
        0 < m.valid_bits_per_byte < 8 and m.token_ms > 0 and m.first_token_ms > 0 for m in result.models
    )
    assert result.sample_text

    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    for name in ("loss", "cache", "fusion_weights"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = Images()
    text = (out / "report.html").read_text()
    page.feed(text)
    assert len(page.sources) == 3 and all(
        source.startswith("data:image/png;base64,") for source in page.sources
    )
    assert len(page.alternatives) == 3 and all(page.alternatives)
    assert not page.tags & {"script", "link", "iframe"} and "url(" not in text and "@import" not in text
    for row in report.cells(result):
        assert all(cell in text for cell in row)

    from fusedkv_ext.checkpoint.pretrained import load_pretrained

    assert all(load_pretrained(out / name).plan.name == name for name in PLANS)


def test_models_see_equal_tokens_in_equal_order(
    settings: DemoSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(settings.config, ByteTokenizer())
    trainers = training.make_trainers(settings.config, data)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in trainers}
    for name, trainer in trainers.items():
        windows = trainer._windows

        def recorded(name: str = name, windows: Callable = windows) -> torch.Tensor:
            seen[name].append(windows())
            return seen[name][-1]

        monkeypatch.setattr(trainer, "_windows", recorded)
        for _ in range(3):
            trainer.train_step()
    for name in PLANS[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen["vanilla"], seen[name], strict=True))
    assert not torch.equal(seen["vanilla"][0], seen["vanilla"][1])


def test_out_of_time_all_models_stop_at_the_same_step(settings: DemoSettings, tmp_path: Path) -> None:
    data = load_data(settings.config, ByteTokenizer())
    trainers = training.make_trainers(settings.config.updated([("run.steps", 1000)]), data)
    folders = {name: tmp_path / name for name in trainers}
    done = training.train(trainers, folders, SilentProgress(), deadline=time.monotonic() + 0.3)
    assert 0 < done.steps < 1000
    assert {trainer.step for trainer in trainers.values()} == {done.steps}
    assert all(seconds > 0 for seconds in done.step_seconds.values())


def test_fastest_number_of_threads_is_chosen(settings: DemoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(settings.config, ByteTokenizer())
    seconds = {1: 3.0, 2: 1.0, 4: 2.0}
    monkeypatch.setattr(timing, "in_turns", lambda *_: {"step": seconds[torch.get_num_threads()]})
    torch.set_num_threads(4)
    assert training.choose_threads(settings.config, data) == 2
    assert torch.get_num_threads() == 4


def test_timing_is_a_median_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.in_turns(calls, 4, torch.device("cpu"), warm_up=2)
    assert times == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"


def model_result(name: str, factor: float) -> report.ModelResult:
    return report.ModelResult(
        name, int(1000 * factor), 1.5, 2.0 * factor, 512 * factor, 10.0, 3.0 / factor, 80.0
    )


@pytest.fixture
def result() -> report.DemoResult:
    words = "layers hidden_size heads kv_heads head_dim batch_size seq_len precision text prompt_repeats "
    words += "decode_repeats decode_dtype processor threads torch"
    numbers = {"steps": 90, "planned_steps": 100, "tokens": 1000, "context": 4096}
    models = (model_result("vanilla", 1.0), model_result("fusedkv", 0.5))
    return report.DemoResult(
        models, {**dict.fromkeys(words.split(), 1), **numbers}, "<def>", "a & b", 100, 200
    )


def test_table_shows_values_and_ratios_also_of_what_is_worse(result: report.DemoResult) -> None:
    rows = {row[0]: row[1:] for row in report.cells(result)[1:]}
    assert rows["cache, bytes per token"] == ["512", "256  (0.500x)"]
    assert rows["decoding at 4096 tokens, ms per token"] == ["3.00", "6.00  (2.000x)"]
    lines = report.table(result).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned


def test_report_says_when_training_ended_early(result: report.DemoResult) -> None:
    assert "of 100 planned; the time limit stopped all models" in report.settings_text(result.settings)
    settings = {**result.settings, "steps": 100}
    assert "planned" not in report.settings_text(settings)


def test_page_escapes_generated_text(result: report.DemoResult) -> None:
    page = report.page(result, [("Loss <1>", "a picture", b"\x89PNG")])
    assert "&lt;def&gt;" in page and "a &amp; b" in page and "Loss &lt;1&gt;" in page and "<def>" not in page


def test_curves_of_unfinished_runs_are_drawn(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "step": i, "tokens": i * 100, "loss": 5 / i, "bits_per_byte": 7 / i} for i in (1, 2)
    ]
    for unit in ("bits", "nats"):
        figure = figures.loss_curves({"short": records, "fusedkv": records[:1]}, unit=unit)
        figures.save(figure, tmp_path / f"{unit}.png")
    assert not list(tmp_path.glob(".*"))


def test_drawing_a_model_without_fusion_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="no fusion weights"):
        plots.fusion_weights([])
