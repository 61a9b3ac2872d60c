"""MMLU's standard prompt, the random sample of questions, and their token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mmlu_data import LETTERS, SUBJECTS, Question, read_mmlu

HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"
ASK = "Answer:"


@dataclass(frozen=True)
class Prompt:
    """Token ids up to "Answer:", what the right letter is, and of which subject."""

    ids: list[int]
    answer: int
    subject: str


@dataclass(frozen=True)
class Prompts:
    """All prompts of an evaluation, and the ids of " A", " B", " C", " D"."""

    prompts: list[Prompt]
    letters: list[int]
    few_shot: int
    fingerprint: str


def prompts(
    tokenizer: Any,
    percentage: float = 0.1,
    few_shot: int = 0,
    data: str | Path | None = None,
    seed: int = 0,
    subjects: Sequence[str] = SUBJECTS,
) -> Prompts:
    """The sampled questions as prompts; everything about an MMLU run that needs no model.

    Args:
        tokenizer: a Hugging Face tokenizer. Special tokens that it puts before a text are kept (BOS).
        percentage: share of each subject's test questions, from above 0 to 1; at least one question.
            The sample is random, the same for a seed, and independent of the other subjects.
        few_shot: examples of the subject's dev split before the question, the first ones (0 to 5).
        data: a folder (see `read_mmlu`), or None for the hub.

    Raises:
        UserError: wrong numbers, data that cannot be read, or a tokenizer whose letters are not one token.
    """
    if not 0 < percentage <= 1:
        raise UserError(f"percentage={percentage}, expected a share above 0 and up to 1 (0.1 is 10 %)")
    if few_shot < 0:
        raise UserError(f"few_shot={few_shot}, expected 0 or more")
    if tokenizer is None:
        raise UserError("the model has no tokenizer, and MMLU is text: score it by loss or kl on token files")
    letters = letter_ids(tokenizer)
    questions = read_mmlu(data, "test", subjects)
    examples = read_mmlu(data, "dev", subjects) if few_shot else {subject: [] for subject in subjects}
    texts, answers, of = [], [], []
    for subject in subjects:
        if len(examples[subject]) < few_shot:
            raise UserError(f"few_shot={few_shot}, but {subject} has {len(examples[subject])} dev examples")
        begin = HEADER.format(subject.replace("_", " "))
        begin += "".join(f"{ask(q)} {LETTERS[q.answer]}\n\n" for q in examples[subject][:few_shot])
        for question in pick(questions[subject], percentage, f"{seed}:{subject}"):
            texts.append(begin + ask(question))
            answers.append(question.answer)
            of.append(subject)
    head = leading_ids(tokenizer)
    all_ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    found = [
        Prompt(head + ids, answer, subject)
        for ids, answer, subject in zip(all_ids["input_ids"], answers, of, strict=True)
    ]
    facts = json.dumps([letters, [[p.ids, p.answer] for p in found]]).encode()
    return Prompts(found, letters, few_shot, hashlib.sha256(facts).hexdigest()[:16])


def ask(question: Question) -> str:
    """The question, its choices and "Answer:", as in Hendrycks et al. 2021."""
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True)]
    return "\n".join([question.question, *choices, ASK])


def pick(questions: Sequence[Question], percentage: float, seed: str) -> list[Question]:
    """A random share of the questions, in their order."""
    wanted = max(1, round(percentage * len(questions)))
    places = random.Random(seed).sample(range(len(questions)), wanted)
    return [questions[place] for place in sorted(places)]


def letter_ids(tokenizer: Any) -> list[int]:
    """The ids that " A" to " D" have behind "Answer:".

    Raises:
        UserError: one of them is not one token of its own.
    """
    before = tokenizer(ASK, add_special_tokens=False)["input_ids"]
    ids = []
    for letter in LETTERS:
        whole = tokenizer(f"{ASK} {letter}", add_special_tokens=False)["input_ids"]
        if whole[:-1] != before or whole[-1] in ids or whole[-1] == tokenizer.unk_token_id:
            raise UserError(
                f"the tokenizer has no single token for ' {letter}' behind {ASK!r} (it writes "
                f"{tokenizer.convert_ids_to_tokens(whole)}), so MMLU's letters cannot be compared; score "
                "this model by kl or loss, or by a function of your own (module:function)"
            )
        ids.append(whole[-1])
    return ids


def leading_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself."""
    bare = tokenizer(ASK, add_special_tokens=False)["input_ids"]
    full = tokenizer(ASK)["input_ids"]
    places = [at for at in range(len(full)) if full[at : at + len(bare)] == bare]
    return full[: places[0]] if places else []
