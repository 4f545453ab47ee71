"""lm_eval scores a converted model on vLLM as it does on transformers, to rounding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_folders
import pytest
import torch
import vllm_models  # noqa: F401  (the environment of vLLM)

if os.environ.get("FUSEDKV_REQUIRE_VLLM") is None:
    pytest.importorskip("lm_eval", reason="needs lm_eval; run `make test-vllm`")

import lm_eval
from lm_eval_tasks import CONTEXT, TASKS

from fusedkv_ext.vllm.versions import vllm_version

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def named_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm_eval asks for the version of a distribution "vllm"; builds for CPUs have another name.

    vLLM reads the version, too: "+cpu" chooses its platform.
    """
    folder: Path = tmp_path_factory.mktemp("metadata")
    (folder / "vllm.dist-info").mkdir()
    (folder / "vllm.dist-info" / "METADATA").write_text(f"Name: vllm\nVersion: {vllm_version()}+cpu\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def results(named_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What lm_eval finds with each backend about one folder in float32."""
    from lm_eval.models.vllm_causallms import VLLM

    torch.manual_seed(0)
    model = hf_folders.converted(hf_folders.tiny_llama(hidden_size=64, head_dim=16), "fusedkv")
    folder = str(hf_folders.save_folder(model, tmp_path_factory.mktemp("lm_eval") / "model"))
    arguments = {"pretrained": folder, "dtype": "float32", "max_length": CONTEXT}
    found = {
        "hf": lm_eval.simple_evaluate(
            model="hf", model_args=arguments, tasks=TASKS, device="cpu", batch_size=2, bootstrap_iters=0
        )
    }
    vllm = VLLM(
        folder,
        dtype="float32",
        max_model_len=CONTEXT + 2,  # its windows are two tokens shorter
        batch_size="auto",
        enforce_eager=True,
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=1 << 26,
    )
    try:
        found["vllm"] = lm_eval.simple_evaluate(model=vllm, tasks=TASKS, bootstrap_iters=0)
    finally:
        vllm.model.llm_engine.engine_core.shutdown()
    return found


def test_each_answer_has_the_same_log_probability(results: Results) -> None:
    compared = 0
    for name in ("choose", "read"):
        pairs = zip(*(results[backend]["samples"][name] for backend in ("hf", "vllm")), strict=True)
        for one, other in pairs:
            assert one["doc"] == other["doc"]
            for (a, *_), (b, *_) in zip(one["resps"], other["resps"], strict=True):
                expected, found = (x[0] if isinstance(x, tuple | list) else x for x in (a, b))
                assert found == pytest.approx(expected, rel=1e-4)
                compared += 1
    assert compared == 3 * 2 + 3


def test_greedy_answers_are_the_same(results: Results) -> None:
    """But for bytes at the end that make no character: vLLM leaves them out."""
    answers = [
        [sample["resps"][0][0].rstrip("\ufffd") for sample in results[backend]["samples"]["answer"]]
        for backend in ("hf", "vllm")
    ]
    assert answers[0] == answers[1] and all(answers[0])


def test_the_scores_are_the_same(results: Results) -> None:
    for task, metric in (("choose", "acc"), ("read", "bits_per_byte"), ("answer", "exact_match")):
        hf, vllm = (results[backend]["results"][task][f"{metric},none"] for backend in ("hf", "vllm"))
        assert vllm == pytest.approx(hf, rel=1e-4)
