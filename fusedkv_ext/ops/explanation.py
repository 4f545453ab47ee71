"""What a call of an attention function would do, and what it costs at least: nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkv_ext import _C
from fusedkv_ext.ops import checks, dispatch, native
from fusedkv_ext.ops.checks import Tensors

__all__ = ["Explanation", "explain"]

_PATHS = {
    "fold": "reads the sources where they lie, weights folded into q and out",
    "fuse-once": "fuses keys and values, then dense attention",
}
# Where no GPU says otherwise: an H100, 132 SMs and 227 KiB of shared memory per block.
_SM_COUNT, _SHARED_PER_BLOCK = 132, 227 * 1024


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; ``print`` shows it as a table.

    path: "fold" or "fuse-once". kernel: what runs. rows: query rows per KV head, S * H / G. splits: into how
    many parts the keys of the longest sequence are cut (None: the dense kernel's own affair). blocks: of the
    CUDA grid, as many as shared memory lets run at the same time. bytes: of memory read and written at least.
    flops: of all products, those of masked scores left out. roof_us: bytes / bandwidth in microseconds, None
    without a bandwidth. reason: the rule and the numbers that it was given.
    """

    path: str
    kernel: str
    rows: int
    splits: int | None
    blocks: int | None
    bytes: int
    flops: int
    roof_us: float | None
    reason: str

    def __str__(self) -> str:
        lines = {
            "path": f"{self.path}: {_PATHS[self.path]}",
            "kernel": self.kernel,
            "rows": f"{self.rows} per KV head",
            "splits": self.splits,
            "blocks": self.blocks,
            "bytes": f"{self.bytes / 1e6:.3f} MB at least",
            "flops": f"{self.flops / 1e9:.3f} GFLOP",
            "roof": "give bandwidth=" if self.roof_us is None else f"{self.roof_us:.1f} us",
            "reason": self.reason,
        }
        return "\n".join(f"{name:<8}{text}" for name, text in lines.items() if text is not None)


class _Call(NamedTuple):
    """The sizes of a call. ``spans``: of each sequence, the tokens [begin, end) that some query row sees."""

    q: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    weighted: tuple[bool, bool]
    spans: list[tuple[int, int]]
    left: int
    right: int
    cached: bool
    page_size: int | None

    @property
    def rows(self) -> int:
        return self.q.shape[1] * (self.q.shape[2] // self.keys[0].shape[2])

    @property
    def sides(self) -> list[tuple[int, int, bool]]:
        """Number of sources, head dim and whether there are weights, of keys and of values."""
        pairs = zip((self.keys, self.values), self.weighted, strict=True)
        return [(len(side), side[0].shape[3], weighted) for side, weighted in pairs]

    @property
    def tokens(self) -> int:
        return sum(end - begin for begin, end in self.spans)


def explain(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    document_ids: Tensor | None = None,
    batch_invariant: bool = False,
    device: torch.device | str | None = None,
    bandwidth: float | None = None,
    sm_count: int | None = None,
) -> Explanation:
    """Says which way ``fused_kv_attn_func`` takes or, with ``cache_seqlens``, ``fused_kv_attn_with_kvcache``.

    Args:
        q, keys, values and all others down to batch_invariant: as in those two, but ``causal`` is True by
            default for both. Meta tensors will do, as no data is read but cache_seqlens; sequences whose
            lengths are on meta count as full, and documents as one. Memory is taken to start at multiples
            of 16 bytes.
        device: whose rule to ask, "cpu" or "cuda"; default: q's.
        bandwidth: of that device's memory in bytes per second, for ``roof_us``.
        sm_count: of the GPU; default: the current one's, or an H100's where there is none.

    Raises ValueError (shapes, devices, lengths) or TypeError (types, dtypes), naming the argument.
    """
    device_type = _device_type(q, device)
    call = _call(
        q, keys, values, (key_weights, value_weights), cache_seqlens, block_table, causal, window_size
    )
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth!r}; expected bytes per second > 0, or None")
    tensors = (call.q, *call.keys, *call.values, key_weights, value_weights)
    differentiates = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if document_ids is not None and call.cached:
        raise ValueError("document_ids is given with cache_seqlens; expected at most one of them")
    packed = checks.check_document_ids(document_ids, call.q, call.keys[0]) is not None
    folds, reason = _decide(call, device_type, differentiates, return_lse, packed, batch_invariant)
    kernel, splits, blocks = _dense_kernel(call), None, None
    if folds and device_type == "cuda":
        kernel, splits, blocks = _cuda_launch(call, sm_count)
        if batch_invariant:
            splits = _fixed_splits(call, native.build_info()["fixed_split_tokens"])
    elif folds:
        kernel = f"{native.build_info()['cpu_kernel']}, SIMD target {native.cpu_level()}"
        splits = _fixed_splits(call, native.build_info()["split_tokens"])
    moved = _bytes(call, folds)
    return Explanation(
        "fold" if folds else "fuse-once",
        kernel,
        call.rows,
        splits,
        blocks,
        moved,
        _flops(call, folds),
        None if bandwidth is None else moved / bandwidth * 1e6,
        reason,
    )


def _device_type(q: Tensor, device: torch.device | str | None) -> str:
    checks.check_tensor("q", q)
    device_type = (q.device if device is None else torch.device(device)).type
    if device_type not in ("cpu", "cuda"):
        where = "q is" if device is None else "device is"
        raise ValueError(f"{where} {device_type}; expected cpu or cuda (give device= for other tensors)")
    return device_type


def _call(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    weights: tuple[Tensor | None, Tensor | None],
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
) -> _Call:
    """The checked call."""
    keys, values = checks.as_tensors("keys", keys), checks.as_tensors("values", values)
    left, right = checks.check_window(causal, window_size)
    if block_table is not None and cache_seqlens is None:
        raise ValueError("block_table is given without cache_seqlens; expected both, or neither")
    paged = checks.check_tensor("block_table", block_table) if block_table is not None else None
    checks.check_attention(q, *([_per_sequence(q, x, paged) for x in side] for side in (keys, values)))
    for name, side, x in (("key_weights", keys, weights[0]), ("value_weights", values, weights[1])):
        if x is not None:
            checks.canonical_weights(name, x, len(side), *side[0].shape[2:], side[0])
    capacity, S = keys[0].shape[1], q.shape[1]
    if paged is not None:
        capacity *= paged.shape[1]
    lengths = [capacity] * len(q)
    if cache_seqlens is not None:
        lengths = _lengths(cache_seqlens, len(q), capacity)
    spans = [(max(n - S - left, 0) if left >= 0 else 0, n) for n in lengths]
    page_size = None if paged is None else keys[0].shape[1]
    weighted = weights[0] is not None, weights[1] is not None
    return _Call(q, keys, values, weighted, spans, left, right, cache_seqlens is not None, page_size)


def _per_sequence(q: Tensor, cache: Tensor, block_table: Tensor | None) -> Tensor:
    """Something with the shape that a check of (B, T, G, D) tensors expects: pages belong to no sequence."""
    if block_table is None:
        return cache
    return torch.empty((*q.shape[:1], *cache.shape[1:]), dtype=cache.dtype, device="meta")


def _lengths(cache_seqlens: Tensor, batch: int, capacity: int) -> list[int]:
    checks.check_tensor("cache_seqlens", cache_seqlens)
    if cache_seqlens.shape != (batch,):
        raise ValueError(f"cache_seqlens has shape {tuple(cache_seqlens.shape)}; expected (B,) = ({batch},)")
    if cache_seqlens.is_meta:
        return [capacity] * batch
    lengths = cache_seqlens.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(f"cache_seqlens[{b}] = {length}; expected 0 to {capacity}, what the cache holds")
    return lengths


def _decide(
    call: _Call,
    device_type: str,
    differentiates: bool,
    return_lse: bool,
    packed: bool,
    batch_invariant: bool,
) -> tuple[bool, str]:
    """Whether the call folds, and why."""
    q, keys, values = call.q, call.keys, call.values
    sources, head_dim = max(len(keys), len(values)), max(q.shape[3], values[0].shape[3])
    most = dispatch.decode_max_rows(device_type, q.dtype, sources, head_dim)
    dtype = str(q.dtype).removeprefix("torch.")
    what = f"{dtype} on {device_type} with m = {sources} and head dim {head_dim}"
    if not dispatch.native_head_dim(q.shape[3], values[0].shape[3]):
        dims = sorted({q.shape[3], values[0].shape[3]})
        return False, f"head dim {' and '.join(map(str, dims))}: kernels take multiples of 8 up to 256"
    few = f"{call.rows} query rows per KV head, of at most {most} for {what}"
    many = f"{call.rows} query rows per KV head, more than the {most} for {what}"
    if call.cached:
        if dispatch.folds_cached(q, keys, values, device_type):
            return True, few if call.rows <= most else f"{many}, but in a graph the lengths are not known"
        wanted = "returns lse" if return_lse else "is batch-invariant" if batch_invariant else None
        return wanted is not None, many if wanted is None else f"{many}, but only this kernel {wanted}"
    if differentiates:
        return False, "an input requires grad, and only fuse_kv and dense attention have a backward"
    if packed:
        return False, "document_ids, which only dense attention masks"
    if dispatch.folds_dense(q, keys, values, call.right, device_type):
        return True, few
    if call.rows > most:
        return False, many
    if q.dtype == torch.float64:
        return False, "no kernel folds float64"
    return False, f"{q.shape[1]} query rows, {keys[0].shape[1]} tokens: no mask for rows before the first"


def _dense_kernel(call: _Call) -> str:
    if not any(_is_fused(call, side) for side in call.sides):
        return "torch SDPA"
    gathered = call.page_size is not None or _is_gathered(call)
    return "torch SDPA after " + ("fuse_kvcache" if gathered else "fuse_kv")


def _is_gathered(call: _Call) -> bool:
    """Whether the call brings sequences of all lengths together, to attend at once."""
    return call.cached and not dispatch.native_head_dim(*(head_dim for _, head_dim, _ in call.sides))


def _is_fused(call: _Call, side: tuple[int, int, bool]) -> bool:
    """Whether the dense path writes a tensor for this side: the sum, or the tokens out of their pages."""
    sources, _, weighted = side
    return sources > 1 or weighted or call.page_size is not None or _is_gathered(call)


def _fixed_splits(call: _Call, size: int) -> int:
    """Splits stand on a fixed grid, so that a sliding window does not move them."""
    return max((-(-end // size) - begin // size for begin, end in call.spans), default=0)


def _cuda_launch(call: _Call, sm_count: int | None) -> tuple[str, int, int]:
    """The kernel, about how many parts the longest sequence has, and the blocks of the grid."""
    shared = _SHARED_PER_BLOCK
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        sm_count = sm_count or properties.multi_processor_count
        shared = properties.shared_memory_per_block_optin
    (num_keys, head_dim, _), (num_values, value_dim, _) = call.sides
    info = native.build_info()
    cell = info["cell_tokens"]
    costs = [max(-(-end // cell) - begin // cell, 1) + info["item_cost_cells"] for begin, end in call.spans]
    launch = _C.decode_launch(
        rows=call.rows,
        head_dim=head_dim,
        value_dim=value_dim,
        num_keys=num_keys,
        num_values=num_values,
        element_size=call.q.element_size(),
        cost=sum(costs) * call.keys[0].shape[2],
        sm_count=sm_count or _SM_COUNT,
        shared_per_block=shared,
    )
    kernel = f"{launch['kernel']}, {launch['rows']} rows"
    splits = max((-(-cost // launch["cells_per_block"]) for cost in costs), default=0)
    return kernel, splits, launch["blocks"]


def _bytes(call: _Call, folds: bool) -> int:
    """Every source and every result once: re-reads are the caches' affair."""
    (batch, steps, heads, dim), kv_heads = call.q.shape, call.keys[0].shape[2]
    elements = batch * steps * heads * (dim + call.values[0].shape[3])
    other = 0  # of 4 bytes each
    for side in call.sides:
        sources, side_dim, weighted = side
        # A fused tensor is written, and read by the attention.
        passes = sources + 2 if not folds and _is_fused(call, side) else sources
        elements += call.tokens * kv_heads * side_dim * passes
        other += sources * kv_heads * side_dim if weighted else 0
    if folds:
        other += batch * steps * heads  # lse
    if call.cached:
        other += batch
    if call.page_size is not None:
        other += sum(-(-end // call.page_size) - begin // call.page_size for begin, end in call.spans)
    return elements * call.q.element_size() + 4 * other


def _flops(call: _Call, folds: bool) -> int:
    """Two for each product of a query row with a key or of a probability with a value, and for the fusion."""
    scores = sum(_scores(call, end) for _, end in call.spans) * call.q.shape[2]
    total = 0
    for side in call.sides:
        sources, dim, _ = side
        total += 2 * scores * dim * (sources if folds else 1)
        if not folds and _is_fused(call, side):
            total += call.tokens * call.keys[0].shape[2] * dim * (2 * sources - 1)
    return total


def _scores(call: _Call, length: int) -> int:
    """How many keys the rows of one sequence and head see, all rows together."""
    steps = call.q.shape[1]
    positions = torch.arange(length - steps, length)
    if call.cached:
        positions = positions[positions >= 0]
    first = (positions - call.left).clamp(min=0) if call.left >= 0 else torch.zeros_like(positions)
    last = (positions + call.right).clamp(max=length - 1) if call.right >= 0 else length - 1
    return int((last - first + 1).clamp(min=0).sum())
