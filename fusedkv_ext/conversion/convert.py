"""Converts a trained Llama or Qwen3 to a cache plan without training.

Weights are copied and pooled, calibrated in closed form (least_squares.py), repaired by maps (absorb.py) and
refitted (refit.py).
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fusedkv_ext.checkpoint import checked_files
from fusedkv_ext.conversion.absorb import Repair, absorb
from fusedkv_ext.conversion.explained_variance import explained_layers
from fusedkv_ext.conversion.least_squares import fit
from fusedkv_ext.conversion.pooling import pool
from fusedkv_ext.conversion.refit import REFITTED, refit
from fusedkv_ext.conversion.second_moments import SecondMoments, collect
from fusedkv_ext.hf.config import PlanConfig, cache_bytes_per_token, config_for
from fusedkv_ext.hf.loading import CONVERSION, new_folder, save_like
from fusedkv_ext.layers.fusion import FusionWeights
from fusedkv_ext.plan import CachePlan
from fusedkv_ext.training.data.tokenizer import FileTokenizer

__all__ = ["Conversion", "calibration_windows", "convert_model", "save_conversion"]

# With fewer rows than a projection has inputs, refitting overfits the text.
LEAST_TOKENS = 2048


@dataclass
class Conversion:
    """A converted model and a record of the conversion.

    Attributes:
        model: the converted model.
        plan: its cache plan.
        changed: names of the parameters that are new or differ from the original's.
        settings: the settings of the calibration.
        left: per refitted layer and projection, the fraction of the squared error in the residual stream that
            remains on the calibration text.
        explained: per layer and side, "key" or "value", the fraction of the variance that its sources and
            fusion weights explain.
        repairs: the fractions explained with maps in addition.
        second_moments: of the calibration text; None without calibration.
    """

    model: PreTrainedModel
    plan: CachePlan
    changed: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    left: dict[int, dict[str, float]] = field(default_factory=dict)
    explained: dict[tuple[int, str], float] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)
    second_moments: SecondMoments | None = None


def calibration_windows(ids: Tensor, tokens: int, window: int) -> Tensor:
    """Windows of a text, spread evenly over it: (N, window), about ``tokens`` tokens or all of the text.

    Args:
        ids: (T,) token ids.
        tokens: the number of tokens wanted.
        window: tokens per window.

    Raises:
        ValueError: there are fewer than 2048 tokens, or ``window`` is below 2: a single token has only one
            key to attend to.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    count = min(tokens, len(ids)) // window
    if count * window < LEAST_TOKENS:
        raise ValueError(
            f"calibration must have at least {LEAST_TOKENS} tokens in windows of {window}, got "
            f"{count * window} out of a text of {len(ids)}; use a longer text"
        )
    starts = torch.linspace(0, len(ids) - window, count, dtype=torch.float64).long()
    return torch.stack([ids[start : start + window] for start in starts.tolist()])


def check_plain(config: PreTrainedConfig) -> None:
    """Checks that every layer of a model has its own keys and values.

    Raises:
        ValueError: the model has a plan in which some layers do not.
    """
    if isinstance(config, PlanConfig):
        plan = config.plan
        if plan.layers != CachePlan.named("vanilla", plan.num_layers).layers:
            raise ValueError(
                "the model must have its own keys and values in all layers, got one converted already, to "
                f"plan {plan.name!r}; convert the original"
            )


@torch.no_grad()
def convert_model(
    model: PreTrainedModel,
    plan: CachePlan | str,
    *,
    calibration: Tensor | None = None,
    metric: str = "score",
    ridge: float = 1e-3,
    repair: bool = False,
    refitted: Sequence[str] = tuple(REFITTED),
    pooling: str = "mean-v",
    second_moments: SecondMoments | None = None,
    batch_size: int = 4,
    progress: Callable[[str], None] = lambda line: None,
) -> Conversion:
    """Converts a model to another cache plan. The original is not changed.

    Args:
        model: LlamaForCausalLM or Qwen3ForCausalLM of transformers.
        plan: a plan with as many layers, or the name of one.
        calibration: (N, S) int64 token ids to fit the weights to. None copies only; fusion weights then start
            at the plan's initial values.
        metric: of the fusion weights, see ``least_squares.fit``.
        ridge: of the fusion weights, see ``least_squares.fit``.
        repair: absorb linear maps of keys and values into the projections, see ``absorb.absorb``.
        refitted: projections to refit in the layers with other keys or values, see ``refit.refit``; empty for
            none.
        pooling: for layers that store part of their heads, see ``pooling.pool``.
        second_moments: of the calibration text, if they are known.
        batch_size: sequences per forward pass.
        progress: receives a line now and then.

    Raises:
        ValueError: the model is of another type or already converted, the plan has another depth, or heads do
            not divide (``config_for``).
    """
    check_plain(model.config)
    config = config_for(model.config, plan)
    plan = config.plan
    converted = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    converted.generation_config = copy.deepcopy(model.generation_config)
    _copy(model, converted, pooling)
    done = Conversion(converted, plan, [], {"pooling": pooling})
    if calibration is not None:
        if second_moments is None:
            progress(f"second moments of {calibration.numel():,} tokens")
            second_moments = collect(model, calibration, batch_size)
        _fit_fusion(model, converted, second_moments, metric, ridge)
        done.second_moments, done.explained = (
            second_moments,
            explained_layers(converted, model, second_moments, metric),
        )
        if repair:
            done.repairs = absorb(converted, model, second_moments, metric=metric, ridge=ridge)
        if refitted:
            reading = [i for i in range(plan.num_layers) if plan.source_layers(i)]
            done.left = refit(
                model,
                converted,
                calibration,
                reading,
                projections=refitted,
                batch_size=batch_size,
                progress=progress,
            )
        done.settings |= {"tokens": calibration.numel(), "window": calibration.shape[1], "metric": metric}
        done.settings |= {"ridge": ridge, "repair": repair, "refitted": list(refitted)}
    done.changed = _changed(model, converted)
    return done


def _fit_fusion(
    model: PreTrainedModel,
    converted: PreTrainedModel,
    second_moments: SecondMoments,
    metric: str,
    ridge: float,
) -> None:
    """Solves for all learnable fusion weights of the plan."""
    for layer, original in zip(converted.get_decoder().layers, model.get_decoder().layers, strict=True):
        fusion = layer.self_attn.kv_fusion
        for segment in () if fusion is None else fusion.fused_segments:
            if segment.fusion.learnable:
                fit(fusion, segment, second_moments, original.self_attn.o_proj, metric=metric, ridge=ridge)


def _copy(model: PreTrainedModel, converted: PreTrainedModel, pooling: str) -> None:
    """Copies all common weights; of layers that store part of their heads, those of these heads."""
    state = dict(model.state_dict())
    plan, heads = converted.config.plan, converted.config.num_key_value_heads
    for i in range(plan.num_layers):
        name = f"model.layers.{i}.self_attn."
        keys, values = plan.stored_key_heads(i, heads), plan.stored_value_heads(i, heads)
        for side, stored in (("k", keys), ("v", values)):
            if len(stored) in (0, heads):
                continue
            # Keys are not pooled: they match the queries of their own head. A bias is one more column, for an
            # input that is always 1.
            how = pooling if side == "v" else "own"
            weight, output = f"{name}{side}_proj.weight", f"{name}o_proj.weight"
            bias = f"{name}{side}_proj.bias"
            rows = [state[weight], state[bias][:, None]] if bias in state else [state[weight]]
            pooled, state[output] = pool(torch.cat(rows, 1), state[output], stored, heads, how)
            state[weight] = pooled[:, : state[weight].shape[1]]
            if bias in state:
                state[bias] = pooled[:, -1]
    wanted = converted.state_dict()
    kept = {name: tensor for name, tensor in state.items() if name in wanted}
    found = converted.load_state_dict(kept, strict=False)
    missing = [name for name in found.missing_keys if ".kv_fusion." not in name]
    if missing:
        raise ValueError(
            f"the model must be a whole Llama or Qwen3, got one without {', '.join(missing[:3])}"
        )
    for module in converted.modules():
        if isinstance(module, FusionWeights):
            module.clear_cache()


def _changed(model: PreTrainedModel, converted: PreTrainedModel) -> list[str]:
    before = dict(model.named_parameters())
    return sorted(
        name
        for name, weight in converted.named_parameters()
        if name not in before or before[name].shape != weight.shape or not torch.equal(before[name], weight)
    )


def save_conversion(
    conversion: Conversion,
    out: str | os.PathLike[str],
    original: str | os.PathLike[str],
    report: dict[str, Any],
    tokenizer: FileTokenizer | None = None,
) -> Path:
    """Writes a Hugging Face folder atomically: the model, small files of ``original``, conversion.json.

    Args:
        conversion: the converted model.
        out: the new folder.
        original: the folder of the original, from which the tokenizer and other small files are copied.
        report: further entries of conversion.json.
        tokenizer: replaces the tokenizer of the original.

    Raises:
        FileExistsError: ``out`` exists.
        OSError: the disk is full; the message names the file.
    """
    out, original = Path(out), Path(original)
    with new_folder(out) as scratch:
        with checked_files.naming(out):
            save_like(conversion.model, original, scratch)
            if tokenizer is not None:
                tokenizer.save(scratch)
        config = conversion.model.config
        record = {
            "original": str(original.resolve()),
            "plan": conversion.plan.name,
            "changed": conversion.changed,
            "calibration": conversion.settings,
            "explained": _by_layer(conversion.explained),
            "explained_with_maps": _by_layer({(r.layer, r.side): r.after for r in conversion.repairs}),
            "left": {str(i): shares for i, shares in conversion.left.items()},
            "cache_bytes_per_token": {
                "original": cache_bytes_per_token(config_for(config, "vanilla"), conversion.model.dtype),
                "converted": cache_bytes_per_token(config, conversion.model.dtype),
            },
            **report,
        }
        with checked_files.naming(out / CONVERSION):
            (scratch / CONVERSION).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out


def _by_layer(shares: dict[tuple[int, str], float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for (i, side), share in shares.items():
        found.setdefault(str(i), {})[side] = share
    return found
