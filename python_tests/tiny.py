"""Plans and tiny models that the tests of the modules share."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from fusedkv_ext.layers.decoder import Decoder, DecoderConfig
from fusedkv_ext.layers.fusion import FusionWeights
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment
from fusedkv_ext.training.config import TrainConfig

LAYERS = 4
NAMED = CachePlan.names()
FIRST, SECOND = (Fraction(0), Fraction(1, 2)), (Fraction(1, 2), Fraction(1))


def _own(i: int) -> LayerPlan:
    return LayerPlan(Segment((i,)), Segment((i,)))


def _patchwork() -> CachePlan:
    """Everything at once: sides cut differently, one half mixed before storing, sums without weights."""
    per_head, per_channel = Fusion("head", "normal"), Fusion("channel", "normal")
    mixing = LayerPlan(
        (Segment((0, 1), FIRST, per_channel), Segment((1,), SECOND)),
        Segment((0, 1), fusion=per_head),
    )
    reading = LayerPlan(
        Segment((0, 1), fusion=per_channel),
        (Segment((0, 1), FIRST), Segment((1,), SECOND, Fusion("shared_channel", "normal"))),
    )
    storing_half = LayerPlan((Segment((3,), FIRST), Segment((0,), SECOND)), Segment((1,)))
    return CachePlan("patchwork", (_own(0), mixing, reading, storing_half))


PLANS: dict[str, CachePlan] = {name: CachePlan.named(name, LAYERS) for name in NAMED}
PLANS["patchwork"] = _patchwork()
# Plans that cut heads into shares need more KV heads than one.
CUT = {
    name
    for name, plan in PLANS.items()
    if any(s.heads != (0, 1) for layer in plan.layers for s in layer.keys + layer.values)
}


def hybrid(plan: CachePlan | str) -> dict[str, object]:
    """Windows on every other layer, but for those whose cache another layer reads: these see everything."""
    plan = PLANS[plan] if isinstance(plan, str) else plan
    read = {j for i in range(plan.num_layers) for j in plan.source_layers(i)}
    sliding = [i % 2 == 1 and i not in read for i in range(plan.num_layers)]
    types = tuple("sliding_attention" if slides else "full_attention" for slides in sliding)
    return dict(sliding_window=4, layer_types=types)


def randomise_fusion(module: nn.Module) -> None:
    """Moves fusion weights off their initial values: a source with weight 0 or 1 could hide a mistake."""
    for part in module.modules():
        if isinstance(part, FusionWeights):
            for fused in part.fused_segments:
                low, high = (weight / fused.fusion.multiplier for weight in (0.2, 0.8))
                for name in fused.names:
                    torch.nn.init.uniform_(part.get_parameter(name), low, high)


def tiny_config(plan: CachePlan | str, **changes: object) -> DecoderConfig:
    sizes = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        plan=PLANS.get(plan, plan) if isinstance(plan, str) else plan,
        max_position_embeddings=64,
        initializer_range=0.25,
    )
    return DecoderConfig(**(sizes | changes))


def tiny_decoder(plan: CachePlan | str, **changes: object) -> Decoder:
    """A decoder whose logits are far from uniform and whose fusion weights are all at work."""
    model = Decoder(tiny_config(plan, **changes))
    randomise_fusion(model)
    return model


def tiny_run(folder: Path, **changes: object) -> TrainConfig:
    """Training of a tiny model for a few steps, on a text that is written into `folder`."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for i in range(8):
        (text / f"{i}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog {i}\n" * 40)
    values = {
        "model.num_hidden_layers": LAYERS,
        "model.hidden_size": 32,
        "model.num_attention_heads": 2,
        "model.num_key_value_heads": 2,
        "model.head_dim": 16,
        "data.text": [str(text)],
        "data.cache_dir": str(folder / "cache"),
        "data.seq_len": 32,
        "optim.warmup_steps": 2,
        "run.batch_size": 4,
        "run.steps": 6,
        "run.log_every": 1,
        "run.valid_batches": 2,
        "run.save_every": 2,
        "run.device": "cpu",
    }
    return TrainConfig().updated({**values, **changes}.items())


def killed_after(calls: int) -> Callable[[], bool]:
    """A `should_stop` that ends the process, as it were, when it is asked once more than that."""
    left = iter([False] * calls)

    def should_stop() -> bool:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return False

    return should_stop


def options(config: TrainConfig) -> list[str]:
    """The command line of `fusedkv probe` and `fusedkv grads` that asks for one seed of `config`, whatever
    their own defaults are; of its plan it says nothing.
    """
    values = {
        f"{section}.{name}": value
        for section, keys in config.to_dict().items()
        for name, value in keys.items()
        if f"{section}.{name}" not in ("model.plan", "model.plan_options", "data.text", "run.steps")
    }
    texts = {key: ",".join(value) if isinstance(value, list) else value for key, value in values.items()}
    flags = [part for key, text in texts.items() for part in ("--set", f"{key}={text}")]
    return ["--text", *config.data.text, "--steps", str(config.run.steps), "--seeds", "1", *flags]
