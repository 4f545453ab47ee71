"""The cache plan: a table that says, layer by layer, where keys and values come from.

Cross-layer cache methods differ only in this table. Each layer has *segments* of its KV heads, for keys and
for values separately, and each segment names its source layers. Two rules give the table its meaning:

* A layer *stores* the heads of the segments that name the layer itself. With other sources beside it, it
  mixes before it stores (ResFormer, YOCO++), and everybody who reads it later reads the mix.
* Heads of segments that name only other layers are not stored: the layer mixes what others stored when it
  reads (FusedKV).

Layers count from 0 here; the papers count from 1. methods.py has the published methods by name, and
docs/methods.md shows them.
"""

from fusedkv_ext.plan.cache_plan import CachePlan
from fusedkv_ext.plan.latent import LatentLayer, latent_layers
from fusedkv_ext.plan.methods import METHODS
from fusedkv_ext.plan.pieces import GRANULARITIES, Fusion, LayerPlan, ResolvedSegment, Segment
from fusedkv_ext.plan.registry import Method, method

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
    "latent_layers",
    "method",
]
