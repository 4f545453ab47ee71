"""A call of an operation as one value, checked once.

The public functions check what users pass and build an :class:`AttentionCall` or :class:`AppendCall`. Layers
and caches build them from tensors of their own. Everything below takes the value: the dispatch between
kernels, the native operation, SDPA and :func:`explain`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkv_ext.ops import checks, codes
from fusedkv_ext.ops.checks import Tensors
from fusedkv_ext.ops.native import run_op
from fusedkv_ext.ops.packing import Documents

__all__ = [
    "AppendCall",
    "AttentionCall",
    "CacheState",
    "CodedInputs",
    "Side",
    "append_call",
    "attention_call",
    "cached_attention_call",
    "packed_call",
    "take_code_inputs",
]

_ARGUMENTS = 22  # of the native operation
_BEFORE_CODES = 17  # of them, those that are not about codes
_ENCODE_OPTIONS = tuple(codes.EncodeOptions.__annotations__)  # in the order of the native operation
Side = tuple[Sequence[Tensor], Tensor | None]  # the sources of keys or of values, and their weights


class AttentionCall(NamedTuple):
    """One call of attention. Weights are contiguous float32 (m, G, D), or float64 for float64 tensors.

    ``document_lengths`` are those of ``Documents``: None if the host does not know that they are runs.

    The first 22 fields are the arguments of the native operation, in its order. Without ``cache_seqlens``,
    keys and values are (B, T, G, D). With it they are caches: (B, capacity, G, D), or (P, page_size, G, D)
    with a ``block_table``. With ``cu_seqlens_q`` queries are packed: q is (1, total_q, H, D). Without
    ``left_padding`` rows before a sequence's first token see what the bounds allow. ``out`` and ``workspace``
    are memory of the caller's that the native operation writes. ``q_sources`` (m_k, *q.shape) has a query per
    key source, q is then the first.
    """

    q: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    key_weights: Tensor | None
    value_weights: Tensor | None
    cache_seqlens: Tensor | None
    block_table: Tensor | None
    scale: float
    left: int
    right: int
    schedule: Tensor | None = None
    batch_invariant: bool = False
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    codebook: Tensor | None = None
    key_token_scales: Sequence[Tensor] | None = None
    value_token_scales: Sequence[Tensor] | None = None
    q_sources: Tensor | None = None
    value_bias: Tensor | None = None
    host_seqlens: Sequence[int] | None = None
    return_lse: bool = False
    document_ids: Tensor | None = None
    document_lengths: tuple[tuple[int, ...], ...] | None = None
    left_padding: bool = True
    attn_mask: Tensor | None = None
    out: Tensor | None = None
    workspace: Tensor | None = None

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys and values, each with their weights."""
        return (self.keys, self.key_weights), (self.values, self.value_weights)

    @property
    def adjusted(self) -> bool:
        """Whether there is a soft cap, a sink or an ALiBi slope."""
        return self.softcap != 0 or self.sinks is not None or self.alibi_slopes is not None

    @property
    def native_only(self) -> bool:
        """Whether only the native kernel runs the call: over codes, or with what belongs to them."""
        if codes.is_coded(self.keys[0]) or codes.is_coded(self.values[0]):
            return True
        scales = self.key_token_scales is not None or self.value_token_scales is not None
        return scales or self.q_sources is not None or self.value_bias is not None

    @property
    def value_dim(self) -> int:
        """Dv, the head dim of the values."""
        return codes.channels(self.values[0])

    @property
    def packs_documents(self) -> bool:
        """Whether documents can be computed one by one. Slopes of sequences do not belong to documents."""
        slopes_of_sequences = self.alibi_slopes is not None and self.alibi_slopes.dim() == 2
        return self.document_lengths is not None and not slopes_of_sequences

    @property
    def query_length(self) -> int:
        """S, the most query tokens of a sequence."""
        return self.q.shape[1] if self.cu_seqlens_q is None else self.max_seqlen_q

    @property
    def query_rows(self) -> int:
        """Query rows per KV head, S * H / G."""
        return self.query_length * (self.q.shape[2] // self.keys[0].shape[2])

    @property
    def page_size(self) -> int | None:
        """Tokens per page; None without a block table."""
        return None if self.block_table is None else self.keys[0].shape[1]

    @property
    def seqlens(self) -> Tensor:
        """``cache_seqlens`` of a call over caches."""
        assert self.cache_seqlens is not None
        return self.cache_seqlens

    @property
    def capacity(self) -> int:
        """Tokens that each sequence can have."""
        tokens = self.keys[0].shape[1]
        return tokens if self.block_table is None else tokens * self.block_table.shape[1]

    def fold(self, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the native kernel, which reads the sources without fusing them.

        Args:
            lengths: (B,) int32, the number of tokens, for a call without a cache.

        Returns:
            out and lse.
        """
        if self.out is not None:
            memory = (self.out, self.workspace)
            of_codes = self[_BEFORE_CODES:_ARGUMENTS]
            lse = run_op("attn_with_kvcache_out", *self[:_BEFORE_CODES], *memory, *of_codes)
            return self.out, lse
        if lengths is None:
            return run_op("attn_with_kvcache", *self[:_ARGUMENTS])
        try:
            return run_op("attn_with_kvcache", *self[:5], lengths, *self[6:_ARGUMENTS])
        except ValueError as error:  # the operation calls them caches
            message = str(error).replace("key_caches", "keys").replace("value_caches", "values")
            raise ValueError(message) from None

    @property
    def all_rows_see_all(self) -> bool:
        """Whether every row sees all tokens, also one before the first."""
        return not self.left_padding and self.left < 0 and self.right < 0

    def check(self) -> None:
        """Runs the checks of the native operation: its messages without its work, on no query rows."""
        scores = (self.softcap, self.sinks, self.alibi_slopes)
        packed = None if self.cu_seqlens_q is None else torch.zeros_like(self.cu_seqlens_q)
        run_op("attn_with_kvcache", self.q[:, :0], *self[1:10], None, False, packed, 0, *scores)

    def sequences(self, rows: slice, q: Tensor | None = None) -> AttentionCall:
        """The same call for some sequences of a cached batch. ``q``: their rows if queries are packed."""
        table, slopes = self.block_table, self.alibi_slopes
        paged = table is not None
        return self._replace(
            q=self.q[rows] if q is None else q,
            cu_seqlens_q=None,
            max_seqlen_q=0,
            keys=self.keys if paged else [x[rows] for x in self.keys],
            values=self.values if paged else [x[rows] for x in self.values],
            cache_seqlens=self.seqlens[rows],
            block_table=None if table is None else table[rows],
            alibi_slopes=slopes[rows] if slopes is not None and slopes.dim() == 2 else slopes,
            host_seqlens=None if self.host_seqlens is None else list(self.host_seqlens)[rows],
        )

    def fused(self, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> AttentionCall:
        """The call that is left once keys and values are fused: one source each, no cache, no weights."""
        return AttentionCall(
            *(q, [k], [v], None, None, None, None, self.scale, self.left, self.right),
            softcap=self.softcap,
            sinks=self.sinks,
            alibi_slopes=self.alibi_slopes,
            return_lse=self.return_lse,
            document_ids=document_ids,
        )


class CacheState(NamedTuple):
    """Where the tokens of each sequence lie: int32 lengths, pages, the lengths if the host has them."""

    seqlens: Tensor
    block_table: Tensor | None
    host_seqlens: Sequence[int] | None


class CodedInputs(NamedTuple):
    """The query per source and ``CodeOptions``, in the order of the native operation."""

    codebook: Tensor | None
    key_token_scales: Sequence[Tensor] | None
    value_token_scales: Sequence[Tensor] | None
    q_sources: Tensor | None
    value_bias: Tensor | None

    def checked(self, num_keys: int, num_values: int) -> CodedInputs:
        """The same with lists of token scales.

        Raises:
            ValueError: A number of tensors is wrong.
            TypeError: A type is wrong.
        """
        sides = []
        for name, x, m in (
            ("key_token_scales", self.key_token_scales, num_keys),
            ("value_token_scales", self.value_token_scales, num_values),
        ):
            sides.append(None if x is None else checks.as_list(name, x))
            if x is not None and len(sides[-1] or ()) != m:
                raise ValueError(f"{name} must hold {m} tensors, one per cache, got {len(sides[-1] or ())}")
        if self.q_sources is not None and len(self.q_sources) != num_keys:
            raise ValueError(
                f"q must hold {num_keys} tensors, one for each of key_caches, got {len(self.q_sources)}"
            )
        return self._replace(key_token_scales=sides[0], value_token_scales=sides[1])

    def packed(self) -> CodedInputs:
        """With queries (m_k, 1, total_q, H, D)."""
        q_sources = self.q_sources
        return self if q_sources is None else self._replace(q_sources=q_sources.unsqueeze(1))

    @property
    def tensors(self) -> list[Any]:
        """All tensors."""
        return [y for x in self.given.values() for y in (x if isinstance(x, list) else [x])]

    @property
    def given(self) -> dict[str, Any]:
        """What is not None, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}


_NO_CODES = CodedInputs(None, None, None, None, None)


def take_code_inputs(q: Any, options: Any) -> tuple[Any, CodedInputs]:
    """The query, or the first of those per source, and what belongs to codes: taken out of the options."""
    if not options and isinstance(q, Tensor):  # nearly every call
        return q, _NO_CODES
    q, q_sources = codes.split_queries(q)
    taken = {name: options.pop(name, None) for name in codes.CodeOptions.__annotations__}
    return q, CodedInputs(q_sources=q_sources, **taken)


class AppendCall(NamedTuple):
    """One call of append_kvcache: the arguments of the native operation, in its order."""

    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = False
    query: Tensor | None = None
    key_scale: Tensor | None = None
    key_center: Tensor | None = None
    value_scale: Tensor | None = None
    value_center: Tensor | None = None


def attention_call(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    return_lse: bool,
    document_ids: Tensor | Documents | None = None,
    softcap: float = 0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> AttentionCall:
    """The checked arguments of ``fused_kv_attn_func``, under autocast in its dtype."""
    q = checks.check_tensor("q", q)
    keys, values = checks.as_tensors("keys", keys), checks.as_tensors("values", values)
    (q,), keys, values = checks.autocast([q]), checks.autocast(keys), checks.autocast(values)
    checks.check_attention(q, keys, values)
    left, right = checks.check_window(causal, window_size)
    scale = checks.check_scale(softmax_scale, q.shape[3])
    return_lse = checks.check_flag("return_lse", return_lse)
    documents = checks.check_document_ids(document_ids, q, keys[0])
    ids, lengths = (None, None) if documents is None else documents
    attn_mask = checks.check_attn_mask(attn_mask, q, keys[0])
    key_weights, value_weights = checks.attention_weights(keys, values, key_weights, value_weights)
    softcap = checks.check_softcap(softcap)
    sinks, alibi_slopes = checks.check_scores(q, q.shape[0], sinks, alibi_slopes)
    optional = {"key_weights": key_weights, "value_weights": value_weights, "document_ids": ids}
    optional.update(sinks=sinks, alibi_slopes=alibi_slopes, attn_mask=attn_mask)
    checks.check_same_device({"q": q, "keys": keys, "values": values, **optional})
    return AttentionCall(
        *(q, keys, values, key_weights, value_weights, None, None, scale, left, right),
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
        document_ids=ids,
        document_lengths=lengths,
        attn_mask=attn_mask,
    )


def packed_call(
    q: Tensor,
    keys: Tensors,
    values: Tensors,
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    return_lse: bool,
    sequences: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> AttentionCall:
    """The checked arguments of ``fused_kv_attn_varlen_func`` without its lengths, as a batch of one.

    Slopes are those of the ``sequences``.
    """
    q = checks.check_tensor("q", q)
    keys, values = checks.as_tensors("keys", keys), checks.as_tensors("values", values)
    checks.check_packed(q, keys, values)
    q, keys, values = q.unsqueeze(0), [x.unsqueeze(0) for x in keys], [x.unsqueeze(0) for x in values]
    options = (softmax_scale, causal, window_size, return_lse)
    call = attention_call(q, keys, values, key_weights, value_weights, *options)
    softcap = checks.check_softcap(softcap)
    sinks, alibi_slopes = checks.check_scores(call.q, sequences, sinks, alibi_slopes)
    checks.check_same_device({"q": q, "sinks": sinks, "alibi_slopes": alibi_slopes})
    return call._replace(softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes)


def cached_attention_call(
    q: Tensor,
    key_caches: Tensors,
    value_caches: Tensors,
    key_weights: Tensor | None,
    value_weights: Tensor | None,
    state: CacheState,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    return_lse: bool,
    schedule: Tensor | None,
    batch_invariant: bool,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    left_padding: bool,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    coded: CodedInputs,
) -> AttentionCall:
    """The checked arguments of ``fused_kv_attn_with_kvcache``.

    Types, devices, dtypes and gradients are checked here, sizes and contents by the native operation.
    """
    cache_seqlens, block_table, host_seqlens = state
    keys = checks.as_list("key_caches", key_caches)
    values = checks.as_list("value_caches", value_caches)
    optional = {"key_weights": key_weights, "value_weights": value_weights, "block_table": block_table}
    optional.update(cu_seqlens_q=cu_seqlens_q, sinks=sinks, alibi_slopes=alibi_slopes)
    given = [x for x in optional.values() if x is not None]
    if coded is not _NO_CODES:
        coded = coded.checked(len(keys), len(values))
        optional.update(coded.given)
        given += coded.tensors
    if not checks.plain_on_cpu([q, *keys, *values, cache_seqlens, *given]):
        checks.check_inputs(
            "fused_kv_attn_with_kvcache",
            {"q": q, "key_caches": keys, "value_caches": values, "cache_seqlens": cache_seqlens},
            optional,
            "use fused_kv_attn_func to train, torch.no_grad() and plain tensors to decode",
            ("key_caches", "value_caches", "key_token_scales", "value_token_scales"),
        )
    if q.dtype != keys[0].dtype:
        q = checks.autocast_like(q, keys[0])
    if cu_seqlens_q is not None:
        q, max_seqlen_q = checks.check_packed_queries(q, cu_seqlens_q, max_seqlen_q)
        coded = coded.packed()
    elif max_seqlen_q is not None:
        raise ValueError(f"max_seqlen_q must be None without cu_seqlens_q, got {max_seqlen_q}")
    if not q.dim() == keys[0].dim() == values[0].dim() == 4:
        checks.check_rank4({"q": q, "key_caches": keys[:1], "value_caches": values[:1]})
    scale = checks.check_scale(softmax_scale, q.shape[3])
    left, right = checks.check_window(causal, window_size)
    return_lse = checks.check_flag("return_lse", return_lse)
    batch_invariant = checks.check_flag("batch_invariant", batch_invariant)
    left_padding = checks.check_flag("left_padding", left_padding)
    if not left_padding and right != 0 and (left >= 0 or right > 0):
        raise ValueError(
            f"left_padding must be True with causal=False and a window, got window_size = {window_size}"
        )
    key_weights, value_weights = checks.attention_weights(keys, values, key_weights, value_weights)
    softcap = checks.check_softcap(softcap)
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    sinks, alibi_slopes = checks.check_scores(q, batch, sinks, alibi_slopes)
    if alibi_slopes is not None and not left_padding and right < 0:
        raise ValueError("alibi_slopes must be None with left_padding=False and causal=False, got a tensor")
    if schedule is not None:
        checks.check_tensor("schedule", schedule)
        checks.check_same_device({"q": q, "schedule": schedule})
    return AttentionCall(
        *(q, keys, values, key_weights, value_weights, cache_seqlens, block_table, scale, left, right),
        *(schedule, batch_invariant, cu_seqlens_q, max_seqlen_q or 0, softcap, sinks, alibi_slopes),
        *coded,
        host_seqlens=host_seqlens,
        return_lse=return_lse,
        left_padding=left_padding,
    )


def append_call(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Any,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    query: Tensor | None,
    encode: Mapping[str, Any] | None = None,
) -> AppendCall:
    """The checked arguments of ``append_kvcache`` and ``rope_append_kvcache``, tables in float32.

    Types, devices and gradients are checked here, sizes and contents by the native operation.
    """
    encoding: list[Tensor | None] = []
    if encode:
        for name in encode:
            if name not in _ENCODE_OPTIONS:
                raise TypeError(f"append_kvcache() got an unexpected keyword argument {name!r}")
        encoding = [encode.get(name) for name in _ENCODE_OPTIONS]
    optional = [x for x in (block_table, rotary_cos, rotary_sin, query, *encoding) if x is not None]
    if not checks.plain_on_cpu([key, value, key_cache, value_cache, cache_seqlens, *optional]):
        tables = {"block_table": block_table, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        tables.update(encode or {}, query=query)
        caches = {"key_cache": key_cache, "value_cache": value_cache, "cache_seqlens": cache_seqlens}
        arguments = {"key": key, "value": value, **caches}
        checks.check_inputs("append_kvcache", arguments, tables, "append .detach()ed tensors")
    checks.check_not_negated("key_cache", key_cache)
    checks.check_not_negated("value_cache", value_cache)
    if rotary_cos is not None:
        rotary_cos = checks.rotary_table("rotary_cos", rotary_cos)
    if rotary_sin is not None:
        rotary_sin = checks.rotary_table("rotary_sin", rotary_sin)
    interleaved = checks.check_flag("rotary_interleaved", rotary_interleaved)
    rotary = (rotary_cos, rotary_sin, interleaved)
    return AppendCall(
        key, value, key_cache, value_cache, cache_seqlens, block_table, *rotary, query, *encoding
    )
