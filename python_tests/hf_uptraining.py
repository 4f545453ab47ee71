"""Folders of tiny models, a text and settings for tests of uptraining."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusedkv_ext.hf import FusedKVLlamaForCausalLM, config_for
from fusedkv_ext.plan import CachePlan

WORDS = "the cache of a layer holds keys and values that another layer reads again".split()
SMALL = dict(steps=6, batch_size=2, seq_len=32, valid_tokens=256, valid_window=64, validations=1, lr=3e-3)


@contextmanager
def one_thread_and_cache(folder: Path) -> Iterator[None]:
    """Resuming bit for bit is promised for an equal number of threads. Token files go to ``folder``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield
    torch.set_num_threads(threads)


def write_tokenizer(path: Path, size: int) -> None:
    """Words as tokens, and as many unused ones as it takes to have `size`."""
    tokens = ["<unk>", "<|endoftext|>", *dict.fromkeys(WORDS)]
    tokens += [f"unused{i}" for i in range(size - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def write_model(folder: Path, converted_from: Path | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """A plain Llama, or one on the plan "fusedkv" with the weights of such a folder and a conversion.json."""
    if converted_from is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            attention_dropout=0.5,
        )
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    else:
        plain = LlamaForCausalLM.from_pretrained(converted_from, dtype="auto")
        config = config_for(plain.config, CachePlan.named("fusedkv", 4))
        model = FusedKVLlamaForCausalLM(config).to(plain.dtype)
        found = model.load_state_dict(plain.state_dict(), strict=False)
        assert found.missing_keys and all("kv_fusion" in name for name in found.missing_keys)
        model.tie_weights()
        model.save_pretrained(folder)
        changed = [*found.missing_keys, "model.layers.3.self_attn.o_proj.weight"]
        conversion = {"original": str(converted_from), "plan": "fusedkv", "changed": changed, "note": 1}
        (folder / "conversion.json").write_text(json.dumps(conversion))
    write_tokenizer(folder / "tokenizer.json", 32)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_text(path: Path) -> Path:
    path.write_text("\n".join(" ".join(WORDS[i % 5 :] + WORDS[: i % 3]) for i in range(1200)))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: p.detach() for name, p in model.named_parameters()}
