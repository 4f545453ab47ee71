"""fusedkv generate: continue a prompt with a trained model, token by token, with its KV cache.

The checkpoint is the --out folder of a training run (its newest checkpoint), a folder with
config.json and model.safetensors, or a Hugging Face folder with any causal language model. Processes that
torchrun starts shard the heads of the model, and with them weights and cache. For a Hugging Face folder the
last line, on stderr, has the memory that the cache holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fusedkv_ext.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fusedkv_ext.training.data.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a run, checkpoint or model, or ORG/NAME")
    parser.add_argument("--prompt", default="", help="text to continue; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="only the K most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the sampling (default: random)")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json (default: the one of the run)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def _prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of the prompt; an empty one starts a new document."""
    ids = tokenizer.encode(text)
    if not ids:
        if tokenizer.separator is None:
            raise ConfigError("--prompt must not be empty: the tokenizer has no token that starts a document")
        ids = [tokenizer.separator]
    return ids


def run(args: argparse.Namespace) -> int:
    from fusedkv_ext.training import session

    with session.session():
        return _generate(args)


def _generate(args: argparse.Namespace) -> int:
    import torch

    from fusedkv_ext.cli.models import load_model
    from fusedkv_ext.generation.sampling import Sampling
    from fusedkv_ext.training import session

    try:
        Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be >= 1, got {args.max_new_tokens}")
    loaded = load_model(args.checkpoint, args.tokenizer, device=args.device, dtype=args.dtype)
    model, tokenizer = loaded.model, loaded.tokenizer
    speaks = session.rank() == 0
    text = args.prompt
    if text == "-":
        text = session.from_rank_zero(sys.stdin.read() if speaks else "")
    seed = args.seed
    if session.world_size() > 1 and seed is None:  # all ranks must draw the same tokens
        seed = session.from_rank_zero(torch.Generator().seed())
    ids = _prompt_ids(text, tokenizer)
    decoder, new_ids, pieces = tokenizer.stream(), [], []

    def show(piece: str) -> None:
        pieces.append(piece)
        if speaks and not args.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def take(tokens: Tensor) -> None:
        new_ids.append(int(tokens[0]))
        if new_ids[-1] not in loaded.ends:
            show(decoder.push(new_ids[-1]))

    if speaks and not args.json:
        sys.stdout.write(text)
        sys.stdout.flush()
    started = time.perf_counter()
    model.generate(
        torch.tensor([ids]),
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=seed,
        stop=tokenizer.separator,
        stream=take,
    )
    seconds = time.perf_counter() - started
    show(decoder.finish())
    if not speaks:
        return 0
    cache_bytes = getattr(model, "resident_cache_bytes", None)
    if args.json:
        result = {
            "checkpoint": str(loaded.folder),
            "plan": loaded.plan,
            "prompt": text,
            "text": "".join(pieces),
            "prompt_tokens": len(ids),
            "new_tokens": len(new_ids),
            "seconds": seconds,
            "cache_bytes": cache_bytes,
        }
        print(json.dumps(result))
    else:
        print()
        if cache_bytes is not None:
            tokens = len(ids) + len(new_ids) - 1  # the last one is not stored
            print(f"cache: {cache_bytes / 1024:,.1f} KiB for {tokens:,} tokens", file=sys.stderr)
    return 0
