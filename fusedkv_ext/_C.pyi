"""Types of the native module (csrc/bindings.cpp)."""

from typing import Any

def build_info() -> dict[str, Any]:
    """What this module was built with."""

def decode_launch(
    batch: int,
    rows: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    num_keys: int,
    num_values: int,
    element_size: int,
    cost: int,
    capacity: int,
    batch_invariant: bool,
    sm_count: int,
    shared_per_block: int,
    coded: bool,
) -> dict[str, Any]:
    """The GPU kernel of a cached-attention call, its block and its grid."""

def cpu_levels() -> list[str]:
    """SIMD targets of this build that this CPU supports, best first."""

def cpu_level() -> str:
    """The SIMD target in use."""

def set_cpu_level(target: str, /) -> bool:
    """Use this SIMD target from now on; False if it is not one of cpu_levels()."""

def advise_huge_pages(address: int, nbytes: int) -> bool:
    """Requests huge pages for memory that is not yet written; False if it has no whole huge page."""

def workspace_allocations() -> int:
    """How often the scratch memory of the CPU threads has grown."""

def kept_memory_bytes() -> int:
    """Bytes of freed CPU results kept for reuse."""

def release_kept_memory() -> None:
    """Returns that memory to the system."""
