"""Family prefill: one layer's attention over a prompt, fused from two sources or projected by itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import WrongResult, assert_close
from suite.gpu.lab import Lab
from suite.gpu.tasks import Sizes, Task
from suite.measure import Contestant, Entry, Peer, Row, require_same_function

CHECKED_ROWS = 32


class Layer:
    """A prompt of T tokens: queries, two sources, and what a layer needs that makes its own keys and values.

    The projecting layer's result is another one, so each has its own exact rows: the last ones, first head.
    """

    def __init__(self, lab: Lab, T: int, G: int, sizes: Sizes) -> None:
        H, D, hidden = sizes.prefill_heads, sizes.head_dim, sizes.prefill_hidden
        self.T, self.H, self.G, self.D = T, H, G, D
        self.params = {"T": T, "H": H, "G": G, "D": D, "hidden": hidden}
        self.q = lab.random(1, T, H, D)
        self.keys, self.values = ([lab.random(1, T, G, D) for _ in range(2)] for _ in range(2))
        self.key_weights, self.value_weights = (lab.weights(2, G, D) for _ in range(2))
        self.x = lab.random(1, T, hidden)
        self.projections = [lab.random(G * D, hidden, scale=hidden**-0.5) for _ in range(2)]
        rope = fkv.RotaryEmbedding(D).to(lab.device)
        self.cos_sin = rope.cos_sin(torch.arange(T, device=lab.device))
        self.fused = [fkv.fuse_kv(self.keys, self.key_weights), fkv.fuse_kv(self.values, self.value_weights)]
        # Causal: half of the products.
        self.flops = 2.0 * T * T * H * D

    def sdpa(self, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (self.q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.G)
        return out.transpose(1, 2)

    def fusing(self) -> Tensor:
        return fkv.fused_kv_attn_func(
            self.q, self.keys, self.values, self.key_weights, self.value_weights, causal=True
        )

    def projected(self, x: Tensor, projections: list[Tensor]) -> tuple[Tensor, Tensor]:
        k, v = (F.linear(x, w).unflatten(-1, (self.G, self.D)) for w in projections)
        return fkv.apply_rotary(k, *self.cos_sin), v

    def projecting(self) -> Tensor:
        return self.sdpa(*self.projected(self.x, self.projections))

    def rows(self, keys: list[Tensor], values: list[Tensor], *weights: Tensor) -> list[Tensor]:
        """The last rows of the first heads, in float64 and from the same math in the working dtype."""
        q = self.q[:, -CHECKED_ROWS:, : self.H // self.G]
        sides = [[x[:, :, :1] for x in side] for side in (keys, values)]
        weights = tuple(w[:, :1] for w in weights)
        return [
            reference.fused_kv_attn_func(q.to(dtype), *sides, *weights, causal=True, dtype=dtype)
            for dtype in (torch.float64, self.q.dtype)
        ]

    def check(self, result: Tensor) -> None:
        got = self.checked(result)
        assert_close(
            got, *self.rows(self.keys, self.values, self.key_weights, self.value_weights), "last rows"
        )

    def check_projected(self, result: Tensor) -> None:
        k, v = self.projected(self.x.float(), [w.float() for w in self.projections])
        require_same_function("last rows", self.checked(result), self.rows([k], [v])[0])

    def checked(self, result: Tensor) -> Tensor:
        if not bool(torch.isfinite(result).all()):
            raise WrongResult("NaN or infinity")
        return result[:, -CHECKED_ROWS:, : self.H // self.G]

    def entry(self) -> Entry:
        peers: dict[str, Peer] = {
            "KV projection + RoPE + SDPA": Contestant([self.projecting], self.check_projected),
            "SDPA alone": Contestant([lambda: self.sdpa(*self.fused)], bound=True),
        }
        op = "fusion + SDPA"
        return Entry(
            op, op, self.params, self.q.dtype, self.fusing, self.check, 0, "matmul", peers, flops=self.flops
        )


def prefill_tasks(sizes: Sizes) -> Iterator[Task]:
    for T in sizes.prefill_tokens:
        for G in (sizes.prefill_heads, sizes.prefill_heads // 4):

            def measure(lab: Lab, T: int = T, G: int = G) -> Iterator[Row]:
                yield lab.row("prefill", Layer(lab, T, G, sizes).entry())

            first = T == sizes.prefill_tokens[-1] and G == sizes.prefill_heads
            size = 1 << 30 if T < 1 << 15 else 8 << 30
            yield Task("prefill", f"layer T={T} G={G}", 1 if first else 2, size, measure)
