"""The Trainer of transformers and the adapters of PEFT on models of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from hf_tiny import close, sizes, tiny_model, tokens
from tiny import PLANS
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from fusedkv_ext.hf import FusedKVLlamaConfig, FusedKVLlamaForCausalLM
from fusedkv_ext.layers.fusion import FusionWeights, param_groups

STEPS = 10


def model_of(plan: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_model("llama", plan).train()


def new_model(plan: str) -> PreTrainedModel:
    """As initialized for training."""
    torch.manual_seed(0)
    return FusedKVLlamaForCausalLM(FusedKVLlamaConfig(**sizes(cache_plan=PLANS[plan].to_dict())))


def texts(count: int = 40) -> list[dict[str, Tensor]]:
    """Sequences that count upwards: easy to learn."""
    start = torch.randint(2, 12, (count, 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in start + torch.arange(12)]


def trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=texts(), **options)


def optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=1e-2)


def losses(run: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.mark.parametrize("plan", ["fusedkv", "skipv1", "resformer"])
def test_the_trainer_learns_and_resumes_bit_for_bit(plan: str, tmp_path: Path) -> None:
    model = new_model(plan)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    run = trainer(model, tmp_path / "run", optimizers=(optimizer(model), None))
    run.train()
    found = losses(run)
    assert len(found) == STEPS and found[STEPS] < found[1] - 0.5
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name

    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(again) is FusedKVLlamaForCausalLM and again.config.plan == PLANS[plan]
    second = trainer(again, tmp_path / "again", optimizers=(optimizer(again), None))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert losses(second) == found
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name


def decay_of(run: Trainer) -> dict[str, float]:
    """Weight decay by parameter."""
    groups = run.optimizer.param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    return {name: decay[id(weight)] for name, weight in run.model.named_parameters() if weight.requires_grad}


class WithoutDecayOfFusion(Trainer):
    """As in docs/huggingface_training.md."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if "kv_fusion" not in name]


def test_param_groups_keep_the_trainer_from_decaying_fusion_weights(tmp_path: Path) -> None:
    fusion = {name for name, _ in model_of("fusedkv").named_parameters() if "kv_fusion" in name}
    assert len(fusion) == 8

    plain = trainer(model_of("fusedkv"), tmp_path)
    plain.create_optimizer()
    assert all(decay_of(plain)[name] == 0.1 for name in fusion), "a Trainer left alone decays them"

    model = model_of("fusedkv")
    grouped = {"params": param_groups(model, weight_decay=0.1), "lr": 1e-2}
    runs = [
        trainer(model, tmp_path, optimizers=(optimizer(model), None)),
        trainer(model, tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, grouped)),
    ]
    runs.append(WithoutDecayOfFusion(model, runs[0].args, train_dataset=texts()))
    for run in runs:
        run.create_optimizer()
        decay = decay_of(run)
        assert {decay[name] for name in fusion} == {0.0}
        assert decay["model.layers.0.mlp.up_proj.weight"] == 0.1
        assert decay["model.norm.weight"] == 0.0


def test_constants_of_a_plan_are_not_learned_whatever_asks_for_it(tmp_path: Path) -> None:
    model_of("resformer").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    constants = [weight for name, weight in model.named_parameters() if "kv_fusion" in name]
    assert len(constants) == 6 and not any(weight.requires_grad for weight in constants)
    model.requires_grad_(True)
    ids = tokens(2, 8)
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is None for weight in constants)


def test_offloaded_weights_are_there_when_keys_and_values_are_fused() -> None:
    from accelerate import cpu_offload

    model, ids = model_of("fusedkv").eval(), tokens(2, 9)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


# PEFT

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=PROJECTIONS, modules_to_save=["kv_fusion"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def a_step(model: Any, ids: Tensor) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()


@pytest.mark.parametrize("plan", ["fusedkv", "fusedkv-lite", "skipv1"])
def test_adapters_train_merge_and_come_back(plan: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, ids = model_of(plan), tokens(2, 12)
    base.save_pretrained(tmp_path / "base")
    before = base.eval()(ids).logits.detach()
    model = adapted(base)
    close(model(input_ids=ids).logits, before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    fixed = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    fusion = {name for name in trained if "kv_fusion" in name}
    assert len(fusion) == (8 if plan == "fusedkv" else 0)
    assert all("lora_" in name or ".kv_fusion.modules_to_save." in name for name in trained)
    stored = [layer.self_attn for layer in model.base_model.model.model.layers]
    assert len(trained - fusion) == 2 * sum(
        getattr(x, name) is not None for x in stored for name in PROJECTIONS
    )

    model.train()
    a_step(model, ids)
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == (name in trained), name
        assert name in trained or torch.equal(weight, fixed[name]), name
    after = model.eval()(input_ids=ids).logits.detach()
    assert (after - before).abs().max() > 0.05

    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    close(peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")(input_ids=ids).logits, after)

    merged = model.merge_and_unload()
    assert type(merged) is FusedKVLlamaForCausalLM
    close(merged(ids).logits, after)
    assert merged.state_dict().keys() == model_of(plan).state_dict().keys()
    for module in merged.modules():
        if isinstance(module, FusionWeights):
            assert all(weight.dtype == torch.float32 for weight in module.parameters())
    merged.save_pretrained(tmp_path / "merged")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, after)
