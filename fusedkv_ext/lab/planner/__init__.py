"""Planning on paper: what a decoder of any plan needs per GPU to be trained and served, from formulas.

Every quantity is one short function with its formula. Tests compare them with the decoder itself: parameters
and what autograd keeps are counted on the meta device, messages in runs of several processes. Nothing here
has been measured on a GPU.
"""

from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.memory import memory
from fusedkv_ext.lab.planner.serving import Server
from fusedkv_ext.lab.planner.traffic import traffic

__all__ = ["Job", "Server", "memory", "traffic"]
