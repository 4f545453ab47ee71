"""Rivals of cached attention: torch SDPA in every form that makes sense, our Triton kernel, FlashInfer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import fusedkv_ext as fkv
from suite.gpu import triton_fused
from suite.gpu.inputs import DecodeInputs
from suite.gpu.lab import Lab
from suite.measure import Contestant, Peer
from suite.pointwise import eager_fuse

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# The math backend works in float32 with the whole score matrix: beyond this it only costs time.
MATH_BYTES = 1 << 30
# Fusing first needs the fused tensors and temporaries as large as the caches.
EAGER_BYTES = 24 << 30
# A compilation that takes longer ends compiling for this run.
COMPILE_SECONDS = 90.0

_compile_stopped: list[str] = []


def decode_peers(x: DecodeInputs, *, compiled: bool) -> dict[str, Peer]:
    """Everybody who can do this decode step, and why the others cannot."""
    if x.shape.sources == 1:
        peers: dict[str, Peer] = {f"SDPA {name}": _sdpa(x, name) for name in backends(x)}
        peers["FlashInfer"] = _flashinfer(x)
    else:
        peers = {f"concat SDPA {name}": _concat(x, name) for name in backends(x)}
        too_large = x.shape.allocated_bytes() > EAGER_BYTES
        peers["eager fuse + SDPA"] = "memory" if too_large else _eager(x)
        if compiled and not too_large:
            peers["compiled fuse + SDPA"] = _compiled(x)
    return peers | {_triton_name(x): _triton(x)}


def backends(x: DecodeInputs) -> list[str]:
    if not x.lab.cuda:
        return ["flash", "math"]
    return [name for name in BACKENDS if name != "math" or x.shape.cache_bytes() <= MATH_BYTES]


# ---- torch ---------------------------------------------------------------------------------------------


def fusing_first(x: DecodeInputs) -> Contestant:
    """Our fuse_kv over the whole context, then SDPA: what folding saves, and what it has to beat."""
    s = x.shape

    def run(i: int) -> Tensor:
        fused = []
        for buffer, weights in ((x.key_buffers[i], x.key_weights), (x.value_buffers[i], x.value_weights)):
            tokens = [source[:, : max(s.lengths)] for source in x.split(buffer)]
            fused.append(tokens[0] if weights is None else fkv.fuse_kv(tokens, weights))
        return attend(x.q, *fused, s.lengths, _scale(x))

    return x.peer("fuse_kv + SDPA", "contiguous", run)


def attend(q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """q (B, S, H, D), caches (B, capacity, G, Dk) -> (B, S, H, Dv), as well as SDPA can say it.

    One query token: the query heads of a KV head become rows, which needs neither a mask nor expanded heads.
    Lengths that differ need one call per sequence; in a graph that costs no launch latency.
    """
    if len(set(lengths)) > 1:
        parts = [
            attend(q[b : b + 1], keys[b : b + 1, :n], values[b : b + 1, :n], [n], scale)
            for b, n in enumerate(lengths)
        ]
        return torch.cat(parts)
    (B, S, H, D), G, n = q.shape, keys.shape[2], lengths[0]
    k, v = keys[:, :n].transpose(1, 2), values[:, :n].transpose(1, 2)
    if S == 1:
        rows = q.view(B, G, H // G, D)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(B, 1, H, -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=causal_lower_right(S, n), scale=scale, enable_gqa=H != G
    )
    return out.transpose(1, 2)


def _scale(x: DecodeInputs) -> float:
    return 1 / math.sqrt(x.shape.head_dim)


def _sdpa(x: DecodeInputs, backend: str) -> Contestant:
    def run(i: int) -> Tensor:
        (k,), (v,) = x.split(x.key_buffers[i]), x.split(x.value_buffers[i])
        with sdpa_kernel(BACKENDS[backend]):
            return attend(x.q, k, v, x.shape.lengths, _scale(x))

    return x.peer(f"SDPA {backend}", "contiguous", run, "SDPA")


def _concat(x: DecodeInputs, backend: str) -> Contestant:
    """Sources side by side in the cache: plain attention with head dim m * D, weights folded by hand."""
    s = x.shape
    a, b = (w.to(x.lab.dtype) for w in (x.key_weights, x.value_weights))
    rows = s.heads // s.kv_heads
    # (m, G, D) -> (H, m, D)
    a, b = (w.transpose(0, 1).repeat_interleave(rows, 0).contiguous() for w in (a, b))

    def run(i: int) -> Tensor:
        q = (x.q[..., None, :] * a).flatten(-2)
        with sdpa_kernel(BACKENDS[backend]):
            out = attend(q, x.concat(x.key_buffers[i]), x.concat(x.value_buffers[i]), s.lengths, _scale(x))
        return (out.unflatten(-1, (s.sources, s.head_dim)) * b).sum(-2)

    return x.peer(f"concat SDPA {backend}", "concat", run, "concat")


def _fuse_and_attend(x: DecodeInputs) -> Callable[..., Tensor]:
    lengths, scale = x.shape.lengths, _scale(x)

    def fuse_and_attend(q: Tensor, keys: list[Tensor], values: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
        if len(set(lengths)) == 1:
            return attend(q, eager_fuse(keys, a), eager_fuse(values, b), lengths, scale)
        # Only the valid tokens are fused.
        parts = []
        for i, n in enumerate(lengths):
            k = eager_fuse([source[i : i + 1, :n] for source in keys], a)
            v = eager_fuse([source[i : i + 1, :n] for source in values], b)
            parts.append(attend(q[i : i + 1], k, v, [n], scale))
        return torch.cat(parts)

    return fuse_and_attend


def _fusing(x: DecodeInputs, name: str, call: Callable[..., Tensor]) -> Contestant:
    def run(i: int) -> Tensor:
        keys, values = x.split(x.key_buffers[i]), x.split(x.value_buffers[i])
        return call(x.q, keys, values, x.key_weights, x.value_weights)

    return x.peer(name, "contiguous", run)


def _eager(x: DecodeInputs) -> Contestant:
    return _fusing(x, "eager fuse + SDPA", _fuse_and_attend(x))


def _compiled(x: DecodeInputs) -> Contestant | str:
    call = compiled(x.lab, _fuse_and_attend(x))
    return call if isinstance(call, str) else _fusing(x, "compiled fuse + SDPA", call)


def compiled(lab: Lab, function: Callable[..., object]) -> Callable[..., object] | str:
    """torch.compile for exactly the shapes that come, or why not. The first call says how long it took."""
    if not lab.compile_peers:
        return "torch.compile is switched off"
    if _compile_stopped:
        return f"{_compile_stopped[0]}"
    torch._dynamo.reset()
    inner = torch.compile(function, dynamic=False)
    first = [True]

    def call(*args: object) -> object:
        began = time.monotonic()
        result = inner(*args)
        if first:
            first.clear()
            seconds = time.monotonic() - began
            if seconds > COMPILE_SECONDS:
                _compile_stopped.append(f"torch.compile took {seconds:.0f} s on an earlier case")
        return result

    return call


# ---- Triton and FlashInfer -----------------------------------------------------------------------------


def _triton_name(x: DecodeInputs) -> str:
    name = "Triton, fusing in the loop" if x.shape.sources > 1 else "Triton split-KV"
    return name if x.lab.compile_peers else f"{name}, not tuned"


def _triton(x: DecodeInputs) -> Contestant | str:
    s = x.shape
    reason = triton_fused.usable(x.lab.device)
    if reason is None and s.steps > 1:
        reason = "one query token only"
    if reason is not None:
        return reason
    key = (s.sources, s.page is None, s.cache_bytes() > 256 << 20)

    def call(i: int, config: triton_fused.Config) -> Tensor:
        return triton_fused.decode(
            x.q,
            x.paged(x.key_buffers[i]),
            x.paged(x.value_buffers[i]),
            x.key_weights,
            x.value_weights,
            x.seqlens,
            x.table,
            x.lab.sm_count,
            config,
        )

    def run(i: int) -> Tensor:
        # The search compiles every configuration, which takes as long as measuring many cells.
        tuned = x.lab.compile_peers
        return call(i, triton_fused.tuned(key, partial(call, 0)) if tuned else triton_fused.CONFIGS[0])

    return x.peer(_triton_name(x), "paged", run)


def _flashinfer(x: DecodeInputs) -> Contestant | str:
    """Its paged decode with a plan made beforehand: planning on the host is not in its time."""
    s = x.shape
    if not x.lab.cuda:
        return "FlashInfer needs a GPU"
    if s.page is None or s.steps > 1:
        return "paged decode of one token only"
    try:
        import flashinfer
    except Exception as error:
        return f"flashinfer does not import: {type(error).__name__}"
    counts = [-(-n // s.page) for n in s.lengths]
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).to(torch.int32)
    indices = torch.cat([row[:count] for row, count in zip(x.table, counts, strict=True)])
    last = torch.tensor([(n - 1) % s.page + 1 for n in s.lengths], dtype=torch.int32)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=x.lab.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=s.heads // s.kv_heads >= 4,
        paged_kv_indptr_buffer=indptr.to(x.lab.device),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.to(x.lab.device),
    )

    def plan() -> None:
        sizes = (s.heads, s.kv_heads, s.head_dim, s.page)
        wrapper.plan(indptr, indices, last, *sizes, q_data_type=x.q.dtype, kv_data_type=x.q.dtype)

    def run(i: int) -> Tensor:
        (k,), (v,) = x.paged(x.key_buffers[i]), x.paged(x.value_buffers[i])
        return wrapper.run(x.q[:, 0], (k, v))[:, None]

    return x.peer("FlashInfer", "paged", run, prepare=plan)
