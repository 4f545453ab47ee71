"""Planner: memory, traffic and FLOPs per GPU of training and serving a decoder, from formulas.

Every quantity is one short function with its formula. Tests compare the formulas with the decoder: parameters
and saved activations are counted on the meta device, and traffic in runs of several processes. Nothing here
is measured on a GPU.
"""

from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.memory import memory
from fusedkv_ext.lab.planner.serving import Server
from fusedkv_ext.lab.planner.traffic import traffic

__all__ = ["Job", "Server", "memory", "traffic"]
