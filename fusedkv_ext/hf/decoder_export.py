"""Decoders of this package as models of transformers, with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fusedkv_ext.extras import need
from fusedkv_ext.hf.config import FusedKVLlamaConfig, FusedKVQwen3Config
from fusedkv_ext.layers.decoder_config import POSITIVE_FIELDS
from fusedkv_ext.training.data.tokenizer import FileTokenizer, Tokenizer

if TYPE_CHECKING:
    from fusedkv_ext.layers.decoder import Decoder
    from fusedkv_ext.layers.decoder_config import DecoderConfig

__all__ = ["from_decoder", "save_tokenizer"]

_SAME = (*POSITIVE_FIELDS, "rms_norm_eps", "tie_word_embeddings", "attention_bias", "initializer_range")


def from_decoder(model: Decoder) -> PreTrainedModel:
    """The model of transformers with the plan and the weights of a decoder, which are copied.

    A decoder with ``qk_norm`` is a Qwen3, one without is a Llama.

    Args:
        model: The decoder.

    Raises:
        ValueError: Neither can hold latent attention, experts, interleaved RoPE, or windows without
            ``qk_norm``.
    """
    config = model.config
    _check(config)
    fields: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    fields["rope_parameters"] = {
        "rope_type": "default",
        **(config.rope_scaling or {}),
        "rope_theta": config.rope_theta,
    }
    fields["cache_plan"] = config.plan.to_dict()
    if config.qk_norm:
        windows: dict[str, Any] = {
            "sliding_window": config.sliding_window,
            "use_sliding_window": config.sliding_window is not None,
            "layer_types": list(config.layer_types),
        }
        settings: Any = FusedKVQwen3Config(**fields, **windows)
    else:
        settings = FusedKVLlamaConfig(**fields)
    dtype = model.model.embed_tokens.weight.dtype
    made = AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    made.load_state_dict(model.state_dict())
    return made


def _check(config: DecoderConfig) -> None:
    wrong = {
        "kv_lora_rank": config.kv_lora_rank is not None and "latent attention",
        "num_experts": config.num_experts > 0 and "experts",
        "rope_interleaved": config.rope_interleaved and "interleaved RoPE",
        "sliding_window": not config.qk_norm
        and config.sliding_window is not None
        and "windows without QK-norm",
    }
    for name, what in wrong.items():
        if what:
            raise ValueError(
                f"{name} must be off for a Hugging Face folder, got {getattr(config, name)!r}: Llama and "
                f"Qwen3 have no {what} there; export without --hf"
            )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer as transformers reads it: tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer: That of the training. Bytes become a vocabulary of 256 tokens without merges.
        folder: An existing folder.
    """
    path = folder / "tokenizer.json"
    end = None
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.save(folder)
        end = None if tokenizer.separator is None else tokenizer.decode([tokenizer.separator])
    else:
        _bytes().save(str(path))
    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=end)
    wrapped.save_pretrained(folder)


def _bytes() -> Any:
    """A BPE of no characters, so that each falls back to its bytes: the id of a byte is its number."""
    tokenizers = need("tokenizers", "Writing a tokenizer file")
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    return made
