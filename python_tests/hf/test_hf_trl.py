"""TRL fine-tunes our models from their folders: supervised, with preferences, and with rewards.

TRL and datasets bring 270 MB of packages, so `make` does not install them; `make test-trl` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", reason="needs trl; run `make test-trl`")

import hf_folders
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import create_model_from_path

import fusedkv_ext.hf as hf

STEPS = 5
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
TEXTS = Dataset.from_list([{"text": f"after {a} comes {b}."} for a, b in zip(WORDS, WORDS[1:], strict=False)])
PAIRS = Dataset.from_list(
    [
        {"prompt": f"after {a} comes", "chosen": f" {b}", "rejected": f" {a}"}
        for a, b in zip(WORDS, WORDS[1:], strict=False)
    ]
)
ANSWERS = Dataset.from_list(
    [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
)
PLANS = ["fusedkv", "skipv1"]


@pytest.fixture(scope="module", params=PLANS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama on a plan, with a tokenizer of bytes."""
    torch.manual_seed(0)
    model = hf_folders.converted(hf_folders.tiny_llama(), request.param)
    return hf_folders.save_folder(model, tmp_path_factory.mktemp("trl") / request.param)


def settings(where: Path, **more: Any) -> dict[str, Any]:
    return dict(
        output_dir=str(where),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        **more,
    )


def tokenizer_of(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trainer_of(kind: type, model: Any, folder: Path, data: Dataset, args: Any, *more: Any) -> Any:
    return kind(model, *more, args=args, train_dataset=data, processing_class=tokenizer_of(folder))


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_checkpoint_is_created_from_its_path(folder: Path) -> None:
    model = create_model_from_path(str(folder), dtype=torch.float32)
    ids = torch.arange(8)[None]
    expected = hf.FusedKVLlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert type(model) is hf.FusedKVLlamaForCausalLM
    torch.testing.assert_close(model(ids).logits, expected)


def test_auto_map_is_no_field_of_the_files(folder: Path) -> None:
    assert "auto_map" not in (folder / "config.json").read_text()


def test_sft_from_a_folder_learns_in_five_steps(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(SFTTrainer, str(folder), folder, TEXTS, SFTConfig(**settings(tmp_path)))
    assert type(trainer.model) is hf.FusedKVLlamaForCausalLM
    found = losses(trainer)
    assert len(found) == STEPS and found[-1] < found[0]
    trainer.save_model(tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(tuned(ids).logits, trainer.model.eval()(ids).logits)


def test_dpo_from_a_folder_makes_its_reference_and_learns_in_five_steps(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(DPOTrainer, str(folder), folder, PAIRS, DPOConfig(**settings(tmp_path)))
    found = losses(trainer)
    assert len(found) == STEPS and found[-1] < found[0]
    # The reference stays what the folder has.
    expected = hf.FusedKVLlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    torch.testing.assert_close({k: v.float() for k, v in trainer.ref_model.state_dict().items()}, expected)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def test_grpo_from_a_folder_generates_and_steps(folder: Path, tmp_path: Path) -> None:
    args = GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=8, beta=0.1))
    args.max_steps = 1
    trainer = trainer_of(GRPOTrainer, str(folder), folder, PAIRS.select_columns("prompt"), args, reward)
    assert type(trainer.ref_model) is hf.FusedKVLlamaForCausalLM
    assert len(losses(trainer)) == 1


def test_kto_from_a_folder_is_constructed(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(KTOTrainer, str(folder), folder, ANSWERS, KTOConfig(**settings(tmp_path)))
    assert type(trainer.ref_model) is hf.FusedKVLlamaForCausalLM


def test_a_reward_model_learns_in_five_steps(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = 256
    trainer = trainer_of(RewardTrainer, model, folder, PAIRS, RewardConfig(**settings(tmp_path)))
    found = losses(trainer)
    assert len(found) == STEPS and found[-1] < found[0]
