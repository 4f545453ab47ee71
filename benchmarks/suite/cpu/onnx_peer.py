"""A peer that is not torch: GroupQueryAttention of ONNX Runtime on the CPU (`pip install onnx onnxruntime`).

Its call stores the key and value of a new token and then attends. Past and present are one buffer, (B, G, T,
D), which is bound once, so that nothing is copied. The new token is the last of the T tokens: the call reads
what ours reads, and writes one token more. Threads are as many as torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

NAME = "ONNX Runtime GroupQueryAttention"
DTYPES = (torch.float32, torch.float16)  # it has no bfloat16 on the CPU


def available(dtype: torch.dtype) -> bool:
    """Whether the packages are installed and the dtype is supported."""
    return dtype in DTYPES and find_spec("onnx") is not None and find_spec("onnxruntime") is not None


def group_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """A call for q (B, 1, H, D) and k, v (B, G, T, D), contiguous; it returns (B, 1, H, D)."""
    import numpy as np
    import onnxruntime as ort

    (B, _, H, D), (_, G, T, _) = q.shape, k.shape
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning between calls, on the cores of whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(_model(H, G, q.dtype), options, providers=["CPUExecutionProvider"])
    numbers = np.float32 if q.dtype == torch.float32 else np.float16
    new = [x[:, :, -1].reshape(B, 1, G * D).contiguous() for x in (k, v)]
    out = torch.empty(B, 1, H * D, dtype=q.dtype)
    query = q.reshape(B, 1, H * D).contiguous()
    binding = session.io_binding()
    lengths = np.full(B, T - 1, dtype=np.int32)  # one less than the tokens after the call

    def pointer(x: Tensor) -> dict[str, Any]:
        return {
            "device_type": "cpu",
            "device_id": 0,
            "element_type": numbers,
            "shape": tuple(x.shape),
            "buffer_ptr": x.data_ptr(),
        }

    for name, x in (("query", query), ("key", new[0]), ("value", new[1]), ("past_key", k), ("past_value", v)):
        binding.bind_input(name, **pointer(x))
    binding.bind_cpu_input("seqlens_k", lengths)
    binding.bind_cpu_input("total_sequence_length", np.array(T, dtype=np.int32))
    for name, x in (("output", out), ("present_key", k), ("present_value", v)):
        binding.bind_output(name, **pointer(x))

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return out.view(B, 1, H, D)

    run.kept = (query, new, k, v, lengths)  # type: ignore[attr-defined]  # the binding has addresses only
    return run


def _model(num_heads: int, kv_heads: int, dtype: torch.dtype) -> bytes:
    """A graph of the one operation."""
    from onnx import TensorProto, helper

    element = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    inputs = ["query", "key", "value", "past_key", "past_value"]
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention",
        [*inputs, "seqlens_k", "total_sequence_length"],
        outputs,
        domain="com.microsoft",
        num_heads=num_heads,
        kv_num_heads=kv_heads,
    )

    def info(name: str, kind: int, rank: int) -> Any:
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    ranks = {"past_key": 4, "past_value": 4, "present_key": 4, "present_value": 4}
    graph = helper.make_graph(
        [node],
        "decode",
        [
            *[info(name, element, ranks.get(name, 3)) for name in inputs],
            info("seqlens_k", TensorProto.INT32, 1),
            info("total_sequence_length", TensorProto.INT32, 0),
        ],
        [info(name, element, ranks.get(name, 3)) for name in outputs],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
