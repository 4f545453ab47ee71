"""The demo from text to report: models with different cache plans, equal tokens, interleaved measurements."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusedkv_ext.checkpoint.pretrained import save_pretrained
from fusedkv_ext.lab import figures, reporting
from fusedkv_ext.lab.demo import measure, plots, report
from fusedkv_ext.lab.demo.settings import PLANS, PROMPT, DemoSettings
from fusedkv_ext.lab.demo.training import TrainingDone, calibrate, choose_threads, make_trainers, train
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.training.data.tokenizer import ByteTokenizer
from fusedkv_ext.training.data.tokens import TokenData
from fusedkv_ext.training.loop import load_data
from fusedkv_ext.training.metrics import read_metrics
from fusedkv_ext.training.progress import Progress
from fusedkv_ext.training.trainer import DecoderTrainer


def _fused_sources(model: Decoder) -> list[plots.FusedSource]:
    """The fusion weights of all layers, with their initial values."""
    found = []
    for index, layer in enumerate(model.model.layers):
        fusion = layer.self_attn.kv_fusion
        if fusion is None:
            continue
        plan = model.plan.layers[index]
        for side, segments, weights_of in (
            ("keys", plan.keys, fusion.key_weights),
            ("values", plan.values, fusion.value_weights),
        ):
            for number, segment in enumerate(segments):
                weights = weights_of(number)
                if weights is None:
                    continue
                assert segment.fusion is not None
                init = segment.fusion.init
                starts = (0.0,) * len(segment.sources) if isinstance(init, str) else init
                for source, start, values in zip(
                    segment.sources, starts, weights.detach().cpu(), strict=True
                ):
                    found.append(plots.FusedSource(index, side, source, values, start))
    return found


def _processor() -> str:
    """The name of the CPU, as far as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _results(
    trainers: Mapping[str, DecoderTrainer], done: TrainingDone, settings: DemoSettings, progress: Progress
) -> tuple[report.ModelResult, ...]:
    """Validates and times the trained models."""
    models = {name: trainer.model.eval() for name, trainer in trainers.items()}
    data, device = next(iter(trainers.values())).data, next(iter(trainers.values())).device
    losses = {}
    for name, trainer in trainers.items():
        progress.line(f"validating {name}")
        losses[name] = trainer.evaluate(settings.final_valid_batches)
    prompt = data.valid[: settings.context].to(torch.int64)[None].to(device)
    progress.line(f"timing the prefill of {settings.context} tokens and decode steps, models interleaved")
    first = measure.first_token(models, prompt, settings.prompt_repeats)
    following = measure.next_token(models, prompt, settings.decode_repeats)
    return tuple(
        report.ModelResult(
            name=name,
            parameters=trainer.num_parameters,
            valid_loss=losses[name],
            valid_bits_per_byte=trainer.bits_per_byte(losses[name]),
            cache_bytes_per_token=measure.cache_bytes_per_token(models[name], settings.context),
            first_token_ms=1e3 * first[name],
            token_ms=1e3 * following[name],
            train_step_ms=1e3 * done.step_seconds[name],
        )
        for name, trainer in trainers.items()
    )


def _sample(models: Mapping[str, Decoder], settings: DemoSettings) -> dict[str, Any]:
    """Generated text of the last model, and the cache bytes of the last and the first model for it."""
    first, last = models[PLANS[0]], models[PLANS[-1]]
    tokenizer = ByteTokenizer()
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    out = last.generate(ids, settings.sample_tokens, temperature=0.8, top_p=0.95, seed=0)
    new = [token for token in out[0, ids.shape[1] :].tolist() if token != tokenizer.separator]
    return {
        "sample_prompt": PROMPT,
        "sample_text": tokenizer.decode(new),
        "sample_cache_bytes": last.make_cache(1, out.shape[1]).nbytes,
        "sample_cache_bytes_first": first.make_cache(1, out.shape[1]).nbytes,
    }


def _described(
    settings: DemoSettings, data: TokenData, steps: int, planned: int, trainer: DecoderTrainer
) -> dict[str, Any]:
    config = settings.config
    return {
        "layers": config.model.num_hidden_layers,
        "hidden_size": config.model.hidden_size,
        "heads": config.model.num_attention_heads,
        "kv_heads": config.model.num_key_value_heads,
        "head_dim": config.model.head_dim,
        "steps": steps,
        "planned_steps": planned,
        "batch_size": config.run.batch_size,
        "seq_len": config.data.seq_len,
        "tokens": steps * config.run.batch_size * config.data.seq_len,
        "precision": config.run.precision,
        "text": str(data.info),
        "context": settings.context,
        "prompt_repeats": settings.prompt_repeats,
        "decode_repeats": settings.decode_repeats,
        "decode_dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "device": str(trainer.device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _draw(
    folders: Mapping[str, Path], models: Mapping[str, Decoder], result: report.DemoResult, out: Path
) -> None:
    """Writes the plots, the page with them and results.json."""
    context = result.settings["context"]
    panels = [
        ("KV cache", "bytes per token", {m.name: m.cache_bytes_per_token for m in result.models}),
        (f"First token, {context}-token prompt", "ms", {m.name: m.first_token_ms for m in result.models}),
        (f"Decoding at {context} tokens", "ms per token", {m.name: m.token_ms for m in result.models}),
    ]
    curves = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    pictures = {
        "loss": (
            "Loss",
            "Training (lines) and validation loss (dots) in bits per byte over training tokens.",
            figures.loss_curves(curves),
        ),
        "cache": (
            "Cache and time",
            "Cache bytes per token, time to first token and time per token, with ratios to the first model.",
            plots.bars(panels),
        ),
        "fusion_weights": (
            "Learned fusion weights",
            "Change of each fusion weight of the FusedKV model since initialization, per layer and channel. "
            "Key weights repeat within a head, because the two channels of a RoPE pair share one weight.",
            plots.fusion_weights(_fused_sources(models[PLANS[-1]])),
        ),
    }
    for name, (_, _, figure) in pictures.items():
        figures.save(figure, out / f"{name}.png")
    shown = [
        (heading, text, (out / f"{name}.png").read_bytes()) for name, (heading, text, _) in pictures.items()
    ]
    reporting.write(out / "report.html", report.page(result, shown))
    report.write_json(out / "results.json", result)


def run_demo(settings: DemoSettings, out: Path, progress: Progress) -> report.DemoResult:
    """Trains and measures the models, and writes all results into `out`.

    Args:
        settings: Sizes and time limits.
        out: Output folder.
        progress: Progress display.
    """
    threads = torch.get_num_threads()
    try:
        return _run_demo(settings, out, progress)
    finally:
        torch.set_num_threads(threads)


def _run_demo(settings: DemoSettings, out: Path, progress: Progress) -> report.DemoResult:
    figures.need_matplotlib()
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    progress.line("encoding the text (once; later runs use the cached tokens)")
    data = load_data(settings.config, ByteTokenizer())
    progress.line(f"text: {data.info}")
    torch.set_num_threads(choose_threads(settings.config, data))
    step_seconds = calibrate(settings.config, data)
    budget = settings.minutes * 60 * (1 - settings.reserve) - (time.monotonic() - started)
    # The rest is for validation during training and for fluctuations of the machine's speed.
    planned = max(20, int(budget * 0.85 / sum(step_seconds.values())))
    shown = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in step_seconds.items())
    progress.line(
        f"one training step: {shown}, threads: {torch.get_num_threads()}; {planned} steps per model fit into "
        f"{settings.minutes:g} minutes"
    )
    warm_up = min(settings.config.optim.warmup_steps, planned // 5)
    config = settings.config.updated([("run.steps", planned), ("optim.warmup_steps", warm_up)])
    trainers = make_trainers(config, data)
    folders = {name: out / name for name in trainers}
    done = train(trainers, folders, progress, deadline=time.monotonic() + budget)
    models = {name: trainer.model for name, trainer in trainers.items()}
    for name, model in models.items():
        save_pretrained(model, folders[name])
    results = _results(trainers, done, settings, progress)
    described = _described(replace(settings, config=config), data, done.steps, planned, trainers[PLANS[0]])
    result = report.DemoResult(models=results, settings=described, **_sample(models, settings))
    _draw(folders, models, result, out)
    return result
