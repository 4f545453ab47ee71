"""Reading a causal language model in parts: its last hidden states, its head, and what its layers give; and
the loss that pulls the layers of a converted model to those of the original.

    layers = mean_i |s_i - t_i|^2 / |t_i|^2

s_i, t_i: what layer i gives in the student and the teacher, either the output of attention (after o_proj)
or the hidden states after the layer. Dividing by |t_i|^2 gives each layer the same say, however large its
numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from fusedkv_ext.conversion.layer_sharing import LayerSharing
from fusedkv_ext.ops.head_loss import Head

MATCHED = ("attention", "hidden")
# Of `_probe`: largest difference of logits that rounding explains, as a share of the largest logit.
_TOLERANCE = 1e-2


class Outputs(NamedTuple):
    """hidden: (B, S, C), after the last norm. layers: one (B, S, C) per layer, empty where not asked for."""

    hidden: Tensor
    layers: list[Tensor]


class LanguageModelParts:
    """A causal language model of transformers, called for its last hidden states.

    Args:
        model: the model. It is not copied; the matched modules get hooks. If FSDP2 shards it, it is the root.
        match: "attention", "hidden", or None, which keeps nothing of the layers.

    Raises:
        ValueError: the logits are not simply the head applied to the last hidden states (some models scale or
            cap them), or the layers are not where `match` expects them.
    """

    def __init__(self, model: Any, match: str | None = None) -> None:
        self.model, self.backbone = model, model.base_model
        self._kept: list[Tensor] | None = None  # None: between calls of this object
        self._hidden = self._run
        sharded = isinstance(model, FSDPModule)
        if sharded:  # only calls through the root gather its weights: embedding, last norm and head
            model.last_hidden_state = self._run
            register_fsdp_forward_method(model, "last_hidden_state")
            self._hidden = model.last_hidden_state
        for module in _matched(self.backbone, match):
            module.register_forward_hook(self._keep)
        self._probe()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._kept is not None:
            self._kept.append(output[0] if isinstance(output, tuple) else output)

    @property
    def head(self) -> Head:
        output = self.model.get_output_embeddings()
        return Head(output.weight, output.bias)

    def __call__(self, ids: Tensor, sources: list[int] | None = None) -> Outputs:
        """ids: (B, S) int64, full rows. sources: the layer whose keys and values each layer attends to, for a
        model within ``layers_share``; None: its own.
        """
        self._kept = []
        hidden = self._hidden(ids, sources)
        kept, self._kept = self._kept, None
        return Outputs(hidden, kept)

    def _run(self, ids: Tensor, sources: list[int] | None = None) -> Tensor:
        sharing = {} if sources is None else {"kv_sharing": LayerSharing(sources)}
        return self.backbone(input_ids=ids, use_cache=False, **sharing).last_hidden_state

    @torch.no_grad()
    def _probe(self) -> None:
        device = next(self.model.parameters()).device
        ids = torch.arange(8, device=device)[None] % self.head.weight.shape[0]
        expected = self.model(input_ids=ids, use_cache=False).logits
        found = torch.nn.functional.linear(self(ids).hidden, self.head.weight, self.head.bias)
        if (found - expected).abs().max() > _TOLERANCE * expected.abs().max():
            raise ValueError(
                f"{type(self.model).__name__} does more to its logits than apply its output embedding to the "
                "last hidden states (scaling or capping); losses without whole logits do not know how"
            )


def _matched(backbone: nn.Module, match: str | None) -> Sequence[nn.Module]:
    if match is None:
        return []
    if match not in MATCHED:
        raise ValueError(f"match must be one of {', '.join(MATCHED)}, got {match!r}")
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(backbone).__name__} has no list `layers`, whose outputs could be matched")
    if match == "hidden":
        return list(layers)
    try:
        return [cast(Any, layer).self_attn.o_proj for layer in layers]
    except AttributeError as error:
        raise ValueError(
            f"the layers of {type(backbone).__name__} have no self_attn.o_proj; match hidden states instead"
        ) from error


def layer_loss(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over layers of |s - t|^2 / |t|^2: a scalar, fp32 (fp64 for fp64 input), differentiable in `ours`.

    ours, theirs: one tensor of any equal shape per layer. Raises ValueError for other counts or shapes.
    """
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (ours, theirs)]
    if not ours or shapes[0] != shapes[1]:
        raise ValueError(
            f"layers to match: {len(ours)} of shape {shapes[0][:1]} here, {len(theirs)} of shape "
            f"{shapes[1][:1]} in the teacher; both need the same layers of the same width"
        )
    terms = []
    for s, t in zip(ours, theirs, strict=True):
        exact = torch.promote_types(s.dtype, torch.float32)
        t = t.detach().to(exact)
        terms.append((s.to(exact) - t).square().sum() / t.square().sum().clamp_min(1e-12))
    return torch.stack(terms).mean()
