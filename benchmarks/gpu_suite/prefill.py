"""Family prefill: one layer's attention over a prompt, fused from two sources or projected by itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import reference
from gpu_suite.cells import Cell, Sizes
from gpu_suite.measure import Case, Contestant, Lab, Result, Row, assert_near

CHECKED_ROWS = 32


class Layer:
    """A prompt of T tokens: queries, two sources, and what a layer needs that makes its own keys and values.

    The projecting layer's result is another one, so each has its own exact rows: the last ones, first head.
    """

    def __init__(self, lab: Lab, T: int, G: int, sizes: Sizes) -> None:
        H, D, hidden = sizes.prefill_heads, sizes.head_dim, sizes.prefill_hidden
        self.T, self.H, self.G, self.D = T, H, G, D
        self.shape_text = f"T={T} H={H} G={G} D={D} hidden={hidden}"
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

    def fusing(self, i: int) -> Tensor:
        return fkv.fused_kv_attn_func(
            self.q, self.keys, self.values, self.key_weights, self.value_weights, causal=True
        )

    def projected(self, x: Tensor, projections: list[Tensor]) -> tuple[Tensor, Tensor]:
        k, v = (F.linear(x, w).unflatten(-1, (self.G, self.D)) for w in projections)
        return fkv.apply_rotary(k, *self.cos_sin), v

    def projecting(self, i: int) -> Tensor:
        return self.sdpa(*self.projected(self.x, self.projections))

    def check(self, result: Result, keys: list[Tensor], values: list[Tensor], *weights: Tensor) -> None:
        rows, heads = slice(-CHECKED_ROWS, None), slice(0, self.H // self.G)
        exact = reference.fused_kv_attn_func(
            self.q[:, rows, heads],
            [k[:, :, :1] for k in keys],
            [v[:, :, :1] for v in values],
            *(w[:, :1] for w in weights),
            causal=True,
            dtype=torch.float64,
        )
        assert bool(torch.isfinite(result).all()), "NaN or infinity"
        assert_near("last rows of the first heads", result[:, rows, heads], exact)

    def check_fused(self, result: Result) -> None:
        self.check(result, self.keys, self.values, self.key_weights, self.value_weights)

    def check_projected(self, result: Result) -> None:
        k, v = self.projected(self.x.float(), [w.float() for w in self.projections])
        self.check(result, [k], [v])


def prefill_cells(sizes: Sizes) -> Iterator[Cell]:
    for T in sizes.prefill_tokens:
        for G in (sizes.prefill_heads, sizes.prefill_heads // 4):

            def measure(lab: Lab, T: int = T, G: int = G) -> Iterator[Row]:
                layer = Layer(lab, T, G, sizes)
                mine = Contestant("fusedkv_ext", layer.fusing, layer.check_fused)
                projecting = Contestant(
                    "KV projection + RoPE + SDPA", layer.projecting, layer.check_projected
                )
                alone = Contestant(
                    "SDPA alone", lambda i: layer.sdpa(*layer.fused), layer.check_fused, bound=True
                )
                case = Case(
                    "prefill",
                    "fusion + SDPA",
                    layer.shape_text,
                    mine,
                    [projecting, alone],
                    0,
                    layer.flops,
                    "matmul",
                )
                yield lab.row(case)

            first = T == sizes.prefill_tokens[-1] and G == sizes.prefill_heads
            size = 1 << 30 if T < 1 << 15 else 8 << 30
            yield Cell("prefill", f"layer T={T} G={G}", 1 if first else 2, size, measure)
