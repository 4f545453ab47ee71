"""Conversion of trained models: what is copied, pooled, calibrated, refitted, and what is written."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from hf_folders import save_folder, tiny_llama
from hf_tiny import LAYERS, close, sizes, tokens
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fusedkv_ext.cli import main as cli
from fusedkv_ext.conversion import calibration_windows, convert_model, save_conversion
from fusedkv_ext.plan import CachePlan

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def plain(family: str = "llama", seed: int = 0, **options) -> torch.nn.Module:
    """A model whose attention matters to its logits."""
    torch.manual_seed(seed)
    config, kind = FAMILIES[family]
    model = kind(config(**sizes(**options)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    return model.eval()


def divergence(original, converted, ids) -> float:
    """Mean KL divergence of the next token's distribution, nats."""
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (original, converted))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_vanilla_conversion_is_the_model_itself(family):
    model, ids = plain(family), tokens(2, 12)
    converted = convert_model(model, "vanilla")
    assert converted.changed == []
    close(converted.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["fusedkv", "fusedkv-lite", "cla", "dense-fusion"])
def test_calibration_brings_the_model_nearer_to_the_original(family, plan):
    model = plain(family)
    text, other = tokens(32, 64), tokens(8, 64)
    copied = divergence(model, convert_model(model, plan).model, other)
    solved = divergence(model, convert_model(model, plan, calibration=text, refitted=()).model, other)
    refitted = divergence(model, convert_model(model, plan, calibration=text).model, other)
    assert refitted < 0.8 * copied
    assert solved <= copied * 1.05 and refitted < solved


def test_identical_layers_convert_without_loss():
    """A layer that computes the keys and values of its source from the same stream loses nothing."""
    model = plain()
    with torch.no_grad():  # layers 1 to 3 add nothing to the stream, so all layers see the same rows
        for layer in model.model.layers[:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for layer in model.model.layers[1:]:
            for name in ("k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight.copy_(
                    getattr(model.model.layers[0].self_attn, name).weight
                )
    text = tokens(16, 64)
    for plan in ("fusedkv-lite", "fusedkv", "yoco", "cla"):
        calibrated = convert_model(model, plan, calibration=text, refitted=()).model
        assert divergence(model, calibrated, text) < 1e-6, plan


def test_the_original_is_not_touched():
    model = plain()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention = model.config._attn_implementation
    convert_model(model, "fusedkv", calibration=tokens(16, 64))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config._attn_implementation == attention


def test_changed_names_exactly_what_differs():
    model = plain()
    done = convert_model(model, "fusedkv", calibration=tokens(16, 64), refitted=("o_proj",))
    readers = range(LAYERS // 2, LAYERS)
    expected = {f"model.layers.{i}.self_attn.o_proj.weight" for i in readers}
    expected |= {
        f"model.layers.{i}.self_attn.kv_fusion.{side}_{j}"
        for i in readers
        for side in ("key", "value")
        for j in range(2)
    }
    assert set(done.changed) == expected
    assert set(done.left) == set(readers)


def test_refitting_leaves_no_error_that_a_projection_can_mend():
    """Where only an output projection was spoilt, refitting it restores the model."""
    from fusedkv_ext.conversion.refit import refit

    model = plain()
    for projection in ("o_proj", "down_proj"):
        spoilt = convert_model(model, "vanilla").model
        layer = spoilt.model.layers[2]
        linear = layer.self_attn.o_proj if projection == "o_proj" else layer.mlp.down_proj
        with torch.no_grad():
            linear.weight.add_(0.3 * torch.randn_like(linear.weight) * linear.weight.std())
        text = tokens(64, 64)
        before = divergence(model, spoilt, text)
        left = refit(model, spoilt, text, [2], projections=(projection,))
        assert set(left) == {2} and left[2][projection] < 0.1  # what the ridge holds back
        assert divergence(model, spoilt, text) < 0.15 * before


def test_refitted_layers_count_what_is_left_of_the_error():
    """The shares that refitting reports are those of the streams themselves."""
    from fusedkv_ext.conversion.refit import refit

    model, text = plain(), tokens(32, 64)
    seen = {}

    def watch(which, name):
        def hook(_module, _args, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return which.model.layers[3].register_forward_hook(hook)

    def error(converted):
        hooks = [watch(model, "original"), watch(converted, "converted")]
        with torch.no_grad():
            model(text), converted(text)
        for hook in hooks:
            hook.remove()
        return (seen["original"] - seen["converted"]).double().square().sum().item()

    converted = convert_model(model, "fusedkv-lite").model
    refit(model, converted, text, [2, 3], projections=("o_proj",))
    before = error(converted)
    left = refit(model, converted, text, [3], projections=("down_proj",))
    assert error(converted) / before == pytest.approx(left[3]["down_proj"], rel=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 8])
def test_refitting_walks_the_layers_as_the_models_run(implementation, window):
    """The streams that refitting compares are those of the models, whatever masks the layers need."""
    from fusedkv_ext.conversion.refit import _Stream

    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    model = plain("qwen3", **(sliding if window else {}))
    model.set_attn_implementation(implementation)
    converted, ids = convert_model(model, "cla" if window is None else "yoco").model, tokens(3, 40)
    for one in (model, converted):
        with torch.no_grad():
            stream = _Stream(one, ids, batch_size=2)
            for i in range(LAYERS):
                stream.attend(i)
                stream.advance(i)
            walked = torch.cat([one.get_decoder().norm(hidden) for hidden in stream.hidden])
            close(walked, one.get_decoder()(ids, use_cache=False).last_hidden_state)


def test_skipv1_stores_half_of_the_value_heads_pooled_by_pairs():
    model = plain()
    done = convert_model(model, "skipv1", pooling="mean-v")
    for i, layer in enumerate(done.model.model.layers):
        original = model.model.layers[i].self_attn.v_proj.weight
        if i == 0:
            assert torch.equal(layer.self_attn.v_proj.weight, original)
        else:
            heads = original.unflatten(0, (4, 8))
            pooled = torch.cat([heads[:2].mean(0), heads[2:].mean(0)])
            torch.testing.assert_close(layer.self_attn.v_proj.weight, pooled)


def test_calibrated_skipv1_is_nearer_to_the_original():
    model, text, other = plain(), tokens(32, 64), tokens(8, 64)
    pooled = divergence(model, convert_model(model, "skipv1").model, other)
    assert divergence(model, convert_model(model, "skipv1", calibration=text).model, other) < 0.8 * pooled


def test_learnable_resformer_starts_as_the_original():
    """Its layers store their own values; the fit finds that they need nothing of the first layer's."""
    model, text = plain(), tokens(32, 64)
    plan = CachePlan.named("resformer", LAYERS, learnable=True)
    done = convert_model(model, plan, calibration=text, refitted=())
    assert divergence(model, done.model, text) < 1e-4


def test_bfloat16_models_convert_in_their_dtype():
    model = plain().bfloat16()
    done = convert_model(model, "fusedkv", calibration=tokens(16, 64))
    kinds = {name: weight.dtype for name, weight in done.model.named_parameters()}
    for name, kind in kinds.items():
        assert kind == (torch.float32 if "kv_fusion" in name else torch.bfloat16), name


@pytest.mark.parametrize("refused", ["bert", "gpt2", "depth", "heads"])
def test_what_cannot_be_converted_is_refused_by_name(refused):
    if refused == "bert":
        config = BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
        model, plan, words = BertModel(config), "fusedkv", "bert"
    elif refused == "gpt2":
        model, plan, words = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2)), "fusedkv", "gpt2"
    elif refused == "depth":
        model, plan, words = plain(), CachePlan.named("fusedkv", 7), "7 layers"
    else:
        model, plan, words = plain(num_key_value_heads=1), "skipv1", "multiple of 2"
    with pytest.raises(ValueError, match=words):
        convert_model(model, plan)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="at least 2048 tokens.*text of 10"):
        calibration_windows(torch.arange(10), 16384, 512)


def test_windows_are_spread_over_the_whole_text():
    windows = calibration_windows(torch.arange(100_000), 4096, 512)
    assert windows.shape == (8, 512)
    assert windows[0, 0] == 0 and windows[-1, -1] == 99_999
    assert torch.equal(windows[:, 1:] - windows[:, :-1], torch.ones(8, 511, dtype=torch.long))


class TestFolders:
    @pytest.fixture
    def original(self, tmp_path):
        torch.manual_seed(0)
        return save_folder(tiny_llama(), tmp_path / "original")

    @pytest.fixture
    def text(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("".join(f"line {i}: one cache for several layers, {i * i}\n" for i in range(200)))
        return path

    def test_the_command_writes_a_folder_that_loads(self, original, text, tmp_path, capsys):
        out = tmp_path / "out"
        args = ["convert", original, "--plan", "fusedkv", "--calibrate", text, "--out", out, "--json"]
        assert cli.main([str(arg) for arg in (*args, "--tokens", 4096, "--window", 128)]) == 0
        record = json.loads((out / "conversion.json").read_text())
        shown = json.loads(capsys.readouterr().out)
        assert shown == {"folder": str(out), **record}
        assert record["original"] == str(original)
        layer = 2 * 2 * 8 * 4  # keys and values, KV heads, channels, bytes
        assert record["cache_bytes_per_token"] == {"original": 4 * layer, "converted": 2 * layer}
        assert record["perplexity"]["before"] > 0 and record["perplexity"]["after"] > 0
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.plan == CachePlan.named("fusedkv", 4)
        assert set(record["changed"]) <= set(dict(model.named_parameters()))
        assert (out / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()

    @pytest.mark.parametrize("size", [20_000, 2_000])
    def test_a_folder_that_does_not_fit_the_disk_is_named(self, size, original, tmp_path, largest_file):
        conversion = convert_model(plain(), "fusedkv")
        with pytest.raises(OSError, match="File too large: '.*out'"):
            with largest_file(size):
                save_conversion(conversion, tmp_path / "out", original, {"long": "-" * 3000})
        assert [path.name for path in tmp_path.iterdir()] == ["original"]
        assert save_conversion(conversion, tmp_path / "out", original, {}).is_dir()

    @pytest.mark.parametrize("how", ["prefix", "layers", "kvsharer"])
    def test_searched_plans_keep_their_budget_and_load(
        self, how, original, text, tmp_path, capsys, monkeypatch
    ):
        out = tmp_path / "out"
        args = ["convert", original, "--search", how, "--storage-layers", 2, "--calibrate", text]
        args += ["--out", out]
        if how == "kvsharer":  # the threshold would keep layers of random weights apart
            monkeypatch.setattr("torch.cosine_similarity", lambda a, b: torch.ones(len(a)))
        assert cli.main([str(arg) for arg in (*args, "--tokens", 4096, "--window", 128)]) == 0
        model = AutoModelForCausalLM.from_pretrained(out)
        assert len(model.config.plan.storage_layers) == 2
        assert "explained" in capsys.readouterr().out

    def test_repair_and_bare_refit_are_taken(self, original, text, tmp_path):
        out = tmp_path / "out"
        args = ["convert", original, "--plan", "fusedkv", "--repair", "--refit", "--calibrate", text]
        args += ["--out", out]
        assert cli.main([str(arg) for arg in (*args, "--tokens", 4096, "--window", 128)]) == 0
        record = json.loads((out / "conversion.json").read_text())
        assert record["left"] == {} and record["calibration"]["repair"] is True
        assert any(name.endswith("q_proj.weight") for name in record["changed"])
        for layer, shares in record["explained"].items():
            assert all(record["explained_with_maps"][layer][side] > share for side, share in shares.items())

    @pytest.mark.parametrize(
        "args, words",
        [
            (["--search", "layers"], "--search needs --calibrate"),
            (
                ["--plan", "cla", "--budget", "0.5"],
                "at most 1, with --search, got 0.5",
            ),
            (["--plan", "gqa"], "num_key_value_heads"),
            (
                ["--plan", "cla-v", "--storage-layers", "2"],
                "a plan with the option storage_layers, got cla-v",
            ),
        ],
    )
    def test_options_that_do_not_go_together_are_refused(self, args, words, original, tmp_path, capsys):
        assert cli.main(["convert", str(original), *args, "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err

    def test_a_plan_comes_from_a_file_too(self, original, tmp_path):
        path = tmp_path / "plan.json"
        path.write_text(CachePlan.named("cla", 4, factor=3).to_json())
        out = tmp_path / "out"
        assert cli.main(["convert", str(original), "--plan", str(path), "--out", str(out)]) == 0
        assert AutoModelForCausalLM.from_pretrained(out).config.plan == CachePlan.named("cla", 4, factor=3)

    @pytest.mark.parametrize(
        "wrong",
        ["short text", "taken", "unknown plan", "truncated", "other tokenizer", "no folder", "other depth"],
    )
    def test_errors_are_one_sentence_and_leave_nothing(self, wrong, original, text, tmp_path, capsys):
        out, plan = tmp_path / "out", "fusedkv"
        if wrong == "short text":
            text.write_text("ten tokens")
            words = "at least 2048 tokens"
        elif wrong == "taken":
            out.mkdir()
            words = "--out must not exist, got "
        elif wrong == "unknown plan":
            plan, words = "fusedkw", "got 'fusedkw'"
        elif wrong == "truncated":
            weights = original / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1000])
            words = "download them again"
        elif wrong == "other tokenizer":
            data = json.loads((original / "tokenizer.json").read_text())
            data["model"]["vocab"] = {f"word{i}": i for i in range(5000)}
            data["added_tokens"] = []
            (original / "tokenizer.json").write_text(json.dumps(data))
            words = "another model"
        elif wrong == "other depth":
            (tmp_path / "plan.json").write_text(CachePlan.named("cla", 6).to_json())
            plan, words = str(tmp_path / "plan.json"), "6 layers"
        else:
            original, words = tmp_path / "nothing", "config.json"
        before = set(tmp_path.iterdir())
        args = ["convert", original, "--plan", plan, "--calibrate", text, "--out", out, "--window", 128]
        assert cli.main([str(arg) for arg in args]) != 0
        error = capsys.readouterr().err
        assert words in error and error.strip().count("\n") == 0
        assert set(tmp_path.iterdir()) == before

    def test_a_failed_save_leaves_nothing(self, original, tmp_path, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(original)
        done = convert_model(model, "fusedkv")

        def fail(folder, **_kwargs):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(done.model, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            save_conversion(done, tmp_path / "out", original, {})
        assert [path.name for path in tmp_path.iterdir()] == ["original"]
