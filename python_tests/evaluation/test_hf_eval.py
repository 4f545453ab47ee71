"""`fusedkv eval` and `fusedkv generate` on Hugging Face folders: right numbers, one error for bad folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_folders
import pytest
import torch

pytest.importorskip("transformers")

import transformers

from fusedkv_ext.cli.main import main
from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.hf import cache_bytes_per_token
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer

TEXT = "".join(f"line {i} of a text that nobody has to understand\n" for i in range(40))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain model, the same on a plan, the plain one in several files of weights, and a text."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hf")
    plain = hf_folders.tiny_llama()
    (root / "text.txt").write_text(TEXT)
    return {
        "plain": hf_folders.save_folder(plain, root / "plain"),
        "fusedkv": hf_folders.save_folder(hf_folders.converted(plain), root / "fusedkv"),
        "parts": hf_folders.save_folder(plain, root / "parts", max_shard_size="30KB"),
        "text": root / "text.txt",
    }


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# fusedkv eval


def test_eval_compares_a_model_with_its_conversion(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["plain", "fusedkv"]
    arguments = ["eval", *(str(folders[name]) for name in names), "--text", str(folders["text"])]
    result = printed([*arguments, "--context", "128", "--tasks", "perplexity,positions"], capsys)
    for name in names:
        model, entry = load_causal_lm(folders[name]), result["checkpoints"][name]
        tokenizer = load_tokenizer(folders[name], 264)
        ids = torch.tensor([*tokenizer.encode(TEXT), tokenizer.separator])
        assert len(ids) == len(TEXT) + 1
        assert entry["perplexity"]["loss"] == pytest.approx(
            perplexity(model, ids, context=128).loss, rel=1e-6
        )
        assert entry["perplexity"]["tokens"] == len(TEXT)
        assert sum(entry["positions"]["tokens"]) == len(TEXT)
    plain, fused = (result["checkpoints"][name] for name in names)
    assert (plain["plan"], fused["plan"]) == ("llama", "fusedkv")
    assert plain["cache_bytes_per_token"] == 4 * 2 * 2 * 8 * 4  # layers, K and V, heads, channels, bytes
    assert fused["cache_bytes_per_token"] == cache_bytes_per_token(model.config, torch.float32)
    assert "difference" in fused and "difference" not in plain


def test_eval_reads_weights_in_several_files_and_in_any_dtype(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(list(folders["parts"].glob("model-*.safetensors"))) > 2
    arguments = ["eval", "--text", str(folders["text"]), "--context", "64", "--tasks", "perplexity"]
    losses = {}
    for name in ("plain", "parts"):
        entry = printed([*arguments, str(folders[name])], capsys)["checkpoints"][name]
        losses[name] = entry["perplexity"]["loss"]
    assert losses["plain"] == losses["parts"]
    half = printed([*arguments, str(folders["plain"]), "--dtype", "bfloat16"], capsys)["checkpoints"]["plain"]
    assert half["perplexity"]["loss"] != losses["plain"]
    assert half["perplexity"]["loss"] == pytest.approx(losses["plain"], rel=2e-2)
    assert half["cache_bytes_per_token"] == 4 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("name", ["plain", "fusedkv"])
def test_eval_asks_for_what_stands_in_the_context(
    name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(folders[name]), "--text", str(folders["text"]), "--tasks", "retrieval"]
    result = printed([*arguments, "--lengths", "160", "--examples", "2", "--depths", "50"], capsys)
    totals = result["checkpoints"][name]["retrieval"]["totals"]
    assert [total["task"] for total in totals] == ["single", "multikey"]
    assert all(total["examples"] == 2 and total["nll"] > 5 for total in totals)


# fusedkv generate


@pytest.mark.parametrize("name", ["plain", "fusedkv"])
def test_generate_is_greedy_at_temperature_zero(
    name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(folders[name]), "--prompt", "line 1", "--temperature", "0"]
    result = printed([*arguments, "--max-new-tokens", "9"], capsys)
    model, tokenizer = load_causal_lm(folders[name]), load_tokenizer(folders[name], 264)
    ids = tokenizer.encode("line 1")
    with torch.no_grad():
        while len(ids) < 6 + 9 and ids[-1] != 256:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = [token for token in ids[6:] if token != 256]
    assert result["text"] == tokenizer.decode(expected)
    assert (result["prompt_tokens"], result["new_tokens"]) == (6, len(ids) - 6)


def test_generate_repeats_itself_with_the_same_seed_only(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(folders["plain"]), "--prompt", "a", "--max-new-tokens", "16"]
    one, again, other = (
        printed([*arguments, "--temperature", "2", "--seed", seed], capsys)["text"] for seed in "112"
    )
    assert one == again != other
    most_likely = printed([*arguments, "--temperature", "5", "--top-k", "1"], capsys)["text"]
    assert most_likely == printed([*arguments, "--temperature", "0"], capsys)["text"]


# Folders that are not what they should be


def lose_a_part(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_a_part(folder: Path) -> None:
    part = sorted(folder.glob("model-*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:-100])


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def leave_a_pointer(folder: Path) -> None:
    """What a git clone without git-lfs leaves."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))


def change_a_shape(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}))


def lose_the_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def put_words_into_the_tokenizer(folder: Path, words: int) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"word{i}": 257 + i for i in range(words)}
    path.write_text(json.dumps(content))


def take_a_larger_tokenizer(folder: Path) -> None:
    put_words_into_the_tokenizer(folder, 100)


def damage_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def set_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def become_a_model_without_a_head(folder: Path) -> None:
    set_config(folder, architectures=["LlamaModel"])


def become_unknown(folder: Path) -> None:
    set_config(folder, model_type="of_tomorrow", architectures=["OfTomorrowForCausalLM"])


def become_an_encoder(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def become_an_encoder_with_a_decoder(folder: Path) -> None:
    config = transformers.T5Config(vocab_size=264, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


BAD = {
    lose_a_part: ("parts", "is not complete: model-00002-of-", "download it again"),
    cut_a_part: ("parts", "are only part of what they should be", "download them again"),
    cut: ("plain", "are only part of what they should be", "download them again"),
    leave_a_pointer: ("plain", "are only part of what they should be", "download them again"),
    lose_the_weights: ("plain", "holds no weights: expected model.safetensors"),
    lose_a_tensor: ("plain", "lack model.layers.2.mlp.up_proj.weight", "the folder is not complete"),
    change_a_shape: ("plain", "model.norm.weight has shape (16,), the config wants (32,)"),
    lose_the_tokenizer: ("plain", "has no tokenizer: there is no tokenizer.json", "--tokenizer FILE"),
    take_a_larger_tokenizer: (
        "plain",
        "must fit the model's vocabulary of 264, got 357 tokens",
        "--tokenizer FILE",
    ),
    damage_the_tokenizer: ("plain", "must be a tokenizer.json of Hugging Face tokenizers"),
    become_a_model_without_a_head: (
        "plain",
        "must be a causal language model",
        "got a LlamaModel",
    ),
    become_unknown: ("plain", "config.json cannot be read", "of_tomorrow"),
    become_an_encoder: (
        "plain",
        "must be a causal language model",
        "got a BertForMaskedLM",
    ),
    become_an_encoder_with_a_decoder: ("plain", "got a T5ForConditionalGeneration"),
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_folder_that_is_not_whole_is_one_clear_error(
    spoil: Callable[[Path], None],
    folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name, *messages = BAD[spoil]
    folder = Path(shutil.copytree(folders[name], tmp_path / "bad"))
    spoil(folder)
    capfd.readouterr()
    assert main(["eval", str(folder), "--text", str(folders["text"]), "--context", "64"]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("fusedkv: error: ") and all(message in line for message in messages), line
    assert main(["generate", str(folder), "--prompt", "a"]) == 1
    assert capfd.readouterr().err.strip() == line


def test_a_tokenizer_of_far_fewer_tokens_is_of_another_model(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "large"
    hf_folders.save_folder(hf_folders.tiny_llama(vocab_size=400), folder)
    arguments = ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1"]
    assert main(arguments) == 1
    assert (
        "must fit the model's vocabulary of 400, got 257 tokens; it belongs to another model"
        in capsys.readouterr().err
    )
    # Whoever names a tokenizer has decided.
    assert main([*arguments, "--tokenizer", str(folder / "tokenizer.json")]) == 0


def test_the_older_files_of_a_tokenizer_are_read_too(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = json.loads((folders["plain"] / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"] | {hf_folders.END: 256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    ids = load_tokenizer(tmp_path, 264).encode(TEXT)
    assert ids == load_tokenizer(folders["plain"], 264).encode(TEXT)


def test_a_folder_without_a_readable_config_is_no_hugging_face_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The errors are those of checkpoints of this package."""
    assert main(["eval", str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["eval", str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
