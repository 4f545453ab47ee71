"""Families of the pointwise operations: fuse (forward, backward, both) and append."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.bench.peers import eager_fuse
from fusedkv_ext.ops import reference
from gpu_suite.cells import Cell, Sizes
from gpu_suite.measure import Case, Contestant, Lab, Result, Row, assert_near
from gpu_suite.peers import compiled

CHECKED_TOKENS = 512


class FuseInputs:
    """``sets`` times m sources and a gradient (1, T, G, D)."""

    def __init__(self, lab: Lab, tokens: int, sources: int, sizes: Sizes) -> None:
        self.lab, self.m = lab, sources
        shape = (1, tokens, sizes.kv_heads, sizes.head_dim)
        self.shape_text = f"m={sources} T={tokens} G={shape[2]} D={shape[3]}"
        self.nbytes = tokens * shape[2] * shape[3] * lab.dtype.itemsize
        self.sets = lab.sets_for((sources + 1) * self.nbytes)
        self.sources = [[lab.random(*shape) for _ in range(sources)] for _ in range(self.sets)]
        self.grads = [lab.random(*shape) for _ in range(self.sets)]
        self.weights = lab.weights(sources, *shape[2:])
        self._exact: list[Tensor] | None = None

    def check_forward(self, result: Result) -> None:
        for part in (slice(0, CHECKED_TOKENS), slice(-CHECKED_TOKENS, None)):
            exact = reference.fuse_kv(
                [x.detach()[:, part] for x in self.sources[0]], self.weights.detach(), dtype=torch.float64
            )
            assert_near("fused tensor", result[:, part], exact)

    def check_backward(self, result: Result) -> None:
        """result: m source gradients, then the weights' (m, G, D)."""
        if self._exact is None:
            sources = [x.detach().double().requires_grad_() for x in self.sources[0]]
            weights = self.weights.detach().double().requires_grad_()
            with torch.enable_grad():
                out = reference.fuse_kv(sources, weights, dtype=torch.float64)
                grads = torch.autograd.grad(out, [*sources, weights], self.grads[0].double())
            # Of the large ones a part is enough.
            self._exact = [*(x[:, :CHECKED_TOKENS].clone() for x in grads[:-1]), grads[-1]]
        *got, got_weights = result
        for j, (x, exact) in enumerate(zip(got, self._exact, strict=False)):
            assert_near(f"gradient of source {j}", x[:, :CHECKED_TOKENS], exact)
        assert_near("gradient of the weights", got_weights, self._exact[-1])

    def require_grad(self, flag: bool) -> None:
        for x in (self.weights, *(x for sources in self.sources for x in sources)):
            x.requires_grad_(flag)

    def case(
        self, op: str, mine: Callable, rivals: dict[str, Callable | str], check: Callable, passes: int
    ) -> Case:
        """Each contestant is called with (sources, gradient). passes: tensors that must move."""
        unavailable = {name: call for name, call in rivals.items() if isinstance(call, str)}
        contestants = [
            Contestant(name, lambda i, call=call: call(self.sources[i], self.grads[i]), check)
            for name, call in {"fusedkv_ext": mine, **rivals}.items()
            if not isinstance(call, str)
        ]
        return Case(
            "fuse",
            op,
            self.shape_text,
            contestants[0],
            contestants[1:],
            passes * self.nbytes,
            0.0,
            "copy",
            self.sets,
            unavailable,
        )


def _formula(sources: Sequence[Tensor], weights: Tensor, grad: Tensor) -> list[Tensor]:
    """The backward as one writes it in torch."""
    grads = [w.to(grad.dtype) * grad for w in weights]
    return [*grads, torch.stack([(x * grad).sum((0, 1), dtype=torch.float32) for x in sources])]


def fuse_cells(sizes: Sizes) -> Iterator[Cell]:
    for tokens in sizes.fuse_tokens:
        for m in sizes.fuse_sources:
            first = m == 2 and tokens == sizes.fuse_tokens[-1]
            name = f"fuse_kv m={m} T={tokens}"
            size = 40 * m * tokens * sizes.kv_heads * sizes.head_dim + (1 << 30)
            yield Cell("fuse", name, 0 if first else 1 if m == 2 else 2, size, _fuse(tokens, m, sizes))


def _fuse(tokens: int, m: int, sizes: Sizes) -> Callable[[Lab], Iterator[Row]]:
    def measure(lab: Lab) -> Iterator[Row]:
        x = FuseInputs(lab, tokens, m, sizes)
        rivals: dict[str, Callable | str] = {"eager": lambda s, g: eager_fuse(s, x.weights)}
        fast = compiled(lab, eager_fuse)
        rivals["torch.compile"] = fast if isinstance(fast, str) else lambda s, g: fast(s, x.weights)
        forward = x.case(
            "fuse_kv", lambda s, g: fkv.fuse_kv(s, x.weights), rivals, x.check_forward, passes=m + 1
        )
        yield lab.row(forward)

        ops = torch.ops.fusedkv

        def backward(sources: list[Tensor], grad: Tensor) -> list[Tensor]:
            grads, weight_grad = ops.fuse_kv_backward(grad, sources, x.weights, True, True)
            return [*grads.unbind(0), weight_grad]

        rivals = {"eager": lambda s, g: _formula(s, x.weights, g)}
        quick = compiled(lab, _formula)
        rivals["torch.compile"] = quick if isinstance(quick, str) else lambda s, g: quick(s, x.weights, g)
        yield lab.row(x.case("fuse_kv backward", backward, rivals, x.check_backward, passes=2 * m + 1))
        yield from _accumulate(lab, x)
        yield from _both(lab, x)

    return measure


def _accumulate(lab: Lab, x: FuseInputs) -> Iterator[Row]:
    """Gradients added to buffers that already hold those of other layers."""
    buffers = [torch.zeros_like(source) for source in x.sources[0]]

    def add(sources: list[Tensor], grad: Tensor) -> list[Tensor]:
        weight_grad = torch.ops.fusedkv.fuse_kv_backward_accumulate(grad, sources, x.weights, buffers, True)
        return [weight_grad]

    def eager(sources: list[Tensor], grad: Tensor) -> list[Tensor]:
        *grads, weight_grad = _formula(sources, x.weights, grad)
        torch._foreach_add_(buffers, grads)
        return [weight_grad]

    # The buffers grow with every call: what is added is checked here, on empty ones.
    for call in (add, eager):
        for buffer in buffers:
            buffer.zero_()
        weight_grads = call(x.sources[0], x.grads[0])
        x.check_backward([*buffers, *weight_grads])

    def check(result: Result) -> None:
        x.check_backward([result[0]])

    case = x.case("fuse_kv backward, accumulating", add, {"eager": eager}, check, passes=3 * x.m + 1)
    yield lab.row(case)


def _both(lab: Lab, x: FuseInputs) -> Iterator[Row]:
    x.require_grad(True)

    def step(fuse: Callable[[list[Tensor], Tensor], Tensor]) -> Callable[..., list[Tensor]]:
        def call(sources: list[Tensor], grad: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                return list(torch.autograd.grad(fuse(sources, x.weights), [*sources, x.weights], grad))

        return call

    passes = (x.m + 1) + (2 * x.m + 1)
    case = x.case(
        "fuse_kv forward + backward", step(fkv.fuse_kv), {"eager": step(eager_fuse)}, x.check_backward, passes
    )
    yield lab.row(case)
    x.require_grad(False)


# ---- append --------------------------------------------------------------------------------------------


class AppendInputs:
    """New tokens of B sequences, their rotary tables, and paged caches with room for just these."""

    def __init__(self, lab: Lab, B: int, S: int, sizes: Sizes) -> None:
        G, D, page = sizes.kv_heads, sizes.head_dim, sizes.pages[0]
        H = 4 * G
        # The new tokens follow a short prefix that ends inside a page.
        self.length = S + page // 2 + 1
        self.page = page
        per_sequence = -(-self.length // page)
        self.shape_text = f"B={B} S={S} H={H} G={G} D={D} page={page}"
        element = lab.dtype.itemsize
        # Queries, keys and values are read and written once.
        self.nbytes = 2 * B * S * (H + 2 * G) * D * element
        self.sets = lab.sets_for(self.nbytes)
        self.queries = [lab.random(B, S, H, D) for _ in range(self.sets)]
        self.keys, self.values = ([lab.random(B, S, G, D) for _ in range(self.sets)] for _ in range(2))
        pool = (B * per_sequence, page, G, D)
        self.key_caches, self.value_caches = (
            [torch.zeros(pool, dtype=lab.dtype, device=lab.device) for _ in range(self.sets)]
            for _ in range(2)
        )
        self.table = torch.randperm(B * per_sequence, device=lab.device).to(torch.int32).view(B, per_sequence)
        self.seqlens = torch.full((B,), self.length, dtype=torch.int32, device=lab.device)
        angles = torch.outer(torch.arange(self.length), 10000.0 ** -(torch.arange(0, D, 2) / D))
        self.cos, self.sin = angles.cos().to(lab.device), angles.sin().to(lab.device)
        self.steps = S

    def ours(self, i: int) -> list[Tensor]:
        query = fkv.append_kvcache(
            self.keys[i],
            self.values[i],
            self.key_caches[i],
            self.value_caches[i],
            cache_seqlens=self.seqlens,
            block_table=self.table,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            query=self.queries[i],
        )
        return [query, self.key_caches[i], self.value_caches[i]]

    def separately(self, call: Callable[..., list[Tensor]]) -> Callable[[int], list[Tensor]]:
        """``call``, which is ``torch_append`` or a compiled form of it, on set i."""
        return lambda i: call(
            self.queries[i],
            self.keys[i],
            self.values[i],
            self.key_caches[i],
            self.value_caches[i],
            self.seqlens,
            self.table,
            self.cos,
            self.sin,
        )

    def check(self, result: Result) -> None:
        """The last tokens of the first and the last sequence."""
        query, key_cache, value_cache = result
        last = min(self.steps, 4)
        for b in sorted({0, len(self.table) - 1}):
            pages = self.table[b].long()
            stored_key, stored_value = (
                x[pages].flatten(0, 1)[None, self.length - last : self.length]
                for x in (key_cache, value_cache)
            )
            exact = {}
            for name, x in (("key", self.keys[0]), ("query", self.queries[0])):
                heads = x.shape[2]
                cache = x.new_zeros(1, self.length, heads, x.shape[3], dtype=torch.float64)
                new = x[b : b + 1, -last:].double()
                reference.append_kvcache(
                    new,
                    new,
                    cache,
                    torch.zeros_like(cache),
                    cache_seqlens=self.seqlens[b : b + 1],
                    rotary_cos=self.cos,
                    rotary_sin=self.sin,
                )
                exact[name] = cache[:, -last:]
            assert_near(f"stored keys of sequence {b}", stored_key, exact["key"])
            assert_near(f"rotated queries of sequence {b}", query[b : b + 1, -last:], exact["query"])
            assert torch.equal(stored_value, self.values[0][b : b + 1, -last:]), f"values of sequence {b}"


def torch_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens: Tensor,
    table: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> list[Tensor]:
    """Rotation and scatter as separate operations; positions and slots from the lengths on the device."""
    page = key_cache.shape[1]
    positions = seqlens.long()[:, None] + torch.arange(-key.shape[1], 0, device=seqlens.device)
    slots = table.gather(1, positions // page).long() * page + positions % page
    cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)

    for cache, new in ((key_cache, rotated(key)), (value_cache, value)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots.flatten(), new.flatten(0, 1))
    return [rotated(query), key_cache, value_cache]


def append_cells(sizes: Sizes) -> Iterator[Cell]:
    for i, (B, S) in enumerate(sizes.appends):

        def measure(lab: Lab, B: int = B, S: int = S) -> Iterator[Row]:
            x = AppendInputs(lab, B, S, sizes)
            rivals = [Contestant("separate torch ops", x.separately(torch_append), x.check)]
            unavailable = {}
            fast = compiled(lab, torch_append)
            if isinstance(fast, str):
                unavailable["torch.compile of them"] = fast
            else:
                rivals.append(Contestant("torch.compile of them", x.separately(fast), x.check))
            mine = Contestant("fusedkv_ext", x.ours, x.check)
            op = "append_kvcache with rotary, q too"
            yield lab.row(
                Case("append", op, x.shape_text, mine, rivals, x.nbytes, 0.0, "copy", x.sets, unavailable)
            )

        yield Cell("append", f"append_kvcache B={B} S={S}", min(i + 1, 2), 8 << 30, measure)
