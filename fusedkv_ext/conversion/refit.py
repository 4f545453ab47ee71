"""Refits output projections in closed form, layer by layer, so that a converted model follows its original.

Both models read the same text. Take a changed layer of the converted model and its output projection of
attention (or of the feed-forward network). Let x be the inputs of the projection and h' the residual stream
before its result is added. Let h be the stream of the original after the same addition. The projection
becomes

    argmin_W  sum over rows |h' + W x - h|^2  +  ridge |W - W_0|^2,        W_0 the original's

So a layer also corrects the errors of earlier layers. W includes any linear map on the values of a head, with
a different map per query head if needed, at no cost at run time. The pass keeps the hidden states of both
models at one layer, and the keys and values that later layers read, for the (N, S) tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from fusedkv_ext.hf.attention import SharedKV
from fusedkv_ext.hf.versions import CACHE

__all__ = ["REFITTED", "refit"]

# Projections that may be refitted, and the ridge of each, times the mean of the diagonal of sum x x^T. The
# feed-forward network's has more inputs, so it overfits the calibration text more easily.
REFITTED = {"o_proj": 0.03, "down_proj": 0.3}

FULL, SLIDING = "full_attention", "sliding_attention"  # values of layer_types


class _Stream:
    """The residual stream of one model over a text, one layer at a time. Parts are batches of the text."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, batch_size: int) -> None:
        self.decoder = model.get_decoder()
        parts = ids.split(batch_size)
        self.hidden = [self.decoder.embed_tokens(part.to(model.device)) for part in parts]
        self.attended: list[Tensor] = []  # after the attention of the layer at hand
        self.shared = [SharedKV() for _ in parts]
        positions = torch.arange(ids.shape[1], device=model.device)[None]
        self.rotary = self.decoder.rotary_emb(self.hidden[0], positions)
        self.masks = [_masks(model.config, hidden, positions) for hidden in self.hidden]
        self.types = getattr(model.config, "layer_types", None) or [FULL] * len(self.decoder.layers)
        self.read_later = _read_later(model.config)

    def attention(self, i: int, part: int) -> Tensor:
        """The attention output of layer i, (B, S, hidden)."""
        layer = self.decoder.layers[i]
        x = layer.input_layernorm(self.hidden[part])
        seen = {"position_embeddings": self.rotary, "attention_mask": self.masks[part][self.types[i]]}
        return layer.self_attn(hidden_states=x, **seen, shared_kv_states=self.shared[part])[0]

    def feed_forward(self, i: int, part: int) -> Tensor:
        """The feed-forward output of layer i, (B, S, hidden)."""
        layer = self.decoder.layers[i]
        return layer.mlp(layer.post_attention_layernorm(self.attended[part]))

    def attend(self, i: int) -> None:
        """Runs the attention of layer i and drops the keys and values that no later layer reads."""
        self.attended = [hidden + self.attention(i, part) for part, hidden in enumerate(self.hidden)]
        for shared in self.shared:
            for name in [name for name in shared if int(name.split()[0]) not in self.read_later[i]]:
                del shared[name]

    def advance(self, i: int) -> None:
        """Runs the rest of layer i."""
        self.hidden = [x + self.feed_forward(i, part) for part, x in enumerate(self.attended)]


def _masks(config: Any, hidden: Tensor, positions: Tensor) -> dict[str, Tensor | None]:
    """The mask of each type of layer, in the format of the model's attention implementation."""
    seen = {"inputs_embeds": hidden, "attention_mask": None, CACHE: None}
    seen["position_ids"] = positions.expand(len(hidden), -1)
    masks = {FULL: create_causal_mask(config, **seen)}
    if SLIDING in (getattr(config, "layer_types", None) or ()):
        masks[SLIDING] = create_sliding_window_causal_mask(config, **seen)
    return masks


def _read_later(config: Any) -> list[set[int]]:
    """Layers whose keys and values are read after layer i."""
    if not getattr(config, "cache_plan", None):
        return [set()] * config.num_hidden_layers
    plan = config.plan
    return [
        {j for later in range(i + 1, plan.num_layers) for j in plan.source_layers(later)}
        for i in range(plan.num_layers)
    ]


def _equal(layer: nn.Module, other: nn.Module) -> bool:
    a, b = layer.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _LeastSquares:
    """Sums of x x^T and (y - W_0 x) x^T over rows, and the W that minimizes the error."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        size, out = linear.in_features, linear.out_features
        self.inputs = torch.zeros(size, size, dtype=torch.float64)
        self.errors = torch.zeros(out, size, dtype=torch.float64)
        self.energy = 0.0

    def add(self, run: Callable[[], Tensor], target: Tensor) -> None:
        """Adds the rows of one pass.

        Args:
            run: a pass through the projection, whose result (..., out) should be ``target``.
            target: (..., out).
        """
        seen: list[Tensor] = []
        hook = self.linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            output = run()
        finally:
            hook.remove()
        x, error = seen[0].flatten(0, -2).float(), (target - output).flatten(0, -2).float()
        self.inputs += (x.mT @ x).double().cpu()
        self.errors += (error.mT @ x).double().cpu()
        self.energy += float(error.double().square().sum())

    def solve(self, ridge: float) -> float:
        """Changes the weight and returns the fraction of the squared error that remains."""
        strength = ridge * self.inputs.diagonal().mean()
        eye = torch.eye(len(self.inputs), dtype=torch.float64)
        change = torch.linalg.solve(self.inputs + strength * eye, self.errors.mT).mT
        if not torch.isfinite(change).all():
            raise ValueError(
                "refitted weights must be finite, got NaN or infinity; calibrate on more or other text"
            )
        weight = self.linear.weight
        weight.add_(change.to(weight))
        mended = float((2 * self.errors * change).sum() - ((change @ self.inputs) * change).sum())
        return 1 - mended / self.energy if self.energy else 0.0


@torch.no_grad()
def refit(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    ids: Tensor,
    layers: Iterable[int],
    *,
    projections: Sequence[str] = tuple(REFITTED),
    batch_size: int = 4,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[int, dict[str, float]]:
    """Refits output projections of layers of the converted model.

    Args:
        original: the plain model, in which every layer has its own keys and values.
        converted: a model of the same family.
        ids: (N, S) int64, sequences of equal length.
        layers: the layers to refit.
        projections: ``o_proj`` of attention, ``down_proj`` of the feed-forward network, or both.
        batch_size: sequences per forward pass.
        progress: receives a line per layer.

    Returns:
        Per layer and projection, the fraction of the squared error in the residual stream that remains on
        this text.

    Raises:
        ValueError: a projection is neither of the two, or no finite weights exist.
    """
    if unknown := set(projections) - set(REFITTED):
        raise ValueError(f"projections must be among {', '.join(REFITTED)}, got {', '.join(sorted(unknown))}")
    wanted = set(layers)
    left: dict[int, dict[str, float]] = {}
    if not wanted:
        return left
    one_so_far = True  # the two models are equal so far, and so are their streams
    before, after = _Stream(original, ids, batch_size), _Stream(converted, ids, batch_size)

    for i, layer in enumerate(after.decoder.layers):
        shares = {}
        one_so_far = one_so_far and i not in wanted and _equal(layer, before.decoder.layers[i])
        if one_so_far:
            after.attend(i)
            after.advance(i)
            before.hidden = list(after.hidden)
            continue
        before.attend(i)
        if i in wanted and "o_proj" in projections:
            sums = _LeastSquares(layer.self_attn.o_proj)
            for part, (goal, base) in enumerate(zip(before.attended, after.hidden, strict=True)):
                sums.add(partial(after.attention, i, part), goal - base)
            shares["o_proj"] = sums.solve(REFITTED["o_proj"])
        after.attend(i)
        before.advance(i)
        if i in wanted and "down_proj" in projections:
            sums = _LeastSquares(layer.mlp.down_proj)
            for part, (goal, base) in enumerate(zip(before.hidden, after.attended, strict=True)):
                sums.add(partial(after.feed_forward, i, part), goal - base)
            shares["down_proj"] = sums.solve(REFITTED["down_proj"])
        after.advance(i)
        if shares:
            left[i] = shares
            shown = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            progress(f"layer {i}: left of the squared error: {shown}")
    return left
