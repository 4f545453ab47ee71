"""Sharding rules of torch.ops.fusedkv for DTensors; importing this module registers them.

A rule lists, for one dimension of a device mesh, possible placements of inputs and outputs. torch tries all
combinations over the dimensions and moves tensors to the cheapest one that fits. These placements are exact:

    fuse_kv                  whole, by sequences, by tokens, by KV heads; weights whole or by KV heads
    its gradients            as fuse_kv; gradients of whole weights are then sums over processes (Partial)
    attention over a cache   whole, by sequences, by KV heads with their query heads; by query heads if G = 1;
                             sinks and ALiBi slopes are those of the query heads
    append_kvcache           as attention; in place, so nothing is moved: see ``_in_place``
    merge_states             whole, by sequences, by query rows, by query heads

Weights, lengths and block tables are placed as the tensors they belong to. A page pool is whole if sequences
are sharded. There is no rule for heads if KV heads do not divide, for tokens of a cache, or for channels:
those tensors are gathered.

``fused_kv_attn_func`` with gradients or many rows is fuse_kv, then torch's SDPA, which has rules on CUDA and
none on the CPU. On the CPU call it through ``torch.distributed.tensor.experimental.local_map``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from fusedkv_ext.ops import native  # noqa: F401  (defines torch.ops.fusedkv)

if TYPE_CHECKING:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

__all__ = ["register_rules"]

Rule = tuple[list[Placement], list[Placement]]  # of the outputs, of the inputs that are tensors, lists flat

_WHOLE, _SUM = Replicate(), Partial()
_BATCH, _TOKENS, _HEADS = 0, 1, 2  # dims of (B, T, G, D)
_WEIGHT_HEADS = 1  # of (m, G, D)


def register_rules(namespace: str) -> None:
    """Registers the rules for a namespace: "fusedkv", or another one with the same schemas."""
    for name, rule in _RULES.items():
        op = getattr(getattr(torch.ops, namespace), name).default
        register_sharding(op)(rule)
        # By itself register_sharding keeps one decision for calls that differ in bools and in which tensor is
        # None only. The shapes of our results differ then: every argument has to count. (Torch has no public
        # name for this; these are the same from 2.11 to 2.13.)
        propagator = DTensor._op_dispatcher.sharding_propagator
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)


def _sharded(dim: int | None) -> Placement:
    return _WHOLE if dim is None else Shard(dim)


def _fuse_kv(sources: Sequence[DTensorSpec], weights: DTensorSpec) -> list[Rule]:
    m = len(sources)
    return [
        ([_sharded(dim)], [*[_sharded(dim)] * m, _of_weights(dim)]) for dim in (None, _BATCH, _TOKENS, _HEADS)
    ]


def _fuse_kv_pair(
    keys: Sequence[DTensorSpec],
    key_weights: DTensorSpec,
    values: Sequence[DTensorSpec],
    value_weights: DTensorSpec,
) -> list[Rule]:
    rules = []
    for dim in (None, _BATCH, _TOKENS, _HEADS):
        sides = [[*[_sharded(dim)] * len(x), _of_weights(dim)] for x in (keys, values)]
        rules.append(([_sharded(dim)] * 2, [*sides[0], *sides[1]]))
    return rules


def _fuse_kv_backward(
    grad: DTensorSpec,
    sources: Sequence[DTensorSpec],
    weights: DTensorSpec,
    needs_sources: bool,
    needs_weights: bool,
) -> list[Rule]:
    """The sources' gradients are one tensor (m, B, T, G, D), (0,) if not needed."""
    rules = []
    for dim in (None, _BATCH, _TOKENS, _HEADS):
        of_sources = _sharded(dim + 1) if needs_sources and dim is not None else _WHOLE
        inputs = [*[_sharded(dim)] * (1 + len(sources)), _of_weights(dim)]
        rules.append(([of_sources, _of_weights_grad(dim)], inputs))
    return rules


def _fuse_kv_backward_accumulate(
    grad: DTensorSpec,
    sources: Sequence[DTensorSpec],
    weights: DTensorSpec,
    grad_sources: Sequence[DTensorSpec],
    needs_weights: bool,
) -> list[Rule]:
    m = len(sources)
    rules = []
    for dim in (None, _BATCH, _TOKENS, _HEADS):
        inputs = [*[_sharded(dim)] * (1 + m), _of_weights(dim), *[_sharded(dim)] * m]
        rules.append(([_of_weights_grad(dim)], inputs))
    return _in_place("fuse_kv_backward with grad_sources", rules, [grad, *sources, weights, *grad_sources])


def _fuse_kvcache(
    caches: Sequence[DTensorSpec],
    weights: DTensorSpec,
    cache_seqlens: DTensorSpec,
    block_table: DTensorSpec | None,
    tokens: int,
) -> list[Rule]:
    rules = []
    for dim in (None, _BATCH, _HEADS):
        inputs = [*[_of_cache(dim, block_table)] * len(caches), _of_weights(dim)]
        rules.append(([_sharded(dim)], inputs + _of_lengths(dim, block_table)))
    return rules


def _attn_with_kvcache(
    q: DTensorSpec,
    key_caches: Sequence[DTensorSpec],
    value_caches: Sequence[DTensorSpec],
    key_weights: DTensorSpec | None,
    value_weights: DTensorSpec | None,
    cache_seqlens: DTensorSpec,
    block_table: DTensorSpec | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    schedule: DTensorSpec | None,
    batch_invariant: bool,
    cu_seqlens_q: DTensorSpec | None = None,
    max_seqlen_q: int = 0,
    softcap: float = 0.0,
    sinks: DTensorSpec | None = None,
    alibi_slopes: DTensorSpec | None = None,
    codebook: DTensorSpec | None = None,
    key_token_scales: Sequence[DTensorSpec] | None = None,
    value_token_scales: Sequence[DTensorSpec] | None = None,
    q_sources: DTensorSpec | None = None,
    value_bias: DTensorSpec | None = None,
) -> list[Rule]:
    """Results (B, S, H, Dv) and (B, H, S)."""
    caches = [*key_caches, *value_caches]
    weights = [x for x in (key_weights, value_weights) if x is not None]
    rest = [_WHOLE for x in (schedule, cu_seqlens_q) if x is not None]

    def rule(dim: int | None, q_dim: int | None, lse_dim: int | None) -> Rule:
        inputs = [_sharded(q_dim), *[_of_cache(dim, block_table)] * len(caches)]
        inputs += [*[_of_weights(dim)] * len(weights), *_of_lengths(dim, block_table), *rest]
        inputs += [_of_heads(q_dim, x) for x in (sinks, alibi_slopes) if x is not None]
        inputs += [_WHOLE for x in (codebook,) if x is not None]
        scales = [*(key_token_scales or ()), *(value_token_scales or ())]
        inputs += [_of_cache(dim, block_table) for _ in scales]
        inputs += [_sharded(None if q_dim is None else q_dim + 1) for x in (q_sources,) if x is not None]
        inputs += [Shard(0) if dim == _HEADS else _WHOLE for x in (value_bias,) if x is not None]
        return [_sharded(q_dim), _sharded(lse_dim)], inputs

    rules = [rule(None, None, None)]
    if schedule is not None and schedule.shape.numel():
        return rules  # it was made for these sequences and this many heads
    if cu_seqlens_q is None:
        rules.append(rule(_BATCH, _BATCH, 0))
    num_kv_heads = caches[0].shape[_HEADS]
    if num_kv_heads == 1:
        rules.append(rule(None, _HEADS, 1))
    elif num_kv_heads % _parts([q, *caches]) == 0:
        rules.append(rule(_HEADS, _HEADS, 1))
    return rules


def _attn_schedule(cache_seqlens: DTensorSpec, *sizes: int) -> list[Rule]:
    return [([_WHOLE], [_WHOLE])]


def _append_kvcache(
    key: DTensorSpec,
    value: DTensorSpec,
    key_cache: DTensorSpec,
    value_cache: DTensorSpec,
    cache_seqlens: DTensorSpec,
    block_table: DTensorSpec | None,
    rotary_cos: DTensorSpec | None,
    rotary_sin: DTensorSpec | None,
    rotary_interleaved: bool,
    query: DTensorSpec | None,
    key_scale: DTensorSpec | None = None,
    key_center: DTensorSpec | None = None,
    value_scale: DTensorSpec | None = None,
    value_center: DTensorSpec | None = None,
) -> list[Rule]:
    """Its result is the rotated query, or (0,)."""
    tables = [_WHOLE for x in (rotary_cos, rotary_sin) if x is not None]
    encode = [x for x in (key_scale, key_center, value_scale, value_center) if x is not None]
    rules: list[Rule] = []
    for dim in (None, _BATCH, _HEADS):
        of_codes = [Shard(0) if dim == _HEADS else _WHOLE] * len(encode)
        queries = [] if query is None else [_sharded(dim)]
        inputs = [*[_sharded(dim)] * 2, *[_of_cache(dim, block_table)] * 2]
        inputs += [*_of_lengths(dim, block_table), *tables, *queries, *of_codes]
        rules.append((queries or [_WHOLE], inputs))
    given = [key, value, key_cache, value_cache, cache_seqlens, block_table, rotary_cos, rotary_sin, query]
    given += encode
    return _in_place("append_kvcache", rules, [x for x in given if x is not None])


def _of_weights(dim: int | None) -> Placement:
    """The placement of weights (m, G, D) whose sources are placed along ``dim``."""
    return Shard(_WEIGHT_HEADS) if dim == _HEADS else _WHOLE


def _of_weights_grad(dim: int | None) -> Placement:
    """The placement of their gradient, a sum over sequences and tokens."""
    return _SUM if dim in (_BATCH, _TOKENS) else _of_weights(dim)


def _of_cache(dim: int | None, block_table: DTensorSpec | None) -> Placement:
    """The placement of a cache: a page pool has the sequences in any order."""
    return _WHOLE if dim == _BATCH and block_table is not None else _sharded(dim)


def _of_lengths(dim: int | None, block_table: DTensorSpec | None) -> list[Placement]:
    """(B,) lengths and the (B, pages) table."""
    return [Shard(0) if dim == _BATCH else _WHOLE] * (1 if block_table is None else 2)


def _of_heads(q_dim: int | None, x: DTensorSpec) -> Placement:
    """The placement of (H,) or (B, H) numbers of queries placed along ``q_dim``."""
    per_sequence = len(x.shape) == 2
    if q_dim == _HEADS:
        return Shard(1 if per_sequence else 0)
    return Shard(0) if q_dim == _BATCH and per_sequence else _WHOLE


def _merge_states(outs: Sequence[DTensorSpec], lses: Sequence[DTensorSpec]) -> list[Rule]:
    """lses are (B, H, S)."""
    n = len(outs)
    return [
        ([_sharded(dim), _sharded(of_lse)], [*[_sharded(dim)] * n, *[_sharded(of_lse)] * n])
        for dim, of_lse in ((None, None), (_BATCH, 0), (_TOKENS, 2), (_HEADS, 1))
    ]


def _parts(specs: Sequence[DTensorSpec]) -> int:
    """The number of parts of the heads. Chunks of H and of G belong together if these are whole KV heads."""
    mesh = specs[0].mesh
    heads = Shard(_HEADS)
    return math.prod(
        mesh.size(i) for i in range(mesh.ndim) if any(spec.placements[i] == heads for spec in specs)
    )


def _in_place(name: str, rules: list[Rule], specs: Sequence[DTensorSpec]) -> list[Rule]:
    """The rules, if one fits the tensors as they are placed: a written tensor must not be a moved copy.

    If none fits, torch would move some tensor, perhaps that one. The error leaves ``ops`` as ValueError.
    """
    for i in range(specs[0].mesh.ndim):
        placed = [spec.placements[i] for spec in specs]
        if not any(placed == inputs for _, inputs in rules):
            raise ValueError(
                f"fusedkv ValueError: {name} writes in place and moves no tensor; its tensors must be placed "
                f"along mesh dim {i} as one of {[inputs for _, inputs in rules]}, got {placed}"
            )
    return rules


_RULES: dict[str, Callable[..., list[Rule]]] = {
    "fuse_kv": _fuse_kv,
    "fuse_kv_pair": _fuse_kv_pair,
    "fuse_kv_backward": _fuse_kv_backward,
    "fuse_kv_backward_accumulate": _fuse_kv_backward_accumulate,
    "fuse_kvcache": _fuse_kvcache,
    "attn_schedule": _attn_schedule,
    "attn_with_kvcache": _attn_with_kvcache,
    "append_kvcache": _append_kvcache,
    "merge_states": _merge_states,
}

register_rules("fusedkv")
