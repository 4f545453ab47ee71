"""Fusion weights of a cache plan, and parameter groups for optimizers.

    K_i = sum_j a_ij (.) K_j        V_i = sum_j b_ij (.) V_j        (FusedKV, arXiv:2512.03870)

Keys are fused after RoPE, so a_ij must be equal on the two channels of each RoPE pair. A parameter has one
number per pair and is expanded to D channels. Fusion weights stay fp32 for every dtype of the model, because
their updates are smaller than the resolution of bf16 around 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedkv_ext.layers.shards import local
from fusedkv_ext.plan import CachePlan, Fusion, Segment


class FusedSegment(NamedTuple):
    """One segment with weights.

    Attributes:
        side: "key" or "value".
        segment: The segment of the plan, with its sources.
        fusion: Granularity, initial values and ties of the weights.
        start: First KV head.
        stop: One past the last KV head.
        dim: Channels per head.
        rotary_dim: Channels that RoPE rotates.
        names: Parameter names, one per source.
    """

    side: str
    segment: Segment
    fusion: Fusion
    start: int
    stop: int
    dim: int
    rotary_dim: int
    names: tuple[str, ...]

    @property
    def shared(self) -> bool:
        """Whether all heads have the same weights."""
        return self.fusion.granularity in ("shared_channel", "scalar")


class FusionTensors(NamedTuple):
    """Fusion weights of one layer for the operations: fp32 (m, g, D) or None per resolved segment."""

    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]


class FusionWeights(nn.Module):
    """Fusion weights of one layer of a plan.

    There is one fp32 nn.Parameter per side and source, named ``key_0``, ``key_1``, ``value_0``, ... in the
    order of the segment's sources. If a side has several fused segments, names are ``key_s1_0`` (second key
    segment, first source). Shapes, with g the segment's KV heads, and C = D - rotary_dim/2 if pairs are tied,
    else D:

        channel (g, C)    shared_channel (1, C)    head (g, 1)    scalar (1, 1)

    Args:
        plan: The cache plan.
        layer: The layer of the plan, from 0.
        num_kv_heads: G.
        head_dim: D.
        interleaved: The pairing convention of RoPE (rope.py).
        rotary_dim: Channels that RoPE rotates, by default D. The others have no pair and weights of their
            own.
        value_dim: Channels of a value, if not D (latent attention). Values then have no RoPE pairs.

    Raises:
        ValueError: A head interval is not a whole number of heads, or rotary_dim is invalid.
    """

    def __init__(
        self,
        plan: CachePlan,
        layer: int,
        num_kv_heads: int,
        head_dim: int,
        interleaved: bool = False,
        rotary_dim: int | None = None,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if not 0 <= rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and in 0..head_dim={head_dim}, got {rotary_dim}")
        self.plan, self.layer, self.interleaved = plan, layer, interleaved
        self._dims = {
            "key": (head_dim, rotary_dim),
            "value": (head_dim, rotary_dim) if value_dim is None else (value_dim, 0),
        }
        self._of_heads = False  # whether this rank has the weights of some heads only
        self._rows: slice | None = None  # this rank's rows of per-head parameters; None: all
        self._expanded: dict[tuple[str, int], tuple[list[tuple[int, int, int]], Tensor]] = {}
        self._resolve(num_kv_heads)
        for fused in self.fused_segments:
            for name in fused.names:
                weight = torch.empty(self._parameter_shape(fused), dtype=torch.float32)
                self.register_parameter(name, nn.Parameter(weight, fused.fusion.learnable))
        self.reset_parameters()

    def _resolve(self, num_kv_heads: int) -> None:
        self._segments = self.plan.segments(self.layer, num_kv_heads)
        row = self.plan.layers[self.layer]
        keys = self._fused("key", num_kv_heads, row.keys)
        values = self._fused("value", num_kv_heads, row.values)
        self.fused_segments: tuple[FusedSegment, ...] = (*keys.values(), *values.values())
        # One entry per resolved segment; None if it has no weights.
        self._keys = [keys.get(segment.key) for segment in self._segments]
        self._values = [values.get(segment.value) for segment in self._segments]

    def shard_heads(self, num_kv_heads: int, first: int | None = None) -> None:
        """Sets the KV heads to those of this rank under tensor parallelism.

        Parameters that all heads share stay replicated. Gradients of replicated parameters are summed over
        ranks.

        Args:
            num_kv_heads: KV heads of this rank.
            first: If given, per-head parameters are replicated, and the rows from ``first`` on are used. This
                is for plans whose segments have all heads. If None, they have only this rank's rows.
        """
        self._resolve(num_kv_heads)
        self._of_heads = True
        self._rows = None if first is None else slice(first, first + num_kv_heads)
        self.clear_cache()

    def _fused(
        self, side: str, num_kv_heads: int, segments: tuple[Segment, ...]
    ) -> dict[Segment, FusedSegment]:
        several = sum(segment.fusion is not None for segment in segments) > 1
        found = {}
        for s, segment in enumerate(segments):
            if segment.fusion is None:
                continue
            start, stop = (int(bound * num_kv_heads) for bound in segment.heads)
            prefix = f"{side}_s{s}" if several else side
            names = tuple(f"{prefix}_{j}" for j in range(len(segment.sources)))
            dims = self._dims[side]
            found[segment] = FusedSegment(side, segment, segment.fusion, start, stop, *dims, names)
        return found

    def _parameter_shape(self, fused: FusedSegment) -> tuple[int, int]:
        fusion = fused.fusion
        rows = 1 if fused.shared else fused.stop - fused.start
        if fusion.granularity not in ("channel", "shared_channel"):
            return rows, 1
        return rows, fused.dim - (fused.rotary_dim // 2 if fusion.tied else 0)

    def key_weights(self, segment_index: int = 0) -> Tensor | None:
        """Weights on the keys of ``plan.segments(layer, G)[segment_index]``.

        Without gradients the expanded tensor is cached until a parameter changes, so that decoding does not
        rebuild it for every token. PyTorch's version counters miss writes through ``parameter.data`` and
        optimizers with ``fused=True``. ``train()``, ``eval()`` and a call with gradients clear this cache;
        otherwise call ``clear_cache()``.

        Returns:
            Contiguous fp32 (m, g, D), read-only, or None for all ones. g is the number of heads of that
            resolved segment, m the number of its key sources, in the segment's order.
        """
        return self._weights("key", segment_index, self._keys[segment_index])

    def value_weights(self, segment_index: int = 0) -> Tensor | None:
        """Weights on the values of ``plan.segments(layer, G)[segment_index]``, like ``key_weights``."""
        return self._weights("value", segment_index, self._values[segment_index])

    def _weights(self, side: str, segment_index: int, fused: FusedSegment | None) -> Tensor | None:
        if fused is None:
            return None
        own: dict[str, Any] = self._parameters
        parameters = [own[name] for name in fused.names]
        state = None
        if torch.is_grad_enabled():
            self._expanded.clear()  # an optimizer step may follow; fused ones do not count versions
        else:
            state = _state(parameters)
        kept = self._expanded.get((side, segment_index))
        if state is not None and kept is not None and kept[0] == state:
            return kept[1]
        start, stop, *_ = self._segments[segment_index]
        expanded = torch.stack([self._expand(self._local(x, fused), fused) for x in parameters])
        if (start, stop) != (fused.start, fused.stop):  # the other side splits this segment
            expanded = expanded[:, start - fused.start : stop - fused.start].contiguous()
        if fused.fusion.multiplier != 1:
            expanded = expanded * fused.fusion.multiplier
        if not fused.fusion.learnable:  # even if requires_grad was set on all parameters
            expanded = expanded.detach()
        if state is not None:
            self._expanded[side, segment_index] = (state, expanded)
        return expanded

    def expansion(self, fused: FusedSegment) -> Tensor:
        """The matrix (D, C) that maps a row of a parameter to one head's weights, fp32."""
        rows = torch.eye(self._parameter_shape(fused)[1])
        return self._spread(rows, fused).expand(len(rows), fused.dim).mT

    def _local(self, parameter: nn.Parameter, fused: FusedSegment) -> Tensor:
        """This rank's rows of a parameter."""
        if fused.shared:
            return local(parameter, self._of_heads)
        if self._rows is None:
            return local(parameter)
        return local(parameter, summed=True)[self._rows]

    def _expand(self, parameter: Tensor, fused: FusedSegment) -> Tensor:
        """(g | 1, C | 1) -> (g, D)."""
        weight = self._spread(parameter, fused)
        # Under tensor parallelism a parameter has the rows of this rank's heads only.
        return weight.expand(fused.stop - fused.start if fused.shared else weight.shape[0], fused.dim)

    def _spread(self, weight: Tensor, fused: FusedSegment) -> Tensor:
        """(rows, C | 1) -> (rows, D | 1): both channels of a pair get its weight."""
        if not fused.fusion.tied or fused.fusion.granularity not in ("channel", "shared_channel"):
            return weight
        pairs, free = weight[:, : fused.rotary_dim // 2], weight[:, fused.rotary_dim // 2 :]
        if self.interleaved:
            return torch.cat((pairs.repeat_interleave(2, dim=-1), free), dim=-1)
        return torch.cat((pairs, pairs, free), dim=-1)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, names: Collection[str] | None = None
    ) -> None:
        """Sets the initial values of the plan.

        Args:
            generator: Generator for initial values from N(0, 1); None: torch's global generator.
            names: Parameters to set; None: all.
        """
        for fused in self.fused_segments:
            init, multiplier = fused.fusion.init, fused.fusion.multiplier
            for j, name in enumerate(fused.names):
                if names is not None and name not in names:
                    continue
                if isinstance(init, str):
                    self.get_parameter(name).normal_(0.0, 1 / multiplier, generator=generator)
                else:
                    self.get_parameter(name).fill_(init[j] / multiplier)

    def forward(self) -> FusionTensors:
        """``key_weights`` and ``value_weights`` of all resolved segments.

        It is the module's call, because FSDP2 and offloading fetch parameters in hooks of that call.
        """
        segments = range(len(self._segments))
        return FusionTensors(
            tuple(self.key_weights(s) for s in segments), tuple(self.value_weights(s) for s in segments)
        )

    def freeze_constants(self) -> None:
        """Turns off gradients of non-learnable weights, after a loader has replaced the parameters."""
        for fused in self.fused_segments:
            if not fused.fusion.learnable:
                for name in fused.names:
                    self.get_parameter(name).requires_grad_(False)

    def clear_cache(self) -> None:
        """Clears the cache of expanded weights, as ``train()`` and ``eval()`` do."""
        self._expanded.clear()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without expanded weights, which belong to these parameters."""
        return {**self.__dict__, "_expanded": {}}

    def train(self, mode: bool = True) -> FusionWeights:
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusionWeights:
        """Like ``Module._apply``, but keeps at least fp32, even for ``.bfloat16()`` and ``.to(dtype)``."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device, torch.float32)
            return moved

        self.clear_cache()
        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        shapes = (f"{name} {tuple(p.shape)}" for name, p in self.named_parameters())
        return f"layer {self.layer}: " + ", ".join(shapes)


def _state(parameters: Sequence[Tensor]) -> list[tuple[int, int, int]] | None:
    """A value that changes whenever a parameter does: identity, storage, version.

    None if this is unknown (inference tensors, tensor subclasses such as DTensor) or irrelevant (a compiled
    graph contains the expansion).
    """
    if torch.compiler.is_compiling():
        return None
    state = []
    for p in parameters:
        if type(p) is not nn.Parameter or p.is_inference():
            return None
        state.append((id(p), p.data_ptr(), p._version))
    return state


def param_groups(model: nn.Module, weight_decay: float, lr: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weight decay on matrices only.

    Excluded from decay are norms and biases (fewer than two dimensions), embeddings (also tied ones), and
    fusion weights. Fusion weights are matrices by shape, but decay would pull fused keys and values towards
    zero. Parameters without a gradient are omitted. The order is that of ``model.named_parameters()``, so an
    optimizer state fits the same model again.

    Args:
        model: The model.
        weight_decay: Weight decay of the group "decay".
        lr: Learning rate of the groups, if given.

    Returns:
        Non-empty groups with ``params``, ``weight_decay``, ``name`` ("decay", "no_decay") and, if given,
        ``lr``.
    """
    exempt = {id(p) for p in _exempt(model)}
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "weight_decay": weight_decay, "name": "decay"},
        "no_decay": {"params": [], "weight_decay": 0.0, "name": "no_decay"},
    }
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and id(parameter) not in exempt
            groups["decay" if decays else "no_decay"]["params"].append(parameter)
    extra = {} if lr is None else {"lr": lr}
    return [{**group, **extra} for group in groups.values() if group["params"]]


def _exempt(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (FusionWeights, nn.Embedding)):
            yield from module.parameters(recurse=False)
