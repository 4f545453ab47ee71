"""AttentionCall and AppendCall: the fields that the native operations get by position."""

from __future__ import annotations

import torch
from cases import Case, cache_inputs

from fusedkv_ext.ops.call import AppendCall, AttentionCall

# Where a field and the argument of the operation have different names.
RENAMED = {
    "keys": "key_caches",
    "values": "value_caches",
    "scale": "softmax_scale",
    "left": "window_left",
    "right": "window_right",
}


def arguments(name: str) -> list[str]:
    return [x.name for x in getattr(torch.ops.fusedkv, name).default._schema.arguments]


def test_fields_are_the_arguments_of_the_operations_in_their_order() -> None:
    expected = arguments("attn_with_kvcache")
    assert [RENAMED.get(name, name) for name in AttentionCall._fields[: len(expected)]] == expected
    assert list(AppendCall._fields) == arguments("append_kvcache")


def test_some_sequences_of_a_call() -> None:
    for page_size in (None, 4):
        case = Case("sequences", B=3, S=2, T=12, lengths=(12, 5, 1), page_size=page_size)
        (q, keys, values, a, b), state = cache_inputs(case, torch.device("cpu"))
        window = (0.5, -1, 0)
        call = AttentionCall(q, keys, values, a, b, *state.values(), *window, host_seqlens=case.lengths)
        out, lse = call.fold()
        for i in range(3):
            alone = call.sequences(slice(i, i + 1))
            assert alone.host_seqlens == [case.lengths[i]] and alone.capacity == call.capacity == 12
            for got, all_of_them in zip(alone.fold(), (out, lse), strict=True):
                torch.testing.assert_close(got, all_of_them[i : i + 1])
