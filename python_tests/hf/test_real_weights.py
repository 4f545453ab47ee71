"""SmolLM2-135M on real text: what is known of it comes out. `make test-real` fetches both and runs this."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from fusedkv_ext.cli.main import main
from fusedkv_ext.conversion import calibration_windows, convert_model
from fusedkv_ext.evaluation.language_model import LanguageModel
from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.hf import FusedKVLlamaForCausalLM, cache_bytes_per_token, config_for
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer
from fusedkv_ext.plan import CachePlan

FOLDER = Path(os.environ.get("FUSEDKV_REAL_WEIGHTS") or "build/real")
pytestmark = pytest.mark.skipif(
    not os.environ.get("FUSEDKV_REAL_WEIGHTS"), reason="needs real weights; run `make test-real`"
)
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_causal_lm(FOLDER / "smollm2", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(FOLDER / "smollm2", 49152)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> Tensor:
    """The first 2,048 tokens of the Python tutorial."""
    text = (FOLDER / "text" / "python_tutorial.txt").read_text("utf-8")
    return torch.tensor(tokenizer.encode(text[:20_000])[:2048])


def on_plan(model: Any, plan: CachePlan) -> Any:
    """The same weights on a plan; those that it has no use for are left out."""
    converted = FusedKVLlamaForCausalLM(config_for(model.config, plan)).eval()
    assert not converted.load_state_dict(model.state_dict(), strict=False).missing_keys
    return converted


def test_the_tokenizer_keeps_digits_apart_and_gives_text_back(tokenizer: Any) -> None:
    text = "In 2024, naïve   readers\n\tsaw 3.14 and 𝒳."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2024")] == list("2024")
    assert tokenizer.encode(PROMPT) == [504, 3575, 282, 4649, 314]


@pytest.mark.parametrize(
    ("storage_layers", "expected"), [(30, 13.67), (29, 14.21), (28, 15.68), (24, 140.5), (15, 7603.0)]
)
def test_perplexity_of_fusedkv_lite_without_calibration(
    storage_layers: int, expected: float, model: Any, ids: Tensor
) -> None:
    if storage_layers < 30:
        model = on_plan(model, CachePlan.named("fusedkv-lite", 30, storage_layers=storage_layers))
    found = perplexity(model, ids, context=2048)
    assert found.tokens == 2047
    assert found.perplexity == pytest.approx(expected, rel=0.01)
    size = LanguageModel(model).cache_bytes_per_token()
    assert size == cache_bytes_per_token(model.config, torch.float32) == 46080 * storage_layers / 30


@pytest.mark.parametrize(("storage_layers", "expected"), [(24, 19.0), (15, 60.0)])
def test_perplexity_of_fusedkv_after_calibration(
    storage_layers: int, expected: float, model: Any, tokenizer: Any, ids: Tensor
) -> None:
    """On other pages of the documentation; merely copied weights give 140 and 7603."""
    text = (FOLDER / "text" / "python_docs.txt").read_text("utf-8")[:2_000_000]
    windows = calibration_windows(torch.tensor(tokenizer.encode(text)), 8192, 512)
    plan = CachePlan.named("fusedkv", 30, storage_layers=storage_layers)
    converted = convert_model(model, plan, calibration=windows).model
    found = perplexity(converted, ids, context=2048).perplexity
    print(f"n = {storage_layers}: {found:.2f}")
    assert found < expected


def test_a_plan_that_stores_everything_is_the_model_itself(model: Any, ids: Tensor) -> None:
    vanilla = on_plan(model, CachePlan.named("vanilla", 30))
    with torch.inference_mode():
        expected = model(input_ids=ids[None, :200], use_cache=False).logits
        found = vanilla(input_ids=ids[None, :200], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_bfloat16_costs_next_to_nothing(ids: Tensor) -> None:
    half = load_causal_lm(FOLDER / "smollm2", dtype=torch.bfloat16)
    assert perplexity(half, ids[:513], context=512).perplexity == pytest.approx(
        perplexity(half.float(), ids[:513], context=512).perplexity, rel=0.02
    )


def test_the_command_continues_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(FOLDER / "smollm2"), "--prompt", PROMPT, "--temperature", "0"]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The capital of France is Paris.")
