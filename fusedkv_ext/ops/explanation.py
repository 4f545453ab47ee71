"""Explanations of attention calls: path, kernel and minimal cost, without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext import _C
from fusedkv_ext.ops import checks, codes, dispatch, native
from fusedkv_ext.ops.call import AttentionCall
from fusedkv_ext.ops.checks import Tensors
from fusedkv_ext.ops.visibility import visible_range

__all__ = ["Explanation", "explain"]

_PATHS = {
    "fold": "reads the sources in place, weights folded into q and out",
    "fuse-once": "fuses keys and values, then attends with torch",
}
# Without a GPU: an H100, 132 SMs and 227 KiB of shared memory per block.
_SM_COUNT, _SHARED_PER_BLOCK = 132, 227 * 1024


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``print`` shows it as a table.

    Attributes:
        path: "fold" or "fuse-once".
        kernel: The kernel that runs.
        rows: Query rows per KV head, S * H / G.
        splits: Parts into which the keys of the longest sequence are split; None if SDPA decides.
        blocks: Blocks of the CUDA grid, as many as shared memory lets run at the same time.
        workspace: Elements that suffice for ``workspace=`` on CUDA, for any lengths of these shapes.
        bytes: Minimal number of bytes read and written.
        flops: FLOPs of all products without those of masked scores.
        roof_us: bytes / bandwidth in microseconds; None without a bandwidth.
        reason: The rule that decided, and the numbers it was given.
    """

    path: str
    kernel: str
    rows: int
    splits: int | None
    blocks: int | None
    workspace: int | None
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
            "memory": None if self.workspace is None else f"{self.workspace} floats of workspace",
            "bytes": f"{self.bytes / 1e6:.3f} MB at least",
            "flops": f"{self.flops / 1e9:.3f} GFLOP",
            "roof": "give bandwidth=" if self.roof_us is None else f"{self.roof_us:.1f} us",
            "reason": self.reason,
        }
        return "\n".join(f"{name:<8}{text}" for name, text in lines.items() if text is not None)


class _Side(NamedTuple):
    """Keys or values of a call: how many sources, their head dim, whether there are weights, the size."""

    sources: int
    head_dim: int
    weighted: bool
    element_bytes: float  # of a channel


Spans = Sequence[tuple[int, int]]  # of each sequence, the tokens [begin, end) that some query row sees


def explain(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    key_weights: Tensor | None = None,
    value_weights: Tensor | None = None,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool | None = None,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    document_ids: Tensor | None = None,
    batch_invariant: bool = False,
    softcap: float = 0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    device: torch.device | str | None = None,
    bandwidth: float | None = None,
    sm_count: int | None = None,
) -> Explanation:
    """The path of a call of ``fused_kv_attn_func``, or of ``fused_kv_attn_with_kvcache`` with cache_seqlens.

    Meta tensors are sufficient, because only cache_seqlens is read. Sequences whose lengths are on meta count
    as full, and documents as one. Memory is assumed to start at multiples of 16 bytes.

    Args:
        q, keys, values, key_weights, value_weights: As in the two functions.
        cache_seqlens, block_table, window_size, return_lse: As in the two functions.
        document_ids, batch_invariant: As in the function that has them.
        softcap, sinks, alibi_slopes: As in the two functions.
        causal: As in the two functions; None is the default of the function explained, False without
            ``cache_seqlens`` and True with it.
        device: "cpu" or "cuda", the device whose rule applies; default: q's.
        bandwidth: Memory bandwidth of that device in bytes per second, for ``roof_us``.
        sm_count: Multiprocessors of the GPU; default: those of the current one, or of an H100 without a GPU.

    Returns:
        The path and its cost.

    Raises:
        ValueError: A shape, device or length is wrong.
        TypeError: A type or dtype is wrong.
    """
    device_type = _device_type(q, device)
    causal = cache_seqlens is not None if causal is None else causal
    options = (cache_seqlens, block_table, causal, window_size)
    call = _checked(q, keys, values, key_weights, value_weights, *options)
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth must be bytes per second > 0, or None, got {bandwidth!r}")
    if document_ids is not None and call.cache_seqlens is not None:
        raise ValueError("document_ids must not be passed with cache_seqlens, got both")
    documents = checks.check_document_ids(document_ids, call.q, call.keys[0])
    sinks, alibi_slopes = checks.check_scores(call.q, len(call.q), sinks, alibi_slopes)
    softcap, ids = checks.check_softcap(softcap), None if documents is None else documents.ids
    call = call._replace(softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, document_ids=ids)
    call = call._replace(return_lse=return_lse, batch_invariant=batch_invariant)
    spans = _spans(call)
    folds, reason = _decide(call, device_type)
    kernel, splits, blocks, workspace = _dense_kernel(call), None, None, None
    if folds and device_type == "cuda":
        kernel, splits, blocks, workspace = _cuda_launch(call, spans, sm_count)
        if batch_invariant:
            splits = _fixed_splits(spans, native.build_info()["fixed_split_tokens"])
    elif folds:
        kernel = f"{native.build_info()['cpu_kernel']}, SIMD target {native.cpu_level()}"
        splits = _fixed_splits(spans, native.build_info()["split_tokens"])
    moved = _bytes(call, spans, folds)
    return Explanation(
        "fold" if folds else "fuse-once",
        kernel,
        call.query_rows,
        splits,
        blocks,
        workspace,
        moved,
        _flops(call, spans, folds),
        None if bandwidth is None else moved / bandwidth * 1e6,
        reason,
    )


def _device_type(q: Tensor, device: torch.device | str | None) -> str:
    checks.check_tensor("q", q)
    device_type = (q.device if device is None else torch.device(device)).type
    if device_type not in ("cpu", "cuda"):
        where = "q must be on" if device is None else "device must be"
        raise ValueError(f"{where} cpu or cuda, got {device_type}; pass device= for other tensors")
    return device_type


def _checked(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
) -> AttentionCall:
    """The call, checked in Python alone, since the native operation's checks take no meta tensors."""
    keys, values = checks.as_tensors("keys", keys), checks.as_tensors("values", values)
    left, right = checks.check_window(causal, window_size)
    if block_table is not None and cache_seqlens is None:
        raise ValueError("block_table must be passed with cache_seqlens, got it alone")
    if block_table is not None:
        checks.check_tensor("block_table", block_table)
    checks.check_attention(q, *([_per_sequence(q, x, block_table) for x in side] for side in (keys, values)))
    if cache_seqlens is None and any(codes.is_coded(x) for x in (*keys, *values)):
        raise ValueError("cache_seqlens must be given to explain a call over codes, got None")
    weights = checks.attention_weights(keys, values, key_weights, value_weights)
    if cache_seqlens is not None:
        checks.check_tensor("cache_seqlens", cache_seqlens)
        if cache_seqlens.shape != q.shape[:1]:
            raise ValueError(
                f"cache_seqlens must have shape (B,) = ({len(q)},), got {tuple(cache_seqlens.shape)}"
            )
    scale = checks.check_scale(None, q.shape[3])
    return AttentionCall(q, keys, values, *weights, cache_seqlens, block_table, scale, left, right)


def _per_sequence(q: Tensor, cache: Tensor, block_table: Tensor | None) -> Tensor:
    """A tensor that the checks of (B, T, G, D) expect, for pages and for codes."""
    coded = codes.is_coded(cache)
    if (block_table is None and not coded) or cache.dim() != 4:
        return cache
    rows, channels = cache.shape[0] if block_table is None else q.shape[0], codes.channels(cache)
    dtype = q.dtype if coded else cache.dtype
    return torch.empty((rows, *cache.shape[1:3], channels), dtype=dtype, device="meta")


def _spans(call: AttentionCall) -> Spans:
    """The spans of all sequences; without readable lengths they count as full."""
    lengths, capacity = [call.capacity] * len(call.q), call.capacity
    if call.cache_seqlens is not None and not call.cache_seqlens.is_meta:
        lengths = call.cache_seqlens.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"cache_seqlens[{b}] must be from 0 to {capacity}, the tokens of the cache, got {length}"
            )
    hidden = call.q.shape[1] + call.left
    return [(max(n - hidden, 0) if call.left >= 0 else 0, n) for n in lengths]


def _sides(call: AttentionCall) -> list[_Side]:
    sides = []
    for x, weights in call.sides:
        channels = codes.channels(x[0])
        size = x[0].element_size() * x[0].shape[3] / channels
        sides.append(_Side(len(x), channels, weights is not None, size))
    return sides


def _decide(call: AttentionCall, device_type: str) -> tuple[bool, str]:
    """Whether the call folds, and why."""
    q, keys, values, rows = call.q, call.keys, call.values, call.query_rows
    sources, head_dim = max(len(keys), len(values)), max(q.shape[3], call.value_dim)
    most = dispatch.decode_max_rows(device_type, q.dtype, sources, head_dim)
    dtype = str(q.dtype).removeprefix("torch.")
    what = f"{dtype} on {device_type} with m = {sources} and head dim {head_dim}"
    if not dispatch.native_head_dim(q.shape[3], call.value_dim):
        dims = sorted({q.shape[3], call.value_dim})
        if call.native_only:
            raise ValueError(f"q and values must have head dims of a kernel with codes, got {dims}")
        return False, f"head dim {' and '.join(map(str, dims))}: kernels take multiples of 8 up to 256"
    few = f"{rows} query rows per KV head, of at most {most} for {what}"
    many = f"{rows} query rows per KV head, more than the {most} for {what}"
    if call.native_only:
        return True, f"{rows} query rows per KV head over codes, which only this kernel reads"
    if call.cache_seqlens is not None:
        if dispatch.folds_cached(q, keys, values, device_type):
            return True, few if rows <= most else f"{many}, but in a graph the lengths are not known"
        wanted = "returns lse" if call.return_lse else "is batch-invariant" if call.batch_invariant else None
        return wanted is not None, many if wanted is None else f"{many}, but only this kernel {wanted}"
    weights = (call.key_weights, call.value_weights, call.sinks, call.alibi_slopes)
    tensors = (q, *keys, *values, *weights)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False, "an input requires grad, and only fuse_kv and SDPA have a backward"
    if call.document_ids is not None:
        return False, "document_ids, which only the dense path keeps apart"
    if dispatch.folds_dense(q, keys, values, call.right, device_type):
        return True, few
    if rows > most:
        return False, many
    if q.dtype == torch.float64:
        return False, "no kernel folds float64"
    return False, f"{q.shape[1]} query rows, {keys[0].shape[1]} tokens: no mask for rows before the first"


def _dense_kernel(call: AttentionCall) -> str:
    attention = "torch matmuls, scores in float32" if call.adjusted else "torch SDPA"
    if not any(_is_fused(call, side) for side in _sides(call)):
        return attention
    gathered = call.page_size is not None or _is_gathered(call)
    return f"{attention} after " + ("fuse_kvcache" if gathered else "fuse_kv")


def _is_gathered(call: AttentionCall) -> bool:
    """Whether the call gathers sequences of all lengths, to attend to all at once."""
    head_dims = (side.head_dim for side in _sides(call))
    return call.cache_seqlens is not None and not dispatch.native_head_dim(*head_dims)


def _is_fused(call: AttentionCall, side: _Side) -> bool:
    """Whether the dense path writes a tensor for this side: the sum, or the tokens out of their pages."""
    return side.sources > 1 or side.weighted or call.page_size is not None or _is_gathered(call)


def _fixed_splits(spans: Spans, size: int) -> int:
    """Splits lie on a fixed grid, so that a sliding window does not move them."""
    return max((-(-end // size) - begin // size for begin, end in spans), default=0)


def _cuda_launch(call: AttentionCall, spans: Spans, sm_count: int | None) -> tuple[str, int, int, int]:
    """The kernel, about how many splits the longest sequence has, the blocks, and the workspace in floats."""
    shared = _SHARED_PER_BLOCK
    if torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties()
        sm_count = sm_count or properties.multi_processor_count
        shared = properties.shared_memory_per_block_optin
    keys, values = _sides(call)
    info = native.build_info()
    cell = info["cell_tokens"]
    costs = [max(-(-end // cell) - begin // cell, 1) + info["item_cost_cells"] for begin, end in spans]
    launch = _C.decode_launch(
        batch=len(call.q),
        rows=call.query_rows,
        num_kv_heads=call.keys[0].shape[2],
        head_dim=keys.head_dim,
        value_dim=values.head_dim,
        num_keys=keys.sources,
        num_values=values.sources,
        element_size=call.q.element_size(),
        cost=sum(costs) * call.keys[0].shape[2],
        capacity=call.capacity,
        batch_invariant=call.batch_invariant,
        sm_count=sm_count or _SM_COUNT,
        shared_per_block=shared,
        coded=call.native_only,
    )
    kernel = f"{launch['kernel']}, {launch['rows']} rows"
    splits = max((-(-cost // launch["cells_per_block"]) for cost in costs), default=0)
    return kernel, splits, launch["blocks"], launch["workspace_floats"]


def _bytes(call: AttentionCall, spans: Spans, folds: bool) -> int:
    """Every source and every result once: re-reads hit the device's caches."""
    (batch, steps, heads, dim), kv_heads = call.q.shape, call.keys[0].shape[2]
    total = batch * steps * heads * (dim + call.value_dim) * call.q.element_size()
    tokens = sum(end - begin for begin, end in spans)
    other = 0  # of 4 bytes each
    for side in _sides(call):
        # A fused tensor is written, and read by the attention.
        passes = side.sources + 2 if not folds and _is_fused(call, side) else side.sources
        total += int(tokens * kv_heads * side.head_dim * passes * side.element_bytes)
        other += side.sources * kv_heads * side.head_dim if side.weighted else 0
    if folds:
        other += batch * steps * heads  # lse
    if call.cache_seqlens is not None:
        other += batch
    if call.page_size is not None:
        other += sum(-(-end // call.page_size) - begin // call.page_size for begin, end in spans)
    return total + 4 * other


def _flops(call: AttentionCall, spans: Spans, folds: bool) -> int:
    """Two for each product of a query row with a key or of a probability with a value, and for the fusion."""
    scores = sum(_scores(call, end) for _, end in spans) * call.q.shape[2]
    tokens = sum(end - begin for begin, end in spans)
    total = 0
    for side in _sides(call):
        total += 2 * scores * side.head_dim * (side.sources if folds else 1)
        if not folds and _is_fused(call, side):
            total += tokens * call.keys[0].shape[2] * side.head_dim * (2 * side.sources - 1)
    return total


def _scores(call: AttentionCall, length: int) -> int:
    """How many keys the rows of one sequence and head see, all rows together."""
    positions = torch.arange(length - call.q.shape[1], length)
    if call.cache_seqlens is not None:
        positions = positions[positions >= 0]
    first, end = visible_range(positions, length, call.left, call.right)
    return int((end - first).clamp(min=0).sum())
