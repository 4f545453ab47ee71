"""Argument checks that belong to Python: types, devices, dtypes, broadcastable weights.

The native operations check sizes, strides and the contents of lengths and block tables, because they read
them first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedkv_ext.ops import codes, native
from fusedkv_ext.ops.packing import Documents, read_documents

Tensors = Tensor | Sequence[Tensor]
Arguments = Mapping[str, Tensor | Sequence[Tensor] | None]  # by their names

ATTENTION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SOURCES: int = native.build_info()["max_sources"]
MAX_WINDOW = 2**31  # lengths are int32
_STRIDED = torch.strided
_FLOAT32 = torch.finfo(torch.float32)


def check_tensor(name: str, x: object, index: int | None = None) -> Tensor:
    """A dense torch.Tensor, or a TypeError that names the argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{_label(name, index)} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind, remedy = f"layout {x.layout}", ".to_dense()"
        if x.is_nested:
            kind, remedy = "a nested tensor", ".to_padded_tensor()"
        raise TypeError(f"{_label(name, index)} must be a dense tensor, got {kind}; call {remedy}")
    return x


def check_flag(name: str, flag: object) -> bool:
    """A bool. A tensor as a flag would synchronize, or fail deep inside torch."""
    if flag is True or flag is False:
        return flag
    if not isinstance(flag, (bool, int, torch.SymBool)):
        raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    return bool(flag)


def as_list(name: str, tensors: object) -> list[Any]:
    """A tensor, or a sequence of 1 to 32 objects of any type, as a list."""
    if not isinstance(tensors, (list, tuple)):  # first: the cheaper question, and the usual answer
        if isinstance(tensors, Tensor):
            return [tensors]
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(tensors).__name__}")
    if not 1 <= len(tensors) <= MAX_SOURCES:
        raise ValueError(f"{name} must hold 1 to {MAX_SOURCES} tensors, got {len(tensors)}")
    return tensors if isinstance(tensors, list) else list(tensors)


def as_tensors(name: str, tensors: object) -> list[Tensor]:
    """A tensor, or a sequence of 1 to 32 dense tensors, as a list."""
    if isinstance(tensors, Tensor):
        return [check_tensor(name, tensors)]
    return [check_tensor(name, x, j) for j, x in enumerate(as_list(name, tensors))]


def plain_on_cpu(tensors: Sequence[object]) -> bool:
    """Whether all are dense CPU tensors without a gradient.

    It asks what ``check_inputs`` checks, in one pass and without messages, for calls that take microseconds.
    """
    grad = torch.is_grad_enabled()
    if in_forward_mode():
        return False
    for x in tensors:
        if not isinstance(x, Tensor) or not x.is_cpu or x.layout is not _STRIDED or x.is_nested:
            return False
        if grad and x.requires_grad:
            return False
    return True


def check_inputs(
    op: str,
    arguments: Mapping[str, Any],
    optional: Mapping[str, Any],
    instead: str,
    lists: Sequence[str] = (),
) -> None:
    """Checks that all arguments are dense tensors on one device and without a gradient.

    Arguments in ``lists`` hold several tensors; those in ``optional`` may be None. ``instead`` is the remedy
    for an input that requires grad.
    """
    arguments = {**arguments, **{name: x for name, x in optional.items() if x is not None}}
    for name, x in arguments.items():
        if name in lists:
            as_tensors(name, x)
        else:
            check_tensor(name, x)
    check_same_device(arguments)
    check_no_grad(op, arguments, instead)


def _each(arguments: Arguments) -> Iterator[tuple[str, int | None, Tensor]]:
    """All tensors with the name of their argument and, in a list, their index."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, None, value
        elif value is not None:
            for j, x in enumerate(value):
                yield name, j, x


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _label(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


def check_same_device(arguments: Arguments) -> None:
    """All tensors are on one device, or a ValueError that names the first one that is not."""
    first = first_label = None
    for name, j, x in _each(arguments):
        if first is None:
            first, first_label = x.device, _label(name, j)
        elif x.device != first:
            raise ValueError(
                f"{_label(name, j)} must be on {first} as {first_label}, got a tensor on {x.device}"
            )


def check_rank4(arguments: Arguments) -> None:
    """All tensors have 4 dims, or a ValueError that names the first one that does not."""
    for name, j, x in _each(arguments):
        if x.dim() != 4:
            raise ValueError(f"{_label(name, j)} must have 4 dims, got {tuple(x.shape)}")


def check_not_negated(name: str, written: Tensor) -> None:
    """The tensor is no lazily negated view, which has no memory to write to; or a ValueError."""
    if not torch.compiler.is_compiling() and written.is_neg():  # a graph cannot ask
        raise ValueError(f"{name} must be memory to write to, got a lazily negated view; call .resolve_neg()")


def check_packed_queries(q: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int | None) -> tuple[Tensor, int]:
    """q (total_q, H, D) as (1, total_q, H, D), and the most query tokens of a sequence.

    Raises:
        ValueError: q has other dims, or the most is not given.
    """
    if q.dim() != 3:
        raise ValueError(f"q must have 3 dims (total_q, H, D) with cu_seqlens_q, got {tuple(q.shape)}")
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q must be the most query tokens of a sequence, got None")
    return q.unsqueeze(0), max_seqlen_q


def check_contents(cache_seqlens: Tensor, block_table: Tensor | None, cache: Tensor) -> None:
    """Checks lengths and pages of CUDA tensors, for ``debug_checks``; the CPU operations always do."""
    if not cache_seqlens.is_cuda:
        return
    capacity = cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"cache_seqlens[{b}] must be from 0 to {capacity}, the tokens of the cache, got {length}"
            )
        pages = [] if block_table is None else block_table[b, : -(-length // cache.shape[1])].tolist()
        for i, page in enumerate(pages):
            if not 0 <= page < cache.shape[0]:
                raise ValueError(
                    f"block_table[{b}, {i}] must be a page from 0 to {cache.shape[0] - 1}, got {page}"
                )


def check_sources(name: str, sources: Sequence[Tensor], like_name: str, like: Tensor) -> None:
    """All have one shape (4 dims) and the dtype of ``like``."""
    for j, x in enumerate(sources):
        if x.dim() != 4:
            raise ValueError(f"{name}[{j}] must have 4 dims (B, T, G, D), got {tuple(x.shape)}")
        if x.shape != sources[0].shape:
            expected = tuple(sources[0].shape)
            raise ValueError(f"{name}[{j}] must have shape {expected} as {name}[0], got {tuple(x.shape)}")
        if x.dtype != like.dtype:
            raise TypeError(f"{name}[{j}] must be {_dtype(like)} as {like_name}, got {_dtype(x)}")


def check_head_dim(name: str, head_dim: int) -> None:
    """The head dim is at least 1, or a ValueError."""
    if head_dim < 1:
        raise ValueError(f"{name} must have a head dim of at least 1, got {head_dim}")


def check_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Checks q (B, S, H, D), keys (B, T, G, D) and values (B, T, G, Dv) of one floating dtype."""
    if q.dim() != 4:
        raise ValueError(f"q must have 4 dims (B, S, H, D), got {tuple(q.shape)}")
    if q.dtype not in (*ATTENTION_DTYPES, torch.float64):
        raise TypeError(f"q must be float32, bfloat16, float16 or float64, got {_dtype(q)}")
    check_sources("keys", keys, "q", q)
    check_sources("values", values, "q", q)
    (batch, _, heads, head_dim), key_shape, value_shape = q.shape, keys[0].shape, values[0].shape
    check_head_dim("q", head_dim)
    check_head_dim("values[0]", value_shape[3])
    if key_shape[0] != batch or key_shape[3] != head_dim:
        raise ValueError(
            f"keys[0] must be (B, T, G, D) with B = {batch} and D = {head_dim}, got {tuple(key_shape)}"
        )
    if value_shape[:3] != key_shape[:3]:
        raise ValueError(
            f"values[0] must have keys[0]'s (B, T, G) = {tuple(key_shape[:3])}, got {tuple(value_shape)}"
        )
    if heads < 1 or key_shape[2] < 1 or heads % key_shape[2]:
        raise ValueError(f"q must have a multiple of keys[0]'s {key_shape[2]} heads, got {heads}")


def check_packed(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Checks the shapes q (total_q, H, D), keys (total_k, G, D) and values (total_k, G, Dv).

    ``check_attention`` checks the rest, with a batch of one.
    """
    if q.dim() != 3:
        raise ValueError(f"q must have 3 dims (total_q, H, D), got {tuple(q.shape)}")
    for name, side in (("keys", keys), ("values", values)):
        for j, x in enumerate(side):
            if x.dim() != 3:
                raise ValueError(f"{name}[{j}] must have 3 dims (total_k, G, D), got {tuple(x.shape)}")
            if x.shape != side[0].shape:
                expected = tuple(side[0].shape)
                raise ValueError(f"{name}[{j}] must have shape {expected} as {name}[0], got {tuple(x.shape)}")
    key_shape, value_shape = tuple(keys[0].shape), tuple(values[0].shape)
    if key_shape[2] != q.shape[2]:
        raise ValueError(f"keys[0] must be (total_k, G, D) with D = {q.shape[2]}, got {key_shape}")
    if value_shape[:2] != key_shape[:2]:
        raise ValueError(f"values[0] must have keys[0]'s (total_k, G) = {key_shape[:2]}, got {value_shape}")


def check_cu_seqlens(cu_seqlens_q: object, cu_seqlens_k: object) -> tuple[Tensor, Tensor]:
    """Two int32 tensors of one shape (B + 1,); what they hold is checked where it is read."""
    tensors = []
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        x = check_tensor(name, x)
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {_dtype(x)}; call .int()")
        if x.dim() != 1 or x.shape[0] < 1:
            raise ValueError(f"{name} must have shape (B + 1,), got {tuple(x.shape)}")
        tensors.append(x)
    first, second = tensors
    if second.shape != first.shape:
        raise ValueError(
            f"cu_seqlens_k must have shape {tuple(first.shape)} as cu_seqlens_q, got {tuple(second.shape)}"
        )
    return first, second


def check_length(name: str, length: object) -> int:
    """An int of at least 0."""
    if not isinstance(length, (int, torch.SymInt)) or isinstance(length, bool):
        raise TypeError(f"{name} must be an int, got {type(length).__name__}; call .item() on a tensor")
    if length < 0:
        raise ValueError(f"{name} must be at least 0, got {length}")
    return length  # type: ignore[return-value]


def check_document_ids(document_ids: object, q: Tensor, key: Tensor) -> Documents | None:
    """(B, T) integers, the last S of which are those of the rows of q; or None.

    Ids on the CPU are read. Those on a device are read only by the model that passes them as ``Documents``.
    """
    if document_ids is None:
        return None
    documents = document_ids if isinstance(document_ids, Documents) else None
    document_ids = documents.ids if documents is not None else document_ids
    document_ids = check_tensor("document_ids", document_ids)
    if document_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"document_ids must be int32 or int64, got {_dtype(document_ids)}")
    if document_ids.shape != key.shape[:2]:
        raise ValueError(
            f"document_ids must have keys[0]'s (B, T) = {tuple(key.shape[:2])}, got "
            f"{tuple(document_ids.shape)}"
        )
    if q.shape[1] > key.shape[1]:
        raise ValueError(
            f"q must have at most {key.shape[1]} rows with document_ids, as many as keys[0] has tokens, got "
            f"{q.shape[1]}; rows before the first token have no document"
        )
    if documents is None:
        documents = read_documents(document_ids) if document_ids.is_cpu else Documents(document_ids, None)
    return documents


def canonical_weights(name: str, weights: object, sources: Sequence[Tensor]) -> Tensor:
    """Weights broadcast to contiguous (m, G, D), in the dtype of sums: float64 for float64, else float32."""
    weights = check_tensor(name, weights)
    if not weights.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {_dtype(weights)}")
    shape = (len(sources), sources[0].shape[2], codes.channels(sources[0]))
    sum_dtype = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    if weights.shape == shape and weights.dtype == sum_dtype and weights.is_contiguous():
        return weights
    if weights.dim() > 3 or any(
        size != 1 and size != full
        for size, full in zip(reversed(weights.shape), reversed(shape), strict=False)
    ):
        raise ValueError(f"{name} must be broadcastable to {shape} = (m, G, D), got {tuple(weights.shape)}")
    return weights.to(sum_dtype).expand(shape).contiguous()


def check_fusion(sources: Any, weights: Any) -> tuple[list[Tensor], Tensor]:
    """The sources and their weights as (m, G, D)."""
    sources = as_tensors("sources", sources)
    check_sources("sources", sources, "sources[0]", sources[0])
    check_head_dim("sources[0]", sources[0].shape[3])
    if sources[0].dtype not in (*ATTENTION_DTYPES, torch.float64):
        raise TypeError(f"sources[0] must be float32, bfloat16, float16 or float64, got {_dtype(sources[0])}")
    weights = canonical_weights("weights", weights, sources)
    check_same_device({"sources": sources, "weights": weights})
    return sources, weights


def autocast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Floating tensors in the dtype of autocast, if it is on."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [_lowered(x, dtype) for x in tensors]


def autocast_like(q: Tensor, cache: Tensor) -> Tensor:
    """Queries in the dtype of a cache if autocast is on: the cache is not copied."""
    device_type = q.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or codes.is_coded(cache):
        return q
    return _lowered(q, cache.dtype)


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def rotary_table(name: str, x: Tensor) -> Tensor:
    """A floating table as contiguous float32, or a TypeError that names the argument."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {_dtype(x)}")
    return x.float().contiguous()


def attention_weights(
    keys: Sequence[Tensor], values: Sequence[Tensor], key_weights: Tensor | None, value_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both fusion weights as contiguous float32 (m, G, D), None where they are None."""
    if key_weights is not None:
        key_weights = canonical_weights("key_weights", key_weights, keys)
    if value_weights is not None:
        value_weights = canonical_weights("value_weights", value_weights, values)
    return key_weights, value_weights


def check_window(causal: object, window_size: object) -> tuple[int, int]:
    """(left, right) with the causal bound in it; -1 is unbounded."""
    causal = check_flag("causal", causal)
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be two ints (left, right), got {window_size!r}")
    left, right = window_size
    if not (_is_int(left) and _is_int(right)):
        raise TypeError(f"window_size must be two ints (left, right), got {window_size!r}")
    if left < -1 or right < -1:
        raise ValueError(f"window_size must hold sizes >= 0, or -1 for unbounded, got {window_size!r}")
    # A window past every length is unbounded; kernels may then add positions to the rest without overflow.
    if left >= MAX_WINDOW:
        left = -1
    if right >= MAX_WINDOW:
        right = -1
    return left, 0 if causal else right


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def check_scale(softmax_scale: object, head_dim: int) -> float:
    """The softmax scale as a float; None becomes 1 / sqrt(head_dim)."""
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale must be a float or None, got {type(softmax_scale).__name__}")
    return float(softmax_scale)


def check_softcap(softcap: object) -> float:
    """The soft cap as a float: 0.0, or a positive float32 that kernels can divide by.

    Defaults are the int 0: torch.compile with dynamic=True compiles twice for a float.
    """
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a float, got {type(softcap).__name__}; 0.0 is no soft cap")
    if softcap != 0 and not _FLOAT32.tiny <= softcap <= _FLOAT32.max:
        raise ValueError(f"softcap must be 0.0 (off) or a positive float32, got {softcap}")
    return float(softcap)


def check_scores(
    q: Tensor, batch: int, sinks: Tensor | None, alibi_slopes: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Sinks (H,) and slopes (H,) or (B, H), contiguous in the dtype of sums. q: (B, S, H, D)."""
    if sinks is not None:
        sinks = _per_head("sinks", sinks, q, [(q.shape[2],)])
    if alibi_slopes is not None:
        alibi_slopes = _per_head("alibi_slopes", alibi_slopes, q, [(q.shape[2],), (batch, q.shape[2])])
    return sinks, alibi_slopes


def _per_head(name: str, x: object, q: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    x = check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {_dtype(x)}")
    if not any(x.dim() == len(shape) and tuple(x.shape) == shape for shape in shapes):
        expected = " or ".join(
            f"{form} = {shape}" for form, shape in zip(("(H,)", "(B, H)"), shapes, strict=False)
        )
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    return x.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()


def in_forward_mode() -> bool:
    """Whether forward-mode AD is on, by torch.func.jvp or a ``dual_level``."""
    return forward_ad._current_level >= 0


def may_differentiate(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors requires grad in grad mode, or may have a tangent."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    return in_forward_mode()


def check_no_grad(op: str, arguments: Arguments, instead: str) -> None:
    """Refuses gradients and tangents, which operations without a backward would drop silently."""
    if torch.is_grad_enabled():
        for name, j, x in _each(arguments):
            if x.requires_grad:
                raise ValueError(
                    f"{_label(name, j)} must not require grad, as {op} is not differentiable; {instead}"
                )
    check_no_tangent(op, arguments, instead)


def check_no_tangent(op: str, arguments: Arguments, instead: str) -> None:
    """Refuses tangents, which would silently become zeros.

    Within several transforms of torch.func, tangents of the outer ones are not visible.
    """
    if in_forward_mode():
        for name, j, x in _each(arguments):
            if forward_ad.unpack_dual(x).tangent is not None or torch._C._functorch.is_gradtrackingtensor(x):
                raise ValueError(
                    f"{_label(name, j)} must not have a forward-mode tangent, as {op} gives none; {instead}"
                )


def check_out(out: object, shape: tuple[int, ...], like: Tensor) -> None:
    """A tensor to fill, of this shape and of the dtype and device of ``like``; or None."""
    if out is None:
        return
    out = check_tensor("out", out)
    if out.dtype != like.dtype:
        raise TypeError(f"out must be {_dtype(like)} as the result, got {_dtype(out)}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {tuple(shape)} as the result, got {tuple(out.shape)}")
    if out.device != like.device:
        raise ValueError(f"out must be on {like.device} as the result, got a tensor on {out.device}")
    check_not_negated("out", out)
    reach = 0  # of the dims with smaller strides: elements are apart if each stride steps over it
    for stride, size in () if out.is_contiguous() else sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                "out must have memory of its own for each element, got elements that overlap, as in an "
                "expanded tensor; call .contiguous()"
            )
        reach += (size - 1) * stride
    if out.requires_grad:
        raise ValueError("out must not require grad, as nothing differentiates it; pass out.detach()")


def check_attn_mask(attn_mask: object, q: Tensor, key: Tensor) -> Tensor | None:
    """A boolean or floating tensor that broadcasts to (B, H, S, T), or None."""
    if attn_mask is None:
        return None
    attn_mask = check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or have a floating dtype, got {_dtype(attn_mask)}")
    shape, own = (q.shape[0], q.shape[2], q.shape[1], key.shape[1]), tuple(attn_mask.shape)
    sizes = zip(reversed(own), reversed(shape), strict=False)
    if len(own) > 4 or any(size != 1 and size != full for size, full in sizes):
        raise ValueError(f"attn_mask must be broadcastable to {shape} = (B, H, S, T), got {own}")
    return attn_mask
