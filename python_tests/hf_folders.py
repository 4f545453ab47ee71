"""Plain tiny Llamas and Hugging Face folders of them, that the tests of fusedkv_ext.hf share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

END = "<|endoftext|>"
SIZES = dict(
    vocab_size=264,  # bytes, the end of a text, and some padding
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,  # else all tokens are about equally likely and nothing shows
)


def tiny_llama(**settings: Any) -> Any:
    """A plain LlamaForCausalLM in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SIZES, "bos_token_id": 256, "eos_token_id": 256, **settings})
    return LlamaForCausalLM(config).eval()


def converted(model: Any, plan: str = "fusedkv", **options: Any) -> Any:
    """The weights of a plain Llama on a plan, as far as their shapes fit, with random fusion weights."""
    from fusedkv_ext.hf import FusedKVLlamaForCausalLM, config_for
    from fusedkv_ext.plan import CachePlan

    plan = CachePlan.named(plan, model.config.num_hidden_layers, **options)
    on_plan = FusedKVLlamaForCausalLM(config_for(model.config, plan)).eval()
    shapes = {name: weight.shape for name, weight in on_plan.state_dict().items()}
    fitting = {name: w for name, w in model.state_dict().items() if shapes.get(name) == w.shape}
    on_plan.load_state_dict(fitting, strict=False)
    with torch.no_grad():
        for name, weight in on_plan.named_parameters():
            if "kv_fusion" in name:
                weight.copy_(torch.randn_like(weight))
    return on_plan


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer.json whose tokens are the 256 bytes and END."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)


def save_folder(model: Any, folder: Path, **settings: Any) -> Path:
    """A Hugging Face folder of a model, with the tokenizer of bytes."""
    model.save_pretrained(folder, **settings)
    save_byte_tokenizer(folder)
    return folder
