"""fusedkv export: write a checkpoint of a training run as one folder with config.json and model.safetensors.

RUN is the --out folder of a run, whose newest checkpoint is used, or one of its checkpoints, from any number
of processes. Weights and tokenizer are exported; the optimizer state is not read. `fusedkv generate`,
`fusedkv eval` and `fusedkv_ext.load_pretrained` load the folder, even with a torch without torch.distributed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from fusedkv_ext.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run or a checkpoint")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument(
        "--hf",
        action="store_true",
        help="write a folder of transformers, for vLLM too: a Qwen3 with the plan, without QK-norm a Llama",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of all weights except fusion weights, which stay float32 (default: as in the checkpoint)",
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from fusedkv_ext.checkpoint import checked_files
    from fusedkv_ext.checkpoint.pretrained import is_huggingface, load_pretrained, save_pretrained
    from fusedkv_ext.extras import need
    from fusedkv_ext.training import run_folder
    from fusedkv_ext.training.data.tokenizer import saved_tokenizer

    if args.folder.exists():
        raise ConfigError(f"FOLDER must not exist, got {args.folder}; choose another one")
    if is_huggingface(args.run_folder):
        raise ConfigError(
            f"RUN must be the folder of a training run, got the Hugging Face folder {args.run_folder}, which "
            "needs no export"
        )
    need("safetensors", "Exporting", "io")
    found = run_folder.resolve(args.run_folder)
    model = load_pretrained(found, dtype=getattr(torch, args.dtype) if args.dtype else None)
    if args.hf:
        need("transformers", "Exporting with --hf", "hf")
        from fusedkv_ext.hf.decoder_export import from_decoder, save_tokenizer

        try:
            made = from_decoder(model)
        except ValueError as error:
            raise ConfigError(f"--hf: {error}") from error
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.folder.with_name(f".partial-{args.folder.name}-{os.getpid()}")
    try:
        with checked_files.naming(args.folder):
            tokenizer = saved_tokenizer(found)
            if args.hf:
                made.save_pretrained(scratch)
                save_tokenizer(tokenizer, scratch)
            else:
                save_pretrained(model, scratch)
                tokenizer.save(scratch)
            run_folder.publish(scratch, args.folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {
        "checkpoint": str(found),
        "folder": str(args.folder),
        "plan": model.plan.name,
        "parameters": parameters,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.folder}: {model.plan.name}, {parameters:,} parameters, of {found}")
    return 0
