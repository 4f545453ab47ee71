"""save_pretrained and load_pretrained: the same bits back, old or new after a kill, and errors that say what
is wrong.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tiny import PLANS, tiny_decoder

from fusedkv_ext.checkpoint import pretrained
from fusedkv_ext.checkpoint.pretrained import load_pretrained, save_pretrained
from fusedkv_ext.layers.decoder import Decoder

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def same(model: Decoder, other: Decoder) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def edit(folder: Path, **changes: object) -> None:
    """Rewrites fields of config.json; None removes one."""
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tied", [False, True])
def test_bits_survive(tmp_path: Path, plan: str, tied: bool) -> None:
    model = tiny_decoder(plan, tie_word_embeddings=tied)
    save_pretrained(model, tmp_path / "a" / "b")
    loaded = load_pretrained(tmp_path / "a" / "b")
    assert same(model, loaded) and loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(p.is_meta for p in loaded.parameters())
    save_pretrained(loaded, tmp_path / "c")
    assert same(load_pretrained(tmp_path / "c"), model)
    assert sorted(os.listdir(tmp_path / "c")) == ["config.json", "model.safetensors"]
    with safetensors_torch.safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied


def test_a_loaded_model_trains_and_generates_alike(tmp_path: Path) -> None:
    model = tiny_decoder("fusedkv")
    save_pretrained(model, tmp_path)
    loaded, ids = load_pretrained(tmp_path), torch.randint(0, 61, (2, 7))
    assert torch.equal(loaded.generate(ids, 5), model.generate(ids, 5))
    loaded(ids, labels=ids)[1].backward()
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    assert same(load_pretrained(tmp_path), model)


def test_dtypes(tmp_path: Path) -> None:
    model = tiny_decoder("fusedkv").bfloat16()
    save_pretrained(model, tmp_path)
    kept = load_pretrained(tmp_path)
    assert same(model, kept) and kept.model.norm.weight.dtype == torch.bfloat16
    assert kept.model.layers[3].self_attn.kv_fusion.key_0.dtype == torch.float32
    half = load_pretrained(tmp_path, dtype=torch.float16)
    assert half.lm_head.weight.dtype == torch.float16
    assert half.model.layers[3].self_attn.kv_fusion.key_0.dtype == torch.float32
    assert load_pretrained(tmp_path, dtype=torch.float32, device="cpu").lm_head.weight.dtype == torch.float32


TOUCH_THE_DISK = (
    (os, "replace"),
    (os, "fsync"),
    (Path, "unlink"),
    (Path, "write_text"),
    (safetensors_torch, "save_file"),
)


@pytest.mark.parametrize("die_at", range(1, 14))
def test_killed_at_any_moment_the_folder_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    """Every call that touches the disk may be the last one that happens."""
    old, new = tiny_decoder("fusedkv"), tiny_decoder("yoco", rope_interleaved=True)
    save_pretrained(old, tmp_path)
    calls = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= die_at:  # from here on nothing reaches the disk, not even the cleaning up
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (Path, "unlink"),
            (Path, "write_text"),
            (safetensors_torch, "save_file"),
        ):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            save_pretrained(new, tmp_path)
        except KeyboardInterrupt:
            pass
        else:
            assert calls < die_at
    loaded = load_pretrained(tmp_path)
    assert same(loaded, old) or same(loaded, new)
    assert loaded.config == (old if same(loaded, old) else new).config
    save_pretrained(new, tmp_path)  # and what the dead one left behind is no obstacle
    assert same(load_pretrained(tmp_path), new)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    save_pretrained(tiny_decoder("fusedkv"), tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_config_json_is_what_counts(tmp_path: Path) -> None:
    save_pretrained(tiny_decoder("fusedkv"), tmp_path)
    edit(tmp_path, max_position_embeddings=128)
    assert load_pretrained(tmp_path).config.max_position_embeddings == 128
    (tmp_path / "config.json").unlink()
    assert load_pretrained(tmp_path).config.max_position_embeddings == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "config.json.*format 1 or older, got 2; upgrade"),
        ({"flux": 1}, "config.json.*unknown fields, got flux"),
        ({"hidden_size": None}, "config.json.*incomplete.*hidden_size"),
        (
            {"hidden_size": 16},
            r"embed_tokens.weight must have shape \(61, 16\) .*, got \(61, 32\)",
        ),
        ({"qk_norm": False}, "has unexpected model.layers.0.self_attn.k_norm.weight"),
        ({"attention_bias": True}, "misses model.layers.0.self_attn.k_proj.bias, .* and 8 more"),
        ({"model_type": "llama"}, "must be that of a fusedkv_ext decoder"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    save_pretrained(tiny_decoder("fusedkv"), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    save_pretrained(tiny_decoder("fusedkv"), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is truncated or not a safetensors file"):
            load_pretrained(tmp_path)
    weights.write_bytes(whole)
    for text in (config.read_text()[:50], "[]", '"fusedkv"'):
        config.write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            load_pretrained(tmp_path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    model = tiny_decoder("fusedkv")
    save_pretrained(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    checksum = whole.index(b'"crc32":"') + len(b'"crc32":"')
    found = "model.safetensors is damaged: its checksum is .*; restore"
    flips = [(at, 1, found) for at in (checksum + 7, header, header + 1000, len(whole) // 2, len(whole) - 1)]
    # A digit may become another character, or the header no JSON.
    flips += [(checksum, 1 << bit, f"{found}|is truncated or not a safetensors file") for bit in range(8)]
    for at, flip, message in flips:
        damaged = bytearray(whole)
        damaged[at] ^= flip
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path)
    weights.write_bytes(whole)
    assert same(load_pretrained(tmp_path), model)


def test_a_file_without_a_checksum_loads(tmp_path: Path) -> None:
    """Of an earlier version, or saved again by another program."""
    model = tiny_decoder("fusedkv")
    save_pretrained(model, tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    assert same(load_pretrained(tmp_path), model)


def test_a_file_that_does_not_fit_the_disk_is_named_and_the_old_one_stays(
    tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    old = tiny_decoder("fusedkv")
    save_pretrained(old, tmp_path)
    for size in (100, 20_000):  # the config, the weights
        with pytest.raises(OSError, match=r"File too large: '.*model.safetensors'") as caught:
            with largest_file(size):
                save_pretrained(tiny_decoder("yoco"), tmp_path)
        assert caught.value.errno == errno.EFBIG
        assert same(load_pretrained(tmp_path), old)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; expected model.safetensors"):
        load_pretrained(tmp_path / "nowhere")
    safetensors_torch.save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="expected a config.json"):
        load_pretrained(tmp_path)


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: save_pretrained(tiny_decoder("yoco"), tmp_path), lambda: load_pretrained(tmp_path)):
        with pytest.raises(ImportError, match=r"pip install 'fusedkv_ext\[io\]'"):
            call()
    assert pretrained.WEIGHTS == "model.safetensors"
