"""RMSNorm of hidden states, queries, keys and latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedkv_ext.layers.shards import local

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in the dtype of the input (arXiv 1910.07467).

    Attributes:
        shared: Whether the weight is a DTensor, under tensor parallelism.
        of_heads: Whether, in addition, each rank normalizes its own heads only.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.shared = False
        self.of_heads = False

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight  # read once: a module looks up its parameters by name
        if self.shared:
            weight = local(weight, self.of_heads)
        if x.dtype is weight.dtype:
            return torch.rms_norm(x, weight.shape, weight, self.eps)
        # Under autocast: bf16 rows and an fp32 weight, whose precision is kept.
        return torch.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
