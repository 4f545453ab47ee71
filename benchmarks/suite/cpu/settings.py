"""Sizes of the suite: the full run, `--quick`, and tiny ones with which tests run every row in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

FAMILIES = ("decode", "coded", "fuse", "prefill", "train", "model")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Shape = dict[str, Any]  # arguments of DecoderConfig


def _shape(hidden: int, heads: int, kv_heads: int, layers: int = 8, vocab: int = 4096) -> Shape:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1 << 17,
    }


@dataclass(frozen=True)
class Settings:
    """What a run covers.

    G and D: KV heads and head dim of the operations. groups: query heads per KV head. dtypes: of the rows
    that exist in several; dtype: of all others. cache_bytes: of keys and values together. contexts, batches:
    of the curves; batch_tokens: context of the latter. short: contexts of caches that stay in L2. fuse_bytes:
    of one tensor. decode_tokens, short_tokens: contexts of whole models. compile_peers: flex_attention too.
    memory: of training, in processes of their own. longest: no curve goes beyond that context.
    """

    name: str = "full"
    rounds: int = 15
    roof_bytes: int = 256 << 20
    cold_bytes: int = 512 << 20
    cache_bytes: int = 128 << 20
    fuse_bytes: int = 32 << 20
    G: int = 8
    D: int = 128
    groups: tuple[int, ...] = (1, 4, 8)
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    dtype: str = "bfloat16"
    contexts: tuple[int, ...] = tuple(1 << i for i in range(6, 18))
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    batch_tokens: int = 4096
    short: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    append_tokens: int = 2048
    prompts: tuple[int, ...] = (2048, 4096)
    train_tokens: int = 1024
    train_batch: int = 2
    decode_tokens: int = 8192
    short_tokens: int = 512
    prefill_shape: Shape = field(default_factory=lambda: _shape(512, 8, 8))
    train_shape: Shape = field(default_factory=lambda: _shape(512, 8, 8))
    cache_bound: Shape = field(default_factory=lambda: _shape(512, 8, 8))
    cache_bound_batch: int = 4
    weight_bound: Shape = field(default_factory=lambda: _shape(1536, 12, 2))
    tiny_shape: Shape = field(default_factory=lambda: _shape(32, 2, 2, vocab=64))
    compile_peers: bool = True
    memory: bool = True
    longest: int = 1 << 30

    @property
    def full(self) -> bool:
        return self.name == "full"

    @property
    def host_dtype(self) -> str:
        """Of training, and of what only measures the host."""
        return "float32" if "float32" in self.dtypes else self.dtype

    def twin(self) -> Settings:
        """The same cells at a size that brings their code into the caches and little else."""
        return replace(
            self,
            cache_bytes=min(self.cache_bytes, 4 << 20),
            fuse_bytes=min(self.fuse_bytes, 1 << 18),
            append_tokens=min(self.append_tokens, 64),
            batch_tokens=min(self.batch_tokens, 256),
            longest=1024,
        )

    def only(self, dtype: str) -> Settings:
        """The rows of one dtype."""
        return replace(self, dtypes=(dtype,), dtype=dtype)


FULL = Settings()

QUICK = replace(
    FULL,
    name="quick",
    rounds=5,
    cache_bytes=64 << 20,
    cold_bytes=256 << 20,
    fuse_bytes=16 << 20,
    groups=(1, 4),
    dtypes=("bfloat16", "float16", "float32"),
    contexts=(128, 1024, 8192, 16384),
    batches=(1, 4),
    short=(128, 2048),
    prompts=(2048,),
    prefill_shape=_shape(256, 4, 4),
    train_shape=_shape(256, 4, 4),
    weight_bound=_shape(1024, 8, 1),
    train_tokens=512,
    compile_peers=False,
)

TINY = replace(
    QUICK,
    name="tiny",
    rounds=2,
    roof_bytes=1 << 16,
    cold_bytes=1 << 16,
    cache_bytes=1 << 17,
    fuse_bytes=1 << 16,
    G=2,
    D=32,
    contexts=(64, 128),
    batches=(1, 2),
    batch_tokens=64,
    short=(128,),
    append_tokens=16,
    prompts=(64,),
    train_tokens=32,
    train_batch=1,
    decode_tokens=64,
    short_tokens=32,
    prefill_shape=_shape(32, 2, 2, vocab=64),
    train_shape=_shape(32, 2, 2, vocab=64),
    cache_bound=_shape(32, 2, 2, vocab=64),
    weight_bound=_shape(32, 2, 1, vocab=64),
    cache_bound_batch=1,
    memory=False,
)
