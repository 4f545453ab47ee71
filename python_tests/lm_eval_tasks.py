"""Small tasks of lm_eval that download nothing, which its tests share: a choice, perplexity, an answer."""

from __future__ import annotations

from typing import Any

import datasets
import hf_folders

CONTEXT = 128
QUESTIONS = [
    {"question": f"The word after {a} is", "choices": [b, c], "gold": i % 2}
    for i, (a, b, c) in enumerate([("one", "two", "seven"), ("x", "y", "z"), ("red", "blue", "dog")])
]
# lm_eval's last window has more context than ours where it is not full: so lengths are a multiple of the
# window, or less than one.
LONG = "a text of a few words\n" * 20
DOCUMENTS = [LONG[: 3 * CONTEXT], "short", "as long as one window".ljust(CONTEXT, ".")]


def task(
    name: str, kind: str, documents: list[dict[str, Any]], metric: str, **settings: Any
) -> dict[str, Any]:
    """A task of lm_eval on documents that are given, not downloaded."""
    return {
        "task": name,
        "output_type": kind,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
        "test_split": "test",
        "metric_list": [{"metric": metric}],
        **settings,
    }


TASKS = [
    task(
        "choose",
        "multiple_choice",
        QUESTIONS,
        "acc",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
    ),
    task(
        "read",
        "loglikelihood_rolling",
        [{"text": text} for text in DOCUMENTS],
        "bits_per_byte",
        doc_to_text="",
        doc_to_target="{{text}}",
    ),
    task(
        "answer",
        "generate_until",
        QUESTIONS,
        "exact_match",
        doc_to_text="{{question}}",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": [hf_folders.END], "max_gen_toks": 12, "do_sample": False},
    ),
]
