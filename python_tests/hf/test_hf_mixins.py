"""transformers' own tests of its models on ours: ModelTesterMixin and ConfigTester of the installed version.

They are no part of the wheel. ``make test-hf`` unpacks them from the source package of the same version,
which has tests/test_*.py alone. GenerationTesterMixin, ExportTesterMixin and CausalLMModelTest are not in it:
stand-ins below satisfy the imports, test_hf_generate.py and test_hf_cache_kinds.py test generation.
"""

from __future__ import annotations

import sys
import unittest
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tiny import PLANS

import fusedkv_ext.hf as hf


def _stand_in(name: str, **contents: Any) -> None:
    """A module of transformers' tests that its source package leaves out."""
    package, module = (f"tests.{part}" for part in (name.split(".")[0], name))
    sys.modules.setdefault(package, ModuleType(package))
    sys.modules[module] = ModuleType(module)
    vars(sys.modules[module]).update(contents)


_stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
_stand_in(
    "utils.test_configuration_utils",
    config_common_kwargs={"return_dict": False, "output_hidden_states": True, "chunk_size_feed_forward": 5},
)
common = pytest.importorskip(
    "tests.test_modeling_common", reason="needs transformers' own tests; run `make test-hf`"
)
ConfigTester = pytest.importorskip("tests.test_configuration_common").ConfigTester

FAMILIES = {"llama": hf.FusedKVLlamaConfig, "qwen3": hf.FusedKVQwen3Config}
PLAN_NAMES = ("fusedkv", "yoco", "skipv1")
LEFT_OUT: dict[str, str] = {
    "test_num_layers_is_small": "wants two layers; plans show all their kinds of layers from four on",
    "test_bc_torch_dtype": "a quarter of the time, for the loader's old name of dtype",
    "test_generation_tester_mixin_inheritance": "GenerationTesterMixin is not in the source package",
    "test_sdpa_can_dispatch_non_composite_models": "wants sdpa by default; our default is fusedkv",
    "test_training_gradient_checkpointing_use_reentrant_true": "refused: gradients would be wrong",
}
TASKS = {
    "MODEL_MAPPING": common.MODEL_MAPPING_NAMES,
    "MODEL_FOR_CAUSAL_LM_MAPPING": common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": common.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": common.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": common.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def models_of(config_class: type) -> dict[str, type]:
    """Task -> the model of this family that the Auto class of the task makes."""
    found = ((task, getattr(transformers, task).get(config_class, None)) for task in TASKS)
    return {task: model for task, model in found if model is not None}


class Tester:
    """What the mixins ask of a ``model_tester``, as in transformers' CausalLMModelTester."""

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 4, 4

    def __init__(self, config_class: type, plan: str) -> None:
        self.config_class = config_class
        self.sizes = dict(
            cache_plan=PLANS[plan].to_dict(),
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def get_config(self) -> Any:
        return self.config_class(**self.sizes)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class Mixins(common.ModelTesterMixin):
    """All tests of the mixins for one family on one plan."""

    config_class: type
    plan: str
    test_can_init_all_missing_weights_before_2023 = True  # looks for the year in a header that we do not have

    def setUp(self) -> None:
        self.model_tester = Tester(self.config_class, self.plan)
        self.config_tester = ConfigTester(self, self.config_class, **self.model_tester.sizes)
        models = models_of(self.config_class)
        self.all_model_classes = tuple(models.values())
        # Tests find out from these tables of names what a model is for.
        for task, names in TASKS.items():
            if task in models:
                patched = mock.patch.dict(names, {self.config_class.model_type: models[task].__name__})
                patched.start()
                self.addCleanup(patched.stop)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


def _case(family: str, plan: str) -> type[unittest.TestCase]:
    left_out = dict(LEFT_OUT)
    for name in dir(Mixins):
        if name.startswith("test_eager_matches_sdpa_inference") and "fp32" not in name:
            left_out[name] = "a third of the time; fp32 shows what differs"
    if plan != "fusedkv":
        left_out["test_keep_in_fp32_modules_exist"] = "the class names kv_fusion; this plan has no weights"
    contents = {name: unittest.skip(reason)(lambda self: None) for name, reason in left_out.items()}
    own = {"config_class": FAMILIES[family], "plan": plan}
    return type(f"Test_{family}_{plan}", (Mixins, unittest.TestCase), {**contents, **own})


globals().update({case.__name__: case for case in (_case(f, p) for f in FAMILIES for p in PLAN_NAMES)})
