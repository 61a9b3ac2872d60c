"""Scores by name: signs, fingerprints, and refusals."""

from __future__ import annotations

import math

import pytest
from evaluate.conftest import CHILD

from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.divergence import Reference, estimate
from mbridge_prune.evaluate.loss import token_losses
from mbridge_prune.evaluate.mmlu import mmlu
from mbridge_prune.evaluate.score_functions import check_name, score_function


def test_loss_is_negated(megatron, text_ns):
    score = score_function("loss", tokens_ns=text_ns, batch=2)
    losses = token_losses(megatron(), text_ns, batch=2)
    assert score(megatron()) == -estimate(losses).mean
    assert score.estimate(megatron()) == estimate(losses)
    assert score.name == score.fingerprint["name"] == "loss"
    assert score.fingerprint == score_function("loss", tokens_ns=text_ns).fingerprint
    assert score.fingerprint != score_function("loss", tokens_ns=text_ns[:4]).fingerprint


def test_kl_is_negated_and_the_full_model_is_the_best(megatron, text_ns):
    reference = Reference.of(megatron(), text_ns, positions=40, batch=2)
    score = score_function("kl", reference=reference)
    assert score(megatron(CHILD)) == -float(reference.kl(megatron(CHILD)).double().mean())
    assert score(megatron(CHILD)) < score(megatron()) == pytest.approx(0, abs=1e-6)
    assert score.estimate(megatron(CHILD)).n == 40
    other = Reference.of(megatron(), text_ns, positions=40, batch=2, seed=1)
    assert score_function("kl", reference=other).fingerprint != score.fingerprint


@pytest.mark.parametrize(
    ("name", "percentage", "shots", "batch"),
    [("mmlu_50pct_bs3", 0.5, 0, 3), ("mmlu_100pct_2shot_bs8", 1.0, 2, 8), ("mmlu_12.5pct_bs1", 0.125, 0, 1)],
)
def test_mmlu_by_its_name(name, percentage, shots, batch, site, tokenizer, megatron):
    score = score_function(name, tokenizer=tokenizer, data=site / "mmlu57", seed=2)
    expected = mmlu(megatron(), tokenizer, percentage, shots, batch, site / "mmlu57", 2)
    found = score.estimate(megatron())
    assert (score(megatron()), found.se, found.n) == (expected.value, expected.se, expected.n)
    assert found.parts == expected.by_subject
    assert score.steps == expected.n == (114 if percentage == 1 else 57)
    other = score_function(name, tokenizer=tokenizer, data=site / "mmlu57", seed=3)
    assert other.fingerprint != score.fingerprint


def test_any_callable(megatron, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def size(model):\n    return sum(p.numel() for p in model.parameters())\n"
    )
    monkeypatch.chdir(tmp_path)
    score = score_function("mine:size")
    assert score(megatron()) == sum(p.numel() for p in megatron().parameters())
    assert score.estimate(megatron()).se == math.inf
    assert score.name == "mine:size" and score.fingerprint["source"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("los", "no score function 'los' .did you mean 'loss'"),
        ("KL", "no score function 'KL' .did you mean 'kl'"),
        ("mmlu", "did you mean 'mmlu_10pct_bs1'.*mmlu_<P>pct_bs<B>"),
        ("mmlu_10pc_bs1", "did you mean 'mmlu_10pct_bs1'"),
        ("mmlu_10pct", "did you mean 'mmlu_10pct_bs1'"),
        ("mmlu_0pct_bs1", "above 0 and up to 100 pct"),
        ("mmlu_101pct_bs1", "above 0 and up to 100 pct"),
        ("mmlu_10pct_bs0", "batch size .bs. of at least 1"),
        ("accuracy", "there are: loss, kl, mmlu"),
        (":f", "no score function"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        check_name(name)
    with pytest.raises(UserError, match=message):
        score_function(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss", "needs text: give tokens_ns"),
        ("kl", "needs the full model's predictions: give reference"),
        ("mmlu_10pct_bs1", "no tokenizer"),
        ("no_such_module:f", "no_such_module:f: no module 'no_such_module'; it must be importable"),
        ("broken:f", "importing broken failed: boom"),
        ("fine:skore", "fine has no 'skore' .did you mean 'score'"),
        ("fine:NUMBER", "NUMBER is no function but int"),
    ],
)
def test_missing_pieces(name, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise RuntimeError('boom')")
    (tmp_path / "fine.py").write_text("NUMBER = 1\ndef score(model): ...")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        score_function(name)


def test_a_callable_that_returns_no_number(megatron, tmp_path, monkeypatch):
    (tmp_path / "nothing.py").write_text("def score(model): ...")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing:score returned NoneType, expected a number"):
        score_function("nothing:score")(megatron())
