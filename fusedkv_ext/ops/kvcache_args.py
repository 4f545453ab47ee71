"""Arguments of ``fused_kv_attn_with_kvcache`` in flash-attn's forms, as the kernels take them.

* Lengths as an int, int64 or absent become an int32 tensor.
* Rows of a contiguous cache (``cache_batch_idx``) are pages: a block table with one page per sequence.
* Left padding (``cache_leftpad``) is skipped by a block table with one page per token.
* New tokens (``k``, ``v``) are appended first, and their queries rotated.

Nothing here waits for a device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext.ops import cached, checks
from fusedkv_ext.ops.call import AttentionCall, CacheState, append_call
from fusedkv_ext.ops.codes import CodeOptions
from fusedkv_ext.ops.fuse import tokens_as_pages
from fusedkv_ext.ops.rope import apply_rotary
from fusedkv_ext.ops.sizes import host_reads

__all__ = ["FlashOptions", "attend_with_options", "cache_state"]

INT32_MAX = 2**31 - 1


class FlashOptions(CodeOptions, total=False):
    """Further arguments of ``fused_kv_attn_with_kvcache``: those of flash-attn's ``flash_attn_with_kvcache``.

    The arguments that belong to codes are those of ``CodeOptions``.

    Args:
        k, v: (B, S_new, G, D) and (B, S_new, G, Dv), new tokens that are first written into the caches,
            behind ``cache_seqlens`` tokens, as by ``append_kvcache``. Needs one key and one value source.
            ``schedule`` is for the lengths with these tokens.
        rotary_cos, rotary_sin, rotary_interleaved: As in ``append_kvcache``, with k and v only. Row i of q is
            rotated too, at position cache_seqlens + i, or at cache_seqlens without causality and window.
        cache_batch_idx: (B,) int32 or int64, the row of contiguous caches that each sequence has. If rows
            occur twice, k and v of one of their sequences are kept.
        cache_leftpad: (B,) int32 or int64, how many slots before a sequence hold none of its tokens.
            ``cache_seqlens`` counts them. Tokens must have one stride in the caches, and ``schedule`` must be
            None. The call makes a block table with one page per token, B x capacity.
        left_padding: Whether rows before a sequence's first token are padding, as by default. If False, they
            see all keys without causality, as in flash-attn: cross-attention with more queries than keys.
            With a window it must be True.
        out: A tensor that is filled and returned instead of a new one. The kernel writes it if it is
            contiguous and begins at a multiple of 16 bytes; a graph of torch.compile takes no other begin.
        workspace: (N,) float32, for the partial results of the CUDA kernels instead of new memory; N =
            ``explain(...).workspace`` suffices. Calls that share it must run one after another. The CPU and
            the paths of many rows do not use it.
    """

    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    left_padding: bool
    out: Tensor | None
    workspace: Tensor | None


def cache_state(
    cache_seqlens: Any,
    block_table: Any,
    host_seqlens: Sequence[int] | None,
    q: Any,
    key_caches: Any,
    cu_seqlens_q: Any,
    flash: FlashOptions,
) -> CacheState:
    """Lengths and pages in int32. What is no tensor, int or None is left to the checks of the call.

    Raises:
        ValueError: Lengths are absent where they must not be, an int is out of range, or two arguments
            exclude each other.
        TypeError: An option is unknown, or ``cache_batch_idx`` has a wrong type or dtype.
    """
    if not flash and _is_int32(cache_seqlens) and (block_table is None or _is_int32(block_table)):
        return CacheState(cache_seqlens, block_table, host_seqlens)  # nearly every call
    cache = key_caches[0] if isinstance(key_caches, (list, tuple)) and key_caches else key_caches
    known = isinstance(q, Tensor) and isinstance(cache, Tensor) and not q.is_nested
    known = known and q.dim() > 0 and cache.dim() == 4
    for name in flash:
        if name not in FlashOptions.__annotations__:
            raise TypeError(f"fused_kv_attn_with_kvcache() got an unexpected keyword argument {name!r}")
    cache_batch_idx = flash.get("cache_batch_idx")
    for name, other in (("a block_table", block_table), ("k and v", flash.get("k"))):
        if cache_seqlens is None and other is not None:
            raise ValueError(f"cache_seqlens must be given with {name}, got None")
    batch: Any = None
    if known:
        batch = len(cu_seqlens_q) - 1 if isinstance(cu_seqlens_q, Tensor) else q.shape[0]
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx must be None with a block_table, got both; select its rows")
        block_table = _rows_as_pages(cache_batch_idx, cache, batch)
    if known and cache_seqlens is None:
        cache_seqlens = cache.shape[1]
    if known and isinstance(cache_seqlens, (int, torch.SymInt)) and not isinstance(cache_seqlens, bool):
        paged = isinstance(block_table, Tensor) and block_table.dim() == 2
        most = min(cache.shape[1] * (block_table.shape[1] if paged else 1), INT32_MAX)
        if not 0 <= cache_seqlens <= most:
            raise ValueError(
                f"cache_seqlens must be from 0 to {most}, the tokens of the cache, got {cache_seqlens}"
            )
        host = [int(cache_seqlens)] * batch if isinstance(cache_seqlens, int) else None
        if host_seqlens is not None and host is not None and list(host_seqlens) != host:
            raise ValueError(f"host_seqlens must be {host} as cache_seqlens, got {list(host_seqlens)}")
        cache_seqlens = torch.full((batch,), int(cache_seqlens), dtype=torch.int32, device=q.device)
        host_seqlens = host
    return CacheState(_as_int32(cache_seqlens), _as_int32(block_table), host_seqlens)


def attend_with_options(
    call: AttentionCall, cache_seqlens: object, flash: FlashOptions
) -> tuple[Tensor, Tensor | None]:
    """Attention after new tokens are written into the caches, without left padding: out, and lse if wanted.

    Args:
        call: Of ``cache_state``.
        cache_seqlens: As the caller gave it.
        flash: The options.

    Raises:
        ValueError: A shape, device, stride, length or page is wrong, or arguments exclude each other.
        TypeError: A type or dtype is wrong.
    """
    out, packed = flash.get("out"), call.cu_seqlens_q is not None
    shape = (*call.q.shape[:3], call.value_dim)
    checks.check_out(out, shape[1:] if packed else shape, call.q)
    interleaved = checks.check_flag("rotary_interleaved", flash.get("rotary_interleaved", False))
    rotary = (flash.get("rotary_cos"), flash.get("rotary_sin"), interleaved)
    new = _new_tokens(call, flash.get("k"), flash.get("v"), *rotary)
    if new is not None:
        _check_room(call, cache_seqlens, new.k.shape[1])
        call = _with_new_lengths(call, new)
    leftpad = flash.get("cache_leftpad")
    attended = call if leftpad is None else _skip_left_padding(call, leftpad)
    if new is not None:
        attended = attended._replace(q=_append(call, new))
    place = out.unsqueeze(0) if out is not None and packed else out
    workspace = flash.get("workspace")
    if workspace is not None:
        checks.check_tensor("workspace", workspace)
        checks.check_same_device({"q": call.q, "workspace": workspace})
        place = call.q.new_empty(shape) if place is None else place
    if place is not None and place.is_contiguous() and _begins_at_16_bytes(place):
        attended = attended._replace(out=place, workspace=workspace)
    result, lse = cached.attend(attended)
    if out is None or place is None or result is place:
        return result, lse
    return place.copy_(result), lse


def _begins_at_16_bytes(x: Tensor) -> bool:
    """What the kernels need. A graph of torch.compile cannot ask: the operation refuses others there."""
    return torch.compiler.is_compiling() or x.storage_offset() * x.element_size() % 16 == 0


def _is_int32(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.int32


def _as_int32(x: Any) -> Any:
    """An int64 tensor as int32: numbers that int32 has not stay out of range of every cache."""
    if isinstance(x, Tensor) and x.dtype == torch.int64:
        return x.clamp(-1, INT32_MAX).int()
    return x


def _check_per_sequence(name: str, x: object, batch: int | None = None) -> Tensor:
    """An int32 or int64 tensor (B,)."""
    x = checks.check_tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() != 1 or (batch is not None and x.shape[0] != batch):
        expected = "(B,)" if batch is None else f"(B,) = ({batch},)"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    return x


def _rows_as_pages(cache_batch_idx: object, cache: object, batch: int | None) -> Tensor:
    """The block table (B, 1) of a contiguous cache whose rows are the pages."""
    index = _check_per_sequence("cache_batch_idx", cache_batch_idx, batch)
    if isinstance(cache, Tensor) and cache.dim() == 4 and index.is_cpu and host_reads(index):
        for b, row in enumerate(index.tolist()):
            if not 0 <= row < cache.shape[0]:
                last = cache.shape[0] - 1
                raise ValueError(f"cache_batch_idx[{b}] must be a row of the caches, 0 to {last}, got {row}")
    return _as_int32(index)[:, None]


def _check_room(call: AttentionCall, cache_seqlens: object, new_tokens: int) -> None:
    """Lengths that the host knows leave room for the new tokens: an int, and tensors on the CPU."""
    most, lengths = call.capacity - new_tokens, call.seqlens
    if isinstance(cache_seqlens, int):
        known = {"cache_seqlens": cache_seqlens}
    elif lengths.is_cpu and host_reads(lengths):
        known = {f"cache_seqlens[{b}]": length for b, length in enumerate(lengths.flatten().tolist())}
    else:
        return
    for name, length in known.items():
        if not 0 <= length <= most:
            raise ValueError(
                f"{name} must be from 0 to {most}, room for the {new_tokens} tokens of k, got {length}"
            )


class _NewTokens(NamedTuple):
    """``k`` and ``v`` (B, S_new, G, D) behind ``before`` (B,) tokens, and the tables that rotate them."""

    k: Tensor
    v: Tensor
    before: Tensor
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool


def _new_tokens(call: AttentionCall, k: object, v: object, *rotary: Any) -> _NewTokens | None:
    """The tokens that a call appends, checked as far as ``append_kvcache`` does not.

    Args:
        call: Its lengths are those before the tokens.
        k, v, rotary: As in ``fused_kv_attn_with_kvcache``.

    Raises:
        ValueError: The call has several sources or packed queries, or k or v is absent.
        TypeError: k or v is no tensor.
    """
    if k is None and v is None:
        if any(table is not None for table in rotary[:2]):
            raise ValueError(
                "rotary_cos and rotary_sin must be None without k and v; rotate q before the call"
            )
        return None
    k, v = checks.check_tensor("k", k), checks.check_tensor("v", v)
    for name, sources in (("key_caches", call.keys), ("value_caches", call.values)):
        if len(sources) != 1:
            raise ValueError(
                f"{name} must hold one tensor with k and v, got {len(sources)}; call append_kvcache for the "
                "source that has the new tokens"
            )
    if call.cu_seqlens_q is not None:
        raise ValueError("cu_seqlens_q must be None with k and v, got a tensor; call append_kvcache first")
    if k.dim() != 4:
        raise ValueError(f"k must have 4 dims (B, S_new, G, D), got {tuple(k.shape)}")
    return _NewTokens(k, v, call.seqlens, *rotary)


def _with_new_lengths(call: AttentionCall, new: _NewTokens) -> AttentionCall:
    """The call with lengths that include the new tokens."""
    steps, before, host = new.k.shape[1], new.before, call.host_seqlens
    return call._replace(
        cache_seqlens=torch.where(before < 0, before, before + steps),  # a wrong length stays wrong
        host_seqlens=None if host is None else [length + steps for length in host],
    )


def _append(call: AttentionCall, new: _NewTokens) -> Tensor:
    """Writes the new tokens into the caches of ``_with_new_lengths``; the call's queries, rotated.

    Raises:
        ValueError: A shape, length or page is wrong.
        TypeError: A dtype is wrong.
    """
    rotates, steps = _check_tables(call.q, new), call.q.shape[1]
    # flash-attn's convention: without causality and window all queries have the position of the first.
    in_order = call.left >= 0 or call.right >= 0
    together = rotates and steps == new.k.shape[1] and (in_order or steps == 1)
    where = (call.keys[0], call.values[0], call.seqlens, call.block_table)
    try:
        write = append_call(new.k, new.v, *where, *new[3:], call.q if together else None)
        q = call.q
        if not together and write.rotary_cos is not None and write.rotary_sin is not None:
            tables = (write.rotary_cos, write.rotary_sin, write.rotary_interleaved)
            q = _rotated(q, new.before, *tables, in_order)
        rotated = cached.append(write)
        return rotated if together else q
    except (TypeError, ValueError) as error:  # append_kvcache has other names
        message = str(error)
        for pattern, name in _NAMES:
            message = pattern.sub(name, message)
        raise type(error)(message) from None


_NAMES = [
    (re.compile(rf"\b{theirs}\b"), ours)
    for theirs, ours in (
        ("key", "k"),
        ("value", "v"),
        ("key_cache", "key_caches[0]"),
        ("value_cache", "value_caches[0]"),
        ("query", "q"),
    )
]


def _check_tables(q: Tensor, new: _NewTokens) -> bool:
    """Whether tables of angles rotate k and q.

    Raises:
        TypeError: A table is no tensor.
        ValueError: Their shapes are wrong.
    """
    if new.rotary_cos is None or new.rotary_sin is None:
        return False  # one alone is refused by the append
    cos, sin = (
        checks.check_tensor(f"rotary_{name}", x) for name, x in zip(("cos", "sin"), new[3:5], strict=True)
    )
    if cos.dim() != 2 or sin.shape != cos.shape or cos.shape[1] > q.shape[3] // 2:
        raise ValueError(
            f"rotary_cos and rotary_sin must both be (max_len, rotary_dim / 2), with rotary_dim at most D = "
            f"{q.shape[3]}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return True


def _rotated(
    q: Tensor, before: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, in_order: bool
) -> Tensor:
    """Queries rotated at positions before, before + 1, ... or, if not ``in_order``, all at ``before``."""
    steps = torch.arange(q.shape[1], device=q.device)
    positions = before[:, None] + (steps if in_order else torch.zeros_like(steps))
    wrong = (positions < 0) | (positions >= cos.shape[0])
    if positions.is_cpu and host_reads(positions) and bool(wrong.any()):
        last = int(positions.max())
        raise ValueError(f"rotary_cos must have a row for position {last}, got {cos.shape[0]} rows")
    rows = positions.masked_fill(wrong, 0)
    cos, sin = (x[rows].masked_fill(wrong[:, :, None], float("nan")) for x in (cos, sin))
    return apply_rotary(q, cos, sin, interleaved)


def _skip_left_padding(call: AttentionCall, cache_leftpad: object) -> AttentionCall:
    """The call over caches whose sequences begin at ``cache_leftpad``: with one page per token.

    Raises:
        ValueError: A shape, device, stride or number is wrong, or the call has a schedule.
        TypeError: A type or dtype is wrong.
    """
    lengths, table, capacity = call.seqlens, call.block_table, call.capacity
    leftpad = _check_per_sequence("cache_leftpad", cache_leftpad, lengths.shape[0])
    checks.check_same_device({"q": call.q, "cache_leftpad": leftpad})
    if call.schedule is not None:
        raise ValueError("schedule must be None with cache_leftpad, got a tensor")
    for name, scales in (("key", call.key_token_scales), ("value", call.value_token_scales)):
        if scales is not None:
            got = f"got {len(scales)} tensors"
            raise ValueError(f"{name}_token_scales must be None with cache_leftpad, {got}")
    if leftpad.is_cpu and host_reads(leftpad):
        call.check()  # of the lengths and pages that the caller knows
        for b, (padding, length) in enumerate(zip(leftpad.tolist(), lengths.tolist(), strict=True)):
            if not 0 <= padding <= length:
                raise ValueError(
                    f"cache_leftpad[{b}] must be from 0 to cache_seqlens[{b}] = {length}, got {padding}"
                )
    leftpad = leftpad.long()
    inside = (leftpad >= 0) & (leftpad <= lengths) & (lengths <= capacity)
    slots = torch.arange(capacity, device=leftpad.device) + leftpad[:, None]
    rows, size = call.keys[0].shape[:2]
    if table is None:
        pages = torch.arange(rows, device=leftpad.device)[:, None]
        index, offset = pages, slots
    else:
        column = (slots // size).clamp(0, max(table.shape[1] - 1, 0))
        index, offset = table.long().gather(1, column), slots % size
    known = inside[:, None] & (slots < capacity) & (index >= 0) & (index < rows)
    tokens = torch.where(known, index * size + offset, -1).clamp(max=INT32_MAX).int()
    host = call.host_seqlens
    if host is not None:
        host = _host_lengths(leftpad, host)
    return call._replace(
        keys=[_tokens_as_pages("key_caches", j, x) for j, x in enumerate(call.keys)],
        values=[_tokens_as_pages("value_caches", j, x) for j, x in enumerate(call.values)],
        cache_seqlens=torch.where(inside, lengths - leftpad, -1).int(),
        block_table=tokens,
        host_seqlens=host,
    )


def _host_lengths(leftpad: Tensor, host: Sequence[int]) -> Sequence[int] | None:
    """The lengths without padding, if the host can have them without waiting."""
    if not (leftpad.is_cpu and host_reads(leftpad)) or len(host) != len(leftpad):
        return None
    return [length - padding for length, padding in zip(host, leftpad.tolist(), strict=True)]


def _tokens_as_pages(name: str, j: int, cache: Tensor) -> Tensor:
    """(N, size, G, D) as a view (N * size, 1, G, D)."""
    pages = tokens_as_pages(cache)
    if pages is None:
        expected = cache.shape[1] * cache.stride(1)
        raise ValueError(
            f"{name}[{j}] must have stride {expected} in dim 0 with cache_leftpad, got {cache.stride(0)}; "
            "pass a whole token-major cache, not a slice of its tokens"
        )
    return pages
