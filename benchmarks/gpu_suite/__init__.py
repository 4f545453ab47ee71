"""The parts of benchmarks/gpu.py.

measure: clock, roofs, rows. cells, order: what is measured, in which order. decode, operations, prefill,
model: the families. inputs, peers, triton_fused: caches and rivals of cached attention. worker, supervise:
the process that measures and the one that watches it. report: tables.
"""
