"""The evaluator proved on models that answer by rule, and against transformers, one prompt at a time."""

from __future__ import annotations

import math

import pytest
import torch
from evaluate.conftest import CHILD
from fakes import Fake, always, knows
from models import load, tokens
from questions import SUBJECTS, TESTS

import mbridge_prune.evaluate.mmlu as module
from mbridge_prune.dynamic import select, sort
from mbridge_prune.evaluate.forward import each_logits
from mbridge_prune.evaluate.mmlu import answer, mmlu
from mbridge_prune.evaluate.mmlu_prompts import prompts
from mbridge_prune.evaluate.shared_prefix import cannot_share, shared_prefix


@pytest.fixture(scope="module")
def ask(site, tokenizer):
    """`ask(few_shot)`: all questions of the site."""
    return lambda few_shot=0, percentage=1.0, **more: prompts(
        tokenizer, percentage, few_shot, site / "mmlu", subjects=SUBJECTS, **more
    )


@pytest.mark.parametrize("batch", [1, 5])
def test_a_model_that_knows_scores_one(ask, batch):
    asked = ask()
    result = answer(Fake(knows(asked)), asked, batch)
    assert (result.value, result.se, result.n) == (1.0, 0.0, len(SUBJECTS) * TESTS)
    assert result.by_subject == dict.fromkeys(SUBJECTS, 1.0)


def test_a_model_that_says_one_letter_scores_its_share(ask):
    asked = ask()
    said = [p.answer for p in asked.prompts]
    for letter in range(4):
        result = answer(Fake(always(asked.letters[letter])), asked, 4)
        share = said.count(letter) / len(said)
        assert result.value == pytest.approx(share) and 0 < share < 1
        assert result.se == pytest.approx(math.sqrt(share * (1 - share) / (len(said) - 1)))
        for subject, value in result.by_subject.items():
            own = [p.answer for p in asked.prompts if p.subject == subject]
            assert value == pytest.approx(own.count(letter) / len(own))


def test_letters_that_tie_share_the_point(ask):
    asked = ask()
    result = answer(Fake(always(5)), asked, 4)  # another token: all four letters have the logit 0
    assert result.value == pytest.approx(0.25) and result.se == pytest.approx(0)


def by_transformers(model, asked):
    """Points, one prompt a forward, nothing filled up, nothing shared."""
    points = []
    for prompt in asked.prompts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.ids])).logits[0, -1]
        points.append(float(logits[asked.letters].argmax() == prompt.answer))
    return torch.tensor(points)


@pytest.mark.parametrize("few_shot", [0, 2])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_answers_are_those_of_transformers(ask, megatron, plain, few_shot, batch, monkeypatch):
    asked, found = ask(few_shot), []
    monkeypatch.setattr(module, "combine", lambda model, points, deal: found.append(points) or points)
    result = answer(megatron(), asked, batch)
    expected = by_transformers(plain(), asked)
    assert 0 < float(expected.mean()) < 1
    assert torch.equal(found[0], expected)
    assert answer(plain(), asked, batch) == result
    assert answer(megatron(), asked, batch, share=False) == result


def test_the_whole_of_it(site, tokenizer, megatron, plain):
    options = {"percentage": 0.5, "few_shot": 1, "batch_size": 3, "data": site / "mmlu", "subjects": SUBJECTS}
    one, two = (mmlu(model, tokenizer, **options) for model in (megatron(), plain()))
    assert one == two and one.n == len(SUBJECTS) * TESTS // 2
    assert list(one.by_subject) == list(SUBJECTS)


class Counter:
    """Tokens that a Megatron model reads."""

    def __init__(self, model):
        self.tokens, self.calls = 0, 0
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model, arguments, named):
        self.tokens += named["input_ids"].numel()
        self.calls += 1


def test_the_examples_run_once_a_subject(ask, megatron):
    asked, counter = ask(5), Counter(megatron())
    answer(megatron(), asked, 4, share=False)
    whole, counter.tokens, counter.calls = counter.tokens, 0, 0
    answer(megatron(), asked, 4)
    counter.hook.remove()
    assert counter.calls == len(SUBJECTS) * (1 + TESTS // 4)
    assert counter.tokens < whole / 3
    lengths = [len(p.ids) for p in asked.prompts]
    assert whole >= sum(lengths)


def test_batches_are_of_one_length_or_nearly(ask, megatron):
    asked = ask()
    counter = Counter(megatron())
    answer(megatron(), asked, 4)
    counter.hook.remove()
    assert counter.calls == len(asked.prompts) / 4
    assert counter.tokens < 1.1 * sum(len(p.ids) for p in asked.prompts)


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "nemotron", "qwen3_moe_mixed", "glm4_moe_mtp"])
def test_continuations_of_a_shared_prefix(family, hf_folder):
    model = load(hf_folder(family)).unwrapped_model
    assert cannot_share(model) is None
    ids_ns = tokens(3, length=14)
    ids_ns[:, :9] = ids_ns[0, :9]
    whole, behind, begins = {}, {}, []
    each_logits(model, ids_ns, 2, lambda first, logits: whole.__setitem__(first, logits[:, 9:]))
    with shared_prefix(model, ids_ns[0, :9], rows=2, longest=6):
        hook = model.embedding.register_forward_pre_hook(
            lambda module, arguments, named: begins.append(int(named["position_ids"][0, 0])), with_kwargs=True
        )
        each_logits(model, ids_ns[:, 9:], 2, lambda first, logits: behind.__setitem__(first, logits))
    hook.remove()
    assert begins == [9, 9]
    for first, logits in whole.items():
        assert torch.allclose(behind[first], logits, atol=1e-4 * float(logits.abs().max()))
    again = {}
    each_logits(model, ids_ns, 2, lambda first, logits: again.__setitem__(first, logits[:, 9:]))
    assert all(torch.equal(again[first], whole[first]) for first in whole)


def test_a_candidate_shares_as_its_export_would(ask, site):
    """Fewer query groups, heads and layers inside select(): the cache has the candidate's shapes."""
    from mbridge_prune.mcore_minitron import table_of

    model = load(site / "parent").unwrapped_model
    table = table_of(model)
    sort(table, {})
    sizes = table.settle({"num_query_groups": 1, "num_attention_heads": 3, "ffn_hidden_size": 32})
    asked = ask(3)
    with select(table, sizes, [0, 2, 3]):
        shared, whole = answer(model, asked, 4), answer(model, asked, 4, share=False)
    assert shared == whole


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "window"),
        ("mistral_window", "window"),
        ("gemma3", "Gemma3SelfAttention|window"),
        ("gpt_oss", "window"),
        ("deepseek_v2", "MLASelfAttention"),
        ("qwen3_next", "GatedDeltaNet"),
        ("qwen2_5_vl", "Qwen25VLModel"),
    ],
)
def test_what_cannot_share_runs_whole(family, reason, hf_folder):
    import re

    found = cannot_share(load(hf_folder(family)).unwrapped_model)
    assert found is not None and re.search(reason, found), found


def test_progress_counts_questions(ask, megatron):
    done = []
    answer(megatron(CHILD), ask(1), 5, progress=done.append)
    assert sum(done) == len(SUBJECTS) * TESTS
