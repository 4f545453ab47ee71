"""The parts of benchmarks/cpu.py, benchmarks/gpu.py and benchmarks/serving.py.

measure: entries, cells, rows, and the rounds in which they are timed. clocks: the host's, the GPU's and that
of dry runs. machine: where numbers come from. report: the terminal. tables: the documents. pointwise,
decoders: what both devices time and check. cpu, gpu: families, peers and sizes of a device. serving: engines
of vLLM.
"""
