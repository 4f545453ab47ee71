"""Rotary position embedding (RoPE): frequencies and their scaling rules, tables, and the rotation.

Two conventions pair the r = rotary_dim channels. *Half-split* (Llama, Qwen, HF) rotates channels d and
d + r/2 together, *interleaved* (GPT-J, and the notation of the papers) channels 2d and 2d + 1. Scaling rules
and the names of their parameters are those of HF's ``rope_scaling``: linear (arXiv:2306.15595), llama3
(Llama 3.1, arXiv:2407.21783), yarn (arXiv:2309.00071).

Angles are computed in fp64, and cos and sin are stored in fp32: fp32 angles are off by up to 2e-3 at position
32768.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# For each rule the parameters it must have and those it may have besides.
_RULES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
}
# HF's newer `rope_parameters` repeat these two beside the rule's own parameters.
_REPEATED = frozenset({"rope_theta", "partial_rotary_factor"})


class RotaryEmbedding(nn.Module):
    """Cos and sin of one RoPE, computed on demand.

    The module has no parameters and no buffers, so dtype conversions of a model, meta-device construction and
    checkpoints do not affect it.

    Args:
        head_dim: D.
        theta: The base of the frequencies.
        scaling: A dict like HF's ``rope_scaling`` (``rope_type`` or the older ``type``), or None.
        interleaved: The pairing convention, stored here for callers that rotate.
        rotary_dim: Number of leading channels that are rotated (partial rotary), even; default D.

    Raises:
        ValueError: The rule is unknown, or a parameter is missing, unknown or out of range.
        TypeError: ``scaling`` is no mapping.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__()
        rule, parameters = _parse(scaling)
        fraction = parameters.pop("partial_rotary_factor", None)
        if rotary_dim is None:
            rotary_dim = head_dim if fraction is None else int(head_dim * fraction)
        if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and in 2..head_dim={head_dim}, got {rotary_dim}")
        if not (math.isfinite(theta) and theta > 1):
            raise ValueError(f"theta must be a finite number above 1, got {theta!r}")
        if (found := parameters.pop("rope_theta", theta)) != theta:
            raise ValueError(f"theta={theta!r} contradicts scaling's rope_theta={found!r}")
        self.head_dim, self.rotary_dim, self.theta = head_dim, rotary_dim, float(theta)
        self.rule, self.interleaved = rule, interleaved
        inv_freq, self.attention_factor = _frequencies(rule, parameters, rotary_dim, self.theta)
        # On the softmax scale of latent attention, as in HF's DeepseekV3: its channels without positions get
        # nothing of attention_factor.
        self.score_factor = 1.0
        if rule == "yarn":
            self.score_factor = _grown(parameters["factor"], parameters.get("mscale_all_dim", 0)) ** 2
        # Plain attributes, not buffers: Module.to(bf16) would round those, a meta-device build lose them.
        self._inv_freq: dict[torch.device, Tensor] = {torch.device("cpu"): inv_freq}
        self._tables: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of positions. Both carry yarn's attention factor.

        Args:
            positions: Integers (...); negative ones (left padding) are allowed.

        Returns:
            Two fp32 tensors (..., rotary_dim/2) on the device of ``positions``.
        """
        angles = positions.to(_angle_dtype(positions.device))[..., None] * self._inv_freq_on(positions.device)
        return (
            (angles.cos() * self.attention_factor).float(),
            (angles.sin() * self.attention_factor).float(),
        )

    forward = cos_sin

    def tables(self, max_len: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin of positions 0 to max_len - 1: fp32 (max_len, rotary_dim/2), contiguous.

        Calls share the tables of a device, which grow by doubling. Earlier results stay valid.
        """
        if max_len < 0:
            raise ValueError(f"max_len must not be negative, got {max_len}")
        device = torch.empty(0, device=device).device  # "cuda" means the current one: give it its index
        found = self._tables.setdefault(device, [])  # all of them stay: a CUDA graph may read an outgrown one
        if not found or found[-1][0].shape[0] < max_len:
            rows = 1 << max(max_len - 1, 0).bit_length()
            with torch.inference_mode(False), torch.no_grad():  # so that autograd may save the tables later
                cos, sin = self.cos_sin(torch.arange(rows, device="cpu"))
                found.append((cos.to(device), sin.to(device)))
        cos, sin = found[-1]
        return cos[:max_len], sin[:max_len]

    def _inv_freq_on(self, device: torch.device) -> Tensor:
        found = self._inv_freq.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = self._inv_freq[torch.device("cpu")].to(device, _angle_dtype(device))
            self._inv_freq[device] = found
        return found

    def extra_repr(self) -> str:
        style = "interleaved" if self.interleaved else "half-split"
        return f"{self.rotary_dim} of {self.head_dim} channels, theta={self.theta:g}, {self.rule}, {style}"


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first r channels of ``x``, copies the others (RoFormer, arXiv:2104.09864). Differentiable.

    Args:
        x: (B, S, H, D).
        cos, sin: (S, r/2), or (B, S, r/2) if sequences differ.
        interleaved: Whether pairs are (2d, 2d + 1) instead of (d, d + r/2).

    Returns:
        A tensor of the shape and dtype of ``x``, computed in fp32, or in fp64 for fp64 input.

    Raises:
        ValueError: The shapes do not fit.
    """
    half = cos.shape[-1]
    if cos.shape != sin.shape or cos.dim() not in (2, 3) or cos.shape[-2] != x.shape[1]:
        raise ValueError(
            f"cos and sin must both be (S, r/2) or (B, S, r/2) for x (B, S, H, D) = {tuple(x.shape)}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * half > x.shape[-1]:
        raise ValueError(f"cos and sin rotate {2 * half} channels, more than the {x.shape[-1]} of x")
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(dtype).unsqueeze(-2) for table in (cos, sin))  # (..., S, 1, r/2): one for all heads
    rotated, passed = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = rotated[..., :half], rotated[..., half:]
        out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    out = out.to(x.dtype)
    return torch.cat((out, passed), dim=-1) if passed.shape[-1] else out


def _angle_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64


def _parse(scaling: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Rule and parameters of a HF ``rope_scaling`` dict."""
    if scaling is None:
        return "default", {}
    if not isinstance(scaling, Mapping):
        raise TypeError(
            f"scaling must be a dict like HF's rope_scaling or None, got {type(scaling).__name__}"
        )
    rule = scaling.get("rope_type", scaling.get("type", "default"))
    if rule not in _RULES:
        raise ValueError(f"scaling has rope_type {rule!r}; known: {', '.join(_RULES)}")
    parameters = {
        key: value for key, value in scaling.items() if key not in ("rope_type", "type") and value is not None
    }
    required, optional = _RULES[rule]
    missing = sorted(required - set(parameters))
    unknown = sorted(set(parameters) - required - optional - _REPEATED)
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        known = ", ".join(sorted(required | optional)) or "no parameters"
        raise ValueError(f"scaling of rope_type {rule!r} {what}; it takes {known}")
    for key, value in parameters.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if key != "truncate" and not (number and (value > 0 or value == 0 and key.startswith("mscale"))):
            raise ValueError(f"scaling[{key!r}] must be a positive number, got {value!r}")
    return rule, parameters


def _frequencies(rule: str, parameters: dict[str, Any], dim: int, theta: float) -> tuple[Tensor, float]:
    """Inverse frequencies, fp64 (dim/2,) on the CPU, and the factor on cos and sin."""
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if rule == "linear":
        return inv_freq / parameters["factor"], 1.0
    if rule == "llama3":
        return _llama3(inv_freq, **parameters), 1.0
    if rule == "yarn":
        return _yarn(inv_freq, dim, theta, parameters), _yarn_attention_factor(parameters)
    return inv_freq, 1.0


def _llama3(
    inv_freq: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Tensor:
    """Scales frequencies by how often they turn within the original context.

    Those that turn more than high_freq_factor times are kept, those that turn less than low_freq_factor times
    are divided by ``factor``, and those between are interpolated.
    """
    if low_freq_factor >= high_freq_factor:
        raise ValueError(
            "scaling['low_freq_factor'] must be below scaling['high_freq_factor'], got "
            f"{low_freq_factor} and {high_freq_factor}"
        )
    turns = original_max_position_embeddings * inv_freq / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / factor)


def _yarn(inv_freq: Tensor, dim: int, theta: float, parameters: dict[str, Any]) -> Tensor:
    """As llama3, but the ramp is linear in the channel index (arXiv:2309.00071, section 3.2).

    It lies between the channels that turn beta_fast (32) and beta_slow (1) times within the original context.
    """
    context = parameters["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(parameters.get("beta_fast", 32)), channel(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if high == low else high  # as HF: a step instead of a division by zero
    index = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    interpolate = ((index - low) / (high - low)).clamp(0, 1)
    return inv_freq * (1 - interpolate + interpolate / parameters["factor"])


def _yarn_attention_factor(parameters: dict[str, Any]) -> float:
    """The factor on cos and sin, so that its square acts on the scores.

    It is the given one, else 0.1 ln(factor) + 1. With both mscales it is DeepSeek's quotient of two such
    terms; a zero counts as absent, as in HF.
    """
    factor = parameters["factor"]
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return _grown(factor, parameters["mscale"]) / _grown(factor, parameters["mscale_all_dim"])
    return _grown(factor, 1.0)


def _grown(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, or 1 if the context does not grow (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
