"""Random calls of the operations: valid ones, and valid ones to which something was done.

Every call is made from one integer, so that a failure is repeated by that integer alone:
``python -c "import fuzz; print(fuzz.random_call('fuse_kv', 17))"``.
"""

from __future__ import annotations

import faulthandler
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from cases import Case, append, cache_inputs, dense_inputs, random_tensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedkv_ext
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_close, assert_same_bits

OPS = ("fuse_kv", "fused_kv_attn_func", "fused_kv_attn_with_kvcache", "append_kvcache")
CPU = torch.device("cpu")


@dataclass
class Call:
    """An operation, its keyword arguments, and what was done to them."""

    op: str
    arguments: dict[str, object]
    done: list[str] = field(default_factory=list)
    comparable: bool = True

    def __str__(self) -> str:
        return (
            f"{self.op}({', '.join(f'{k}={_short(v)}' for k, v in self.arguments.items())}) after {self.done}"
        )

    def run(self) -> object:
        if self.op == "append_kvcache":
            return append(fusedkv_ext, **self.arguments)
        return getattr(fusedkv_ext, self.op)(**self.arguments)

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for value in self.arguments.values():
            items = value if isinstance(value, (list, tuple)) else [value]
            found.extend(x for x in items if isinstance(x, Tensor))
        return found


def _short(value: object) -> str:
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor):
        # Values matter for the small integer tensors only: lengths and pages.
        values = f", {value.tolist()}" if value.dtype == torch.int32 and _plain(value) else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{values}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_short(x) for x in value)}]"
    return repr(value)


def valid_call(op: str, rng: random.Random) -> Call:
    """A small call that must succeed. Unused slots are zeros: a changed length may make them valid."""
    groups = rng.choice([1, 2])
    lengths = tuple(rng.choice([0, 1, 5, 13]) for _ in range(rng.choice([1, 2, 3])))
    case = Case(
        "random",
        B=len(lengths),
        S=rng.choice([1, 1, 2, 5]),
        T=13,
        H=groups * rng.choice([1, 2, 3]),
        G=groups,
        D=rng.choice([16, 24, 40]),
        Dv=rng.choice([None, None, 16]),
        m_k=rng.choice([1, 2, 3]),
        m_v=rng.choice([1, 2, 3]),
        dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]),
        weights=rng.choice(["none", "channel", "head", "scalar"]),
        causal=rng.random() < 0.7,
        window=rng.choice([(-1, -1), (-1, -1), (3, -1), (2, 1)]),
        scale=rng.choice([None, 0.3]),
        layout=rng.choice(["contiguous", "transposed", "sliced"]),
        lengths=lengths,
        page_size=rng.choice([None, None, 1, 4, 16]),
    )
    if op in ("fuse_kv", "fused_kv_attn_func"):
        q, keys, values, a, b = dense_inputs(case, CPU)
        if op == "fuse_kv":
            return Call(
                op, {"sources": keys, "weights": torch.randn(case.m_k, groups, 1) if a is None else a}
            )
        names = ("q", "keys", "values", "key_weights", "value_weights")
        options = {**case.options, **random_scores(case, rng)}
        if rng.random() < 0.2:
            options["attn_mask"] = torch.rand(case.H, case.S, case.T) < 0.8
        return Call(op, {**dict(zip(names, (q, keys, values, a, b), strict=True)), **options})
    (q, keys, values, a, b), state = cache_inputs(case, CPU)
    for cache in (*keys, *values):
        cache.nan_to_num_()
    if op == "fused_kv_attn_with_kvcache":
        names = ("q", "key_caches", "value_caches", "key_weights", "value_weights")
        options = {**state, **case.options, **random_scores(case, rng)}
        return Call(op, {**dict(zip(names, (q, keys, values, a, b), strict=True)), **options})
    arguments: dict[str, object] = {
        "key": torch.randn(case.B, case.S, groups, case.D).to(case.dtype),
        "value": torch.randn(case.B, case.S, groups, case.value_dim).to(case.dtype),
        "key_cache": keys[0],
        "value_cache": values[0],
        **state,
    }
    if rng.random() < 0.5:
        angles = torch.randn(case.T, rng.choice([4, case.D // 2]))
        arguments |= {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_interleaved": rng.random() < 0.5,
        }
        if rng.random() < 0.5:
            arguments["query"] = random_tensor((case.B, case.S, case.H, case.D), case.dtype, case.layout)
    return Call(op, arguments)


def random_scores(case: Case, rng: random.Random) -> dict[str, object]:
    """A soft cap, sinks and slopes, each in some calls."""
    scores: dict[str, object] = {}
    if rng.random() < 0.2:
        scores["softcap"] = rng.choice([0.5, 30.0])
    if rng.random() < 0.2:
        scores["sinks"] = torch.randn(case.H)
    if rng.random() < 0.2:
        scores["alibi_slopes"] = torch.rand((case.H,) if rng.random() < 0.5 else (case.B, case.H))
    return scores


def random_call(op: str, seed: int) -> Call:
    """The valid call of this seed after up to three changes of random arguments."""
    rng = random.Random(f"{op} {seed}")
    torch.manual_seed(rng.randrange(2**31))
    call = valid_call(op, rng)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
        change(call, rng)
    return call


def change(call: Call, rng: random.Random) -> None:
    """Does something to one argument, which may or may not make the call invalid."""
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    if isinstance(value, list):
        how, call.arguments[name] = changed_list(value, rng)
    elif isinstance(value, Tensor):
        how, call.arguments[name] = changed_tensor(value, rng)
    else:
        how, call.arguments[name] = "replaced", rng.choice(ODD_VALUES)
    new = call.arguments[name]
    infinite = isinstance(new, float) and not math.isfinite(new)
    if infinite or "non-finite" in how or "odd strides" in how:
        call.comparable = False
    call.done.append(f"{name}: {how}")


ODD_VALUES: list[object] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        -2,
        2**31,
        2**63 - 1,
        -(2**63),
        2**70,
        0.5,
        float("nan"),
        float("inf"),
        1j,
    ),
    *("", "text", b"bytes", object, (), [], {}, (1,), (1, 2), (-1, -5), (2**63 - 1, 2**63 - 1), (2**70, 0)),
    *(
        (0.5, 1.5),
        (None, None),
        ("a", "b"),
        (True, False),
        (1, 2, 3),
        [[1.0]],
        torch.float32,
        torch.tensor(1),
    ),
    *(torch.zeros(0), torch.ones(2, 3, 4, 5), torch.ones(1, 1, 1, 8, device="meta")),
]


def changed_list(tensors: list[Tensor], rng: random.Random) -> tuple[str, object]:
    """Another list of sources."""
    place = rng.randrange(len(tensors)) if tensors else 0
    ways: dict[str, Callable[[], object]] = {
        "emptied": list,
        "one left out": lambda: tensors[:place] + tensors[place + 1 :],
        "one twice": lambda: [*tensors, *tensors[place : place + 1]],
        "thirty-three of them": lambda: (tensors * 33)[:33],
        "tuple": lambda: tuple(tensors),
        "stacked": lambda: torch.stack(tensors),
        "lone tensor": lambda: tensors[place],
        "nested": lambda: [tensors],
        "replaced": lambda: rng.choice(ODD_VALUES),
        "odd element": lambda: [*tensors[:place], rng.choice(ODD_VALUES), *tensors[place + 1 :]],
    }
    if not tensors or not isinstance(tensors[place], Tensor):
        return "replaced", rng.choice(ODD_VALUES)
    if rng.random() < 0.4:
        return _attempt(rng.choice(list(ways)), ways)
    how, other = changed_tensor(tensors[place], rng)
    return f"[{place}] {how}", [*tensors[:place], other, *tensors[place + 1 :]]


def changed_tensor(x: Tensor, rng: random.Random) -> tuple[str, object]:
    """Another tensor, or something that is none."""
    ways = dict(TENSOR_CHANGES)
    if x.dtype == torch.int32:
        ways = {"entry": _odd_entry, "another entry": _odd_entry, **ways}
    return _attempt(rng.choice(list(ways)), {how: lambda how=how: ways[how](x, rng) for how in ways})


def _attempt(how: str, ways: dict[str, Callable[[], object]]) -> tuple[str, object]:
    """What a way of changing gives; None where torch itself cannot do it to what earlier changes left."""
    try:
        return how, ways[how]()
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return f"{how} (impossible)", None


def _odd_entry(x: Tensor, rng: random.Random) -> Tensor:
    x = x.clone()
    x.view(-1)[rng.randrange(x.numel())] = rng.choice([-1, 0, 1, 2, 13, 14, 10**6, 2**31 - 1, -(2**31)])
    return x


def _other_dtype(x: Tensor, rng: random.Random) -> Tensor:
    kinds = "int64 int32 bool uint8 complex64 float64 float32 float16 bfloat16 float8_e4m3fn"
    return x.to(getattr(torch, rng.choice(kinds.split())))


def _non_finite(x: Tensor, rng: random.Random) -> Tensor:
    x = x.clone()
    x.view(-1)[rng.randrange(x.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38])
    return x


def _narrowed(x: Tensor, rng: random.Random) -> Tensor:
    dim = rng.randrange(x.dim())
    return x.narrow(dim, 0, rng.randrange(x.shape[dim]))


def _repeated(x: Tensor, rng: random.Random) -> Tensor:
    dim = rng.randrange(x.dim())
    return torch.cat([x] * rng.choice([2, 3, 9]), dim)


def _transposed(x: Tensor, rng: random.Random) -> Tensor:
    return x.transpose(rng.randrange(x.dim()), rng.randrange(x.dim()))


def _gap(x: Tensor, rng: random.Random) -> Tensor:
    """The same values with a gap between neighbors of a random dim."""
    dim = rng.randrange(x.dim())
    index = [slice(None)] * x.dim()
    index[dim] = slice(None, None, 2)
    return x.repeat_interleave(2, dim)[tuple(index)]


def _negative_view(x: Tensor, rng: random.Random) -> Tensor:
    """A tensor whose memory holds the opposite of its values."""
    if x.element_size() == 1:
        raise TypeError("torch cannot negate float8 and the like")
    return torch._neg_view(x.clone())


TENSOR_CHANGES: dict[str, Callable[[Tensor, random.Random], object]] = {
    "dtype": _other_dtype,
    "another dtype": _other_dtype,
    "meta": lambda x, rng: x.to("meta"),
    "sparse": lambda x, rng: x.to_sparse(),
    "nested": lambda x, rng: torch.nested.nested_tensor(list(x)),
    "first entry": lambda x, rng: x[0],
    "one more dim": lambda x, rng: x.unsqueeze(rng.randrange(x.dim() + 1)),
    "narrowed": _narrowed,
    "repeated": _repeated,
    "transposed": _transposed,
    "gaps": _gap,
    "expanded": lambda x, rng: x[:1].clone().expand_as(x),
    "odd strides": lambda x, rng: x.clone().as_strided(x.shape, [rng.choice([0, 1]) for _ in x.shape]),
    "non-finite": _non_finite,
    "requires grad": lambda x, rng: x.clone().requires_grad_(),
    "parameter": lambda x, rng: torch.nn.Parameter(x.clone()),
    "negative view": _negative_view,
    "empty": lambda x, rng: x.new_empty(0),
    "scalar": lambda x, rng: x.new_ones(()),
    "list": lambda x, rng: x.tolist(),
    "replaced": lambda x, rng: rng.choice(ODD_VALUES),
}


def check(call: Call) -> bool:
    """True: the call succeeded and agrees with the oracle. False: it was refused. Anything else raises."""
    if call.op == "append_kvcache":
        return _check_append(call)
    try:
        got = call.run()
    except (ValueError, TypeError) as error:
        assert str(error).strip(), "an error without a message"
        return False
    outputs = got if isinstance(got, tuple) else (got,)
    assert all(isinstance(x, Tensor) for x in outputs)
    if not call.comparable or any(x.device.type == "meta" for x in outputs):
        return True
    oracle = getattr(reference, call.op)
    with torch.no_grad():
        exact, same_maths = oracle(**call.arguments, dtype=torch.float64), oracle(**call.arguments)
    # Among thousands of calls torch is lucky in some: the atol is that of a sum of all channels of all
    # sources. The log-sum-exp has the rounding of fused keys.
    if isinstance(got, tuple):
        got = (got[0], got[1].to(got[0].dtype))
    assert_close(got, exact, same_maths, terms=64)
    return True


def _check_append(call: Call) -> bool:
    names = ("key_cache", "value_cache")
    before = {
        name: x.clone() for name in names if isinstance(x := call.arguments[name], Tensor) and _plain(x)
    }
    try:
        rotated = call.run()
    except (ValueError, TypeError) as error:
        assert str(error).strip(), "an error without a message"
        for name, old in before.items():
            assert_same_bits(call.arguments[name].detach(), old.detach())
        return False
    if not call.comparable or len(before) < 2 or "expanded" in str(call.done):
        return True
    results = []
    for dtype in (torch.float64, call.arguments["key"].dtype):
        caches = {name: old.detach().to(dtype, copy=True) for name, old in before.items()}
        expected = append(reference, **{**call.arguments, **caches}, dtype=dtype)
        results.append((*caches.values(), *([] if expected is None else [expected])))
    got = (*(call.arguments[name] for name in names), *([] if rotated is None else [rotated]))
    assert_close(got, *results, terms=4)
    return True


def _plain(x: Tensor) -> bool:
    """An ordinary tensor whose bits can be compared."""
    ordinary = x.layout == torch.strided and x.device.type == "cpu" and not x.is_nested and not x.is_neg()
    return ordinary and x.element_size() in (2, 4, 8)


class RecordedCalls(TorchDispatchMode):
    """Collects the calls of torch.ops.fusedkv.* that happen while it is on, as (op, args, kwargs)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedkv":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def native_calls(seed: int) -> list[tuple[torch._ops.OpOverload, tuple, dict]]:
    """What the valid calls of a seed hand to the native operations, backward passes included."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with RecordedCalls() as recorded:
        for op in OPS:
            call = valid_call(op, rng)
            if op in ("fuse_kv", "fused_kv_attn_func"):
                for x in call.tensors():
                    x.requires_grad_(x.is_floating_point())
                out = call.run()
                (out[0] if isinstance(out, tuple) else out).sum().backward()
            else:
                call.run()
        run_the_others(rng)
    return recorded.calls


def run_the_others(rng: random.Random) -> None:
    """Native operations that small calls of OPS do not lead to."""
    sources, weights = valid_call("fuse_kv", rng).arguments.values()
    grad = torch.randn(sources[0].shape).to(sources[0].dtype)
    sum_dtype = rng.choice([torch.float32, grad.dtype])
    sums = [torch.zeros(grad.shape, dtype=sum_dtype) for _ in sources]
    fusedkv_ext.fuse_kv_backward(grad, sources, weights, grad_sources=sums)
    call = valid_call("fused_kv_attn_with_kvcache", rng).arguments
    caches = call["key_caches"]
    out = torch.empty(*call["q"].shape[:3], call["value_caches"][0].shape[3], dtype=caches[0].dtype)
    workspace = torch.empty(9) if rng.random() < 0.5 else None
    fusedkv_ext.fused_kv_attn_with_kvcache(**call, out=out, workspace=workspace)
    weights = torch.randn(len(caches), *caches[0].shape[2:])
    tokens = rng.choice([1, 5, 13])
    torch.ops.fusedkv.fuse_kvcache(caches, weights, call["cache_seqlens"], call["block_table"], tokens)
    torch.ops.fusedkv.attn_schedule(call["cache_seqlens"], tokens, 4, 2, 100, -1, rng.choice([True, False]))
    outs = [torch.randn(2, tokens, 3, 16).to(caches[0].dtype) for _ in range(rng.choice([1, 2, 3]))]
    torch.ops.fusedkv.merge_states(outs, [torch.randn(2, 3, tokens) for _ in outs])


def native_op_names() -> set[str]:
    """Every operation that is registered under fusedkv."""
    return {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fusedkv::")}


def changed_native_calls(count: int) -> Iterator[tuple[torch._ops.OpOverload, list, dict]]:
    """Native calls with one to three changed arguments; no Python layer stands before their checks."""
    rng = random.Random(count)
    made = 0
    while made < count:
        for op, args, kwargs in native_calls(made):
            for _ in range(5):
                changed = list(args)
                for place in rng.sample(range(len(changed)), min(rng.choice([1, 1, 2, 3]), len(changed))):
                    value = changed[place]
                    if isinstance(value, (list, tuple)):
                        changed[place] = changed_list(list(value), rng)[1]
                    elif isinstance(value, Tensor):
                        changed[place] = changed_tensor(value.detach(), rng)[1]
                    else:
                        changed[place] = rng.choice(ODD_VALUES)
                yield op, changed, kwargs
                made += 1


def main(count: int) -> None:
    """Makes changed native calls; any Python exception is a fine answer, a crash is not."""
    faulthandler.enable()
    torch.set_num_threads(1)
    refused = 0
    for op, args, kwargs in changed_native_calls(count):
        last = f"{op}({', '.join(_short(x) for x in args)})"
        with open("last_call.txt", "w") as log:
            log.write(last)
        try:
            with torch.no_grad():
                op(*args, **kwargs)
        except Exception:
            refused += 1
    print(f"refused {refused}")
