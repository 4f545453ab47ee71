"""lm_eval, EleutherAI's harness, evaluates a converted model from its folder and finds what we find.

The tasks are made here: nothing is downloaded. lm_eval brings 540 MB of packages, so `make` does not install
it; `make test-lm-eval` does.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import hf_folders
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="needs lm_eval; run `make test-lm-eval`")

import lm_eval
from lm_eval_tasks import CONTEXT, DOCUMENTS, QUESTIONS, TASKS

from fusedkv_ext.evaluation.perplexity import perplexity
from fusedkv_ext.hf.loading import load_causal_lm, load_tokenizer


class Run(NamedTuple):
    """A Llama on a plan, read from its folder, and what lm_eval found about that folder."""

    model: Any
    tokenizer: Any
    result: dict[str, Any]


@pytest.fixture(scope="module", params=["fusedkv", "skipv1"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    model = hf_folders.converted(hf_folders.tiny_llama(), request.param)
    folder = hf_folders.save_folder(model, tmp_path_factory.mktemp("lm_eval") / request.param)
    arguments = {"pretrained": str(folder), "dtype": "float32", "max_length": CONTEXT}
    result = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=TASKS, device="cpu", batch_size=2, bootstrap_iters=0
    )
    return Run(load_causal_lm(folder), load_tokenizer(folder, 264), result)


def log_probability(model: Any, context: list[int], answer: list[int]) -> float:
    """ln p of an answer behind a context, summed in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + answer]), use_cache=False).logits[0].double()
    found = logits.log_softmax(-1)[len(context) - 1 : -1]
    return found.gather(1, torch.tensor(answer)[:, None]).sum().item()


def test_choices_are_made_by_the_same_probabilities(run: Run) -> None:
    right = 0
    for sample in run.result["samples"]["choose"]:
        question = run.tokenizer.encode(sample["doc"]["question"])
        answers = [run.tokenizer.encode(f" {choice}") for choice in sample["doc"]["choices"]]
        expected = [log_probability(run.model, question, answer) for answer in answers]
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(expected, rel=1e-5)
        right += expected.index(max(expected)) == sample["doc"]["gold"]
    assert run.result["results"]["choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_perplexity_of_documents_is_ours(run: Run) -> None:
    nats = 0.0
    for sample, text in zip(run.result["samples"]["read"], DOCUMENTS, strict=True):
        ids = [run.tokenizer.separator, *run.tokenizer.encode(text)]  # lm_eval begins a document so, too
        found = perplexity(run.model, torch.tensor(ids), context=CONTEXT)
        assert found.tokens == len(text)
        assert -sample["resps"][0][0] == pytest.approx(found.loss * found.tokens, rel=1e-5)
        nats += found.loss * found.tokens
    expected = nats / math.log(2) / sum(map(len, DOCUMENTS))
    assert run.result["results"]["read"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_greedy_answers_are_those_of_the_model_without_a_cache(run: Run) -> None:
    for sample in run.result["samples"]["answer"]:
        prompt = run.tokenizer.encode(sample["doc"]["question"])
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(12):
                logits = run.model(input_ids=ids, use_cache=False).logits[:, -1]
                ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        expected = run.tokenizer.decode(ids[0, len(prompt) :].tolist()).split(hf_folders.END)[0]
        assert sample["resps"][0][0] == expected
