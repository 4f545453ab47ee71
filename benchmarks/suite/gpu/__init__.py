"""The GPU suite.

tasks: what is measured, in which sizes. decode, operations, prefill, model: the families. lab, inputs, peers,
triton_fused: roofs and buffers, caches and rivals of cached attention. worker, supervise: the process that
measures and the one that watches it.
"""
