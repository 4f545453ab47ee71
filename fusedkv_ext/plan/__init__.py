"""The cache plan: a table of the source layers of every layer's keys and values.

Cross-layer cache methods differ only in this table. Each layer has *segments* of its KV heads, for keys and
for values separately. Each segment names its source layers. Two rules give the table its meaning:

* A layer *stores* the heads of the segments that name the layer itself. If such a segment has other sources
  too, the layer mixes before it stores (ResFormer, YOCO++), and later readers read the mix.
* A layer does not store the heads of segments that name only other layers. It mixes their stored tensors when
  it reads (FusedKV).

Layers count from 0 here; the papers count from 1. methods.py has the published methods by name, and
docs/methods.md lists them.
"""

from fusedkv_ext.plan.cache_plan import CachePlan
from fusedkv_ext.plan.latent import LatentLayer, latent_layers
from fusedkv_ext.plan.methods import METHODS
from fusedkv_ext.plan.pieces import GRANULARITIES, Fusion, LayerPlan, ResolvedSegment, Segment
from fusedkv_ext.plan.registry import Method, method
from fusedkv_ext.plan.windows import check_windows

__all__ = [
    "GRANULARITIES",
    "METHODS",
    "CachePlan",
    "Fusion",
    "LatentLayer",
    "LayerPlan",
    "Method",
    "ResolvedSegment",
    "Segment",
    "check_windows",
    "latent_layers",
    "method",
]
