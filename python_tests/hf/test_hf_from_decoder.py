"""Decoders that were trained here, as models of transformers: `fusedkv export --hf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny import tiny_decoder, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedkv_ext.checkpoint.pretrained import load_pretrained
from fusedkv_ext.cli.main import main
from fusedkv_ext.hf.decoder_export import from_decoder, save_tokenizer
from fusedkv_ext.training import loop
from fusedkv_ext.training.data.tokenizer import ByteTokenizer, FileTokenizer
from fusedkv_ext.training.progress import SilentProgress

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "fusedkv-lite", "yoco", "skipv1", "resformer"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": False, "attention_bias": True},
        {"tie_word_embeddings": True, "rope_scaling": YARN},
        {"qk_norm": False, "rope_theta": 500.0, "rms_norm_eps": 1e-3, "head_dim": 8},
    ],
    ids=["qwen3", "llama with biases", "tied, scaled RoPE", "llama, other sizes"],
)
def test_logits_are_those_of_the_decoder(plan: str, options: dict[str, object]) -> None:
    decoder = tiny_decoder(plan, **options).eval()
    ids = torch.randint(0, 61, (2, 24))
    with torch.no_grad():
        expected, got = decoder(ids), from_decoder(decoder)(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_windows_of_some_layers_are_kept() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    decoder = tiny_decoder("vanilla", sliding_window=4, layer_types=kinds).eval()
    ids = torch.randint(0, 61, (1, 24))
    model = from_decoder(decoder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, decoder(ids), rtol=1e-4, atol=1e-4)
    assert model.config.layer_types == kinds


def test_weights_are_copies_in_the_dtypes_of_the_decoder() -> None:
    decoder = tiny_decoder("fusedkv").to(torch.bfloat16)
    model = from_decoder(decoder)
    found = model.state_dict()
    for name, weight in decoder.state_dict().items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
        assert found[name].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2}, "num_experts must be off for a Hugging Face folder, got 2: .* no experts there"),
        ({"rope_interleaved": True}, "rope_interleaved must be off"),
        ({"qk_norm": False, "sliding_window": 4}, "sliding_window must be off .* no windows without QK-norm"),
    ],
)
def test_what_neither_family_has_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_decoder(tiny_decoder("vanilla", **options))


def test_latents_are_refused() -> None:
    sizes = {
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": None,
    }
    with pytest.raises(ValueError, match="kv_lora_rank must be off .* no latent attention there"):
        from_decoder(tiny_decoder("vanilla", **sizes))


def test_bytes_become_a_vocabulary_of_bytes(tmp_path: Path) -> None:
    save_tokenizer(ByteTokenizer(), tmp_path)
    text = "naïve 𝄞\n\x7f \ttwo  spaces"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for ids in (FileTokenizer(tmp_path / "tokenizer.json").encode(text), loaded(text)["input_ids"]):
        assert bytes(ids) == text.encode()
    assert loaded.decode(list(text.encode())) == text
    assert len(loaded) == 256


def test_an_exported_run_generates_with_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = loop.run(loop.start(tiny_run(tmp_path), tmp_path / "run"), SilentProgress(), stop_after=2)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--hf"]) == 0
    decoder = load_pretrained(Path(run.checkpoint)).eval()
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([list(b"the ")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, decoder(ids), rtol=1e-4, atol=1e-4)
    assert main(["generate", str(out), "--prompt", "the", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(tmp_path / "run"), str(out), "--hf"]) == 2
    assert "FOLDER must not exist" in capsys.readouterr().err


def test_a_run_that_no_family_holds_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(tmp_path, **{"model.num_experts": 2})
    loop.run(loop.start(config, tmp_path / "run"), SilentProgress(), stop_after=1)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--hf"]) == 2
    assert "--hf: num_experts must be off" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
