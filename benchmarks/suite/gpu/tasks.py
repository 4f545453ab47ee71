"""What a task is, and the shapes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suite.gpu.lab import Lab
    from suite.measure import Row

TITLES = {
    "decode": "Cached attention, one query token",
    "coded": "Caches of codes",
    "latency": "Latency, one sequence",
    "schedule": "Schedules",
    "crossover": "Folding against fusing once, by query rows",
    "head_dim": "Other head dims",
    "layout": "Order of a page in memory",
    "ragged": "Ragged batches",
    "chunked": "Chunked prefill over pages",
    "fuse": "Fusing",
    "append": "Appending to the cache",
    "prefill": "Attention of a layer over a prompt",
    "model": "Whole decoders",
}
FAMILIES = tuple(TITLES)
NO_TIME = "no time left"


@dataclass(frozen=True)
class Task:
    """One or a few rows.

    priority: 0 first, ``--headline`` stops after it, ``--quick`` after 1. num_bytes: device memory it needs.
    """

    family: str
    name: str
    priority: int
    num_bytes: int
    measure: Callable[[Lab], Iterable[Row]]

    @property
    def key(self) -> str:
        return f"{self.family}: {self.name}"


@dataclass(frozen=True)
class Model:
    """A decoder's sizes; the defaults are those of the common 1.5B models."""

    name: str
    kv_heads: int
    hidden: int = 1536
    intermediate: int = 8960
    layers: int = 28
    heads: int = 12
    head_dim: int = 128
    vocab: int = 151936


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run. The middle batch, context and ratio and the first page size are the headline."""

    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024, 8192, 65536)
    ratios: tuple[int, ...] = (1, 4, 8)
    pages: tuple[int | None, ...] = (16, None, 64)
    kv_heads: int = 8
    head_dim: int = 128
    head_dims: tuple[int, ...] = (64, 256)
    crossover_rows: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    crossover_contexts: tuple[int, ...] = (4096, 32768)
    chunks: tuple[int, ...] = (512, 1024, 2048)
    latency_kv_heads: int = 4
    latency_contexts: tuple[int, ...] = (1024, 8192, 16384)
    ragged: tuple[int, ...] = (4641, 45118, 1730, 1696)
    fuse_tokens: tuple[int, ...] = (16384, 65536)
    fuse_sources: tuple[int, ...] = (2, 3)
    appends: tuple[tuple[int, int], ...] = ((64, 1), (1, 4096), (8, 256))
    prefill_tokens: tuple[int, ...] = (4096, 16384)
    prefill_hidden: int = 2048
    prefill_heads: int = 16
    models: tuple[Model, ...] = (Model("1.5B GQA", 2), Model("1.5B MHA", 12))
    prompts: tuple[tuple[int, int], ...] = ((1, 8192), (16, 8192), (1, 32768))
    new_tokens: int = 24


TINY = Sizes(
    batches=(1, 2, 3),
    contexts=(16, 64, 100),
    ratios=(1, 2, 4),
    pages=(16, None, 64),
    kv_heads=2,
    head_dim=32,
    head_dims=(16, 64),
    crossover_rows=(4, 8, 40),
    crossover_contexts=(48,),
    chunks=(8, 20),
    latency_kv_heads=2,
    latency_contexts=(64,),
    ragged=(37, 90, 9, 5),
    fuse_tokens=(64,),
    fuse_sources=(2, 3),
    appends=((3, 1), (1, 20), (2, 8)),
    prefill_tokens=(48,),
    prefill_hidden=64,
    prefill_heads=4,
    models=(Model("tiny", 2, 64, 96, 4, 4, 16, 128),),
    prompts=((2, 40),),
    new_tokens=6,
)
