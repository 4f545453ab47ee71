"""Models are made once and whole, as those of transformers are."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

from hf_tiny import CONFIGS, LAYERS, MODELS, lively, sizes, tokens
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import fusedkv_ext.hf as hf

PLAIN = {"llama": LlamaConfig, "qwen3": Qwen3Config}
HEADS = {
    AutoModelForSequenceClassification: {"labels": torch.tensor([0, 2])},
    AutoModelForTokenClassification: {"labels": torch.arange(14).view(2, 7) % 3},
    AutoModelForQuestionAnswering: dict(
        start_positions=torch.tensor([1, 0]), end_positions=torch.tensor([3, 6])
    ),
}

family = pytest.mark.parametrize("family", CONFIGS)


def config_of(family: str, plan: str = "fusedkv", **options: object) -> PreTrainedConfig:
    return CONFIGS[family](**sizes(cache_plan=plan, **options))


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@family
def test_models_made_in_threads_from_one_config_have_all_layers(family: str, switching: None) -> None:
    config = config_of(family)
    before = copy.deepcopy(config.to_dict())
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: MODELS[family](config), range(24)))
    assert {len(model.model.layers) for model in models} == {LAYERS}
    assert config.to_dict() == before


@family
@pytest.mark.parametrize("where", ["plain", "ours"])
def test_gradient_checkpointing_of_a_config_is_switched_on(family: str, where: str) -> None:
    plain = PLAIN[family](**sizes())
    if where == "plain":
        plain.gradient_checkpointing = True
    config = hf.config_for(plain, "fusedkv")
    if where == "ours":
        config.gradient_checkpointing = True
    model = MODELS[family](config).train()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert not hasattr(model.config, "gradient_checkpointing")  # as in transformers: it is no field to save


@family
def test_gradients_are_the_same_with_the_checkpointing_of_a_config(family: str) -> None:
    ids, grads = tokens(2, 9), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = config_of(family)
        if checkpointing:
            config.gradient_checkpointing = True
        model = lively(MODELS[family](config)).train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


@family
def test_accelerate_finds_the_layers_to_wrap(family: str) -> None:
    utils = pytest.importorskip("accelerate.utils")
    model = MODELS[family](config_of(family))
    plugin = utils.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    (layer,) = {type(layer) for layer in model.model.layers}
    assert model._no_split_modules == {layer.__name__}
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {layer}


@family
@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_heads_on_the_vanilla_plan_are_those_of_the_plain_model(family: str, auto: type) -> None:
    ids = tokens(2, 7)
    torch.manual_seed(0)
    plain = lively(auto.from_config(PLAIN[family](**sizes(num_labels=3))))
    ours = auto.from_config(config_of(family, "vanilla", num_labels=3)).eval()
    assert type(ours).__module__.startswith("fusedkv_ext")
    ours.load_state_dict(plain.state_dict())
    found, expected = (model(ids, **HEADS[auto]) for model in (ours, plain))
    torch.testing.assert_close(found.loss, expected.loss)


@family
@pytest.mark.parametrize("plan", ["fusedkv", "skipv1"])
@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_heads_train_every_parameter(family: str, plan: str, auto: type) -> None:
    model = lively(auto.from_config(config_of(family, plan, num_labels=3))).train()
    model(tokens(2, 7), **HEADS[auto]).loss.backward()
    trained = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    assert not [name for name, grad in trained.items() if grad is None or not grad.any()]
