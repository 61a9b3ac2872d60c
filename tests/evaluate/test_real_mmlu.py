"""The real questions, read by a real model."""

from __future__ import annotations

import pytest
import torch
from models import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from mbridge_prune import demo_data
from mbridge_prune.evaluate.mmlu import answer
from mbridge_prune.evaluate.mmlu_data import SUBJECTS, read_mmlu
from mbridge_prune.evaluate.mmlu_prompts import prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_all_questions_are_there():
    test, dev = (read_mmlu(demo_data.mmlu(), split) for split in ("test", "dev"))
    assert sum(map(len, test.values())) == 14_042 and {len(q) for q in dev.values()} == {5}
    assert test["abstract_algebra"][0].question.startswith("Find the degree for the given field extension")
    answers = [q.answer for questions in test.values() for q in questions]
    assert all(3000 < answers.count(letter) < 4000 for letter in range(4))


@pytest.mark.parametrize(("few_shot", "subjects"), [(0, SUBJECTS[::8]), (5, ("management",))])
def test_a_real_model_answers_as_in_transformers(few_shot, subjects):
    folder = demo_data.smollm2()
    asked = prompts(
        AutoTokenizer.from_pretrained(folder), 0.03, few_shot, demo_data.mmlu(), subjects=subjects
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = 0
    for prompt in asked.prompts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.ids])).logits[0, -1, asked.letters]
        right += int(logits.argmax()) == prompt.answer
    del model
    result = answer(load(folder).unwrapped_model, asked, 4)
    assert result.n == len(asked.prompts) > 2
    assert result.value == pytest.approx(right / result.n)
