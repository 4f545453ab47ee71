"""Plans and tiny models that the tests of the modules share."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import nn

from fusedkv_ext.decoder import Decoder, DecoderConfig
from fusedkv_ext.fusion import FusionWeights
from fusedkv_ext.plan import CachePlan, Fusion, LayerPlan, Segment

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
            for fused in part._fused:
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
