"""Models with other heads than a vocabulary's: sequence and token classification, question answering."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import CONFIGS, close, left_padded, lively, sizes, tokens
from tiny import PLANS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
)
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config

AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
}
PLAIN = {
    "llama": (
        LlamaConfig,
        {
            "sequence": LlamaForSequenceClassification,
            "token": LlamaForTokenClassification,
            "question": LlamaForQuestionAnswering,
        },
    ),
    "qwen3": (
        Qwen3Config,
        {
            "sequence": Qwen3ForSequenceClassification,
            "token": Qwen3ForTokenClassification,
            "question": Qwen3ForQuestionAnswering,
        },
    ),
}


def config(family: str, plan: str):
    return CONFIGS[family](**sizes(cache_plan=PLANS[plan].to_dict(), num_labels=3))


def scores(out, task: str) -> torch.Tensor:
    return torch.stack((out.start_logits, out.end_logits), -1) if task == "question" else out.logits


def labels(task: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    if task == "question":
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    return {"labels": torch.randint(3, ids.shape if task == "token" else ids.shape[:1])}


@pytest.mark.parametrize("task", list(AUTO))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_on_a_plan_that_shares_nothing_a_head_scores_as_the_plain_model_does(family: str, task: str) -> None:
    plain_config, models = PLAIN[family]
    plain = lively(models[task](plain_config(**sizes(num_labels=3))))
    ours = AUTO[task].from_config(config(family, "vanilla")).eval()
    assert type(ours).__name__ == "FusedKV" + type(plain).__name__
    assert not any(ours.load_state_dict(plain.state_dict()))
    ids, mask = left_padded(tokens(3, 9), [0, 4, 2])
    close(
        scores(ours(ids, attention_mask=mask), task)[mask.bool() if task != "sequence" else ...],
        scores(plain(ids, attention_mask=mask), task)[mask.bool() if task != "sequence" else ...],
    )


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1-yoco"])
@pytest.mark.parametrize("task", list(AUTO))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_train_save_and_load_on_plans_that_share(family: str, task: str, plan: str, tmp_path) -> None:
    model = lively(AUTO[task].from_config(config(family, plan)))
    ids = tokens(2, 9)
    out = model(ids, **labels(task, ids))
    out.loss.backward()
    without = [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]
    assert not without and torch.isfinite(out.loss)
    model.save_pretrained(tmp_path)
    again, report = AUTO[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        close(scores(again.eval()(ids), task), scores(model(ids), task))
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 3


def test_a_reward_model_starts_from_a_language_model(tmp_path) -> None:
    base = lively(AutoModelForCausalLM.from_config(config("llama", "fusedkv")))
    base.save_pretrained(tmp_path)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=1, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"score.weight"}
    ids = tokens(2, 9)
    with torch.no_grad():
        hidden = base.model(ids).last_hidden_state
        close(model.eval()(ids).logits, hidden[:, -1] @ model.score.weight.T)
